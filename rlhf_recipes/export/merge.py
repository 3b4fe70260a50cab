"""Merge an adapter into its base at full precision, and check the result.

The model is written into a folder beside `output_dir`, read again and compared. Only then the folder is renamed, so
`output_dir` is complete or missing.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlhf_recipes.config.merge import MergeArguments
from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.files import RECIPE, REWARD, read_json, write_json
from rlhf_recipes.core.provenance import versions
from rlhf_recipes.export.model_card import lineage, write_card
from rlhf_recipes.export.upload import redact, repository_name, upload
from rlhf_recipes.generation.policies import Placement, PolicyBank
from rlhf_recipes.inputs import require_adapter
from rlhf_recipes.models.adapters import read_adapter_config
from rlhf_recipes.models.loading import check_vocabulary, load_model, release_memory
from rlhf_recipes.models.tokenizer import check_tokenizer, encode
from rlhf_recipes.rewards.classifier import load_classifier
from rlhf_recipes.rewards.reward_models import HEAD
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits or scores, as a share of their deviation; merged weights are rounded to the type."""

_ANSWER, _QUESTION = "It is the capital of France, and has two million people.", "What is Paris? Say it in one sentence."
_ROWS, _LENGTH = 4, 32  # of random tokens
_BASE = "the base"


@dataclass(frozen=True)
class AdapterOutputs:
    """What an adapter outputs for the probes, before it is merged.

    Parameters:
        values: logits (tokens, V) or scores (rows, 1), fp32.
        effect: root mean square of the differences from the base alone, as a share of the deviation; None for scores.
        dtype: of the weights.
    """

    values: Tensor
    effect: float | None
    dtype: torch.dtype


@dataclass(frozen=True)
class MergeCheck:
    """How far a merged model differs from the adapter on its base.

    Parameters:
        what: "logits" or "scores".
        dtype: of the weights of both.
        difference: root mean square of the differences, as a share of the deviation of the adapter's outputs.
        of_adapter: the same between base and adapter, which merging must keep; None for scores.
        tolerance: largest difference allowed.
    """

    what: str
    dtype: str
    difference: float
    of_adapter: float | None
    tolerance: float

    def __str__(self) -> str:
        effect = "" if self.of_adapter is None else f"; the adapter changes the base's by {self.of_adapter:.1e}"
        return (
            f"The merged model's {self.what} differ from the adapter's by {self.difference:.1e} of their deviation "
            f"({self.dtype}, at most {self.tolerance:.0e} allowed{effect})"
        )


def resolve_base(arguments: MergeArguments, model: ModelConfig) -> tuple[bool, ModelConfig]:
    """Return whether the adapter is a reward model, and the arguments of its base.

    Raises:
        RecipeError: if there is no adapter (but an ensemble, a full model, nothing), or the base should be in 4 or 8 bits.
    """
    folder = Path(arguments.adapter)
    if model.load_in_4bit or model.load_in_8bit:
        raise RecipeError(
            "load_in_4bit, load_in_8bit: adapters are merged at full precision, however they were trained. Fix: remove the key"
        )
    if members := (read_json(folder / REWARD).get("ensemble") or {}).get("members"):
        raise RecipeError(f"adapter: {folder} is an ensemble. Fix: merge its members one by one ({folder / members[0]}, ...)")
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise RecipeError(f"adapter: {folder} holds a full model: there is nothing to merge")
    with error_context("adapter"):
        require_adapter(arguments.adapter)
    config = read_adapter_config(folder, "adapter")
    if model.model_name_or_path is None:
        model = replace(model, model_name_or_path=config.base_model_name_or_path)
    return config.task_type == "SEQ_CLS", model


