"""Sampled answers: seeds, batches, the distribution, and what is restored afterwards."""

from rlhf_recipes.generation.answers import log_probs, sample
from rlhf_recipes.tiny import splits
from support.evaluations import log_prob_by_hand

import pytest
import torch
from transformers import GenerationConfig


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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_sums_over_tokens_at_any_batch_size(tiny, temperature):
    model, tokenizer = tiny
    prompts = list(splits.evaluation(rows=7)["prompt"])
    answers = sample(model, tokenizer, prompts, max_new_tokens=3, temperature=2.0, seed=3)
    expected = [log_prob_by_hand(model, tokenizer, *pair, temperature) for pair in zip(prompts, answers, strict=True)]
    for batch_size in (1, 3, 7):
        logps = log_probs(model, tokenizer, prompts, answers, temperature=temperature, batch_size=batch_size)
        assert logps == pytest.approx(expected, abs=1e-4)


def test_samples_record_whether_they_ended(tiny):
    model, tokenizer = tiny
    prompts = list(splits.evaluation(rows=8)["prompt"])
    for completion in sample(model, tokenizer, prompts, max_new_tokens=12):
        assert completion.ended
        assert completion.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in completion.ids[:-1]
    assert not any(completion.ended for completion in sample(model, tokenizer, prompts, max_new_tokens=1))


def test_prompts_may_be_plain_text(tiny):
    model, tokenizer = tiny
    text = tokenizer.apply_chat_template(splits.evaluation(rows=1)["prompt"][0], tokenize=False, add_generation_prompt=True)
    (answer,) = sample(model, tokenizer, [text.removeprefix(tokenizer.bos_token)], temperature=0, max_new_tokens=12)
    (same,) = sample(model, tokenizer, list(splits.evaluation(rows=1)["prompt"]), temperature=0, max_new_tokens=12)
    assert answer == same
