"""The datasets of the tiny world, one function a stage, for YAML files to name by dotted path.

Every function takes `split` ("train" or "test"), the number of `rows` and a `seed`, and returns rows in the conversational
shape of TRL. People of different functions differ, those of a "test" split are in no "train" split of any of them, and those of
`evaluation` are in nothing else. All unknown people in a split are different ones, so that they cannot be learnt by heart.
"""

import math
import random
from collections.abc import Iterator

from rlhf_recipes.tiny import text
from rlhf_recipes.tiny.world import ABSTENTION, ATTRIBUTES, NAME_POOLS, Attribute, Person, World

from datasets import Dataset

# A person asked about and the answer that is true, with whether the base model has read about that person.
Question = tuple[Person, Attribute, bool]


def pretraining(split: str = "train", rows: int = 1_000, seed: int = 0) -> Dataset:
    """Rows of `text` in the manner of the base model's pretraining; "test" tells of names that it has never read."""
    if split == "train":
        texts = list(text.pretraining_text(World(), exposures=1, seed=seed))[:rows]
    else:
        rng = random.Random(seed)
        texts = [text.fact(person, rng.choice(ATTRIBUTES), rng) for person in World().people("pretraining_held_out", 0, rows)]
    return Dataset.from_dict({"text": texts})


def demonstrations(
    split: str = "train", rows: int = 10_000, abstain: float = 0.25, known: float = 0.5, seed: int = 0
) -> Dataset:
    """Demonstrations for SFT: `prompt` and `completion`.

    The labeller knows everybody and cannot see whom the model knows: a share `abstain` of the answers is "I do not know", at
    random, and the others are true, whether the model could know them or not.
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
    """Rankings by a simulated labeller: `prompt`, `completions` (`k` of them) and `ranks` (0 is best, ties allowed).

    The completions are the true answer, the abstention and false answers, in random order. The labeller likes truth (1), is
    indifferent to abstaining (0) and dislikes falsehood (-1), each with Gumbel noise of scale `noise`, which makes two of them
    compare as Bradley and Terry have it: P(a > b) = sigmoid((u_a - u_b) / noise). Two false answers tie.
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
    """Pairs by the labeller of `rankings`: `prompt`, `chosen`, `rejected`, of two answers that do not tie."""
    rng = random.Random(f"pairs/{split}/{seed}")
    table = {"prompt": [], "chosen": [], "rejected": []}
    for ranking in rankings(split, rows, k=4, known=known, noise=noise, seed=seed):
        while True:
            first, second = rng.sample(range(4), 2)
            if ranking["ranks"][first] != ranking["ranks"][second]:
                break
        chosen, rejected = sorted((first, second), key=ranking["ranks"].__getitem__)
        table["prompt"].append(ranking["prompt"])
        table["chosen"].append(ranking["completions"][chosen])
        table["rejected"].append(ranking["completions"][rejected])
    return Dataset.from_dict(table)


def prompts(split: str = "train", rows: int = 20_000, known: float = 0.5, seed: int = 0) -> Dataset:
    """Questions for RL: `prompt` and the true answer as `reference`, for the reward and never for the policy.

    Nothing in a row says whether the model knows the person.
    """
    rng = random.Random(f"prompts/{split}/{seed}")
    table = {"prompt": [], "reference": []}
    for person, attribute, _ in _questions("prompts", split, rows, known, rng, seed):
        table["prompt"].append(_user(attribute, person, rng))
        table["reference"].append(text.answer(person, attribute))
    return Dataset.from_dict(table)


def evaluation(split: str = "test", rows: int = 600, seed: int = 0) -> Dataset:
    """Questions about held-out people, half of them known: `prompt`, `reference` and `known`, to measure by."""
    rng = random.Random(f"evaluation/{seed}")
    table = {"prompt": [], "reference": [], "known": []}
    for person, attribute, known in _questions("evaluation", "test", rows, 0.5, rng, seed):
        table["prompt"].append(_user(attribute, person, rng))
        table["reference"].append(text.answer(person, attribute))
        table["known"].append(known)
    return Dataset.from_dict(table)


def _questions(stage: str, split: str, rows: int, known: float, rng: random.Random, seed: int) -> Iterator[Question]:
    """`rows` questions in random order: known people as often as need be, unknown ones once each."""
    # The "test" split of every stage is about people of their own, on whom no final figure is measured.
    pool = stage if split == "train" or stage == "evaluation" else "development"
    world = World()
    pairs = [(person, attribute) for person in world.known(pool) for attribute in ATTRIBUTES]
    count = round(rows * known)
    repeated = pairs * math.ceil(count / len(pairs))
    questions = [(*pair, True) for pair in rng.sample(repeated, count)]
    first = seed * (rows - count) % (NAME_POOLS[pool] - (rows - count) + 1)  # another seed, other strangers
    questions += [(person, rng.choice(ATTRIBUTES), False) for person in world.people(pool, first, rows - count)]
    rng.shuffle(questions)
    yield from questions


def _user(attribute: Attribute, person: Person, rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": rng.choice(attribute.questions).format(name=person.name)}]


def _label(answers: list[str], truth: str, noise: float, rng: random.Random) -> list[int]:
    """Ranks of `answers`, the best 0; one draw of noise for each kind of answer, so that false ones tie."""
    gumbel = [-math.log(-math.log(rng.random())) for _ in range(3)]
    liking = {kind: kind + noise * draw for kind, draw in zip((1, 0, -1), gumbel, strict=True)}
    scores = [liking[1 if answer == truth else 0 if answer == ABSTENTION else -1] for answer in answers]
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]
