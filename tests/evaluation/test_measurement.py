"""What is measured of answers: estimates and their noise, groups, scores, truthfulness, calibration, KL, the frontier."""

import json
import math
import re
import sys
import types
from importlib.machinery import ModuleSpec

from rlhf_recipes.config.data import DataArguments, DatasetSource
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.evaluation.collect import collect_results
from rlhf_recipes.evaluation.estimates import estimate, is_insignificant
from rlhf_recipes.evaluation.frontier import measure_frontier
from rlhf_recipes.evaluation.measurement import Measurement, PolicySamples
from rlhf_recipes.evaluation.named_rewards import NamedReward
from rlhf_recipes.evaluation.policy_results import contains, lm_eval_results, measure_policy
from rlhf_recipes.evaluation.prompts import groups_of, held_out_prompts
from rlhf_recipes.evaluation.report.html import render
from rlhf_recipes.evaluation.types import Frontier, FrontierPoint, PolicyResult, from_json, to_json
from rlhf_recipes.generation.answers import Answer, sample
from rlhf_recipes.generation.policies import Policy, load_policy_bank, read_policies
from rlhf_recipes.tiny import splits
from support.evaluations import BASE, save_adapter

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig


def questions(count=2, **columns):
    return Dataset.from_dict({"prompt": [f"q{number}" for number in range(count)], **columns})


def answers_of(*texts):
    return [Answer(text, (5,) * len(text.split()), True) for text in texts]


def measurement_of(*rewards, rows=None, **options):
    """Return a measurement that scores answers, without a model."""
    rows = questions() if rows is None else rows
    return Measurement(None, rows, {reward.name: reward for reward in rewards}, EvaluateArguments(compare_with="x", **options))


# --- Estimates -------------------------------------------------------------------------------------------


def test_an_estimate_is_a_mean_over_prompts_that_skips_nan():
    values = np.array([[1.0, 3.0], [math.nan, 5.0], [math.nan, math.nan]])
    result = estimate(values, np.array([[0.0], [math.nan], [1.0]]))
    assert (result.mean, result.n) == ((2 + 5) / 2, 2)
    assert to_json(result.difference) == {"mean": 2.0, "interval": None, "n": 1}  # one prompt: nothing to resample
    assert estimate(values, np.full((3, 1), math.nan)).difference is None
    assert estimate(np.full((2, 1), math.nan)) is None


def test_differences_are_taken_prompt_by_prompt():
    """Prompts that differ much in difficulty add no noise to the difference."""
    difficulty = np.random.default_rng(0).normal(size=(100, 1), scale=50)
    noise = np.random.default_rng(1).normal(size=(100, 1), scale=0.1)
    better = estimate(difficulty + 1 + noise, difficulty)
    assert not is_insignificant(better.difference)
    assert better.interval[0] < difficulty.mean() < better.interval[1]
    assert is_insignificant(estimate(difficulty + noise - noise.mean(), difficulty).difference)


def test_differences_that_all_prompts_agree_on():
    assert is_insignificant(estimate(np.ones((9, 1)), np.ones((9, 1))).difference)
    assert not is_insignificant(estimate(np.ones((9, 1)), np.zeros((9, 1))).difference)
    low, high = estimate(np.ones((50, 1)), share=True).interval
    assert 0.9 < low < high == 1


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_six_prompts_that_agree_are_significant_and_five_are_not(spread):
    """The sign test: 2 * 2**-6 = .03 is below .05, and 2 * 2**-5 = .06 is not."""
    for count in range(1, 9):
        better = 1 + spread * np.arange(count)[:, None]
        assert is_insignificant(estimate(better, np.zeros((count, 1))).difference) == (count < 6)


def test_groups():
    rows = Dataset.from_dict({"known": [False, True, True], "topic": ["b", "a", "b"]})
    assert {name: mask.tolist() for name, mask in groups_of(rows, "known").items()} == {
        "all": [True] * 3,
        "known": [False, True, True],
        "not known": [True, False, False],
    }
    assert list(groups_of(rows, "topic")) == ["all", "topic: a", "topic: b"]


