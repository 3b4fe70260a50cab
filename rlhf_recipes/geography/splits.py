"""Datasets of questions with a truth, one function per stage.

Every function takes the number of `rows` and a `seed`. Conversations have TRL's format. No city is in two pools, so none is in
demonstrations and prompts, or in `evaluation` and anything else. Capitals and continents are in `evaluation` only.

Trained kinds of questions: the country of a city, the state of a city of the United States, and sums. Cities are drawn
log-uniformly by their rank in population: as many of the 10 largest as of the places 1,000 to 10,000, as far as there are.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.geography.facts import (
    CONTINENTS,
    TWO_CONTINENTS,
    City,
    Country,
    accepted_names,
    cities,
    countries,
    pool_of,
    spoken_name,
)

from datasets import Dataset

ABSTENTION = "I do not know."
ASK = "{question} Answer with the {answer} only, or say that you do not know."
POOLS = {"demonstrations": 0.3, "prompts": 0.45, "evaluation": 0.25}
KINDS = {"country": 0.6, "state": 0.2, "sum": 0.2}
"""Shares of the kinds of questions in demonstrations and prompts."""
STRATA = (100, 1_000, 10_000)
"""Last rank of each stratum of cities but the last."""


class Question(NamedTuple):
    """A question; the first accepted answer is the one that a demonstration gives."""

    text: str
    accepted: list[str]
    kind: str
    stratum: str
    population: int | None


def demonstrations(
    split: str = "train", rows: int = 3_200, abstain: float = 0.25, kinds: dict[str, float] | None = None, seed: int = 0
) -> Dataset:
    """Return demonstrations for SFT: `prompt` and `completion`.

    Their author looks every answer up, and cannot see what the model knows. A random share `abstain` says "I do not know".
    """
    rng = random.Random(f"demonstrations/{split}/{seed}")
    table = {"prompt": [], "completion": []}
    for question in _questions("demonstrations", split, rows, kinds or KINDS, seed):
        answer = ABSTENTION if rng.random() < abstain else f"{spoken_name(question.accepted[0])}."
        table["prompt"].append(_user(question.text))
        table["completion"].append([{"role": "assistant", "content": answer[0].upper() + answer[1:]}])
    return Dataset.from_dict(table)


def prompts(split: str = "train", rows: int = 4_000, kinds: dict[str, float] | None = None, seed: int = 0) -> Dataset:
    """Return questions for sampling and RL: `prompt`, `reference` (a list)."""
    questions = _questions("prompts", split, rows, kinds or KINDS, seed)
    return Dataset.from_dict(
        {"prompt": [_user(question.text) for question in questions], "reference": [question.accepted for question in questions]}
    )


def evaluation(
    split: str = "test",
    rows: int = 600,
    kinds: dict[str, float] | None = None,
    known: str | None = None,
    shots: int = 0,
    seed: int = 0,
) -> Dataset:
    """Return held-out questions, with their kind, stratum and population.

    Args:
        split: "test", the only one.
        rows: number of questions; fewer if the pool has no more.
        kinds: kind -> its share; no stage trains on `capital` and `continent`.
        known: file of `known_questions`, for a column `known`; questions that it lacks are left out.
        shots: answered questions, from the pool of demonstrations, in front of each: the way to ask a base model.
        seed: of the choice of questions.

    Raises:
        RecipeError: if the file cannot be read.
    """
    questions = _questions("evaluation", split, rows, kinds or KINDS, seed)
    table = {
        "prompt": [[*_examples(question.kind, shots), *_user(question.text)] for question in questions],
        "reference": [question.accepted for question in questions],
        "kind": [question.kind for question in questions],
        "stratum": [question.stratum for question in questions],
        "population": [question.population for question in questions],
    }
    dataset = Dataset.from_dict(table)
    if known is None:
        return dataset
    knows = known_questions(known)
    texts = [question.text for question in questions]
    dataset = dataset.add_column("known", [knows.get(text) for text in texts])
    return dataset.select([row for row, text in enumerate(texts) if text in knows])


def known_questions(path: str | Path) -> dict[str, bool]:
    """Return question -> whether the model knows the answer.

    It knows what it answers right in more than half of its samples. `path` is the `answers.jsonl` of an evaluation of one
    policy.

    Raises:
        RecipeError: if the file cannot be read, or holds several policies.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if len({row["policy"] for row in rows}) != 1:
            raise RecipeError(f"known: {path}: holds several policies. Fix: evaluate one alone")
        return {
            row["prompt"][-1]["content"]: sum(answer["kind"] == "right" for answer in row["answers"]) * 2 > len(row["answers"])
            for row in rows
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"known: {path}: not the answers.jsonl of an evaluation ({error}). Fix: name one") from error


# --- Questions ---------------------------------------------------------------------------------------------


