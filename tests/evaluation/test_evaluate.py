"""The evaluation of policies: probabilities of answers, figures and their noise, the judge, the recipe, the report."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.machinery import ModuleSpec

from rlhf_recipes.config.data import DataArguments, DatasetSource
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.evaluate import (
    Drawn,
    Measurement,
    NamedReward,
    describe,
    figure,
    frontier,
    groups_of,
    held_out_prompts,
    is_insignificant,
    lm_eval_results,
)
from rlhf_recipes.evaluation.metrics.comparison import Divergence
from rlhf_recipes.evaluation.report.html import render
from rlhf_recipes.evaluation.report.verdict import verdict
from rlhf_recipes.evaluation.results import collect
from rlhf_recipes.generation.answers import Answer, log_probs, sample
from rlhf_recipes.generation.policies import Policy, load_policy_bank, read_policies
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.tiny import splits
from support import ROOT
from support.chat_server import NOWHERE, chat_server
from support.tolerance import assert_close

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

BASE = resolve_path("rlhf_recipes.tiny.base")


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


def save_adapter(folder, seed, size=0.1):
    """An adapter on the tiny base that changes its answers, with its tokenizer."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=size)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An SFT policy, and a PPO run with two checkpoints, half a one and a record."""
    folder = tmp_path_factory.mktemp("runs")
    save_adapter(folder / "sft", 1)
    save_adapter(folder / "ppo", 2)
    for step in (10, 2, 11):
        save_adapter(folder / "ppo" / f"checkpoint-{step}", 2, size=0.01 * step)
        if step != 11:  # that one is of a run that was killed as it wrote it
            (folder / "ppo" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    log = [{"step": step, "score": step / 10, "kl": 0.1} for step in range(5)]
    (folder / "ppo" / "recipe.json").write_text(json.dumps({"recipe": "ppo", "log": log}))
    return folder


# --- Probabilities of answers ----------------------------------------------------------------------------


def by_hand(model, tokenizer, prompt, answer, temperature=1.0):
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        logps = (model(torch.tensor([[*ids, *answer.ids]])).logits[0] / temperature).log_softmax(-1)
    return sum(logps[len(ids) - 1 + place, token].item() for place, token in enumerate(answer.ids))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_sums_over_the_tokens_of_the_answer_whatever_the_batches(tiny, temperature):
    model, tokenizer = tiny
    prompts = list(splits.evaluation(rows=7)["prompt"])
    answers = sample(model, tokenizer, prompts, max_new_tokens=3, temperature=2.0, seed=3)
    expected = [by_hand(model, tokenizer, *pair, temperature) for pair in zip(prompts, answers, strict=True)]
    for batch_size in (1, 3, 7):
        found = log_probs(model, tokenizer, prompts, answers, temperature=temperature, batch_size=batch_size)
        assert found == pytest.approx(expected, abs=1e-4)


def test_samples_say_whether_they_ended(tiny):
    model, tokenizer = tiny
    prompts = list(splits.evaluation(rows=8)["prompt"])
    for answer in sample(model, tokenizer, prompts, max_new_tokens=12):
        assert answer.ended
        assert answer.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in answer.ids[:-1]
    assert not any(answer.ended for answer in sample(model, tokenizer, prompts, max_new_tokens=1))


def test_prompts_may_be_plain_text(tiny):
    model, tokenizer = tiny
    text = tokenizer.apply_chat_template(splits.evaluation(rows=1)["prompt"][0], tokenize=False, add_generation_prompt=True)
    (answer,) = sample(model, tokenizer, [text.removeprefix(tokenizer.bos_token)], temperature=0, max_new_tokens=12)
    (same,) = sample(model, tokenizer, list(splits.evaluation(rows=1)["prompt"]), temperature=0, max_new_tokens=12)
    assert answer == same


# --- Figures ---------------------------------------------------------------------------------------------


def test_a_figure_is_a_mean_over_prompts_without_what_is_missing():
    values = np.array([[1.0, 3.0], [math.nan, 5.0], [math.nan, math.nan]])
    assert figure(values)["mean"] == (2 + 5) / 2
    difference = figure(values, np.array([[0.0], [math.nan], [1.0]]))["difference"]
    assert difference == {"mean": 2.0, "interval": None, "n": 1}  # one prompt: resampling says nothing
    assert figure(values)["n"] == 2
    assert figure(np.full((2, 1), math.nan)) is None


def test_differences_are_taken_prompt_by_prompt():
    """Where prompts differ much in how well they can be answered, that is no noise in the difference."""
    difficulty = np.random.default_rng(0).normal(size=(100, 1), scale=50)
    noise = np.random.default_rng(1).normal(size=(100, 1), scale=0.1)
    better = figure(difficulty + 1 + noise, difficulty)
    assert not is_insignificant(better["difference"])
    assert better["interval"][0] < difficulty.mean() < better["interval"][1]
    assert is_insignificant(figure(difficulty + noise - noise.mean(), difficulty)["difference"])


def test_what_is_the_same_everywhere():
    assert is_insignificant(figure(np.ones((9, 1)), np.ones((9, 1)))["difference"])
    assert not is_insignificant(figure(np.ones((9, 1)), np.zeros((9, 1)))["difference"])
    low, high = figure(np.ones((50, 1)), share=True)["interval"]
    assert 0.9 < low < high == 1


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_six_prompts_that_agree_say_something_and_five_do_not(spread):
    """The sign test: 2 * 2**-6 = .03 is below .05, and 2 * 2**-5 = .06 is not."""
    for count in range(1, 9):
        better = 1 + spread * np.arange(count)[:, None]
        assert is_insignificant(figure(better, np.zeros((count, 1)))["difference"]) == (count < 6)
    assert not is_insignificant({"mean": 1.0, "interval": [0.5, 1.5]})  # of a metrics.json without `n`


def test_groups():
    rows = Dataset.from_dict({"known": [False, True, True], "topic": ["b", "a", "b"]})
    assert {name: mask.tolist() for name, mask in groups_of(rows, "known").items()} == {
        "all": [True] * 3,
        "known": [False, True, True],
        "not known": [True, False, False],
    }
    assert list(groups_of(rows, "topic")) == ["all", "topic: a", "topic: b"]


def said(*texts):
    return [Answer(text, (5,) * len(text.split()), True) for text in texts]


@pytest.mark.parametrize(
    ("wanted", "references", "told"),
    [
        (None, ["Paris.", "I grew up in the old town, and", None], True),
        (
            None,
            ["There are two ways to do it, and this is the first.", "Yes, as long as it does not rain on that day.", "No."],
            False,
        ),
        (True, ["There are two ways to do it, and this is the first."], True),
        (False, ["Paris."], False),
        (True, [None, " "], False),
    ],
)
def test_free_text_is_not_compared_word_for_word(wanted, references, told):
    rows = Dataset.from_dict({"prompt": ["?"] * len(references), "reference": references})
    assert Measurement(None, rows, {}, EvaluateArguments(truthfulness=wanted)).tells_truth == told


def test_truthfulness_and_calibration_by_group():
    rows = Dataset.from_dict({"prompt": ["q"] * 4, "reference": ["a", "b", "c", "d"], "known": [True, True, False, False]})
    arguments = EvaluateArguments(group_by="known", compare_with="x")
    measurement = Measurement(None, rows, {}, arguments)
    logps = np.log([[0.9], [0.5], [0.2], [0.6]])
    drawn = Drawn(said("a", "I do not know.", "wrong", "d"), {}, logps, logps - 0.25)
    result = describe(measurement, Policy("x"), drawn, None, None)
    shares = {group: {kind: share["mean"] for kind, share in kinds.items()} for group, kinds in result["truthfulness"].items()}
    assert shares["all"] == {"right": 0.5, "abstained": 0.25, "made_up": 0.25}
    assert shares["known"] == {"right": 0.5, "abstained": 0.5, "made_up": 0.0}
    assert result["over_abstained"]["mean"] == 0.5
    # What abstains is left out; one answer a bin: |1 - .9|, |0 - .2|, |1 - .6|
    assert result["calibration"]["all"]["ece"] == pytest.approx((0.1 + 0.2 + 0.4) / 3)
    assert result["calibration"]["all"]["brier"] == pytest.approx((0.01 + 0.04 + 0.16) / 3)
    assert result["calibration"]["known"]["n"] == 1
    assert result["kl"]["mean"] == pytest.approx(0.25)
    assert result["entropy"]["mean"] == pytest.approx(-logps.mean())
    json.dumps(result, allow_nan=False)


def test_kl_and_entropy_are_the_metric():
    generator = np.random.default_rng(0)
    logps, ref_logps = -generator.random((2, 5, 3))
    measurement = measurement_of(rows=questions(5), num_answers=3, seed=7)
    result = describe(measurement, Policy("x"), Drawn(said(*"abcdefghijklmno"), {}, logps, ref_logps), None, None)
    groups = np.repeat(np.arange(5), 3).tolist()
    options = {"predictions": logps.ravel(), "references": ref_logps.ravel(), "groups": groups, "seed": 7}
    found = Divergence().compute(**options)
    for name, values in (("kl", logps - ref_logps), ("entropy", -logps)):
        assert result[name] == {"mean": found[name], "interval": found[f"{name}_interval"], "n": 5}
        assert result[name]["mean"] == pytest.approx(values.mean())
        assert result[name]["interval"] == pytest.approx(figure(values, seed=7)["interval"])


def confident(answers, confidence, count):
    """Twice the same answer to each prompt, with one confidence."""
    texts = [text for text in answers for _ in range(2)]
    return Drawn(said(*texts), {}, np.full((count, 2), math.log(confidence)), np.full((count, 2), math.log(confidence)))


def test_calibration_is_compared_and_says_what_chance_gives():
    count = 40
    rows = questions(count, reference=["a"] * count)
    measurement = measurement_of(rows=rows, num_answers=2)
    answers = ["wrong" if number % 8 < 5 else "a" for number in range(count)]  # right in 3 of 8
    drawn = {"x": confident(answers, 0.5, count), "y": confident(answers, 0.9, count), "z": confident(answers, 0.5, count)}
    metrics = collect(measurement, {name: Policy(name) for name in drawn}, drawn, None, None, None)
    found = {name: policy["calibration"]["all"] for name, policy in metrics["policies"].items()}
    assert "difference" not in found["x"]
    assert found["y"]["difference"]["ece"]["mean"] == pytest.approx((0.9 - 3 / 8) - (0.5 - 3 / 8), abs=0.02)
    assert found["y"]["difference"]["brier"]["mean"] == pytest.approx((3 * 0.1**2 + 5 * 0.9**2) / 8 - 0.25)
    # of 40 coins, and not of 80: the mean of |heads / 40 - 1/2|
    assert found["x"]["ece_if_calibrated"] == pytest.approx(math.sqrt(2 / math.pi) * 0.5 / math.sqrt(40), rel=0.15)
    noise = metrics["verdict"][-1]
    assert "z: right, abstained, made up, calibration error, Brier score, length, share ended" in noise
    assert "y: right, abstained, made up, length, share ended" in noise
    assert noise.endswith("perplexity and diversity have no interval.")
    page = render(metrics)
    mark = r'\(0.0\d\) <span class="mark">▲</span></td><td>0.51 <span class="mark">▲</span></td>'
    assert re.search(rf"<td>0.5[23] {mark}", " ".join(page.split()))
    assert re.search(r'<td class="noise">0.1[23] \(0.0\d\)</td><td class="noise">0.25</td>', " ".join(page.split()))


# --- Scores ----------------------------------------------------------------------------------------------


def questions(count=2, **columns):
    return Dataset.from_dict({"prompt": [f"q{number}" for number in range(count)], **columns})


def measurement_of(*rewards, rows=None, **options):
    """What scores answers, without a model."""
    rows = questions() if rows is None else rows
    return Measurement(None, rows, {reward.name: reward for reward in rewards}, EvaluateArguments(compare_with="x", **options))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "the reward gold returned 1 scores.*list of 2"),
        ([1.0, -math.inf], "the reward gold returned -inf for completion 1 .*[Tt]he prompt: 'q1'"),
        ([1.0, math.nan], "the reward gold returned nan for completion 1 .*[Tt]he prompt: 'q1'"),
        (None, "the reward gold returned a NoneType, not a list"),
    ],
)
def test_what_a_reward_must_not_return_is_named(scores, message):
    measurement = measurement_of(NamedReward("gold", lambda **columns: scores))
    with pytest.raises(RecipeError, match=message):
        measurement.score("gold", said("a", "b"))


