"""Texts of answers: how much they differ, and whether they are true.

A word is what `rlhf_recipes.rewards.matching.normalise` leaves between spaces.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Sequence

from rlhf_recipes.evaluation.metrics.base import TEXT, TEXTS, metric
from rlhf_recipes.evaluation.metrics.intervals import codes_of
from rlhf_recipes.rewards.functions import RepetitionPenalty
from rlhf_recipes.rewards.matching import ABSTENTIONS, KINDS, kinds_of, normalise

import numpy as np

_LONGEST = 4  # words in BLEU's longest n-grams


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Return the share of distinct n-grams of words over all texts (Li et al., 2016).

    None where there are no n-grams. It falls with the number of texts, so compare equal numbers.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(_words(text), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Return the mean BLEU of each text against all others (Zhu et al., 2018).

    1 where all texts are equal. BLEU (Papineni et al., 2002) is of n-grams up to 4, or up to the text's words if fewer. It is
    not smoothed: 0 where one length of n-gram has no match. Texts without words are left out. None for fewer than two texts.
    """
    rows = [words for words in map(_words, texts) if words]
    if len(rows) < 2:
        return None
    counts = [[Counter(_ngrams(words, n)) for words in rows] for n in range(1, _LONGEST + 1)]
    highest = [_two_highest(of_length) for of_length in counts]
    lengths = sorted(map(len, rows))
    return float(np.mean([_bleu(row, len(words), counts, highest, lengths) for row, words in enumerate(rows)]))


def _two_highest(counts: list[Counter]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Return per n-gram its highest count, that text's row, and the next count."""
    highest: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for row, counter in enumerate(counts):
        for ngram, count in counter.items():
            first, owner, second = highest.get(ngram, (0, -1, 0))
            highest[ngram] = (count, row, first) if count > first else (first, owner, max(second, count))
    return highest


def _bleu(row: int, length: int, counts: list[list[Counter]], highest: list[dict], lengths: list[int]) -> float:
    logs = []
    for of_length, best in zip(counts[:length], highest, strict=False):
        matches = 0
        for ngram, count in of_length[row].items():
            first, owner, second = best[ngram]
            matches += min(count, second if owner == row else first)
        if not matches:
            return 0.0
        logs.append(math.log(matches / of_length[row].total()))
    # the length nearest to this one, the shorter of two; this text itself is left out
    place = bisect_left(lengths, length)
    others = lengths[max(place - 1, 0) : place] + lengths[place + 1 : place + 2]
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / length))


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Return the mean share of a text's n-grams that occur earlier in it."""
    return abs(float(np.mean(RepetitionPenalty(n)(completions=list(texts)))))


def diversity(texts: Sequence[str], groups: Sequence[Hashable] | None = None) -> dict[str, float | None]:
    """Return all measures of diversity of (N,) answers, to prompts `groups` (N,).

    Returns:
        `distinct_1`, `distinct_2`, `repetition`; `self_bleu`: over the first answers to all prompts, which is high where one
        answer serves for all; `self_bleu_within`: the mean over prompts of self-BLEU among their answers, None where no
        prompt has two.

    Raises:
        ValueError: No texts, or a different number of groups.
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


Diversity = metric(
    "Diversity",
    diversity,
    """Distinct n-grams, self-BLEU and repetition of answers.

    `predictions` are the answers. Options as in `diversity`.

        >>> Diversity().compute(predictions=["a b", "a c"])["distinct_1"]
        0.75
    """,
    predictions=TEXT,
)


def truthfulness(
    answers: Sequence[str], references: Sequence[str], abstentions: Sequence[str] = ABSTENTIONS
) -> dict[str, float]:
    """Return the shares of answers `right`, `abstained`, and `made_up`.

    Raises:
        ValueError: No answers, or different lengths.
    """
    if not answers:
        raise ValueError("There are no answers to judge.")
    kinds = kinds_of(answers, references, abstentions)
    return {kind: kinds.count(kind) / len(kinds) for kind in KINDS}


Truthfulness = metric(
    "Truthfulness",
    truthfulness,
    """Shares of answers that are right, that abstain, and that are made up (neither).

    `predictions` are answers, `references` the right ones, each a text or a list of accepted texts. `abstentions` are the
    beginnings of answers that abstain.

        >>> Truthfulness().compute(predictions=["Larkhill."], references=["larkhill"])
        {'right': 1.0, 'abstained': 0.0, 'made_up': 0.0}
    """,
    predictions=TEXT,
    references=[TEXT, TEXTS],
)


def _words(text: str) -> list[str]:
    return normalise(text).split()


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