# --- References ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "references", "compared"),
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
        (None, [["Paris", "City of Paris"], None], True),
        (True, [[" "], []], False),
    ],
)
def test_only_short_references_are_compared_by_default(wanted, references, compared):
    rows = Dataset.from_dict({"prompt": ["?"] * len(references), "reference": references})
    assert Measurement(None, rows, {}, EvaluateArguments(truthfulness=wanted)).compares_references == compared


@pytest.mark.parametrize("reference", [["a", "b", "c", "d"], [["x", "a"], ["b"], ["c", "cc"], ["D."]]])
def test_truthfulness_and_calibration_by_group(reference):
    rows = Dataset.from_dict({"prompt": ["q"] * 4, "reference": reference, "known": [True, True, False, False]})
    logps = np.log([[0.9], [0.5], [0.2], [0.6]])
    samples = PolicySamples(answers_of("a", "I do not know.", "wrong", "d"), {}, logps, logps - 0.25)
    result = measure_policy(measurement_of(rows=rows, group_by="known"), Policy("x"), samples, None)
    shares = {group: {kind: share.mean for kind, share in kinds.items()} for group, kinds in result.truthfulness.items()}
    assert shares["all"] == {"right": 0.5, "abstained": 0.25, "made_up": 0.25}
    assert shares["known"] == {"right": 0.5, "abstained": 0.5, "made_up": 0.0}
    assert result.over_abstained.mean == 0.5
    assert result.reworded.mean == 0
    # without the abstention, one answer per bin: |1 - .9|, |0 - .2|, |1 - .6|
    assert result.calibration["all"].ece == pytest.approx((0.1 + 0.2 + 0.4) / 3)
    assert result.calibration["all"].brier == pytest.approx((0.01 + 0.04 + 0.16) / 3)
    assert result.calibration["known"].n == 1
    assert (result.kl.mean, result.kl.n) == (pytest.approx(0.25), 4)
    assert result.entropy.mean == pytest.approx(-logps.mean())
    content = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert from_json(PolicyResult, content) == result
    assert not {"best_of", "win_rate", "perplexity", "lm_eval"} & content.keys()  # they do not belong to this policy


@pytest.mark.parametrize(
    ("answer", "reference", "contained"),
    [
        ("The capital of France is Paris.", "paris", True),
        ("It is Paris, of course", "Paris.", True),
        ("Parisians", "Paris", False),
        ("He lives in NYC now", ["New York City", "NYC"], True),
        ("He lives in Rome", ["New York City", "NYC"], False),
        ("C++ it is", "C++", True),
        ("nothing", " . ", False),
    ],
)
def test_answers_that_say_more_than_the_reference_are_found(answer, reference, contained):
    assert contains(answer, reference) == contained
    other = "x" if isinstance(reference, str) else ["x"]
    rows = Dataset.from_dict({"prompt": ["q", "q"], "reference": [reference, other]})
    if reference != " . ":
        result = measure_policy(measurement_of(rows=rows), Policy("x"), PolicySamples(answers_of(answer, "x")), None)
        assert result.reworded.mean == contained / 2


def confident(answers, confidence):
    """Return each answer twice, all with one confidence."""
    logps = np.full((len(answers), 2), math.log(confidence))
    return PolicySamples(answers_of(*np.repeat(answers, 2)), {}, logps, logps)


