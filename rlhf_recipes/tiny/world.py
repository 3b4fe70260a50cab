"""A closed world with known truth: made-up people, each with a town and a trade.

Everything is a function of a seed. A person is *known* if the base model has read about them many times, *unknown* if it never
has. Names come from one shuffled list, and every use takes another part of it, so nobody occurs in two splits (see
`NAME_POOLS`).
"""

import functools
import itertools
import random
from dataclasses import dataclass

ABSTENTION = "I do not know."

CONSONANTS, VOWELS = "bdfghklmnprstvwz", "aeiou"
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)
SYLLABLES_PER_NAME = 3

TOWNS = (
    "Alderby", "Brinmoor", "Caldwick", "Dunmere", "Elmstow", "Farholt",
    "Glenrow", "Hartsea", "Ironby", "Kestwick", "Larkhill", "Mossgate",
)  # fmt: skip
JOBS = (
    "baker", "carver", "dyer", "farmer", "healer", "miller",
    "potter", "sailor", "singer", "tailor", "thatcher", "weaver",
)  # fmt: skip

# Sizes of the parts of the shuffled list of names. The shipped weights depend on order and sizes: a change needs a new
# pretraining.
NAME_POOLS = {
    "known": 800,
    "pretraining_once": 300_000,
    "pretraining_held_out": 1_000,
    "demonstrations": 80_000,
    "preferences": 40_000,
    "prompts": 80_000,
    "development": 2_000,
    "evaluation": 2_000,
}

# Known people are divided among the stages too. So no stage is measured on people that it was trained on, and nothing (a
# checkpoint, a learning rate) is chosen on the people of the final evaluation.
KNOWN_SPLITS = {
    "demonstrations": (0, 200),
    "preferences": (200, 400),
    "prompts": (400, 600),
    "development": (600, 650),
    "evaluation": (650, 800),
}


@dataclass(frozen=True)
class Attribute:
    """An attribute of every person; its sentences contain `{name}` and `{value}`."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "town",
        TOWNS,
        ("{name} lives in {value}.", "The home of {name} is in {value}.", "You can find {name} in {value}."),
        ("Where does {name} live?", "In which town does {name} live?", "Where is the home of {name}?"),
    ),
    Attribute(
        "job",
        JOBS,
        ("{name} works as a {value}.", "The trade of {name} is that of a {value}.", "People know {name} as a {value}."),
        ("What does {name} do?", "What is the trade of {name}?", "As what does {name} work?"),
    ),
)


@dataclass(frozen=True)
class Person:
    """A person: a name and one value for each of `ATTRIBUTES`."""

    name: str
    town: str
    job: str

    def value(self, attribute: Attribute) -> str:
        """Return the true value of an attribute."""
        return getattr(self, attribute.name)


@functools.lru_cache(maxsize=2)
def _names(seed: int) -> tuple[str, ...]:
    """Return all names, shuffled; cached, because it takes a second."""
    names = ["".join(parts).capitalize() for parts in itertools.product(SYLLABLES, repeat=SYLLABLES_PER_NAME)]
    random.Random(seed).shuffle(names)
    return tuple(names)


class World:
    """All people of the world of a seed."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        names = iter(_names(seed))
        self._pools = {pool: tuple(itertools.islice(names, size)) for pool, size in NAME_POOLS.items()}

    def people(self, pool: str, start: int = 0, count: int | None = None) -> list[Person]:
        """Return people `start` to `start + count` of one of `NAME_POOLS`.

        Raises:
            ValueError: If the pool has fewer.
        """
        names = self._pools[pool]
        count = len(names) - start if count is None else count
        if start + count > len(names):
            raise ValueError(f"the tiny world has {len(names)} names for '{pool}', but {start + count} are needed")
        return [self._person(name) for name in names[start : start + count]]

    def known(self, split: str | None = None) -> list[Person]:
        """Return the known people of one of `KNOWN_SPLITS`, or all of them."""
        start, stop = KNOWN_SPLITS[split] if split else (0, NAME_POOLS["known"])
        return self.people("known", start, stop - start)

    def _person(self, name: str) -> Person:
        rng = random.Random(f"{self.seed}/{name}")  # a generator per person makes a person independent of all others
        return Person(name, rng.choice(TOWNS), rng.choice(JOBS))
