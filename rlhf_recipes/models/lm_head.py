"""The LM head, whose logits, (tokens, vocabulary), are the largest tensors."""

import math
from typing import Any

from rlhf_recipes.models.backbone import base_of

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

MOST_LOGITS = 2**27  # of one pass
TOKENS_AT_ONCE = 256  # whose log-probabilities are computed in fp32
_LARGE = 2**20  # weights


def keep_head_inputs_contiguous(model: PreTrainedModel) -> None:
    """Copy the states that reach a large LM head if they are a slice.

    For such a slice PyTorch copies a frozen head once for each row on a CPU: seconds, and GiBs, a pass.
    """
    head = model.get_output_embeddings()
    if head is not None and math.prod(head.weight.shape) >= _LARGE:
        head.register_forward_pre_hook(_contiguous)


def _contiguous(head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0].contiguous(), *arguments[1:]) if arguments else arguments


@torch.no_grad()
def token_log_probs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the log-probabilities of the `wanted` tokens, (N,), row by row.

    The head reads only the states in front of these tokens, and so few rows at once that there are at most `MOST_LOGITS`
    logits. `wanted` is (B, T) of truth values, as `input_ids`, and false at the first token of each row.
    """
    base = base_of(model)
    logits_of_a_row = max(1, int(wanted.sum(1).max())) * base.config.get_text_config().vocab_size
    rows = max(1, MOST_LOGITS // logits_of_a_row)
    if rows < len(input_ids):
        parts = zip(*(tensor.split(rows) for tensor in (input_ids, attention_mask, wanted)), strict=True)
        return torch.cat([token_log_probs(model, *part, temperature) for part in parts])
    before = wanted.roll(-1, dims=1)
    hook = base.get_output_embeddings().register_forward_pre_hook(
        lambda module, arguments: (arguments[0][before][None], *arguments[1:]), prepend=True
    )
    try:
        (logits,) = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        hook.remove()
    parts = zip(logits.split(TOKENS_AT_ONCE), input_ids[wanted].split(TOKENS_AT_ONCE), strict=True)
    return torch.cat([-cross_entropy(part.float() / temperature, tokens, reduction="none") for part, tokens in parts])
