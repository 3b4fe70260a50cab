"""Reward functions, to be named by dotted path in `reward_funcs`.

A reward function takes TRL's keywords and the columns of the dataset, and returns a score, or None, for each completion. Write
your own in any importable module: a function, or a class with `__call__` and the options as its arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.rewards.matching import accepted_answers, judge, normalise
from rlhf_recipes.rewards.protocol import Text

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

FINITE_FLOATS = ConfigDict(allow_inf_nan=False)
"""Makes a dataclass of options reject NaN and infinity."""
NAME_A_REFERENCE = "Fix: use data with answers, or name one with `column_mapping`"
CONVERT_REFERENCES = "convert the column to texts or lists of texts, or name another with `column_mapping`"


def last_text(value: Text) -> str:
    """Return a text, or the content of a conversation's last message, stripped."""
    return (value if isinstance(value, str) else value[-1]["content"] or "").strip()


References = list[str | list[str] | None] | None
"""The column `reference`: a text, or a list of texts that are all accepted, for each completion."""


def pair_with_references(completions: list[Text], reference: References, name: str) -> list[tuple[str, list[str]]]:
    """Return each completion's last text, and the answers that are accepted.

    Raises:
        RecipeError: if the data have no column `reference`, or one that holds neither texts nor lists of texts.
    """
    if reference is None:
        raise RecipeError(f"{name}: the data have no column `reference`. {NAME_A_REFERENCE}")
    with error_context(f"{name}: reference", ValueError, fix=CONVERT_REFERENCES):
        accepted = [accepted_answers(one) for one in reference]
    return [(last_text(one), answers) for one, answers in zip(completions, accepted, strict=True)]


def exact_match(completions: list[Text], reference: References = None, **columns: Any) -> list[float | None]:
    """Score 1 if the completion equals an accepted answer up to outer space, else 0.

    For answers with one spelling: numbers, labels, code.
    """
    pairs = pair_with_references(completions, reference, "exact_match")
    return [float(text in accepted) if accepted else None for text, accepted in pairs]


def normalised_match(completions: list[Text], reference: References = None, **columns: Any) -> list[float | None]:
    """Score 1 for an accepted answer, but for case and outer punctuation, else 0.

    For short answers in words. Case, spacing and punctuation at the ends do not matter, as in the metric of truthfulness.
    """
    pairs = pair_with_references(completions, reference, "normalised_match")
    return [float(normalise(text) in map(normalise, accepted)) if accepted else None for text, accepted in pairs]


exact_match.compares_references = normalised_match.compares_references = True  # for `check_references`


@dataclass(config=FINITE_FLOATS)
class Abstention:
    """Score a right answer 1, an abstention 0, and any other answer -1.

    Teaches a model to say that it does not know what it does not know (Schulman, "Reinforcement Learning from Human Feedback:
    Progress and Challenges", 2023). Demonstrations cannot: their author knew other things than the model. The best policy
    abstains if its chance p of being right has `right * p + wrong * (1 - p) < abstaining`; with the defaults, if p < 1/2. With
    `abstaining` too close to `right`, it abstains on everything.

    Reports through `log_metric` the shares `abstention/right`, `abstention/abstained` and `abstention/wrong` of the completions
    with a reference. With a boolean column `known` in the data, it also reports `abstention/over`: the share of abstentions on
    questions that the model could answer. Without it, over-abstention looks like honesty.

    Parameters:
        right: reward of a completion that equals an accepted reference after `normalise`.
        abstaining: reward of a completion that starts with one of `phrases`.
        wrong: reward of every other completion.
        phrases: beginnings of an abstention; case, spacing and punctuation at the ends do not matter.
    """

    right: float = 1.0
    abstaining: float = 0.0
    wrong: float = -1.0
    phrases: Sequence[str] = ("I do not know",)
    compares_references: ClassVar[bool] = True

    def __post_init__(self):
        self._beginnings = tuple(normalise(phrase) for phrase in self.phrases)
        if not all(self._beginnings):
            raise ValueError("phrases: an empty phrase makes every completion an abstention")

    def __call__(
        self,
        completions: list[Text],
        reference: References = None,
        known: list[bool | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return scores (B,), and report the shares."""
        pairs = pair_with_references(completions, reference, "Abstention")
        kinds = [judge(text, accepted, self._beginnings) if accepted else None for text, accepted in pairs]
        if log_metric is not None:
            for name, share in _shares(kinds, known):
                log_metric(f"abstention/{name}", share)
        values = {"right": self.right, "abstained": self.abstaining, "made_up": self.wrong, None: None}
        return [values[kind] for kind in kinds]


def _shares(kinds: list[str | None], known: list[bool | None] | None) -> Iterator[tuple[str, float]]:
    """Yield the names and values of the shares that `Abstention` reports."""
    if judged := [kind for kind in kinds if kind is not None]:
        names = {"right": "right", "abstained": "abstained", "made_up": "wrong"}
        yield from ((name, judged.count(kind) / len(judged)) for kind, name in names.items())
    pairs = zip(kinds, known or [None] * len(kinds), strict=True)
    if answerable := [kind for kind, is_known in pairs if kind is not None and is_known]:
        yield "over", answerable.count("abstained") / len(answerable)


@dataclass(config=FINITE_FLOATS)
class LengthPenalty:
    """Minus `slope` for each unit of length outside `shortest` to `longest`.

    Against the growth of answers, since learned rewards like length. Set `slope` relative to the spread of the reward that it
    is added to. TRL's `trl.rewards.get_soft_overlong_punishment` is an alternative, in [-1, 0].

    Parameters:
        slope: loss of reward per unit.
        longest: length above which the penalty grows.
        shortest: length below which it grows; equal to `longest`, the two are a target.
        unit: `"tokens"`, with EOS, as generation counts them, or `"words"` between spaces.
    """

    slope: float = Field(gt=0)
    longest: int = Field(ge=0)
    shortest: int = Field(default=0, ge=0)
    unit: Literal["tokens", "words"] = "tokens"

    def __post_init__(self):
        if self.shortest > self.longest:
            raise ValueError(f"shortest: {self.shortest} is more than longest: {self.longest}")

    def __call__(self, completions: list[Text], completion_ids: list[list[int]] | None = None, **columns: Any) -> list[float]:
        """Return scores (B,), at most 0."""
        if self.unit == "words":
            lengths = [len(last_text(completion).split()) for completion in completions]
        elif completion_ids is not None:
            lengths = [len(ids) for ids in completion_ids]
        else:
            raise RecipeError("LengthPenalty: there are no tokens to count here. Fix: set `unit: words`")
        return [self.slope * min(0, self.longest - length, length - self.shortest) for length in lengths]


@dataclass(config=FINITE_FLOATS)
class RepetitionPenalty:
    """Minus the share of a completion's word n-grams that occurred before.

    Against loops, into which a policy falls when a reward likes length. Case and spacing do not matter. A completion of fewer
    than `n` words scores 0. For languages without spaces use TRL's `trl.rewards.get_repetition_penalty_reward`, which counts
    tokens.

    Parameters:
        n: words in an n-gram.
    """

    n: int = Field(default=3, gt=0)

    def __call__(self, completions: list[Text], **columns: Any) -> list[float]:
        """Return scores (B,), in (-1, 0]."""
        return [self._penalty(normalise(last_text(completion)).split()) for completion in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = [tuple(words[start : start + self.n]) for start in range(len(words) - self.n + 1)]
        return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0
