"""Kinds of answers."""

from rlhf_recipes.rewards.matching import kinds_of, normalise


def test_kinds():
    answers = ["Larkhill.", "i do  not know, sorry", "Dunmere.", "", "Larkhill Dunmere"]
    assert kinds_of(answers, ["larkhill"] * 5) == ["right", "abstained", "made_up", "made_up", "made_up"]
    assert kinds_of(["No idea!", "I do not know"], ["x", "x"], ("no idea",)) == ["abstained", "made_up"]


def test_normalise():
    assert normalise(' "The  Town", ') == "the town"
    assert normalise("don't") == "don't"