def test_a_reward_that_applies_nowhere_is_a_dash():
    reward = NamedReward("nowhere", lambda completions, **columns: [None] * len(completions))
    measurement = measurement_of(reward)
    drawn = {name: Drawn(said(*texts), {"nowhere": measurement.score("nowhere", said(*texts))}) for name, texts in SAID.items()}
    points = [{"step": 1, "kl": None, "rewards": {"nowhere": None}}]
    policies = {name: Policy(name) for name in SAID}
    metrics = collect(measurement, policies, drawn, "nowhere", {"runs": {"r": points}, "best_of": [], "chooser": None}, None)
    assert metrics["policies"]["y"]["rewards"] == {"nowhere": None}
    assert metrics["policies"]["y"]["win_rate"] is None
    assert metrics["verdict"][0].startswith("There is no reward or judge")
    assert render(metrics).count("<td>-</td>") >= 4


SAID = {"x": ("a", "b"), "y": ("a", "c")}


@pytest.mark.parametrize("folder", [None, "runs/reward"])
def test_equal_answers_have_equal_scores_and_are_scored_once(folder):
    """A model's scores differ from batch to batch by rounding; here they do in every batch."""
    batches = []

    def drifting(prompts, completions, **columns):
        batches.append(list(zip(prompts, completions, columns["reference"], strict=True)))
        return [len(text) + 1e-7 * len(batches) for text in completions]

    measurement = measurement_of(NamedReward("model", drifting, folder=folder), rows=questions(reference=["r0", "r1"]))
    first = measurement.score("model", said("a", "a", "b", "cc"))
    second = measurement.score("model", said("dd", "a", "a", "cc"))
    assert (first[0, 0], second[0, 1], second[1, 1]) == (first[0, 1], first[0, 0], first[1, 1])
    assert batches == [[("q0", "a", "r0"), ("q1", "b", "r1"), ("q1", "cc", "r1")], [("q0", "dd", "r0"), ("q1", "a", "r1")]]