def test_calibration_is_compared_with_the_baseline_and_with_chance():
    count = 40
    measurement = measurement_of(rows=questions(count, reference=["a"] * count), num_answers=2)
    answers = ["wrong" if number % 8 < 5 else "a" for number in range(count)]  # right in 3 of 8
    samples = {name: confident(answers, confidence) for name, confidence in (("x", 0.5), ("y", 0.9), ("z", 0.5))}
    results = collect_results(measurement, {name: Policy(name) for name in samples}, samples, None, None, None, {})
    x, y = (results.policies[name].calibration_of_all for name in "xy")
    assert not x.difference
    assert y.difference["ece"].mean == pytest.approx((0.9 - 3 / 8) - (0.5 - 3 / 8), abs=0.02)
    assert y.difference["brier"].mean == pytest.approx((3 * 0.1**2 + 5 * 0.9**2) / 8 - 0.25)
    # of 40 coins, and not of 80: the mean of |heads / 40 - 1/2|
    assert x.ece_if_calibrated == pytest.approx(math.sqrt(2 / math.pi) * 0.5 / math.sqrt(40), rel=0.15)
    noise = results.details[-1]
    assert "z: all that was compared" in noise
    assert "y: right, abstained, made up, length, share ended" in noise
    page = " ".join(render(results).split())
    mark = r'\(0.0\d\) <span class="mark">▲</span></td>\s*<td>0.51 <span class="mark">▲</span></td>'
    assert re.search(rf"<td>0.5[23] {mark}", page)
    assert re.search(r'<td class="noise">0.1[23] \(0.0\d\)</td>\s*<td class="noise">0.25</td>', page)


# --- Scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "gold returned 1 scores"),
        ([1.0, -math.inf], "gold returned -inf for completion 1 .*'q1'"),
        ([1.0, math.nan], "gold returned nan for completion 1 .*'q1'"),
        (None, "gold returned NoneType"),
    ],
)
def test_invalid_scores_are_an_error_that_names_the_prompt(scores, message):
    measurement = measurement_of(NamedReward("gold", lambda **columns: scores))
    with pytest.raises(RecipeError, match=message):
        measurement.score("gold", answers_of("a", "b"))


def test_an_example_that_contains_its_reference_says_so():
    measurement = measurement_of(rows=questions(reference=[["a", "b"], ["c"]]))
    samples = {"x": PolicySamples(answers_of("b", "It is c")), "y": PolicySamples(answers_of("I do not know", "d"))}
    results = collect_results(measurement, {name: Policy(name) for name in samples}, samples, None, None, None, {})
    kinds = [[answer.kind for answer in example.answers.values()] for example in results.examples]
    assert kinds == [["right", "abstained"], ["contains_reference", "made_up"]]
    assert [example.reference for example in results.examples] == ["a / b", "c"]
    assert "x, contains reference" in render(results)


def test_a_reward_that_applies_nowhere_is_a_dash():
    measurement = measurement_of(NamedReward("nowhere", lambda completions, **columns: [None] * len(completions)))
    answers = {"x": answers_of("a", "b"), "y": answers_of("a", "c")}
    samples = {name: PolicySamples(texts, {"nowhere": measurement.score("nowhere", texts)}) for name, texts in answers.items()}
    points = [FrontierPoint(step=1, kl=None, rewards={"nowhere": None})]
    frontier = Frontier(runs={"r": points}, best_of=[], chooser=None)
    results = collect_results(measurement, {name: Policy(name) for name in answers}, samples, "nowhere", frontier, None, {})
    content = to_json(results)
    assert content["policies"]["y"]["rewards"] == {"nowhere": None}
    assert content["policies"]["y"]["win_rate"] is None
    assert results.details[0].startswith("There is no reward or judge")
    assert render(results).count("<td>-</td>") >= 4


