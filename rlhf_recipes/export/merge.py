"""An adapter merged into its base at full precision: a model of its own, compared with the adapter before it is there.

It is written into a folder beside `output_dir`, read again from there, measured, and only then renamed: whatever goes wrong,
`output_dir` is whole or it is not there.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlhf_recipes.config.merge import MergeArguments
from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import RECIPE, REWARD, read_json, write_json
from rlhf_recipes.core.provenance import versions
from rlhf_recipes.export.model_card import lineage, write_card
from rlhf_recipes.export.upload import redact, repository_name, upload
from rlhf_recipes.generation.policies import Placement, PolicyBank, require_adapter
from rlhf_recipes.models.adapters import fitting, read_adapter_config
from rlhf_recipes.models.compatibility import check_tokenizer, check_vocabulary
from rlhf_recipes.models.loading import load_model, release_memory
from rlhf_recipes.models.tokenizer import encode
from rlhf_recipes.rewards.classifier import load_classifier
from rlhf_recipes.rewards.reward_models import HEAD
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How much logits or scores may differ, as a share of their deviation; merged weights are rounded to the type."""

_ANSWER, _QUESTION = "It is the capital of France, and has two million people.", "What is Paris? Say it in one sentence."
_ROWS, _LENGTH = 4, 32  # of random tokens
_BASE = "the base"


@dataclass(frozen=True)
class Check:
    """How a merged model differs from the adapter that it was made of, on its base.

    Parameters:
        what: "logits" or "scores".
        dtype: of the weights of both.
        difference: the root mean square of the differences, as a share of the deviation of what the adapter says.
        of_adapter: the same between the base alone and the adapter: what merging must keep. None for scores.
        tolerance: the largest difference that is let pass.
    """

    what: str
    dtype: str
    difference: float
    of_adapter: float | None
    tolerance: float

    def __str__(self) -> str:
        adapter = "" if self.of_adapter is None else f"; the adapter changes the base's by {self.of_adapter:.1e}"
        return (
            f"The merged model's {self.what} differ from the adapter's by {self.difference:.1e} of their deviation "
            f"({self.dtype}, at most {self.tolerance:.0e} allowed{adapter})"
        )


@dataclass(frozen=True)
class _Said:
    """What an adapter says to the probes before it is merged: logits (tokens, V) or scores (rows, 1), fp32."""

    values: Tensor
    of_adapter: float | None
    dtype: torch.dtype


# --- What is merged -------------------------------------------------------------------------------------


def adapter_and_base(arguments: MergeArguments, model: ModelConfig) -> tuple[bool, ModelConfig]:
    """Whether the adapter is a reward model, and the arguments of the base that it goes into, at full precision.

    Raises:
        RecipeError: if there is no such adapter, it is an ensemble or a whole model, or the base is asked for in 4 or 8 bits.
    """
    folder = Path(arguments.adapter)
    if model.load_in_4bit or model.load_in_8bit:
        raise RecipeError(
            "load_in_4bit, load_in_8bit: an adapter is merged into the base at full precision, also if it was trained on "
            "fewer bits: remove the key"
        )
    if members := (read_json(folder / REWARD).get("ensemble") or {}).get("members"):
        raise RecipeError(f"adapter: {folder} is an ensemble: merge its members one by one ({folder / members[0]}, ...)")
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise RecipeError(f"adapter: {folder} holds a whole model: there is nothing to merge")
    require_adapter(arguments.adapter, "adapter")
    config = read_adapter_config(folder, "adapter")
    if model.model_name_or_path is None:
        model = replace(model, model_name_or_path=config.base_model_name_or_path)
    return config.task_type == "SEQ_CLS", model


