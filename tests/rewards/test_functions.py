"""Reward functions: values computed by hand, checks of scores, `reward_funcs`, and a step of TRL's trainer."""

import math
import pickle
import re

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.rewards.functions import (
    Abstention,
    LengthPenalty,
    RepetitionPenalty,
    exact_match,
    last_text,
    normalised_match,
)
from rlhf_recipes.rewards.matching import accepted_answers, kinds_of, normalise
from rlhf_recipes.rewards.protocol import checked_reward
from rlhf_recipes.rewards.reward_funcs import load_rewards

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl.trainer.utils import get_callable_name, is_async_callable

BASE = "rlhf_recipes.tiny.base"
REWARDS = "rlhf_recipes.rewards"


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# --- Comparing with a reference --------------------------------------------------------------------------


def test_last_text():
    assert last_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]) == "b"
    assert last_text([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize("shape", [list, lambda texts: chat(*texts)], ids=["text", "conversation"])
@pytest.mark.parametrize(
    ("reward", "expected"),
    [(exact_match, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, None, None]), (normalised_match, [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, None, None])],
)
def test_matches(reward, expected, shape):
    completions = ["Larkhill.", " Ça va? \n", "larkhill", "", "ÉCOLE  一", "Larkhill. Or not", "Larkhill", ""]
    reference = ["Larkhill.", "Ça va?", " Larkhill. ", "Larkhill", "école 一", "Larkhill.", None, " "]
    assert reward(prompts=[""] * 8, completions=shape(completions), completion_ids=[], reference=reference) == expected


@pytest.mark.parametrize("reward", [exact_match, normalised_match, Abstention()])
def test_reference_column_is_needed_and_holds_texts(reward):
    name = get_callable_name(reward)
    with pytest.raises(RecipeError, match=f"^{name}: the data have no column `reference`.*column_mapping"):
        reward(completions=["a"], answer=["a"])
    for unusable in (3, {"a": 1}, [["a"]]):
        with pytest.raises(RecipeError, match=rf"^{name}: reference: {re.escape(repr(unusable))} is neither a text nor a list"):
            reward(completions=["a", "a"], reference=["a", unusable])
    with pytest.raises(ValueError, match="zip"):
        reward(completions=["a", "a"], reference=["a"])


@pytest.mark.parametrize(
    ("reference", "accepted"),
    [
        ("Paris", ["Paris"]),
        (["Paris", " City of Paris ", "", None], ["Paris", "City of Paris"]),
        ('["Paris", "City of Paris"]', ['["Paris", "City of Paris"]', "Paris", "City of Paris"]),  # as PopQA has it
        ("['Paris', \"it's\"]", ["['Paris', \"it's\"]", "Paris", "it's"]),  # as pandas writes it
        ("[1, 2]", ["[1, 2]"]),
        ("[sic]", ["[sic]"]),
        ("[{[1]: 2}]", ["[{[1]: 2}]"]),  # Python that cannot be evaluated
        (None, []),
        ([], []),
        ([" ", None], []),
        (" ", []),
    ],
)
def test_several_accepted_answers(reference, accepted):
    assert accepted_answers(reference) == accepted
    answers = ["paris", *accepted, "Rome"]
    options = {"completions": answers, "reference": [reference] * len(answers)}
    exact, normalised = (reward(**options) for reward in (exact_match, normalised_match))
    kinds = kinds_of(answers, [reference] * len(answers))
    if not accepted:
        assert exact == normalised == Abstention()(**options) == [None] * len(answers)
        return
    assert exact == [0, *[1] * len(accepted), 0]
    assert normalised == [float("Paris" in accepted), *[1] * len(accepted), 0]
    assert Abstention()(**options) == [1 if score else -1 for score in normalised]
    assert kinds == ["right" if score else "made_up" for score in normalised]
    assert Abstention()(["I do not know"], reference=[reference]) == [0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a", "b"]}, "the data have no column `reference`.*column_mapping"),
        ({"reference": ["a", None], "answer": [3, 4]}, None),
        ({"reference": [["a", "b"], None]}, None),
        ({"reference": [7, 8]}, "reference: row 0: 7 is neither a text nor a list of texts. Fix: convert"),
        ({"reference": [{"text": "a"}, {"text": "b"}]}, "reference: row 0: {'text': 'a'} is neither"),
        ({"reference": [[["a"]], [["b"]]]}, "reference: row 0: .* is neither"),
        ({"reference": [[], [" "]]}, "reference: empty in all rows"),
    ],
)
def test_references_are_checked_before_sampling(columns, message):
    rows = Dataset.from_dict(columns)
    other = Dataset.from_dict({"reference": ["a"]})
    for path in ("exact_match", "normalised_match", "Abstention"):
        spec = {"path": f"{REWARDS}.{path}", "arguments": {}}
        if message is None:
            load_rewards([spec], rows, None)
            continue
        with pytest.raises(RecipeError, match=f"^reward_funcs, entry 1: {REWARDS}.{path}: {message}") as error:
            load_rewards([spec], other, rows)
        assert "quotes" not in str(error.value)
    load_rewards([f"{__name__}.lengths"], rows)  # who reads what it likes


