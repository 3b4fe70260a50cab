"""The policies that an evaluation compares: adapters on one base, the base itself, and the best of n answers of one of them."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.config.chat import ChatArguments
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.config.rank import RankArguments
from rlhf_recipes.config.sample import SampleArguments
from rlhf_recipes.core.errors import RecipeError, did_you_mean
from rlhf_recipes.core.files import RECIPE, holds_result, read_json, taught_conversations
from rlhf_recipes.models.adapters import add_adapter, check_policy_adapter, read_adapter_config
from rlhf_recipes.models.compatibility import check_base, check_tokenizer, check_vocabulary
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.models.roles import NO_ADAPTER, use_adapter
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.models.weights import ADAPTER, read_weights
from rlhf_recipes.stages import training_stages

from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig


@dataclass(frozen=True)
class Policy:
    """One entry of `policies`.

    Parameters:
        name: as the report calls it.
        folder: of its adapter; None for the base, and for a best-of-n.
        best_of: the policy that the n answers are drawn from, or None.
        n: how many are drawn; 1 where `best_of` is None.
        reward: the name of the reward by which the best is chosen; None: the default.
    """

    name: str
    folder: str | None = None
    best_of: str | None = None
    n: int = 1
    reward: str | None = None


def read_policies(entries: dict[str, Any]) -> dict[str, Policy]:
    """What the YAML key `policies` says, checked; optional ones whose folder is missing are left out, and that is printed.

    Raises:
        RecipeError: without policies; for a missing folder, with the recipe that makes it; for an entry of another form.
    """
    if not entries:
        raise RecipeError("policies: name at least one: `base: null`, or `sft: FOLDER`")
    policies = {name: policy for name, entry in entries.items() if (policy := _read(name, entry)) is not None}
    for policy in policies.values():
        source = policies.get(policy.best_of)
        if policy.best_of is not None and (source is None or source.best_of is not None):
            named = [name for name, other in policies.items() if other.best_of is None]
            raise RecipeError(f"policies: {policy.name}: best_of: policy: {policy.best_of!r} is none of {', '.join(named)}")
    return policies


def _read(name: str, entry: Any) -> Policy | None:
    where = f"policies: {name}"
    if entry is None:
        return Policy(name)
    if isinstance(entry, str):
        require_adapter(entry, where)
        return Policy(name, folder=entry)
    if isinstance(entry, dict) and isinstance(entry.get("path"), str) and set(entry) <= {"path", "optional"}:
        if entry.get("optional") is True and not holds_result(entry["path"]):
            print(f"{where}: left out, since there is no result in {entry['path']}")
            return None
        return _read(name, entry["path"])
    best = entry.get("best_of") if isinstance(entry, dict) else None
    if isinstance(best, dict) and set(entry) == {"best_of"}:
        for key in best:
            if key not in ("policy", "n", "reward"):
                raise RecipeError(f"{where}: best_of: unknown key '{key}'{did_you_mean(str(key), ('policy', 'n', 'reward'))}")
        n, policy, reward = best.get("n"), best.get("policy"), best.get("reward")
        if (
            isinstance(n, int)
            and not isinstance(n, bool)
            and n >= 1
            and isinstance(policy, str)
            and isinstance(reward, str | None)
        ):
            return Policy(name, best_of=policy, n=n, reward=reward)
        raise RecipeError(
            f"{where}: best_of: needs `policy`, a name, and `n`, 1 or more, and `reward`, if at all, a name: found {best!r}"
        )
    raise RecipeError(
        f"{where}: must be the folder of an adapter, null for the base, `{{path: ..., optional: true}}`, or "
        f"`{{best_of: {{policy: ..., n: ...}}}}`: found {entry!r}"
    )


def require_adapter(folder: str, where: str) -> None:
    """Refuses a folder that holds no adapter.

    Args:
        folder: as the YAML file has it.
        where: the key that names it.

    Raises:
        RecipeError: with the recipe that makes it, if a part of the path says which that is.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        return
    if (Path(folder) / "config.json").is_file():
        raise RecipeError(
            f"{where}: {folder} holds a whole model, and only adapters share a base: evaluate it by itself, as model"
        )
    stage = next((name for name in training_stages() if name in Path(folder).name or name in where), None)
    recipe = f"recipes/{stage}.py" if stage else "recipes/sft.py, dpo.py or ppo.py"
    raise RecipeError(
        f"{where}: {folder} holds no adapter (no adapter_config.json): train it first with {recipe}, or name another"
    )


