"""Questions about cities: disjoint pools, log-uniform draws, accepted names."""

import json
import re

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.geography import facts, splits
from rlhf_recipes.rewards import Abstention

import pytest


def text_of(row):
    return row["prompt"][-1]["content"]


def subject(text):
    """Return the city or sum that a question is about."""
    return re.search(r"city of (.+?)\?|is (\d+ \+ \d+)\?", text)[0]


def test_cities_are_named_once_and_do_not_tell_their_country():
    cities = facts.cities()
    assert len({city.name for city in cities}) == len(cities) > 20_000
    assert [city.population for city in cities] == sorted((city.population for city in cities), reverse=True)
    assert not [city for city in cities if city.country.lower() in city.name.lower()]
    by_name = {city.name: city for city in cities}
    assert (by_name["Chicago"].country, by_name["Chicago"].state) == ("United States", "Illinois")
    assert (by_name["Eindhoven"].country, by_name["Eindhoven"].state) == ("Netherlands", None)
    assert "Mexico City" not in by_name


def test_no_city_is_in_two_pools():
    pools = [
        splits.demonstrations(rows=2_000),
        splits.demonstrations("test", rows=200),
        splits.prompts(rows=2_000),
        splits.prompts("test", rows=200),
        splits.evaluation("test", rows=1_000),
    ]
    subjects = [{subject(text_of(row)) for row in pool} for pool in pools]
    for number, one in enumerate(subjects):
        assert len(one) == len(pools[number])
        assert not any(one & other for other in subjects[:number])


def test_kinds_have_their_shares_and_some_are_held_out():
    rows = splits.evaluation(rows=400, kinds={"country": 0.5, "capital": 0.25, "sum": 0.25})
    assert {kind: rows["kind"].count(kind) for kind in ("country", "capital", "sum")} == {
        "country": 200,
        "capital": 100,
        "sum": 100,
    }
    for stage in (splits.demonstrations, splits.prompts):
        for kind in ("capital", "continent"):
            with pytest.raises(RecipeError, match="held out"):
                stage(kinds={kind: 1.0})
    with pytest.raises(RecipeError, match="none of country, state, sum, capital, continent"):
        splits.prompts(kinds={"countries": 1.0})


def test_draws_are_log_uniform_in_rank():
    """Each tenfold range of ranks has about as many, until the small ranges have no more."""
    ranks = [city.rank for city in facts.cities()]
    drawn = splits._log_uniform(facts.cities(), 300, splits.random.Random(0))
    counts = [sum(low < city.rank <= 10 * low for city in drawn) for low in (100, 1_000)]
    assert len(ranks) > 20_000
    assert 60 < counts[0] < 120
    assert 60 < counts[1] < 120


def test_every_accepted_answer_is_right_to_the_reward():
    reward = Abstention()
    for row in splits.prompts(rows=300):
        answers = [*row["reference"], f"{row['reference'][0].upper()}.", "Atlantis.", "I do not know."]
        scores = reward([[{"role": "assistant", "content": text}] for text in answers], [row["reference"]] * len(answers))
        assert scores == [1.0] * (len(answers) - 2) + [-1.0, 0.0]


def test_demonstrations_are_right_or_abstain_at_the_given_rate():
    reference = {text_of(row): row for row in splits.demonstrations(rows=1_000, abstain=0.0)}
    rows = splits.demonstrations(rows=1_000, abstain=0.25)
    said = [row["completion"][0]["content"] for row in rows]
    assert 0.2 < said.count(splits.ABSTENTION) / len(rows) < 0.3
    for row, text in zip(rows, said, strict=True):
        assert text in (splits.ABSTENTION, reference[text_of(row)]["completion"][0]["content"])
    assert "The United States." not in {splits.ABSTENTION}
    assert splits.demonstrations(rows=50, seed=1)[0] != splits.demonstrations(rows=50, seed=2)[0]


def test_shots_stand_before_the_question_and_give_nothing_away():
    rows = splits.evaluation(rows=60, kinds={"country": 0.5, "capital": 0.5}, shots=3)
    held_out = {subject(text_of(row)) for row in splits.evaluation(rows=4_000) if row["kind"] == "country"}
    for row in rows:
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"] * 3 + ["user"]
        shown = {subject(turn["content"]) for turn in row["prompt"][:-1:2]}
        assert not shown & held_out


def test_known_is_what_is_answered_right_in_more_than_half_of_the_samples(tmp_path):
    rows = splits.evaluation(rows=20, kinds={"country": 1.0})
    path = tmp_path / "answers.jsonl"
    kinds = [["right"] * right + ["made_up"] * (4 - right) for right in range(5)]
    lines = [
        {"policy": "base", "prompt": row["prompt"], "answers": [{"kind": kind} for kind in kinds[number % 5]]}
        for number, row in enumerate(rows.select(range(10)))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = splits.evaluation(rows=20, kinds={"country": 1.0}, known=str(path))
    assert known["known"] == [False, False, False, True, True] * 2
    assert [text_of(row) for row in known] == [text_of(row) for row in rows.select(range(10))]
    path.write_text(json.dumps({"policy": "base"}) + "\n")
    with pytest.raises(RecipeError, match=r"^known: .*answers\.jsonl"):
        splits.evaluation(known=str(path))