def test_a_function_may_count_tokens_where_the_text_is_one():
    cut_off, ended = Answer("a", (5,), False), Answer("a", (5, 2), True)
    measurement = measurement_of(NamedReward("length", lambda completion_ids, **columns: [len(ids) for ids in completion_ids]))
    assert measurement.score("length", [cut_off, ended, ended, cut_off]).tolist() == [[1, 2], [2, 1]]


def test_best_of_n_on_the_frontier_is_of_the_prompts_that_the_runs_are_of(monkeypatch):
    """Each reward of those that it and the chooser apply to, and not of those that all rewards apply to."""

    def counted(prompts, completions, **columns):
        return [float(text) for text in completions]

    def first_only(prompts, completions, **columns):
        return [-float(text) if prompt == "q0" else None for prompt, text in zip(prompts, completions, strict=True)]

    rewards = [
        NamedReward("everywhere", counted),
        NamedReward("once", first_only),
        NamedReward("never", lambda prompts, **columns: [None] * len(prompts)),
    ]
    measurement = measurement_of(*rewards, frontier_best_of=[2])
    monkeypatch.setattr(Measurement, "draw", lambda self, policy, count, seed: said("1", "3", "10", "20"))
    (point,) = frontier(measurement, 0)["best_of"]
    means = {name: found and (found["mean"], found["n"]) for name, found in point["rewards"].items()}
    assert means == {"everywhere": ((3 + 20) / 2, 2), "once": (-3, 1), "never": None}