def test_kinds_of_answers():
    answers = ["Larkhill.", "i do  not know, sorry", "Dunmere.", "", "Larkhill Dunmere"]
    assert kinds_of(answers, ["larkhill"] * 5) == ["right", "abstained", "made_up", "made_up", "made_up"]
    assert kinds_of(["No idea!", "I do not know"], ["x", "x"], ("no idea",)) == ["abstained", "made_up"]
    assert [normalise(' "The  Town", '), normalise("don't")] == ["the town", "don't"]


ANSWERS = ["Larkhill", "I do not know.", "i DO not  know who that is", "Mossgate.", "", "Larkhill", "I do not know"]
TRUTHS = ["Larkhill."] * 5 + [None, "Larkhill"]


def test_abstention():
    assert Abstention()(completions=chat(*ANSWERS), reference=TRUTHS) == [1, 0, 0, -1, -1, None, 0]
    reward = Abstention(right=2, abstaining=0.5, wrong=-3, phrases=["Mossgate", "No idea"])
    assert reward(completions=[*ANSWERS, "no idea!"], reference=[*TRUTHS, "x"]) == [2, -3, -3, 0.5, -3, None, -3, 0.5]


def report(known=None, truths=TRUTHS):
    metrics = []
    columns = {} if known is None else {"known": known}
    Abstention()(completions=ANSWERS, reference=truths, log_metric=lambda *metric: metrics.append(metric), **columns)
    assert len(dict(metrics)) == len(metrics)
    return dict(metrics)


def test_abstention_reports_shares_of_rows_with_a_reference():
    shares = {"abstention/right": 1 / 6, "abstention/abstained": 3 / 6, "abstention/wrong": 2 / 6}
    assert report() == pytest.approx(shares)
    assert report(known=[False] * 7) == pytest.approx(shares)
    # known: right, abstained, wrong, and one without a reference
    assert report(known=[True, True, False, True, None, True, False]) == pytest.approx(shares | {"abstention/over": 1 / 3})
    assert report(known=[True] * 7, truths=[None] * 7) == {}


# --- Penalties -------------------------------------------------------------------------------------------


def test_length_penalty():
    ids = [[1] * length for length in (0, 2, 3, 5, 9)]
    reward = LengthPenalty(slope=0.5, longest=5, shortest=3)
    assert reward(completions=[""] * 5, completion_ids=ids) == [-1.5, -0.5, 0, 0, -2]
    assert LengthPenalty(slope=0.5, longest=3)(completions=[""] * 5, completion_ids=ids) == [0, 0, 0, -1, -3]
    words = LengthPenalty(slope=2, longest=2, unit="words")
    assert words(completions=chat("", "a  b", "a b\nc d."), completion_ids=[[1] * 99] * 3) == [0, 0, -4]
    with pytest.raises(RecipeError, match="unit: words"):
        reward(completions=[""])


def test_repetition_penalty():
    completions = chat("", "a b", "a b c d", "a b a b a b", "The cat. The  cat. the cat", "é é é")
    assert RepetitionPenalty(2)(completions=completions) == pytest.approx([0, 0, 0, 2 / 5 - 1, 3 / 5 - 1, -1 / 2])
    assert RepetitionPenalty(1)(completions=completions) == pytest.approx([0, 0, 0, -4 / 6, -3 / 6, -2 / 3])
    assert RepetitionPenalty()(completions=["a a a a", "a a"]) == [-0.5, 0]


# --- What a reward returns -------------------------------------------------------------------------------


def lengths(completions, scale=1.0, **columns):
    return [scale * len(text) for text in completions]


async def lengths_later(completions, scale=1.0, **columns):
    return lengths(completions, scale)


class LengthsLater:
    async def __call__(self, completions, **columns):
        return lengths(completions)


def returning(scores):
    def reward(**columns):
        return scores

    return reward


def run(coroutine):
    """Run a coroutine that never waits."""
    with pytest.raises(StopIteration) as stop:
        coroutine.send(None)
    return stop.value.value


