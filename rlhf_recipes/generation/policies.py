"""The policies of an evaluation: adapters on one base, base, and best-of-n."""

import contextlib
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rlhf_recipes.config.chat import ChatArguments
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.config.rank import RankArguments
from rlhf_recipes.config.sample import SampleArguments
from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.files import ADAPTER, RECIPE, holds_result, read_json, trained_on_conversations
from rlhf_recipes.inputs import require_adapter
from rlhf_recipes.models.adapters import add_adapter, check_policy_adapter, read_adapter_config
from rlhf_recipes.models.fingerprint import check_base
from rlhf_recipes.models.loading import check_vocabulary, load_model
from rlhf_recipes.models.roles import NO_ADAPTER, use_adapter
from rlhf_recipes.models.tokenizer import check_tokenizer, load_tokenizer
from rlhf_recipes.models.weights import read_weights

from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """One entry of the YAML key `policies`."""

    name: str  # in reports
    folder: str | None = None  # of its adapter; None for the base, and for a best-of-n
    best_of: str | None = None  # the policy that the n answers are drawn from
    n: int = 1
    reward: str | None = None  # the name of the reward that chooses the best; None: the default


class _BestOf(BaseModel, extra="forbid"):
    policy: str
    n: Annotated[int, Field(strict=True, ge=1)]
    reward: str | None = None


class _BestOfEntry(BaseModel, extra="forbid"):
    best_of: _BestOf


class _PathEntry(BaseModel, extra="forbid"):
    path: str
    optional: bool = False


def read_policies(entries: dict[str, Any]) -> dict[str, Policy]:
    """Return the policies of the YAML key `policies`.

    Optional ones are left out if their folder has no result.

    Raises:
        RecipeError: without policies; for an entry of another form; for a missing folder, with the recipe that makes it.
    """
    if not entries:
        raise RecipeError("policies: the mapping is empty. Fix: name at least one, as `base: null` or `sft: FOLDER`.")
    policies = {name: policy for name, entry in entries.items() if (policy := _read_policy(name, entry)) is not None}
    adapters = [name for name, policy in policies.items() if policy.best_of is None]
    for policy in policies.values():
        if policy.best_of is not None and policy.best_of not in adapters:
            raise RecipeError(f"policies: {policy.name}: best_of: policy: {policy.best_of!r} is none of {', '.join(adapters)}")
    return policies


def _read_policy(name: str, entry: Any) -> Policy | None:
    where = f"policies: {name}"
    if entry is None:
        return Policy(name)
    if isinstance(entry, str):
        with error_context(where):
            require_adapter(entry, name)
        return Policy(name, folder=entry)
    if not isinstance(entry, dict):
        raise RecipeError(f"{where}: {entry!r}. Fix: set the folder of an adapter, null for the base, or a mapping.")
    try:
        if "best_of" in entry:
            best = _BestOfEntry(**entry).best_of
            return Policy(name, best_of=best.policy, n=best.n, reward=best.reward)
        source = _PathEntry(**entry)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{where}: {': '.join(map(str, first['loc']))}: {first['msg']}") from error
    if source.optional and not holds_result(source.path):
        print(f"{where}: left out, because {source.path} holds no result")
        return None
    return _read_policy(name, source.path)


class PolicyBank:
    """One base model, with the adapter of every policy on it."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count()

    def add(self, name: str, folder: str | None, where: str) -> None:
        """Add a policy: an adapter or, with None, the base itself.

        Raises:
            RecipeError: if the adapter was trained on another base, with another tokenizer or chat template, or does not fit;
                if the name is taken.
        """
        if name in self._adapters:
            raise RecipeError(f"{where}: two policies are called '{name}'. Fix: rename one of them.")
        if folder is None:
            self._adapters[name] = NO_ADAPTER
            return
        adapter = f"policy_{next(self._numbers)}"  # PyTorch allows no dots in names, and `1.5` must not become `1_5`
        check_tokenizer(Path(folder), self.tokenizer)
        config = read_adapter_config(folder, where)
        check_policy_adapter(f"{where}: {folder}", config.task_type)
        record = read_json(Path(folder) / RECIPE) or read_json(Path(folder).parent / RECIPE)  # of a checkpoint: its run's
        check_base(f"{where}: {folder}", config.base_model_name_or_path, record, self.model)
        self.model = add_adapter(self.model, config, read_weights(Path(folder) / ADAPTER), adapter, f"{where}: {folder}")
        self.model.eval().requires_grad_(False)
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Remove a policy, with its adapter."""
        self.model.delete_adapter(self._adapters.pop(name))

    @contextlib.contextmanager
    def use_policy(self, name: str) -> Iterator[PreTrainedModel | PeftModel]:
        """Yield the model in eval mode, with only the adapter of this policy active."""
        with use_adapter(self.model, self._adapters[name]):
            yield self.model


def warn_of_plain_text(policies: dict[str, Policy]) -> None:
    """Warn of policies in a chat that were trained on plain text."""
    plain = [name for name, policy in policies.items() if policy.folder and trained_on_conversations(policy.folder) is False]
    if plain:
        logger.warning("policies: trained on plain text, so the chat template may lead to nonsense: %s", ", ".join(plain))


def load_policy_tokenizer(
    policies: dict[str, Policy], model: ModelConfig, arguments: EvaluateArguments | SampleArguments | ChatArguments
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the first policy with an adapter, else that of the base."""
    folder = next((policy.folder for policy in policies.values() if policy.folder), None)
    return load_tokenizer(model, arguments, start_from=folder)


def load_policy_bank(
    model: ModelConfig,
    arguments: EvaluateArguments | SampleArguments | RankArguments | ChatArguments,
    policies: dict[str, Policy],
    tokenizer: PreTrainedTokenizerBase,
) -> PolicyBank:
    """Load the base with every policy's adapter on it, on the device of this process."""
    base = load_model(model, Placement(arguments.trust_remote_code))
    check_vocabulary(base, tokenizer)
    if not getattr(base, "is_quantized", False):
        base = base.to(PartialState().device)
    if not any(policy.folder for policy in policies.values()):  # reward adapters need a PeftModel; B is 0 in a new adapter
        base = get_peft_model(base, LoraConfig(target_modules="all-linear"), adapter_name="unused")
    bank = PolicyBank(base.eval(), tokenizer)
    for policy in policies.values():
        if policy.best_of is None:
            bank.add(policy.name, policy.folder, f"policies: {policy.name}")
    return bank


@dataclass(frozen=True)
class Placement:
    """The arguments of a trainer that `load_model` reads, where there is no trainer."""

    trust_remote_code: bool

    @property
    def device(self) -> Any:
        """The device of this process."""
        return PartialState().device