# --- What YAML files say ---------------------------------------------------------------------------------


def test_prompts_are_those_of_the_test_split_or_of_a_whole_file(tmp_path):
    arguments = EvaluateArguments(group_by="known")
    data = DataArguments(dataset_name="rlhf_recipes.tiny.splits.evaluation", dataset_arguments={"rows": 6})
    assert set(held_out_prompts(data, arguments).column_names) == {"prompt", "reference", "known"}
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Who?"}\n{"prompt": "Where?"}\n')
    assert held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments())["prompt"] == ["Who?", "Where?"]
    with pytest.raises(RecipeError, match="group_by: the data have no column 'known'; the columns are: prompt"):
        held_out_prompts(DataArguments(dataset_name=str(file)), arguments)


def test_a_prompt_with_several_pairs_is_asked_once(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    pairs = [("Who?", "A", "B"), ("Where?", "C", "D"), ("Who?", "A", "E")]
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) for pair in pairs]
    file.write_text("\n".join(lines))
    assert held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments())["prompt"] == ["Who?", "Where?"]
    assert "1 of 3 rows have the prompt and reference of another: they are left out" in capsys.readouterr().out
    answers = [("Who?", "A"), ("Who?", "B"), ("Who?", "A")]  # another reference is another question
    file.write_text("\n".join(json.dumps({"prompt": prompt, "reference": answer}) for prompt, answer in answers))
    rows = held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments())
    assert rows["reference"] == ["A", "B"]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"reference": 42}, {}, r"reference: the column 'reference' holds 42 in row 1: write it in quotes"),
        (
            {"topic": ["a"]},
            {"group_by": "topic"},
            r"group_by: the column 'topic' holds \['a'\] in row 1: name a column of texts",
        ),
    ],
)
def test_a_column_that_cannot_be_used_is_named_with_the_row(tmp_path, row, options, message):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Who?"} | dict.fromkeys(row), {"prompt": "Where?"} | row]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecipeError, match=message):
        held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments(**options))


# --- Policies on one base --------------------------------------------------------------------------------


def bank_of(runs, tiny, **options):
    policies = read_policies({"base": None, "sft": str(runs / "sft"), "ppo": str(runs / "ppo")})
    arguments = EvaluateArguments(**options)
    bank = load_policy_bank(ModelConfig(model_name_or_path=BASE, dtype="float32"), arguments, policies, tiny[1])
    return bank, arguments, policies


def test_policies_on_one_base_answer_as_each_does_alone(runs, tiny):
    from peft import PeftModel

    bank, _, _ = bank_of(runs, tiny)
    prompts = list(splits.evaluation(rows=6)["prompt"])
    answers = sample(*tiny, prompts, max_new_tokens=4, seed=1)
    for name, folder in (("base", None), ("sft", runs / "sft"), ("ppo", runs / "ppo")):
        model = AutoModelForCausalLM.from_pretrained(BASE)
        alone = PeftModel.from_pretrained(model, folder) if folder else model
        with bank.use_policy(name) as shared:
            found = log_probs(shared, tiny[1], prompts, answers)
        assert found == pytest.approx(log_probs(alone.eval(), tiny[1], prompts, answers), abs=1e-4)


def test_policies_whose_names_differ_by_a_dot_are_two(runs, tiny):
    prompts = list(splits.evaluation(rows=4)["prompt"])
    answers = sample(*tiny, prompts, max_new_tokens=4, seed=1)
    found = {}
    for names in (("lr1.5", "lr1_5"), ("one", "two")):
        policies = read_policies(dict(zip(names, (str(runs / "sft"), str(runs / "ppo")), strict=True)))
        arguments = ModelConfig(model_name_or_path=BASE, dtype="float32")
        bank = load_policy_bank(arguments, EvaluateArguments(), policies, tiny[1])
        for name in names:
            with bank.use_policy(name) as model:
                found[name] = log_probs(model, tiny[1], prompts, answers)
    assert found["lr1.5"] == pytest.approx(found["one"], abs=1e-4)
    assert found["lr1_5"] == pytest.approx(found["two"], abs=1e-4)
    assert np.abs(found["one"] - found["two"]).max() > 0.1


def test_a_policy_may_have_the_name_of_a_checkpoint_on_the_frontier(runs, tiny):
    policies = read_policies({"checkpoint-10": str(runs / "sft")})
    arguments = EvaluateArguments(
        compare_with="checkpoint-10", frontier=[str(runs / "ppo")], max_completion_length=4, batch_size=8
    )
    bank = load_policy_bank(ModelConfig(model_name_or_path=BASE, dtype="float32"), arguments, policies, tiny[1])
    measurement = Measurement(bank, splits.evaluation(rows=8), {}, arguments)
    ((_, last),) = frontier(measurement, 0)["runs"].values()
    assert last["step"] == 10
    assert abs(last["kl"]["mean"]) > 0.01  # from the policy, not from itself
    with bank.use_policy("checkpoint-10") as model:  # which is still there
        assert sample(model, tiny[1], list(measurement.rows["prompt"]), max_new_tokens=1)
    with pytest.raises(RecipeError, match="policies: checkpoint-10: "):
        bank.add("checkpoint-10", None, "policies: checkpoint-10")


