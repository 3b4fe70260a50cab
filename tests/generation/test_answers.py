"""Sampled answers: seeds, batches, the distribution, and what is restored afterwards."""

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.generation.answers import sample
from rlhf_recipes.tiny import splits

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@pytest.fixture(scope="module")
def tiny():
    path = resolve_path("rlhf_recipes.tiny.base")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_greedy_answers_do_not_depend_on_the_batch(tiny):
    prompts = list(splits.evaluation(rows=12)["prompt"])
    options = {"temperature": 0, "max_new_tokens": 6}
    alone = [sample(*tiny, [prompt], **options)[0] for prompt in prompts]
    assert sample(*tiny, prompts, batch_size=5, **options) == alone


def test_sampling_follows_the_seed_and_the_model(tiny):
    model, tokenizer = tiny
    prompt = next(row["prompt"] for row in splits.evaluation(rows=20) if not row["known"])
    first, again, other = (
        [answer.text.strip() for answer in sample(*tiny, [prompt] * 2000, max_new_tokens=3, batch_size=1000, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        probability = model(**inputs).logits[0, -1].softmax(-1)
    for token in probability.topk(5).indices:
        share = sum(text.startswith(tokenizer.decode([token])) for text in first) / len(first)
        assert share == pytest.approx(probability[token].item(), abs=0.04)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_restored(tiny, training):
    model, _ = tiny
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model.train(training)
    sample(*tiny, splits.evaluation(rows=2)["prompt"], max_new_tokens=2)
    assert model.training is training
    assert torch.equal(torch.rand(3), expected)


def test_the_generation_config_of_the_model_is_ignored_and_restored(tiny):
    """Many models ship one with a temperature, top-p or repetition penalty."""
    model, _ = tiny
    prompts = list(splits.evaluation(rows=40)["prompt"])
    plain, stored = sample(*tiny, prompts, max_new_tokens=3), model.generation_config
    own = GenerationConfig(do_sample=True, top_p=0.1, repetition_penalty=1.5, min_p=0.3)
    model.generation_config = own
    assert sample(*tiny, prompts, max_new_tokens=3) == plain
    assert model.generation_config is own
    model.generation_config = stored
