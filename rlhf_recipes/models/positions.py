"""Positions of a model: where learned ones end, and what keeps packed rows apart."""

from collections.abc import Callable
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.models.loading import model_path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

_ROW = 16  # tokens of each of the two packed rows


def position_limit(arguments: ModelConfig) -> int | None:
    """Return how many positions a base has if they end, as learned ones do; else None.

    Beyond them PyTorch fails in an embedding, on a GPU by a device-side assert. Rotary positions have no end. Bases with
    code of their own are not looked into.
    """
    try:
        config = AutoConfig.from_pretrained(model_path(arguments), revision=arguments.model_revision, trust_remote_code=False)
        config = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except RecipeError:
        raise
    except Exception:  # `load_model` says why
        return None
    return positions_of(model)


def positions_of(model: nn.Module) -> int | None:
    """Return how many positions a model has if they end, as `position_limit`."""
    config = model.config.get_text_config()
    tables = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables += [name for name, _ in model.named_buffers()]  # GPT-J's are not learned
    if any("pos" in (last := name.rpartition(".")[2]) or last == "wpe" for name in tables):
        return getattr(config, "max_position_embeddings", None)
    return config.max_seq_len if config.model_type == "mpt" else None  # its table is made in the forward pass


@torch.no_grad()
def check_packing(model: nn.Module, collate: Callable[[list[dict[str, list[int]]]], dict[str, Any]], key: str) -> None:
    """Refuse packing if the second of two packed rows depends on the first.

    Args:
        model: on its device.
        collate: the trainer's collator, which joins rows.
        key: the option that packs rows.

    Raises:
        RecipeError: also if the model rejects packed rows.
    """
    device, name, was_training = next(model.parameters()).device, model.config.name_or_path, model.training
    if device.type == "meta":  # FSDP loads the weights in another process
        return
    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    first, second = torch.randint(vocabulary, (2, _ROW), generator=generator).tolist()

    def logits(*rows: list[int]) -> Tensor:
        """Return the logits (tokens, V) of the second row."""
        batch = collate([{"input_ids": ids} for ids in rows])
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        del batch["labels"]
        return model(**batch, use_cache=False).logits[0, -_ROW:].float()

    model.eval()
    try:
        alone, packed, joined = logits(second), logits(first, second), logits(first + second)
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = first_line(error).rstrip(".")
        raise RecipeError(f"{key}: {name} cannot pack rows: {reason}. Fix: set `{key}: false`") from error
    finally:
        model.train(was_training)
    rounding = 4 * torch.finfo(next(model.parameters()).dtype).eps * _rms(alone)
    if _rms(packed - alone) > 0.1 * _rms(joined - alone) + rounding:
        raise RecipeError(
            f"{key}: {name} does not keep packed rows apart: each would read the rows before it. Fix: set `{key}: false`"
        )


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