def several_turns(count):
    """Each question after another one, and its answer."""
    first, *asked = splits.evaluation(rows=count + 1)["prompt"]
    return [[*first, {"role": "assistant", "content": "I do not know."}, *question] for question in asked]


def test_several_turns_on_a_base_in_4_bits(runs, tiny):
    from peft import PeftModel

    quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "dtype": "float32"}
    policies = read_policies({"base": None, "sft": str(runs / "sft"), "ppo": str(runs / "ppo")})
    bank = load_policy_bank(ModelConfig(model_name_or_path=BASE, **quantised), EvaluateArguments(), policies, tiny[1])
    assert bank.model.is_loaded_in_4bit
    config = bank.model.config.quantization_config
    prompts = several_turns(3)
    with bank.use_policy("ppo") as model:
        answers = sample(model, tiny[1], prompts, max_new_tokens=4, seed=1)
    for name in ("base", "sft"):
        model = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=config, dtype=torch.float32).eval()
        alone = PeftModel.from_pretrained(model, runs / name).eval() if name != "base" else model
        # Else bitsandbytes computes in bf16 on CPUs with AVX512-BF16: log-probabilities differ by 0.04 instead of 1e-6.
        disable_cpu_4bit_repacking(alone)
        expected = [by_hand(alone, tiny[1], *pair) for pair in zip(prompts, answers, strict=True)]
        with bank.use_policy(name) as shared:
            assert_close(log_probs(shared, tiny[1], prompts, answers), expected, torch.float32)
        last_turns = [prompt[-1:] for prompt in prompts]
        assert np.abs(log_probs(alone, tiny[1], last_turns, answers) - expected).max() > 0.01


def test_kl_by_sampling_is_near_the_exact_one(runs, tiny):
    """Answers of one token, whose distribution can be written down."""
    bank, arguments, _ = bank_of(runs, tiny, max_completion_length=1, num_answers=150, batch_size=750)
    rows = splits.evaluation(rows=5)
    measurement = Measurement(bank, rows, {}, arguments)
    answers = measurement.draw("ppo", 150, seed=0)
    gaps = measurement.log_probs("ppo", answers) - measurement.log_probs("sft", answers)
    logps = {}
    for name in ("ppo", "sft"):
        with bank.use_policy(name) as model, torch.no_grad():
            logps[name] = torch.stack([first_token(model, tiny[1], prompt) for prompt in rows["prompt"]])
    exact = (logps["ppo"].exp() * (logps["ppo"] - logps["sft"])).sum(1).mean().item()
    assert exact > 0.05
    standard_error = math.sqrt((gaps.var(1) / gaps.shape[1]).sum()) / len(gaps)
    assert standard_error < exact / 5
    assert abs(figure(gaps)["mean"] - exact) < 4 * standard_error


def first_token(model, tokenizer, prompt):
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return model(**inputs).logits[0, -1].log_softmax(-1)