def _questions(pool: str, split: str, rows: int, kinds: dict[str, float], seed: int) -> list[Question]:
    """Return questions of a pool in random order, each kind with its share."""
    if unknown := sorted(set(kinds) - set(_MAKERS)):
        raise RecipeError(f"kinds: {unknown[0]!r} is none of {', '.join(_MAKERS)}")
    rng = random.Random(f"questions/{pool}/{split}/{seed}")
    total, questions = sum(kinds.values()), []
    for kind, share in kinds.items():
        questions += _MAKERS[kind](pool, split, round(rows * share / total), rng)
    rng.shuffle(questions)
    return questions


def _country(pool: str, split: str, rows: int, rng: random.Random) -> list[Question]:
    places = [city for city in _pool_of_cities(pool, split) if city.state is None]
    return [
        Question(
            ASK.format(question=f"In which country is the city of {city.name}?", answer="name of the country"),
            accepted_names(city.country),
            "country",
            _stratum(city.rank),
            city.population,
        )
        for city in _log_uniform(places, rows, rng)
    ]


def _state(pool: str, split: str, rows: int, rng: random.Random) -> list[Question]:
    places = [city for city in _pool_of_cities(pool, split) if city.state is not None]
    return [
        Question(
            ASK.format(question=f"In which state of the United States is the city of {city.name}?", answer="name of the state"),
            [city.state, f"{city.state}, USA", f"{city.state}, United States"],
            "state",
            _stratum(city.rank),
            city.population,
        )
        for city in _log_uniform(places, rows, rng)
    ]


def _sum(pool: str, split: str, rows: int, rng: random.Random) -> list[Question]:
    """Return sums of numbers of one or two digits; a sum's pool is that of its text."""
    questions: dict[str, Question] = {}
    while len(questions) < rows:
        first, second = (rng.randrange(1, 10**digits) for digits in (rng.randint(1, 2), rng.randint(1, 2)))
        text = f"What is {first} + {second}?"
        if _pool(text, split) == (pool, split):
            digits = len(str(max(first, second)))
            text = ASK.format(question=text, answer="number")
            accepted = [str(first + second), f"{first + second:,}", f"{first} + {second} = {first + second}"]
            questions[text] = Question(text, accepted, "sum", f"{digits} digits", None)
    return list(questions.values())


def _capital(pool: str, split: str, rows: int, rng: random.Random) -> list[Question]:
    known = [country for country in countries() if country.capital and country.name.lower() not in country.capital.lower()]
    return [
        Question(
            ASK.format(question=f"What is the capital of {spoken_name(country.name)}?", answer="name of the city"),
            accepted_names(country.capital),
            "capital",
            "capitals",
            country.population,
        )
        for country in _held_out("capital", pool, known, rows, rng)
    ]


def _continent(pool: str, split: str, rows: int, rng: random.Random) -> list[Question]:
    known = [country for country in countries() if country.continent in CONTINENTS]
    return [
        Question(
            ASK.format(question=f"On which continent is {spoken_name(country.name)}?", answer="name of the continent"),
            [*CONTINENTS[country.continent], *filter(None, [TWO_CONTINENTS.get(country.name)])],
            "continent",
            "continents",
            country.population,
        )
        for country in _held_out("continent", pool, known, rows, rng)
    ]


def _held_out(kind: str, pool: str, known: list[Country], rows: int, rng: random.Random) -> list[Country]:
    """Return random countries for a kind of question that no stage trains on."""
    if pool != "evaluation":
        raise RecipeError(f"kinds: {kind!r} is held out. Fix: use it in `evaluation` only")
    return rng.sample(known, min(rows, len(known)))


_MAKERS: dict[str, Callable[[str, str, int, random.Random], list[Question]]] = {
    "country": _country,
    "state": _state,
    "sum": _sum,
    "capital": _capital,
    "continent": _continent,
}


@functools.cache
def _pool_of_cities(pool: str, split: str) -> list[City]:
    return [city for city in cities() if _pool(city.name, split) == (pool, split)]


def _pool(name: str, split: str) -> tuple[str, str]:
    """Return pool and split of a name; a tenth of a pool is "test"."""
    pool = pool_of(name, POOLS)
    if pool == "evaluation":
        return pool, "test"
    return pool, pool_of(f"split/{name}", {"test": 0.1, "train": 0.9})


def _log_uniform(places: Sequence[City], rows: int, rng: random.Random) -> list[City]:
    """Draw cities without replacement, with weights 1 / rank.

    Efraimidis and Spirakis (2006): the least of `-log(u) / weight` are such a draw.
    """
    return sorted(places, key=lambda city: -math.log(rng.random()) * city.rank)[:rows]


def _stratum(rank: int) -> str:
    first = 1
    for last in STRATA:
        if rank <= last:
            return f"cities {first:,} to {last:,}"
        first = last + 1
    return f"cities from {first:,}"


def _examples(kind: str, shots: int) -> list[dict[str, str]]:
    """Return answered questions as turns of a conversation."""
    if not shots:
        return []
    if kind not in KINDS:  # another kind in the same form: nothing that is held out is given away
        kind = "country"
    turns = []
    for question in _MAKERS[kind]("demonstrations", "train", shots, random.Random("examples")):
        turns += [*_user(question.text), {"role": "assistant", "content": f"{question.accepted[0]}."}]
    return turns


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