@pytest.mark.parametrize("folder", [None, "runs/reward"])
def test_equal_answers_have_equal_scores_and_are_scored_once(folder):
    """A model's scores differ from batch to batch by rounding; here they do in every batch."""
    batches = []

    def drifting(prompts, completions, **columns):
        batches.append(list(zip(prompts, completions, columns["reference"], strict=True)))
        return [len(text) + 1e-7 * len(batches) for text in completions]

    measurement = measurement_of(NamedReward("model", drifting, folder=folder), rows=questions(reference=["r0", "r1"]))
    first = measurement.score("model", answers_of("a", "a", "b", "cc"))
    second = measurement.score("model", answers_of("dd", "a", "a", "cc"))
    assert (first[0, 0], second[0, 1], second[1, 1]) == (first[0, 1], first[0, 0], first[1, 1])
    assert batches == [[("q0", "a", "r0"), ("q1", "b", "r1"), ("q1", "cc", "r1")], [("q0", "dd", "r0"), ("q1", "a", "r1")]]


def test_functions_may_score_equal_texts_by_their_tokens():
    cut_off, ended = Answer("a", (5,), False), Answer("a", (5, 2), True)
    measurement = measurement_of(NamedReward("length", lambda completion_ids, **columns: [len(ids) for ids in completion_ids]))
    assert measurement.score("length", [cut_off, ended, ended, cut_off]).tolist() == [[1, 2], [2, 1]]


def test_best_of_n_on_the_frontier_skips_prompts_by_reward(monkeypatch):
    """Each reward counts the prompts that it and the chooser apply to, not those that all rewards apply to."""

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
    monkeypatch.setattr(Measurement, "sample", lambda self, policy, count, seed: answers_of("1", "3", "10", "20"))
    (point,) = measure_frontier(measurement, 0).best_of
    means = {name: score and (score.mean, score.n) for name, score in point.rewards.items()}
    assert means == {"everywhere": ((3 + 20) / 2, 2), "once": (-3, 1), "never": None}


# --- Prompts ---------------------------------------------------------------------------------------------


def test_prompts_come_from_the_test_split_or_a_whole_file(tmp_path):
    arguments = EvaluateArguments(group_by="known")
    data = DataArguments(dataset_name="rlhf_recipes.tiny.splits.evaluation", dataset_arguments={"rows": 6})
    assert set(held_out_prompts(data, arguments).column_names) == {"prompt", "reference", "known"}
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "Who?"}\n{"prompt": "Where?"}\n')
    assert held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments())["prompt"] == ["Who?", "Where?"]
    with pytest.raises(RecipeError, match=r"group_by: .*'known'.*prompt"):
        held_out_prompts(DataArguments(dataset_name=str(file)), arguments)


def test_repeated_prompts_are_kept_once(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    pairs = [("Who?", "A", "B"), ("Where?", "C", "D"), ("Who?", "A", "E")]
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) for pair in pairs]
    file.write_text("\n".join(lines))
    assert held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments())["prompt"] == ["Who?", "Where?"]
    assert "1 of 3 rows" in capsys.readouterr().out
    answers = [("Who?", "A"), ("Who?", "B"), ("Who?", "A")]  # with another reference it is another question
    file.write_text("\n".join(json.dumps({"prompt": prompt, "reference": answer}) for prompt, answer in answers))
    rows = held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments())
    assert rows["reference"] == ["A", "B"]
    answers = [("Who?", ["A", "B"]), ("Who?", ["A"]), ("Who?", ["A", "B"])]
    file.write_text("\n".join(json.dumps({"prompt": prompt, "reference": answer}) for prompt, answer in answers))
    rows = held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments())
    assert rows["reference"] == [["A", "B"], ["A"]]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"reference": 42}, {}, r"reference: row 1: 42 is neither a text nor a list of texts"),
        ({"topic": ["a"]}, {"group_by": "topic"}, r"group_by: .*'topic' holds \['a'\] in row 1"),
    ],
)
def test_unusable_columns_are_named_with_the_row(tmp_path, row, options, message):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Who?"} | dict.fromkeys(row), {"prompt": "Where?"} | row]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecipeError, match=message):
        held_out_prompts(DataArguments(dataset_name=str(file)), EvaluateArguments(**options))