def test_lm_eval_runs_with_each_policy_active_where_it_is_installed(runs, tiny, monkeypatch):
    bank, arguments, policies = bank_of(runs, tiny, lm_eval_tasks=["arc_easy"])
    prompt = splits.evaluation(rows=1)["prompt"][0]

    def simple_evaluate(model, tasks):
        assert tasks == ["arc_easy"]
        return {"results": {"arc_easy": {"acc": first_token(model, tiny[1], prompt).max().item()}}}

    for name, content in (
        ("lm_eval", {"simple_evaluate": torch.no_grad()(simple_evaluate)}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": lambda model, tokenizer, batch_size: model}),
    ):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    found = lm_eval_results(Measurement(bank, None, {}, arguments), policies)
    assert list(found) == ["base", "sft", "ppo"]
    assert len({result["arc_easy"]["acc"] for result in found.values()}) == 3


# --- The recipe ------------------------------------------------------------------------------------------


def settings(runs, output, **values):
    """The tiny YAML file with these runs and few prompts."""
    content = yaml.safe_load((ROOT / "configs" / "tiny" / "evaluate.yaml").read_text())
    content["policies"] |= {"sft": str(runs / "sft"), "ppo": str(runs / "ppo")}
    del content["policies"]["dpo"], content["rewards"][2]  # the reward model, which may be there
    content["dataset_arguments"], content["ptx_dataset"][0]["arguments"] = {"rows": 16}, {"rows": 8}
    content |= {"frontier": [str(runs / "ppo")], "output_dir": str(output), "num_examples": 4, **values}
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory):
    """What the recipe wrote and printed, run by itself: as a script, whose folder is first on Python's path."""
    output = tmp_path_factory.mktemp("evaluated") / "report"
    command = [sys.executable, ROOT / "recipes" / "evaluate.py", "--config", settings(runs, output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads((output / "metrics.json").read_text()), (output / "index.html").read_text(), done.stdout


def test_the_recipe_measures_every_policy(evaluated):
    metrics, _, _ = evaluated
    assert list(metrics["policies"]) == ["base", "sft", "best-of-4", "ppo"]
    assert list(metrics["rewards"]) == ["Abstention", "normalised_match"]
    assert metrics["rewards"]["Abstention"]["about"].startswith("One of three values: for the right answer")
    for name, policy in metrics["policies"].items():
        shares = [share["mean"] for share in policy["truthfulness"]["all"].values()]
        right, _, made_up = shares
        assert sum(shares) == pytest.approx(1)
        assert policy["rewards"]["Abstention"]["mean"] == pytest.approx(right - made_up)
        assert policy["rewards"]["normalised_match"]["mean"] == pytest.approx(right)
        assert ("win_rate" in policy) == (name != "sft")
        assert (policy.get("perplexity") is None) == (name == "best-of-4")
    assert metrics["policies"]["sft"]["kl"] == {"mean": 0.0, "interval": None, "n": 16}
    assert metrics["policies"]["best-of-4"]["kl"] == {
        "mean": pytest.approx(math.log(4) - 0.75),
        "interval": None,
        "bound": True,
    }
    assert metrics["policies"]["ppo"]["kl"]["mean"] > 0
    assert metrics["policies"]["best-of-4"]["rewards"]["Abstention"]["difference"]["mean"] > 0


def test_the_frontier_is_that_of_the_whole_checkpoints_in_order(evaluated):
    frontier = evaluated[0]["frontier"]
    (points,) = frontier["runs"].values()
    assert [point["step"] for point in points] == [2, 10]
    assert points[0]["kl"]["mean"] != points[1]["kl"]["mean"]
    assert [point["n"] for point in frontier["best_of"]] == [1, 2, 4]
    scores = [point["rewards"]["Abstention"]["mean"] for point in frontier["best_of"]]
    assert scores == sorted(scores)


def test_the_report_says_all_of_it_in_one_file(evaluated):
    metrics, page, printed = evaluated
    assert page.count("<svg") == 2 + 2 + 2  # frontiers, diagrams, two curves of the one run with a record
    for sentence in metrics["verdict"]:
        assert sentence in printed
    for words in ("Judged by Abstention", "Inside the noise", "best-of-4", "prefers-color-scheme: dark", "width=device-width"):
        assert words in page
    for example in metrics["examples"]:
        assert example["prompt"] in page
    outside = re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*|url\((?!#)[^)]*|@import|<script|<link""", page)
    assert not outside


def test_the_report_escapes_what_people_and_models_wrote(evaluated):
    metrics = json.loads(json.dumps(evaluated[0]))
    evil = "<script>alert('$x_1$')</script>"
    metrics["policies"][evil] = metrics["policies"].pop("ppo")
    metrics["rewards"][evil] = metrics["rewards"]["Abstention"]
    for policy in metrics["policies"].values():
        policy["rewards"][evil] = policy["rewards"]["Abstention"]
    for points in (*metrics["frontier"]["runs"].values(), metrics["frontier"]["best_of"]):
        for point in points:
            point["rewards"][evil] = point["rewards"]["Abstention"]
    metrics["examples"][0] |= {"prompt": evil, "reference": evil, "group": evil}
    metrics["examples"][0]["answers"]["base"]["text"] = evil
    metrics["verdict"] = verdict(metrics)
    page = render(metrics)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 8


def test_runs_of_one_name_are_two_on_the_frontier(evaluated):
    metrics = json.loads(json.dumps(evaluated[0]))
    (points,) = metrics["frontier"]["runs"].values()
    metrics["frontier"]["runs"] = {"runs/a/ppo": points, "runs/b/ppo": points, "runs/b/dpo": points}
    page = render(metrics)
    for name in ("a/ppo", "b/ppo", "b/dpo"):
        assert page.count(f">{name}<") == 2  # in the picture of each reward
    metrics["frontier"]["runs"] = {"runs/a/ppo": points}
    assert ">ppo<" in render(metrics)


def test_the_same_run_gives_the_same_numbers(evaluated, runs, tmp_path, launch):
    config = settings(runs, tmp_path / "again", frontier=[], frontier_best_of=[], ptx_dataset=[])
    status, message = launch("evaluate", "--config", config)
    assert status == 0, message
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    for name, policy in metrics["policies"].items():
        assert policy["rewards"] == evaluated[0]["policies"][name]["rewards"]
        assert policy["truthfulness"] == evaluated[0]["policies"][name]["truthfulness"]
    assert metrics["frontier"] is None
    assert "Reward against KL" not in (tmp_path / "again" / "index.html").read_text()


def test_a_chat_model_may_be_the_judge(runs, tmp_path, launch):
    with chat_server(lambda question: "[[A]]") as (url, seen):
        judge = {"url": url, "model": "a-model", "max_pairs": 3}
        few = {"policies": {"base": None, "sft": str(runs / "sft")}, "frontier": [], "frontier_best_of": [], "ptx_dataset": []}
        status, message = launch("evaluate", "--config", settings(runs, tmp_path / "judged", **few, judge=judge))
    assert status == 0, message
    rate = json.loads((tmp_path / "judged" / "metrics.json").read_text())["policies"]["base"]["win_rate"]
    assert (rate["judge"], rate["win_rate"], rate["swayed"], rate["n"]) == ("a-model", 0.5, 1.0, 3)
    assert len(seen) == 1 + 6  # the first to see whether it answers
    assert "the order changed the winner in 100%" in (tmp_path / "judged" / "index.html").read_text()


def test_the_recipe_on_several_turns_and_a_base_in_4_bits(runs, tmp_path, launch):
    prompts, file = several_turns(6), tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "reference": "Larkhill."}) + "\n" for prompt in prompts))
    few = {"frontier": [str(runs / "ppo")], "frontier_best_of": [2], "ptx_dataset": [], "group_by": None}
    data = {"dataset_name": str(file), "dataset_arguments": None, "max_prompt_length": 128}
    config = settings(runs, tmp_path / "talks", **few, **data, load_in_4bit=True)
    status, message = launch("evaluate", "--config", config)
    assert status == 0, message
    metrics = json.loads((tmp_path / "talks" / "metrics.json").read_text())
    assert (metrics["prompts"], metrics["policies"]["sft"]["kl"]["mean"]) == (6, 0)
    assert metrics["policies"]["ppo"]["kl"]["mean"] > 0.05
    assert metrics["policies"]["best-of-4"]["win_rate"]["prompts"] == 6
    assert metrics["examples"][0]["prompt"].startswith("user: ")
    assert "\nassistant: I do not know.\nuser: " in metrics["examples"][0]["prompt"]
    assert [point["step"] for point in metrics["frontier"]["runs"][str(runs / "ppo")]] == [2, 10]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compare_with": "nobody"}, "compare_with: 'nobody' is none of the policies (base"),
        ({"kl_reference": "best-of-4"}, "kl_reference: 'best-of-4' is none of the policies"),
        (
            {"frontier": ["no/ppo"]},
            "frontier, entry 1: no/ppo holds no adapter (adapter_config.json). Fix: train it with recipes/ppo.py",
        ),
        ({"lm_eval_tasks": ["arc_easy"]}, "lm_eval_tasks: lm-eval is not installed: `pip install lm-eval`"),
        ({"rewards": ["no/reward"]}, "rewards, entry 1: no/reward: no such folder"),
        ({"rewards": [{"path": "rlhf_recipes.rewards.Abstention", "trained": 1}]}, "rewards, entry 1: trained: expected true"),
        ({"temperature": 0.0}, "temperature: 0.0: must be above 0"),
        ({"polices": {}}, "unknown key 'polices'; did you mean 'policies'?"),
        ({"judge": {"url": "localhost", "model": "m"}}, "judge: url: "),
        (
            {"judge": {"url": NOWHERE, "model": "m", "retries": 0}},
            "judge: http://127.0.0.1:9/v1: cannot be reached",
        ),
        (
            {"judge": {"url": NOWHERE, "model": "m", "api_key_env": "NO_SUCH_KEY"}},
            "judge: api_key_env: NO_SUCH_KEY",
        ),
        (
            {
                "policies": {"base": None, "best": {"best_of": {"policy": "base", "n": 2, "reward": "gold"}}},
                "compare_with": "base",
            },
            "policies: best: best_of: reward: 'gold' is none of the rewards (Abstention, normalised_match)",
        ),
        (
            {
                "policies": {"base": None, "best": {"best_of": {"policy": "base", "n": 2}}},
                "compare_with": "base",
                "rewards": [],
                "judge": None,
            },
            "policies: best: best_of: reward: None is none of the rewards (there is none)",
        ),
    ],
)
def test_what_a_user_got_wrong_is_one_message_before_anything_is_sampled(values, message, runs, tmp_path, launch, monkeypatch):
    monkeypatch.setattr(Measurement, "draw", lambda *arguments: pytest.fail("something was sampled"))
    status, said = launch("evaluate", "--config", settings(runs, tmp_path / "wrong", **values))
    assert status == 2
    assert message in said
    assert "Traceback" not in said