@pytest.mark.parametrize(
    "scores", [[1, None, -0.5], (1.0, None, -0.5), [np.float32(1), None, torch.tensor(-0.5)], [True, None, np.float64(-0.5)]]
)
def test_checked_reward_passes_numbers_through(scores):
    result = checked_reward(returning(scores))(prompts=["a", "b", "c"], completions=["", "", ""])
    assert result == [1, None, -0.5]
    assert [type(score) for score in result] == [float, type(None), float]


def test_checked_reward_passes_arrays_and_arguments_through():
    for array in (torch.tensor([1.0, 2.0]), np.array([True, False])):
        assert checked_reward(returning(array))(prompts=["a", "b"], completions=["", ""]) == array.tolist()
    seen = {}
    checked_reward(lambda **columns: seen.update(columns) or [0])(
        prompts=["a"], completions=["b"], completion_ids=[[1]], extra=[2]
    )
    assert seen == {"prompts": ["a"], "completions": ["b"], "completion_ids": [[1]], "extra": [2]}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "reward returned 1 scores.*list of 2"),
        (None, "returned NoneType"),
        (0.5, "returned float"),
        ("ab", "returned str"),
        ([1.0, math.nan], "returned nan for completion 1 .*The prompt: 'second"),
        ([-math.inf, 1.0], "returned -inf for completion 0 .*The prompt: 'first'"),
        ([0, 1e300], r"returned 1e\+300 for completion 1"),
        ([0, 10**400], "for completion 1"),
        ([0, "1.0"], "returned '1.0' for completion 1"),
        ([0, [1.0]], r"returned \[1.0\] for completion 1"),
        (torch.tensor([1.0, math.nan]), "returned nan for completion 1"),
    ],
)
def test_checked_reward_refuses(scores, message):
    with pytest.raises(RecipeError, match=f"^the reward .*{message}") as error:
        checked_reward(returning(scores))(prompts=["first", "second" * 99], completions=["", ""])
    assert len(str(error.value)) < 900


def test_checked_reward_keeps_asynchronous_rewards_asynchronous():
    for later in (lengths_later, LengthsLater()):
        reward = checked_reward(later)
        assert is_async_callable(reward)
        assert run(reward(prompts=["a", "b"], completions=["", "xy"])) == [0, 2]
        with pytest.raises(RecipeError, match="returned 2 scores"):
            reward(prompts=["a"], completions=["", ""]).send(None)
    assert not is_async_callable(checked_reward(lengths))
    assert [checked_reward(reward).__name__ for reward in (lengths, lengths_later, LengthsLater())] == [
        "lengths",
        "lengths_later",
        "LengthsLater",
    ]
    assert checked_reward(lengths, "other").__name__ == "other"


# --- From YAML -------------------------------------------------------------------------------------------


def make_lengths(scale):
    return LengthPenalty(slope=scale, longest=0, unit="words")


def make_nothing(scale=1):
    return scale


def without_columns(completions, reference):
    return [0.0] * len(completions)


class Failing:
    def __init__(self, size):
        raise ValueError(f"size:\n {size} is too large")

    def __call__(self, **columns):
        return []


class Open:
    def __init__(self, **options):
        self.options = options

    def __call__(self, **columns):
        return [self.options["anything"]]