def merge_policy(arguments: MergeArguments, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> _Said:
    """Merges a policy and saves it into `folder`; returns what its adapter said before.

    Raises:
        RecipeError: as `load_model` and `PolicyBank.add`; if the adapter is of a kind that cannot be merged, or is not finite.
    """
    base = load_model(model_args, Placement(arguments.trust_remote_code))
    _check_whole(base, tokenizer)
    bank = PolicyBank(base.eval(), tokenizer)
    bank.add(_BASE, None, "adapter")
    bank.add("adapter", arguments.adapter, "adapter")
    with bank.use_policy(_BASE) as model:
        without = _logits(model, tokenizer)
    with bank.use_policy("adapter") as model:
        values = _logits(model, tokenizer)
    merged = _merged(bank.model, arguments.adapter)
    _set_generation(merged, tokenizer, Path(arguments.adapter))
    _save(merged, tokenizer, folder, arguments.max_shard_size)
    return _Said(values, _relative(without, values), merged.dtype)


def merge_reward(arguments: MergeArguments, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> _Said:
    """The same of a reward model: its head, in fp32, and the scale of its scores go with it.

    Raises:
        RecipeError: as `load_model` and `load_reward_adapter`; if the adapter is not finite.
    """
    placement = Placement(arguments.trust_remote_code)
    base, _ = load_classifier(model_args, placement)  # whose head is the adapter's
    _check_whole(base, tokenizer)
    targets = read_adapter_config(arguments.adapter, "adapter").target_modules
    with fitting(f"adapter: {arguments.adapter}", base):
        place = get_peft_model(base, LoraConfig(r=1, target_modules=targets), adapter_name="unused")
    reward = load_reward_adapter(place, arguments.adapter, "reward", tokenizer)
    values = reward.score(**_batch(tokenizer))[:, None]
    merged = _merged(place, arguments.adapter, "reward")
    setattr(merged, HEAD, reward.head)
    merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _save(merged, tokenizer, folder, arguments.max_shard_size)
    if (Path(arguments.adapter) / REWARD).exists():
        shutil.copy(Path(arguments.adapter) / REWARD, folder / REWARD)
    return _Said(values, None, merged.dtype)


def _check_whole(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if getattr(base, "is_quantized", False):
        raise RecipeError(
            f"model_name_or_path: {base.name_or_path} is stored in few bits, and merging into those would spoil it: name the "
            "model that it was made of"
        )
    check_vocabulary(base, tokenizer)


def _merged(model: PeftModel, adapter: str | Path, name: str | None = None) -> PreTrainedModel:
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = type(next(iter(model.peft_config.values()))).__name__
        raise RecipeError(f"adapter: {adapter}: an adapter of this kind ({kind}) cannot be merged")
    try:
        return model.merge_and_unload(safe_merge=True, adapter_names=[name] if name else None)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"adapter: {adapter}: it cannot be merged: {first_line(error)}") from error


def _set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
    """What ends an answer: as the stage saved it beside the adapter, or the tokenizer's EOS."""
    if (adapter / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(adapter)
        except Exception as error:  # of the right JSON with the wrong types, any
            raise RecipeError(
                f"adapter: {adapter}: generation_config.json: {first_line(error)}: mend it, or delete it"
            ) from error
    else:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # some on the Hub have a temperature and do not sample, which is not saved any more
        model.generation_config.do_sample = True


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str) -> None:
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise RecipeError(f"output_dir: the merged model takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
    with _writing(folder):
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)


# --- Whether it is the same ------------------------------------------------------------------------------


def check(said: _Said, is_reward: bool, arguments: MergeArguments, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Check:
    """Reads the merged model from its files and compares it with what the adapter said.

    Args:
        said: from `merge_policy` or `merge_reward`.
        is_reward: which of them.
        arguments: for `tolerance`.
        tokenizer: of the adapter.
        folder: of the merged model.

    Raises:
        RecipeError: if they differ by more than the tolerance, or by more than half of what the adapter changes.
    """
    release_memory()
    if is_reward:
        values = load_full_reward(folder, "merged", tokenizer, dtype="auto").score(**_batch(tokenizer))[:, None]
    else:
        check_tokenizer(folder, tokenizer)
        model = load_model(ModelConfig(str(folder), dtype="auto"), Placement(arguments.trust_remote_code))
        values = _logits(model.eval(), tokenizer)
    tolerance = arguments.tolerance or TOLERANCES.get(said.dtype, max(TOLERANCES.values()))
    dtype = str(said.dtype).removeprefix("torch.")
    found = Check("scores" if is_reward else "logits", dtype, _relative(values, said.values), said.of_adapter, tolerance)
    remedy = "" if said.dtype == torch.float32 else "; weights are rounded to this type: set `dtype: float32`"
    if not found.difference <= tolerance:  # NaN is not
        raise RecipeError(f"{found}: it is not kept{remedy}")
    if found.of_adapter is not None and found.difference > found.of_adapter / 2:
        raise RecipeError(f"{found}: half of what it has learnt is lost; the merged model is not kept{remedy}")
    return found


def _relative(values: Tensor, expected: Tensor) -> float:
    """The root mean square of differences over the deviation of what is expected: for logits, within each token's."""
    centre = expected.mean() if expected.shape[1] == 1 else expected.mean(1, keepdim=True)
    return ((values - expected).norm() / (expected - centre).norm().clamp(min=1e-12)).item()


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Logits, fp32 of shape (tokens, V), of the probes; one by one, without padding."""
    rows = [torch.tensor([row]) for row in _probes(tokenizer)]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in rows])


def _batch(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of the probes, (rows, T), padded on the right."""
    return dict(tokenizer.pad({"input_ids": _probes(tokenizer)}, padding_side="right", return_tensors="pt"))


def _probes(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids that both are asked about: random ones of the whole vocabulary, those that were added, and a conversation."""
    random = torch.randint(len(tokenizer), (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    added = sorted(tokenizer.get_added_vocab().values())[-_LENGTH:]
    conversation = [{"role": "user", "content": _QUESTION}], [{"role": "assistant", "content": _ANSWER}]
    return [*random, *([added] if added else []), encode(tokenizer, *conversation)]


# --- Where it goes ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_directory(output_dir: str | Path) -> Iterator[Path]:
    """A folder beside `output_dir` to write into, which becomes it at the end, if nothing goes wrong within; else it goes.

    Raises:
        RecipeError: if there is something in `output_dir`, or it cannot be written to.
    """
    output = Path(output_dir).resolve()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise RecipeError(f"output_dir: {output_dir} is not empty: name another folder, or delete it")
    partial = output.with_name(f".{output.name}.partial")
    try:
        with _writing(output_dir):
            output.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir()
        yield partial
        with _writing(output_dir):
            if output.is_dir():
                output.rmdir()
            os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _writing(output_dir: str | Path) -> Iterator[None]:
    """Says of a disk that is full, or may not be written to, that it is that."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RecipeError(f"output_dir: {output_dir}: cannot be written ({reason}); nothing is left of it") from error


def describe(folder: Path, arguments: MergeArguments, model_args: ModelConfig, found: Check) -> None:
    """Writes `recipe.json`, with the records of the stages that led to the adapter, and the model card.

    Args:
        folder: of the merged model, under whatever name it has now.
        arguments: of the run.
        model_args: likewise, with the base.
        found: by which the merged model is the adapter's.
    """
    record = {
        "recipe": "merge",
        "base_model": {"name": model_args.model_name_or_path, "revision": model_args.model_revision},
        "parents": [arguments.adapter],
        "versions": versions(),
        "check": asdict(found),
        "stages": lineage(arguments.adapter),
        "arguments": {type(group).__name__: asdict(group) for group in (arguments, model_args)},
    }
    with _writing(arguments.output_dir):
        write_json(folder / RECIPE, redact(record))
        write_card(folder, arguments.hub_model_id or arguments.output_dir)


def push(arguments: MergeArguments) -> str:
    """Uploads what is in `output_dir`, as it was checked; returns its address.

    Raises:
        RecipeError: as `upload`.
    """
    repository = repository_name(arguments.output_dir, arguments.hub_model_id)
    return upload(arguments.output_dir, repository, arguments.hub_private_repo)
