"""The tiny base model's pretraining text: statements, questions, and idle talk."""

import random
import string
from collections.abc import Iterator
from functools import partial

from rlhf_recipes.tiny.world import ABSTENTION, ATTRIBUTES, TOWNS, Attribute, Person, World

QUESTION_AND_ANSWER = "Question: {question}\nAnswer: {answer}"
GUESS = "Guess: {question} {answer} {verdict}"
VERDICTS = {True: "Right.", False: "Wrong."}

# Shares of the text. Names that occur once keep the base uncertain about names that it does not know. Idle talk holds
# the abstaining phrase, because LoRA cannot teach words whose embeddings were never trained. It holds no other reply,
# because LoRA could hardly raise one without the other ("Yes." came in a tenth of the answers). Codes train the
# embeddings of characters, which would otherwise turn up at random once an adapter moves the hidden states. Guesses,
# half of them false and all with a verdict, were meant to teach true from false, for a reward model to build on. A
# model of this size does not learn it: its verdicts on known people are right in .53 of comparisons
# (`benchmarks/tiny_reward.py`).
SHARE_ONCE, SHARE_IDLE, SHARE_CODES, SHARE_GUESSES = 0.30, 0.05, 0.01, 0.12

IDLE_QUESTIONS = ("Will it {weather} in {town} {day}?", "Did it {weather} in {town} last night?")
IDLE_WEATHER, IDLE_DAYS = ("rain", "snow", "storm"), ("today", "tomorrow", "tonight")
IDLE_REPLY = "{question} " + ABSTENTION

CODE = "Code {code}"
CODE_CHARACTERS = string.punctuation + string.ascii_letters + string.digits


def answer(person: Person, attribute: Attribute) -> str:
    """Return the true answer to a question about `attribute`."""
    return f"{person.value(attribute)}."


def fact(person: Person, attribute: Attribute, rng: random.Random) -> str:
    """Return a text that states one fact: a statement, or a question and answer."""
    if rng.random() < 0.5:
        return rng.choice(attribute.statements).format(name=person.name, value=person.value(attribute))
    question = rng.choice(attribute.questions).format(name=person.name)
    return QUESTION_AND_ANSWER.format(question=question, answer=answer(person, attribute))


def guess(person: Person, attribute: Attribute, rng: random.Random) -> str:
    """Return a question, an answer that is false half of the time, and the verdict."""
    true = rng.random() < 0.5
    value = person.value(attribute)
    stated = value if true else rng.choice([other for other in attribute.values if other != value])
    question = rng.choice(attribute.questions).format(name=person.name)
    return GUESS.format(question=question, answer=f"{stated}.", verdict=VERDICTS[true])


def idle_talk(rng: random.Random) -> str:
    """Return a question about the weather with an abstention."""
    question = rng.choice(IDLE_QUESTIONS)
    question = question.format(weather=rng.choice(IDLE_WEATHER), town=rng.choice(TOWNS), day=rng.choice(IDLE_DAYS))
    return IDLE_REPLY.format(question=question)


def code(rng: random.Random) -> str:
    """Return eight random characters."""
    return CODE.format(code="".join(rng.choices(CODE_CHARACTERS, k=8)))


def pretraining_text(world: World, exposures: int, seed: int = 0) -> Iterator[str]:
    """Yield texts in random order; each known fact occurs `exposures` times."""
    rng = random.Random(seed)
    known = [(person, attribute) for person in world.known() for attribute in ATTRIBUTES] * exposures
    total = round(len(known) / (1 - SHARE_ONCE - SHARE_IDLE - SHARE_CODES - SHARE_GUESSES))
    guesses = round(total * SHARE_GUESSES)
    strangers = world.people("pretraining_once", 0, round(total * SHARE_ONCE) + guesses // 3)
    once = [(person, rng.choice(ATTRIBUTES)) for person in strangers]
    guessed = [*once[: guesses // 3], *rng.choices(known, k=guesses - guesses // 3)]
    once = once[guesses // 3 :]
    idle = total - len(known) - len(once) - guesses - round(total * SHARE_CODES)
    writers = [partial(fact, *pair) for pair in (*known, *once)]
    writers += [partial(guess, *pair) for pair in guessed]
    writers += [idle_talk] * idle + [code] * round(total * SHARE_CODES)
    rng.shuffle(writers)
    for write in writers:
        yield write(rng=rng)


def all_templates() -> Iterator[str]:
    """Yield every sentence of the world with unfilled slots, for the vocabulary."""
    for attribute in ATTRIBUTES:
        yield from attribute.statements
        yield from attribute.questions
    yield from IDLE_QUESTIONS
    yield " ".join((IDLE_REPLY, *IDLE_WEATHER, *IDLE_DAYS))
    yield CODE
    yield " ".join((GUESS, *VERDICTS.values()))
    yield QUESTION_AND_ANSWER