def test_load_rewards():
    rewards, weights = load_rewards(
        [
            f"{REWARDS}.exact_match",
            {"path": f"{REWARDS}.Abstention", "weight": 2, "arguments": {"wrong": -2e0, "phrases": ["no"]}},
            {"path": f"{REWARDS}.RepetitionPenalty", "weight": 1e-3},
            {"path": f"{__name__}.lengths", "weight": 0, "arguments": {"scale": 3}},
            {"path": f"{__name__}.lengths", "weight": -0.5, "arguments": None},
            {"path": f"{__name__}.make_lengths", "arguments": {"scale": 2}},
            {"path": f"{__name__}.lengths_later", "arguments": {"scale": 2}},
            {"path": "trl.rewards.get_repetition_penalty_reward", "arguments": {}},
            {"path": f"{__name__}.Open", "arguments": {"anything": 7}},
        ]
    )
    assert weights == [1.0, 2.0, 0.001, 0.0, -0.5, 1.0, 1.0, 1.0, 1.0]
    assert [get_callable_name(reward) for reward in rewards] == [
        "exact_match", "Abstention", "RepetitionPenalty", "lengths", "lengths_2", "LengthPenalty", "lengths_later",
        "repetition_penalty_reward", "Open",
    ]  # fmt: skip
    columns = {"prompts": ["p"], "completions": ["no way out no way out"], "completion_ids": [[1] * 4], "reference": ["yes"]}
    assert [is_async_callable(reward) for reward in rewards] == [False] * 6 + [True, False, False]
    scores = [run(reward(**columns)) if is_async_callable(reward) else reward(**columns) for reward in rewards]
    assert scores == [[0], [0], [-0.25], [63], [21], [-12], [42], [-0.5], [7]]
    assert rewards[1](prompts=["p"], completions=["x"], reference=["yes"]) == [-2]
    assert [pickle.loads(pickle.dumps(reward)).__name__ for reward in rewards] == [reward.__name__ for reward in rewards]
    assert pickle.loads(pickle.dumps(rewards[3]))(**columns) == [63]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_match", "expected a folder, or a dotted path"),
        ("a..b", "expected a folder, or a dotted path"),
        ("nosuchmodule.f", "cannot import nosuchmodule .*PYTHONPATH.*No module named 'nosuchmodule'$"),
        ("nosuchmodule.sub.f", "No module named 'nosuchmodule'$"),
        (f"{REWARDS}.exactmatch", "rlhf_recipes.rewards has no 'exactmatch'; did you mean 'exact_match'?"),
        (f"{REWARDS}.protocol.TRL_KEYWORDS", "expected a function or a class"),
        ("builtins.max", "expected a function or a class with known parameters"),
        (f"{__name__}.without_columns", r"without_columns\(completions, reference\) does not take prompts.*`\*\*columns`"),
        ("trl.rewards.get_repetition_penalty_reward", "if it makes a reward, give it `arguments`"),
        ({"path": f"{__name__}.make_nothing", "arguments": {}}, "makes a int"),
        ({"path": f"{__name__}.Failing", "arguments": {"size": 3}}, "arguments: size: 3 is too large$"),
        (f"{REWARDS}.LengthPenalty", "arguments: slope: "),
        (
            {"path": f"{REWARDS}.LengthPenalty", "arguments": {"slop": 1, "longest": 3}},
            r"unknown argument 'slop' of LengthPenalty\(slope, .*\); did you mean 'slope'?",
        ),
        ({"path": f"{REWARDS}.LengthPenalty", "arguments": {"slope": 0, "longest": 3}}, "slope: .*greater than 0, found 0"),
        ({"path": f"{REWARDS}.LengthPenalty", "arguments": {"slope": 1, "longest": 3.5}}, "longest: .*found 3.5"),
        (
            {"path": f"{REWARDS}.LengthPenalty", "arguments": {"slope": 1, "longest": 3, "shortest": 4}},
            "arguments: shortest: 4 is more than longest: 3$",
        ),
        ({"path": f"{REWARDS}.LengthPenalty", "arguments": {"slope": math.inf, "longest": 3}}, "slope: .*finite"),
        ({"path": f"{REWARDS}.Abstention", "arguments": {"phrases": "no"}}, "phrases: .*found 'no'"),
        ({"path": f"{REWARDS}.Abstention", "arguments": {"phrases": ["?"]}}, "phrases: an empty phrase"),
        ({"path": f"{REWARDS}.Similarity", "arguments": {"model_name_or_path": "x", "kind": "bi"}}, "kind: .*'cross-encoder'"),
        (
            {"path": f"{__name__}.lengths", "arguments": {"columns": 1}},
            r"unknown argument 'columns' of lengths\(completions, scale=1.0, \*\*columns\)",
        ),
        ({"path": f"{__name__}.lengths", "arguments": {"completions": []}}, "'completions' comes from TRL"),
        ({"path": f"{__name__}.lengths", "arguments": [1]}, r"arguments: expected a mapping of names to values, found \[1\]"),
        ({"path": f"{__name__}.lengths", "wieght": 1}, "unknown key 'wieght'; did you mean 'weight'?"),
        ({"path": f"{__name__}.lengths", "weight": "much"}, "weight: expected a finite number, found 'much'"),
        ({"path": f"{__name__}.lengths", "weight": math.nan}, "weight: expected a finite number, found nan"),
        ({"weight": 1}, "expected a dotted path, or a mapping with `path`, found {'weight': 1}"),
        (3, "expected a dotted path, or a mapping with `path`, found 3"),
    ],
)
def test_load_rewards_refuses(spec, message):
    with pytest.raises(RecipeError, match=f"^reward_funcs, entry 2: .*{message.replace('?', '[?]')}"):
        load_rewards([f"{REWARDS}.exact_match", spec])


@pytest.mark.parametrize("specs", [[], f"{REWARDS}.exact_match"])
def test_load_rewards_needs_a_list(specs):
    with pytest.raises(RecipeError, match=r"^reward_funcs: expected a list of rewards, found "):
        load_rewards(specs)