class PolicyBank:
    """One base, with the adapter of every policy on it.

    Parameters:
        model: the base, with adapters or without.
        tokenizer: of them all.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count()

    def add(self, name: str, folder: str | None, where: str) -> None:
        """Puts a policy on the base: an adapter, or with None the base as it is.

        Raises:
            RecipeError: if the adapter was trained on another base, with another tokenizer or chat template, or does not fit;
                if the name is taken.
        """
        if name in self._adapters:
            raise RecipeError(f"{where}: there is a policy '{name}' already: rename one of the two")
        if folder is None:
            self._adapters[name] = NO_ADAPTER
            return
        adapter = f"policy_{next(self._numbers)}"  # PyTorch allows no dots in names, and `1.5` must not be `1_5`
        check_tokenizer(Path(folder), self.tokenizer)
        config = read_adapter_config(folder, where)
        check_policy_adapter(f"{where}: {folder}", config.task_type)
        record = read_json(Path(folder) / RECIPE) or read_json(Path(folder).parent / RECIPE)  # of a checkpoint, its run's
        check_base(f"{where}: {folder}", config.base_model_name_or_path, record, self.model)
        self.model = add_adapter(self.model, config, read_weights(Path(folder) / ADAPTER), adapter, f"{where}: {folder}")
        self.model.eval().requires_grad_(False)
        self._adapters[name] = adapter

    def drop(self, name: str) -> None:
        """Takes a policy's adapter off the base."""
        self.model.delete_adapter(self._adapters.pop(name))

    @contextlib.contextmanager
    def use_policy(self, name: str) -> Iterator[PreTrainedModel | PeftModel]:
        """The model, with this policy's adapter alone active within, in eval mode."""
        with use_adapter(self.model, self._adapters[name]):
            yield self.model


def trained_without_template(policies: dict[str, Policy]) -> list[str]:
    """The names of those that were trained on plain text, by their records: a chat template says nothing to them."""
    return [name for name, policy in policies.items() if policy.folder and taught_conversations(policy.folder) is False]


def load_policy_tokenizer(
    policies: dict[str, Policy], model: ModelConfig, arguments: EvaluateArguments | SampleArguments | ChatArguments
) -> PreTrainedTokenizerBase:
    """The tokenizer of the first policy with an adapter, else that of the base; `PolicyBank.add` refuses policies of others.

    Raises:
        RecipeError: as in `load_tokenizer`.
    """
    taught = next((policy.folder for policy in policies.values() if policy.folder), None)
    return load_tokenizer(model, arguments, start_from=taught)


def load_policy_bank(
    model: ModelConfig,
    arguments: EvaluateArguments | SampleArguments | RankArguments | ChatArguments,
    policies: dict[str, Policy],
    tokenizer: PreTrainedTokenizerBase,
) -> PolicyBank:
    """The base with every policy's adapter on it, on the device that Accelerate has chosen.

    Raises:
        RecipeError: as in `load_model` and `PolicyBank.add`.
    """
    base = load_model(model, Placement(arguments.trust_remote_code))
    check_vocabulary(base, tokenizer)
    if not getattr(base, "is_quantized", False):
        base = base.to(PartialState().device)
    if not any(policy.folder for policy in policies.values()):  # a place for reward adapters; it changes nothing
        base = get_peft_model(base, LoraConfig(target_modules="all-linear"), adapter_name="unused")
    bank = PolicyBank(base.eval(), tokenizer)
    for policy in policies.values():
        if policy.best_of is None:
            bank.add(policy.name, policy.folder, f"policies: {policy.name}")
    return bank


@dataclass(frozen=True)
class Placement:
    """What `load_model` asks of a trainer's arguments, where there is no trainer."""

    trust_remote_code: bool

    @property
    def device(self) -> Any:
        """Where Accelerate puts this process."""
        return PartialState().device
