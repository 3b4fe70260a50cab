"""Shares of right, abstaining and made-up answers, and the answers themselves."""

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.generation.answers import answer
from rlhf_recipes.rewards.matching import Truthfulness, normalise
from rlhf_recipes.tiny import splits

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def test_shares():
    predictions = ["Larkhill.", "  larkhill ", "I do not know.", "i do  not know, sorry", "Dunmere.", "", "Larkhill Dunmere"]
    result = Truthfulness().compute(predictions=predictions, references=["Larkhill."] * 7)
    assert result == pytest.approx({"right": 2 / 7, "abstained": 2 / 7, "made_up": 3 / 7})


def test_other_phrases_of_abstaining():
    metric = Truthfulness()
    result = metric.compute(predictions=["No idea!", "I do not know"], references=["x", "x"], abstentions=("no idea",))
    assert result == {"right": 0, "abstained": 0.5, "made_up": 0.5}


def test_normalise():
    assert normalise(' "The  Town", ') == "the town"
    assert normalise("don't") == "don't"


@pytest.fixture(scope="module")
def tiny():
    path = resolve_path("rlhf_recipes.tiny.base")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_greedy_answers_do_not_depend_on_the_batch(tiny):
    model, tokenizer = tiny
    prompts = splits.evaluation(rows=12)["prompt"]
    apart = [answer(model, tokenizer, [prompt], temperature=0, max_new_tokens=6)[0] for prompt in prompts]
    assert answer(model, tokenizer, list(prompts), temperature=0, max_new_tokens=6, batch_size=5) == apart


def test_sampling_follows_the_seed_and_the_model(tiny):
    model, tokenizer = tiny
    prompt = next(row["prompt"] for row in splits.evaluation(rows=20) if not row["known"])
    drawn = answer(model, tokenizer, [prompt] * 2000, max_new_tokens=3, batch_size=1000, seed=1)
    assert drawn[:50] == answer(model, tokenizer, [prompt] * 2000, max_new_tokens=3, batch_size=1000, seed=1)[:50]
    assert drawn != answer(model, tokenizer, [prompt] * 2000, max_new_tokens=3, batch_size=1000, seed=2)
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        probability = model(**inputs).logits[0, -1].softmax(-1)
    for token in probability.topk(5).indices:
        share = sum(text.startswith(tokenizer.decode([token])) for text in drawn) / len(drawn)
        assert share == pytest.approx(probability[token].item(), abs=0.04)


def test_mode_of_the_model_is_left_as_it_was(tiny):
    model, tokenizer = tiny
    for training in (True, False):
        model.train(training)
        answer(model, tokenizer, splits.evaluation(rows=2)["prompt"], max_new_tokens=2)
        assert model.training is training


def test_generation_config_of_the_model_does_not_shape_the_answers(tiny):
    """Many models ship one, with a temperature, a top-p or a repetition penalty of their own."""
    model, tokenizer = tiny
    prompts = list(splits.evaluation(rows=40)["prompt"])
    plain = answer(model, tokenizer, prompts, max_new_tokens=3)
    stored = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.1, repetition_penalty=1.5, min_p=0.3)
    shaped = model.generation_config
    assert answer(model, tokenizer, prompts, max_new_tokens=3) == plain
    assert model.generation_config is shaped
    model.generation_config = stored


def test_random_state_is_left_as_it_was(tiny):
    model, tokenizer = tiny
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    answer(model, tokenizer, splits.evaluation(rows=2)["prompt"], max_new_tokens=2)
    assert torch.equal(torch.rand(3), expected)


def test_no_answers_are_an_error():
    with pytest.raises(ValueError, match="no answers"):
        Truthfulness().compute(predictions=[], references=[])
