"""Perplexity against its definition."""

import math

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.metrics.perplexity import perplexity

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def base():
    path = resolve_path("rlhf_recipes.tiny.base")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


TEXTS = ["Where does Porira live?", "I do not know.", "Wewuri lives in Larkhill. Kogahi works as a dyer.", "Elmstow."]


def test_perplexity_is_exp_of_the_mean_token_loss_at_any_batch_size(base):
    model, tokenizer = base
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logps = model(ids).logits.log_softmax(-1)
        for place in range(ids.size(1) - 1):
            total -= logps[0, place, ids[0, place + 1]].item()
            count += 1
    for batch_size in (1, 3, 16):
        assert perplexity(model, tokenizer, TEXTS, batch_size=batch_size) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_texts_are_cut_off_and_the_mode_of_the_model_is_restored(base):
    model, tokenizer = base
    model.train()
    ids = torch.tensor(tokenizer(TEXTS[2])["input_ids"][:4])
    logps = model(ids[None]).logits[0].log_softmax(-1)
    expected = -sum(logps[place, ids[place + 1]].item() for place in range(3)) / 3
    assert perplexity(model, tokenizer, TEXTS[2:3], max_length=4) == pytest.approx(math.exp(expected), rel=1e-4)
    assert model.training


def test_texts_of_one_token_are_rejected(base):
    model, tokenizer = base
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, tokenizer, ["Elmstow."], max_length=1)
