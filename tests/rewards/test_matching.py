"""Shares of right, abstaining and made-up answers."""

from rlhf_recipes.rewards.matching import Truthfulness, normalise

import pytest


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


def test_no_answers_are_an_error():
    with pytest.raises(ValueError, match="no answers"):
        Truthfulness().compute(predictions=[], references=[])
