"""How much the answers of a policy differ from each other: what an objective without regularisation destroys.

Words are what `rlhf_recipes.rewards.matching.normalise` leaves between spaces.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence

from rlhf_recipes.evaluation.metrics.intervals import codes_of
from rlhf_recipes.rewards.functions import RepetitionPenalty
from rlhf_recipes.rewards.matching import normalise

import datasets
import evaluate
import numpy as np

_LONGEST = 4  # words of an n-gram, in BLEU


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words by all n-grams, over all texts together (Li et al., 2016); None where there is none.

    It falls with the number of texts: compare as many.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(_words(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """The mean over texts of BLEU with all others as references (Zhu et al., 2018): 1 where all say the same.

    BLEU (Papineni et al., 2002) of n-grams up to 4, or up to the number of words where that is less, unsmoothed: 0 where one
    length of n-gram has no match. A text without words is left out. None for less than two texts.
    """
    rows = [words for words in map(_words, texts) if words]
    if len(rows) < 2:
        return None
    counts = [[Counter(_ngrams(words, n)) for words in rows] for n in range(1, _LONGEST + 1)]
    highest = [_two_highest(of_length) for of_length in counts]
    lengths = sorted(map(len, rows))
    return float(np.mean([_bleu(row, len(words), counts, highest, lengths) for row, words in enumerate(rows)]))


def _two_highest(counts: list[Counter]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Of each n-gram: its highest count in a text, the row of that text, and the highest count in the others."""
    highest: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for row, counter in enumerate(counts):
        for ngram, count in counter.items():
            first, owner, second = highest.get(ngram, (0, -1, 0))
            highest[ngram] = (count, row, first) if count > first else (first, owner, max(second, count))
    return highest


def _bleu(row: int, length: int, counts: list[list[Counter]], highest: list[dict], lengths: list[int]) -> float:
    logs = []
    for of_length, best in zip(counts[:length], highest, strict=False):
        matches = sum(min(count, _elsewhere(best[ngram], row)) for ngram, count in of_length[row].items())
        if not matches:
            return 0.0
        logs.append(math.log(matches / of_length[row].total()))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - _nearest_other(length, lengths) / length))


def _elsewhere(entry: tuple[int, int, int], row: int) -> int:
    first, owner, second = entry
    return second if owner == row else first


def _nearest_other(length: int, lengths: list[int]) -> int:
    """The length, of those of the other texts, that is nearest to this text's own; the shorter of two."""
    place = bisect_left(lengths, length)
    others = lengths[max(place - 1, 0) : place] + lengths[place + 1 : place + 2]
    return min(others, key=lambda other: (abs(other - length), other))


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """The mean share of a text's n-grams of words that stand in it earlier: 0 if none repeats (see `RepetitionPenalty`)."""
    return abs(float(np.mean(RepetitionPenalty(n)(completions=list(texts)))))


def diversity(texts: Sequence[str], groups: Sequence[Hashable] | None = None) -> dict[str, float | None]:
    """All of it.

    Args:
        texts: (N,) answers.
        groups: (N,) the prompt of each; None: one answer a prompt.

    Returns:
        `distinct_1`, `distinct_2`, `repetition`; `self_bleu`: over the first answers to all prompts, which is high where one
        answer serves for all; `self_bleu_within`: the mean over prompts of that of the answers to one, None where no prompt has
        two.

    Raises:
        ValueError: no texts, or as many groups as there are not.
    """
    if not texts:
        raise ValueError("There are no answers to compare.")
    prompts: dict[int, list[str]] = {}
    for code, text in zip(codes_of(groups, len(texts)).tolist(), texts, strict=True):
        prompts.setdefault(code, []).append(text)
    within = [value for value in map(self_bleu, prompts.values()) if value is not None]
    return {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "self_bleu": self_bleu([answers[0] for answers in prompts.values()]),
        "self_bleu_within": float(np.mean(within)) if within else None,
        "repetition": repetition(texts),
    }


class Diversity(evaluate.Metric):
    """Distinct n-grams, self-BLEU and repetition of answers.

    `predictions` are the answers; options as in `diversity`.

        >>> Diversity().compute(predictions=["a b", "a c"])["distinct_1"]
        0.75
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions: list[str], groups: Sequence[Hashable] | None = None) -> dict[str, float | None]:
        return diversity(predictions, groups)


def _words(text: str) -> list[str]:
    return normalise(text).split()


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