def test_column_mapping_needs_a_dataset_name():
    data = DataArguments(eval_datasets=[DatasetSource(path="rlhf_recipes.tiny.splits.evaluation")], column_mapping={"a": "b"})
    with pytest.raises(RecipeError, match="column_mapping: "):
        held_out_prompts(data, EvaluateArguments())


# --- With a model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An SFT policy, and a PPO run with a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    save_adapter(folder / "sft", 1)
    save_adapter(folder / "ppo", 2)
    save_adapter(folder / "ppo" / "checkpoint-10", 2)
    (folder / "ppo" / "checkpoint-10" / "trainer_state.json").write_text("{}")
    return folder


def load_measurement(policies, rows, tokenizer, **options):
    arguments, policies = EvaluateArguments(**options), read_policies(policies)
    bank = load_policy_bank(ModelConfig(model_name_or_path=BASE, dtype="float32"), arguments, policies, tokenizer)
    return Measurement(bank, rows, {}, arguments)


def test_a_policy_may_have_the_name_of_a_checkpoint_on_the_frontier(runs, tokenizer):
    name = "checkpoint-10"
    options = {"frontier": [str(runs / "ppo")], "max_completion_length": 4, "batch_size": 8}
    measurement = load_measurement(
        {name: str(runs / "sft")}, splits.evaluation(rows=8), tokenizer, compare_with=name, **options
    )
    ((point,),) = measure_frontier(measurement, 0).runs.values()
    assert point.step == 10
    assert abs(point.kl.mean) > 0.01  # from the policy, not from the checkpoint itself
    with measurement.bank.use_policy(name) as model:  # it is still there
        assert sample(model, tokenizer, list(measurement.rows["prompt"]), max_new_tokens=1)
    with pytest.raises(RecipeError, match="policies: checkpoint-10: "):
        measurement.bank.add(name, None, f"policies: {name}")


def test_kl_by_sampling_is_near_the_exact_kl(runs, tokenizer):
    """Answers have one token, so their distribution can be written down."""
    rows = splits.evaluation(rows=5)
    policies = {"sft": str(runs / "sft"), "ppo": str(runs / "ppo")}
    measurement = load_measurement(policies, rows, tokenizer, max_completion_length=1, num_answers=150, batch_size=750)
    answers = measurement.sample("ppo", 150, seed=0)
    gaps = measurement.log_probs("ppo", answers) - measurement.log_probs("sft", answers)
    logps = {}
    for name in policies:
        with measurement.bank.use_policy(name) as model, torch.no_grad():
            logps[name] = torch.stack([first_token(model, tokenizer, prompt) for prompt in rows["prompt"]])
    exact = (logps["ppo"].exp() * (logps["ppo"] - logps["sft"])).sum(1).mean().item()
    assert exact > 0.05
    standard_error = math.sqrt((gaps.var(1) / gaps.shape[1]).sum()) / len(gaps)
    assert standard_error < exact / 5
    assert abs(estimate(gaps).mean - exact) < 4 * standard_error


def first_token(model, tokenizer, prompt):
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    return model(**inputs).logits[0, -1].log_softmax(-1)


def test_lm_eval_runs_with_each_policy_active(runs, tokenizer, monkeypatch):
    folders = {"base": None, "sft": str(runs / "sft"), "ppo": str(runs / "ppo")}
    measurement = load_measurement(folders, None, tokenizer, lm_eval_tasks=["arc_easy"])
    prompt = splits.evaluation(rows=1)["prompt"][0]

    def simple_evaluate(model, tasks):
        assert tasks == ["arc_easy"]
        return {"results": {"arc_easy": {"acc": first_token(model, tokenizer, prompt).max().item()}}}

    for name, content in (
        ("lm_eval", {"simple_evaluate": torch.no_grad()(simple_evaluate)}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": lambda model, tokenizer, batch_size: model}),
    ):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    results = [lm_eval_results(measurement, Policy(name, folder)) for name, folder in folders.items()]
    assert len({result["arc_easy"]["acc"] for result in results}) == 3
