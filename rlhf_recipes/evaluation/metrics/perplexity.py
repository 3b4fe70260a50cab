"""Perplexity on text: how much alignment costs of what pretraining taught."""

import math
from collections.abc import Sequence

from rlhf_recipes.models.lm_head import token_log_probs

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_size: int = 16,
) -> float:
    """Return exp of the mean negative log-likelihood per token.

    The mean is over all tokens but the first of each text, which is cut off at `max_length`. The model's mode is restored.

    Raises:
        ValueError: If no text has two tokens.
    """
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    try:
        ordered = sorted(texts, key=len)  # similar lengths together: little padding
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            inputs = tokenizer(
                batch, return_tensors="pt", padding=True, truncation=True, max_length=max_length, padding_side="right"
            ).to(model.device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            wanted = mask.bool()
            wanted[:, 0] = False
            logps = token_log_probs(model, ids, mask, wanted)
            total, count = total - logps.sum().item(), count + len(logps)
    finally:
        model.train(was_training)
    if not count:
        raise ValueError("perplexity needs a text of two tokens or more")
    return math.exp(total / count)