def test_an_adapter_of_another_base_is_refused(runs, tmp_path, launch):
    config = json.loads((runs / "sft" / "adapter_config.json").read_text())
    other = tmp_path / "other"
    save_adapter(other, 3)
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/else"}))
    status, said = launch("evaluate", "--config", settings(runs, tmp_path / "wrong", policies={"sft": str(other)}))
    assert status == 2
    assert "was trained on somebody/else" in said


# --- The verdict -----------------------------------------------------------------------------------------


def made_up_metrics(**changes):
    """Two policies: `ppo` against `sft`, in the least that a verdict is made of."""

    def policy(**more):
        plain = {"rewards": {}, "length": {"mean": 1}, "ended": {"mean": 1}}
        return plain | more

    def changed(mean, low, high):
        return {"mean": 0.0, "difference": {"mean": mean, "interval": [low, high]}}

    rewards = {name: changed(*values) for name, values in changes.items()}
    rate = {"judge": "gold", "win_rate": 0.4, "interval": [0.3, 0.55]}
    return {
        "compare_with": "sft",
        "rewards": {"proxy": {"trained": ["ppo"]}, "gold": {"trained": False}},
        "policies": {"sft": policy(), "ppo": policy(rewards=rewards, win_rate=rate, length=changed(2, -1, 5))},
    }


def test_the_verdict_says_what_lies_inside_the_noise():
    sentences = verdict(made_up_metrics(proxy=(1.0, 0.5, 1.5), gold=(0.1, -0.1, 0.3)))
    assert sentences[0] == "Judged by gold, not told apart from sft: ppo (40% [30%, 55%])."
    assert "proxy +1.00 [+0.50, +1.50]; gold (not trained against) +0.10 [-0.10, +0.30] (inside the noise)" in sentences[1]
    assert sentences[-1].startswith("Inside the noise, as differences from sft: ppo: score by gold, length. Looked at: scores,")
    assert not any("over-optimised" in sentence for sentence in sentences)