def merge_policy(
    arguments: MergeArguments, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> AdapterOutputs:
    """Merge a policy and save it into `folder`; return the adapter's outputs.

    Raises:
        RecipeError: as `load_model` and `PolicyBank.add`; if the adapter cannot be merged, or is not finite.
    """
    base = load_model(model_args, Placement(arguments.trust_remote_code))
    _check_mergeable(base, tokenizer)
    bank = PolicyBank(base.eval(), tokenizer)
    bank.add(_BASE, None, "adapter")
    bank.add("adapter", arguments.adapter, "adapter")
    with bank.use_policy(_BASE) as model:
        without_adapter = _logits(model, tokenizer)
    with bank.use_policy("adapter") as model:
        values = _logits(model, tokenizer)
    merged = _merge(bank.model, arguments.adapter)
    _set_generation_config(merged, tokenizer, Path(arguments.adapter))
    _save(merged, tokenizer, folder, arguments.max_shard_size)
    return AdapterOutputs(values, _relative_difference(without_adapter, values), merged.dtype)


def merge_reward(
    arguments: MergeArguments, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> AdapterOutputs:
    """Merge a reward model with its fp32 head; return the adapter's outputs.

    Raises:
        RecipeError: as `load_model` and `load_reward_adapter`; if the adapter cannot be merged, or is not finite.
    """
    base, _ = load_classifier(model_args, Placement(arguments.trust_remote_code))
    _check_mergeable(base, tokenizer)
    reward = load_reward_adapter(base, arguments.adapter, "reward", tokenizer)
    values = reward.score(**_probe_batch(tokenizer))[:, None]
    merged = _merge(reward.model, arguments.adapter, "reward")
    setattr(merged, HEAD, reward.head)
    merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _save(merged, tokenizer, folder, arguments.max_shard_size)
    if (Path(arguments.adapter) / REWARD).exists():
        shutil.copy(Path(arguments.adapter) / REWARD, folder / REWARD)
    return AdapterOutputs(values, None, merged.dtype)


def _check_mergeable(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if getattr(base, "is_quantized", False):
        raise RecipeError(
            f"model_name_or_path: {base.name_or_path} is stored in few bits, and merging would degrade it. Fix: name the model "
            "that it was made of"
        )
    check_vocabulary(base, tokenizer)


def _merge(model: PeftModel, adapter: str | Path, name: str | None = None) -> PreTrainedModel:
    # not finite, or a kind that cannot be merged
    with error_context(f"adapter: {adapter}: cannot be merged", AttributeError, ValueError, RuntimeError):
        return model.merge_and_unload(safe_merge=True, adapter_names=[name] if name else None)


def _set_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
    """Set what ends a completion: the adapter's saved EOS, or the tokenizer's."""
    if (adapter / "generation_config.json").is_file():
        # valid JSON of wrong types raises anything
        with error_context(f"adapter: {adapter}: generation_config.json", Exception, fix="delete it"):
            model.generation_config = GenerationConfig.from_pretrained(adapter)
    else:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # some on the Hub have a temperature without sampling, which Transformers refuses to save
        model.generation_config.do_sample = True


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)


def check_merged(
    outputs: AdapterOutputs, is_reward: bool, arguments: MergeArguments, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> MergeCheck:
    """Read the merged model from its files and compare its outputs with the adapter's.

    Raises:
        RecipeError: if they differ by more than the tolerance, or by more than half of the adapter's effect.
    """
    release_memory()
    if is_reward:
        values = load_full_reward(folder, "merged", tokenizer, dtype="auto").score(**_probe_batch(tokenizer))[:, None]
    else:
        check_tokenizer(folder, tokenizer)
        model = load_model(ModelConfig(str(folder), dtype="auto"), Placement(arguments.trust_remote_code))
        values = _logits(model.eval(), tokenizer)
    tolerance = arguments.tolerance or TOLERANCES.get(outputs.dtype, max(TOLERANCES.values()))
    dtype, difference = str(outputs.dtype).removeprefix("torch."), _relative_difference(values, outputs.values)
    result = MergeCheck("scores" if is_reward else "logits", dtype, difference, outputs.effect, tolerance)
    fix = "" if outputs.dtype == torch.float32 else ". Fix: set `dtype: float32`; weights are rounded to this type"
    if not difference <= tolerance:  # also for NaN
        raise RecipeError(f"{result}: it is not kept{fix}")
    if outputs.effect is not None and difference > outputs.effect / 2:
        raise RecipeError(f"{result}: half of the adapter's effect is lost, and the merged model is not kept{fix}")
    return result


def _relative_difference(values: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference over the deviation of `expected`."""
    centre = expected.mean() if expected.shape[1] == 1 else expected.mean(1, keepdim=True)
    return ((values - expected).norm() / (expected - centre).norm().clamp(min=1e-12)).item()


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return fp32 logits (tokens, V) of the probes, one by one without padding."""
    rows = [torch.tensor([row]) for row in _probes(tokenizer)]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in rows])


def _probe_batch(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of the probes, (rows, T)."""
    return dict(tokenizer.pad({"input_ids": _probes(tokenizer)}, padding_side="right", return_tensors="pt"))


def _probes(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return token ids to compare outputs on."""
    random = torch.randint(len(tokenizer), (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    added = sorted(tokenizer.get_added_vocab().values())[-_LENGTH:]
    conversation = [{"role": "user", "content": _QUESTION}], [{"role": "assistant", "content": _ANSWER}]
    return [*random, *([added] if added else []), encode(tokenizer, *conversation)]


def write_merge_record(folder: Path, arguments: MergeArguments, model_args: ModelConfig, check: MergeCheck) -> None:
    """Write `recipe.json`, with the records of earlier stages, and the model card."""
    record = {
        "recipe": "merge",
        "base_model": {"name": model_args.model_name_or_path, "revision": model_args.model_revision},
        "parents": [arguments.adapter],
        "versions": versions(),
        "check": asdict(check),
        "stages": lineage(arguments.adapter),
        "arguments": {type(group).__name__: asdict(group) for group in (arguments, model_args)},
    }
    write_json(folder / RECIPE, redact(record))
    write_card(folder, arguments.hub_model_id or arguments.output_dir)


def push(arguments: MergeArguments) -> str:
    """Upload `output_dir`, as it was checked, and return its address.

    Raises:
        RecipeError: as `upload`.
    """
    repository = repository_name(arguments.output_dir, arguments.hub_model_id)
    return upload(arguments.output_dir, repository, arguments.hub_private_repo)
