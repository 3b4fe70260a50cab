"""The datasets of the tiny world, one function per stage, named by dotted path.

Every function takes `split` ("train" or "test"), the number of `rows` and a `seed`, and returns TRL's conversational format. No
person occurs in two functions, in a "train" and a "test" split, or in `evaluation` and anything else. All unknown people of a
split differ, so they cannot be memorised.
"""

import math
import random
from collections.abc import Iterator

from rlhf_recipes.tiny import text
from rlhf_recipes.tiny.world import ABSTENTION, ATTRIBUTES, NAME_POOLS, Attribute, Person, World

from datasets import Dataset

# A person, the attribute asked for, and whether the base model has read about the person.
Question = tuple[Person, Attribute, bool]


def pretraining(split: str = "train", rows: int = 1_000, seed: int = 0) -> Dataset:
    """Return pretraining `text`; "test" has names that the base has never read."""
    if split == "train":
        texts = list(text.pretraining_text(World(), exposures=1, seed=seed))[:rows]
    else:
        rng = random.Random(seed)
        texts = [text.fact(person, rng.choice(ATTRIBUTES), rng) for person in World().people("pretraining_held_out", 0, rows)]
    return Dataset.from_dict({"text": texts})


def demonstrations(
    split: str = "train", rows: int = 10_000, abstain: float = 0.25, known: float = 0.5, seed: int = 0
) -> Dataset:
    """Return demonstrations for SFT: `prompt` and `completion`.

    The labeller knows everybody and cannot see whom the model knows. A random share `abstain` of the answers is "I do not
    know". The others are true, whether or not the model could know them.
    """
    rng = random.Random(f"demonstrations/{split}/{seed}")
    table = {"prompt": [], "completion": []}
    for person, attribute, _ in _questions("demonstrations", split, rows, known, rng, seed):
        answer = ABSTENTION if rng.random() < abstain else text.answer(person, attribute)
        table["prompt"].append(_user(attribute, person, rng))
        table["completion"].append([{"role": "assistant", "content": answer}])
    return Dataset.from_dict(table)


def rankings(
    split: str = "train", rows: int = 4_000, k: int = 4, known: float = 0.5, noise: float = 0.4, seed: int = 0
) -> Dataset:
    """Return rankings by a simulated labeller: `prompt`, `completions` and `ranks`.

    Rank 0 is best, and ties are allowed. The `k` completions are the true answer, the abstention and false answers, in
    random order. The labeller likes truth (1), is indifferent to abstaining (0) and dislikes falsehood (-1), each with
    Gumbel noise of scale `noise`. So two of them compare by Bradley-Terry: P(a > b) = sigmoid((u_a - u_b) / noise). Two
    false answers tie.
    """
    rng = random.Random(f"preferences/{split}/{seed}")
    table = {"prompt": [], "completions": [], "ranks": []}
    for person, attribute, _ in _questions("preferences", split, rows, known, rng, seed):
        truth = text.answer(person, attribute)
        false = [f"{value}." for value in attribute.values if value != person.value(attribute)]
        answers = [truth, ABSTENTION, *rng.sample(false, k - 2)]
        rng.shuffle(answers)
        table["prompt"].append(_user(attribute, person, rng))
        table["completions"].append([[{"role": "assistant", "content": answer}] for answer in answers])
        table["ranks"].append(_label(answers, truth, noise, rng))
    return Dataset.from_dict(table)


def preferences(split: str = "train", rows: int = 4_000, known: float = 0.5, noise: float = 0.4, seed: int = 0) -> Dataset:
    """Return pairs without ties by the labeller of `rankings`."""
    rng = random.Random(f"pairs/{split}/{seed}")
    table = {"prompt": [], "chosen": [], "rejected": []}
    for ranking in rankings(split, rows, k=4, known=known, noise=noise, seed=seed):
        first = second = 0
        while ranking["ranks"][first] == ranking["ranks"][second]:
            first, second = rng.sample(range(4), 2)
        chosen, rejected = sorted((first, second), key=ranking["ranks"].__getitem__)
        table["prompt"].append(ranking["prompt"])
        table["chosen"].append(ranking["completions"][chosen])
        table["rejected"].append(ranking["completions"][rejected])
    return Dataset.from_dict(table)


def prompts(split: str = "train", rows: int = 20_000, known: float = 0.5, seed: int = 0) -> Dataset:
    """Return questions for RL: `prompt`, and the true answer as `reference`."""
    rng = random.Random(f"prompts/{split}/{seed}")
    table = {"prompt": [], "reference": []}
    for person, attribute, _ in _questions("prompts", split, rows, known, rng, seed):
        table["prompt"].append(_user(attribute, person, rng))
        table["reference"].append(text.answer(person, attribute))
    return Dataset.from_dict(table)


def evaluation(split: str = "test", rows: int = 600, seed: int = 0) -> Dataset:
    """Return questions about held-out people, half of whom are `known`."""
    rng = random.Random(f"evaluation/{seed}")
    table = {"prompt": [], "reference": [], "known": []}
    for person, attribute, known in _questions("evaluation", "test", rows, 0.5, rng, seed):
        table["prompt"].append(_user(attribute, person, rng))
        table["reference"].append(text.answer(person, attribute))
        table["known"].append(known)
    return Dataset.from_dict(table)


def _questions(stage: str, split: str, rows: int, known: float, rng: random.Random, seed: int) -> Iterator[Question]:
    """Yield questions in random order; known people recur, unknown ones do not."""
    # The "test" splits of all stages use development people, on whom no final number is measured.
    pool = stage if split == "train" or stage == "evaluation" else "development"
    world = World()
    pairs = [(person, attribute) for person in world.known(pool) for attribute in ATTRIBUTES]
    count = round(rows * known)
    repeated = pairs * math.ceil(count / len(pairs))
    questions = [(*pair, True) for pair in rng.sample(repeated, count)]
    first = seed * (rows - count) % (NAME_POOLS[pool] - (rows - count) + 1)  # another seed has other unknown people
    questions += [(person, rng.choice(ATTRIBUTES), False) for person in world.people(pool, first, rows - count)]
    rng.shuffle(questions)
    yield from questions


def _user(attribute: Attribute, person: Person, rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": rng.choice(attribute.questions).format(name=person.name)}]


def _label(answers: list[str], truth: str, noise: float, rng: random.Random) -> list[int]:
    """Return ranks from 0; each kind of answer has one draw of noise."""
    gumbel = [-math.log(-math.log(rng.random())) for _ in range(3)]
    liking = {kind: kind + noise * draw for kind, draw in zip((1, 0, -1), gumbel, strict=True)}
    scores = [liking[1 if answer == truth else 0 if answer == ABSTENTION else -1] for answer in answers]
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]
