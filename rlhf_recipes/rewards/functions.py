"""Reward functions in TRL's protocol, to be named by dotted path."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.rewards.matching import judge, normalise

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

Text = str | list[dict[str, Any]]
Reward = Callable[..., Any]  # to a list[float | None], or to a coroutine of one
TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""The keywords that TRL passes to every reward function, besides the columns of the dataset."""
FINITE_FLOATS = ConfigDict(allow_inf_nan=False)


def last_text(value: Text) -> str:
    """A text, or the content of the last message of a conversation, without surrounding space."""
    return (value if isinstance(value, str) else value[-1]["content"] or "").strip()


def exact_match(completions: list[Text], reference: list[str | None] | None = None, **columns: Any) -> list[float | None]:
    """1 where the completion is the reference, letter by letter but for surrounding space, else 0.

    For answers with one spelling: numbers, labels, code.
    """
    return [
        None if truth is None else float(last_text(completion) == truth)
        for completion, truth in pair_with_references(completions, reference, "exact_match")
    ]


def normalised_match(completions: list[Text], reference: list[str | None] | None = None, **columns: Any) -> list[float | None]:
    """1 where the completion is the reference but for case, spacing and punctuation at the ends, else 0.

    For short answers in words; it calls right what `evaluation.truthfulness` calls right.
    """
    return [
        None if truth is None else float(normalise(last_text(completion)) == normalise(truth))
        for completion, truth in pair_with_references(completions, reference, "normalised_match")
    ]


@dataclass(config=FINITE_FLOATS)
class Abstention:
    """One of three values: for the right answer, for an abstention, for anything else.

    For teaching a model to say that it does not know what it does not know (Schulman, "Reinforcement Learning from Human
    Feedback: Progress and Challenges", 2023): a demonstration cannot, since who wrote it knew other things than the model. The
    best policy abstains where its chance p of being right has `right * p + wrong * (1 - p) < abstaining`: for the defaults,
    where p < 1/2. With `abstaining` too close to `right`, it abstains on everything.

    Through `log_metric` it reports the shares `abstention/right`, `abstention/abstained` and `abstention/wrong` of the
    completions that have a reference, and `abstention/over`: the share that abstains on questions that the model could answer.
    Which those are must be in the data, in a boolean column `known`; without it over-abstention cannot be told from honesty and
    is not reported.

    Parameters:
        right: reward of a completion that equals the reference after `normalise`.
        abstaining: reward of a completion that starts with one of `phrases`.
        wrong: reward of every other completion.
        phrases: the beginnings of an abstention; case, spacing and punctuation at the ends do not matter.
    """

    right: float = 1.0
    abstaining: float = 0.0
    wrong: float = -1.0
    phrases: Sequence[str] = ("I do not know",)

    def __post_init__(self):
        self._beginnings = tuple(normalise(phrase) for phrase in self.phrases)
        if not all(self._beginnings):
            raise ValueError("phrases: an empty phrase would make an abstention of every completion")

    def __call__(
        self,
        completions: list[Text],
        reference: list[str | None] | None = None,
        known: list[bool | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores (B,), each one of the three values or None, and reports the shares."""
        pairs = pair_with_references(completions, reference, "Abstention")
        kinds = [
            None if truth is None else judge(last_text(completion), truth, self._beginnings) for completion, truth in pairs
        ]
        if log_metric is not None:
            for name, share in _shares(kinds, known):
                log_metric(f"abstention/{name}", share)
        values = {"right": self.right, "abstained": self.abstaining, "made_up": self.wrong, None: None}
        return [values[kind] for kind in kinds]


def _shares(kinds: list[str | None], known: list[bool | None] | None) -> Iterator[tuple[str, float]]:
    """The shares that `Abstention` reports, where there is something to take a share of."""
    judged = [kind for kind in kinds if kind is not None]
    if judged:
        names = {"right": "right", "abstained": "abstained", "made_up": "wrong"}
        yield from ((name, judged.count(kind) / len(judged)) for kind, name in names.items())
    if known is not None:
        answerable = [kind for kind, is_known in zip(kinds, known, strict=True) if kind is not None and is_known]
        if answerable:
            yield "over", answerable.count("abstained") / len(answerable)


def pair_with_references(
    completions: list[Text], reference: list[str | None] | None, name: str
) -> list[tuple[Text, str | None]]:
    """Each completion with its stripped reference, or None where a row has none."""
    if reference is None:
        raise RecipeError(
            f"{name}: the data have no column `reference` to compare with: take data with answers, or give a column that name "
            "with `column_mapping`"
        )
    for row, text in enumerate(reference):
        if not isinstance(text, str | None):
            raise RecipeError(f"{name}: reference {row} of the batch is not a text: {text!r}")
    return [(one, (text or "").strip() or None) for one, text in zip(completions, reference, strict=True)]


@dataclass(config=FINITE_FLOATS)
class LengthPenalty:
    """0 for a length from `shortest` to `longest`, and `slope` less for each token or word out of that range; in (-inf, 0].

    Against the growth of answers that learned rewards invite, since they like length. Set `slope` against the spread of the
    reward that it is added to. TRL's `trl.rewards.get_soft_overlong_punishment` is another, in [-1, 0].

    Parameters:
        slope: loss of reward a unit.
        longest: length from which the penalty grows.
        shortest: length below which it grows; equal to `longest`, the two are a target.
        unit: `"tokens"`, with the EOS, as generation counts them, or `"words"` between spaces.
    """

    slope: float = Field(gt=0)
    longest: int = Field(ge=0)
    shortest: int = Field(default=0, ge=0)
    unit: Literal["tokens", "words"] = "tokens"

    def __post_init__(self):
        if self.shortest > self.longest:
            raise ValueError(f"shortest: {self.shortest} is more than longest: {self.longest}")

    def __call__(self, completions: list[Text], completion_ids: list[list[int]] | None = None, **columns: Any) -> list[float]:
        """Scores (B,), at most 0."""
        if self.unit == "words":
            lengths = [len(last_text(completion).split()) for completion in completions]
        elif completion_ids is not None:
            lengths = [len(ids) for ids in completion_ids]
        else:
            raise RecipeError("LengthPenalty: without `completion_ids` there are no tokens to count: set `unit: words`")
        return [self.slope * min(0, self.longest - length, length - self.shortest) for length in lengths]


@dataclass(config=FINITE_FLOATS)
class RepetitionPenalty:
    """Minus the share of the completion's n-grams of words that stand in it earlier: 0 if none repeats, at most 0, above -1.

    Against loops, into which a policy falls when a reward likes length. Case and spacing do not matter; with fewer than `n`
    words nothing repeats. For languages without spaces take TRL's, of tokens: `trl.rewards.get_repetition_penalty_reward`.

    Parameters:
        n: words in an n-gram.
    """

    n: int = Field(default=3, gt=0)

    def __call__(self, completions: list[Text], **columns: Any) -> list[float]:
        """Scores (B,), in (-1, 0]."""
        return [self._penalty(normalise(last_text(completion)).split()) for completion in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = [tuple(words[start : start + self.n]) for start in range(len(words) - self.n + 1)]
        return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


def explain_argument_error(error: Exception) -> str:
    """In one line, which argument is wrong and why."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    if not first["loc"]:  # from a __post_init__
        return str(first["ctx"]["error"])
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}"