def test_the_verdict_warns_of_over_optimisation():
    sentences = verdict(made_up_metrics(proxy=(1.0, 0.5, 1.5), gold=(-0.2, -0.3, -0.1)))
    assert any(sentence.startswith("ppo may be over-optimised: it gains by proxy") for sentence in sentences)
    metrics = made_up_metrics(proxy=(1.0, 0.5, 1.5), gold=(-0.2, -0.3, -0.1))
    metrics["rewards"]["proxy"]["trained"] = ["another"]
    assert not any("over-optimised" in sentence for sentence in verdict(metrics))


def judged(judge, **policies):
    """Policies that all win against `sft`, and differ from it by `proxy`; `ppo` was trained against that."""
    metrics = made_up_metrics(proxy=(1.0, 0.5, 1.5))
    ppo = metrics["policies"].pop("ppo")
    rate = {"judge": judge, "win_rate": 0.7, "interval": [0.6, 0.8]}
    metrics["policies"] |= {name: ppo | {"win_rate": rate} | more for name, more in policies.items()}
    return verdict(metrics)


def test_a_win_by_the_judge_that_a_policy_was_made_for_is_marked():
    chosen = {"best_of": {"policy": "sft", "n": 4, "reward": "proxy"}}
    of_trained = {"best_of": {"policy": "ppo", "n": 4, "reward": "gold"}}
    first = judged("proxy", dpo={}, ppo={}, best=chosen, both=of_trained)[0]
    assert first == (
        "Judged by proxy, better than sft: dpo (wins 70% [60%, 80%]), ppo (wins 70% [60%, 80%]; trained against this judge), "
        "best (wins 70% [60%, 80%]; chosen by this judge), both (wins 70% [60%, 80%]; trained against this judge)."
    )
    assert "this judge" not in judged("gold", ppo={}, best=chosen)[0]
    assert "this judge" not in judged("a chat model", ppo={}, best=chosen)[0]


def test_whether_a_policy_was_trained_against_a_reward_is_said_of_each():
    chosen = {"best_of": {"policy": "sft", "n": 4, "reward": "proxy"}}
    _, dpo, ppo, best, *_ = judged("proxy", dpo={}, ppo={}, best=chosen)
    assert dpo.startswith("dpo against sft: proxy (not trained against) +1.00")
    assert ppo.startswith("ppo against sft: proxy +1.00")
    assert best.startswith("best against sft: proxy +1.00")


# --- Reward models ---------------------------------------------------------------------------------------


def test_a_reward_model_scores_and_chooses_and_its_own_evaluation_is_shown(tmp_path, launch):
    """On the base alone, without an adapter of any policy."""
    from rlhf_recipes.evaluation.reward_models import measure_reward, write_evaluation
    from rlhf_recipes.rewards.saved import load_reward_adapter

    options = ("--max_steps", 2, "--per_device_train_batch_size", 4, "--save_strategy", "no", "--eval_strategy", "no")
    rows = ("--dataset_arguments", '{"rows": 32, "k": 4}')
    status, message = launch("reward", "--output_dir", tmp_path / "reward", *options, *rows)
    assert status == 0, message
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    reward = load_reward_adapter(model, tmp_path / "reward", "reward", tokenizer)
    write_evaluation(tmp_path / "reward", {"reward": measure_reward(reward, splits.rankings("test", rows=8))})
    values = {
        "policies": {"base": None, "best": {"best_of": {"policy": "base", "n": 3, "reward": "model"}}},
        "rewards": [{"path": str(tmp_path / "reward"), "name": "model", "trained": True}],
        "compare_with": "base",
        "judge": None,
        "frontier": [],
        "ptx_dataset": [],
    }
    status, message = launch("evaluate", "--config", settings(tmp_path, tmp_path / "report", **values))
    assert status == 0, message
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["policies"]["best"]["rewards"]["model"]["difference"]["mean"] > 0
    assert metrics["policies"]["best"]["win_rate"]["judge"] == "model"
    assert "model: reward: accuracy" in (tmp_path / "report" / "index.html").read_text()


def test_a_reward_model_is_no_policy(runs, tmp_path, launch):
    shutil.copytree(runs / "sft", tmp_path / "reward")
    config = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    (tmp_path / "reward" / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    path = settings(runs, tmp_path / "out", policies={"sft": str(runs / "sft"), "ppo": str(tmp_path / "reward")}, frontier=[])
    status, error = launch("evaluate", "--config", path)
    assert status == 2
    assert "policies: ppo" in error
    assert "is a reward model (task_type SEQ_CLS)" in error


def test_a_mapping_of_columns_belongs_to_the_source_that_has_them():
    data = DataArguments(eval_datasets=[DatasetSource(path="rlhf_recipes.tiny.splits.evaluation")], column_mapping={"a": "b"})
    with pytest.raises(RecipeError, match="column_mapping: belongs to `dataset_name`: set it in each entry of `eval_datasets`"):
        held_out_prompts(data, EvaluateArguments())
