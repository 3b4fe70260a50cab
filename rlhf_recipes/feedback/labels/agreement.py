"""How often labellers who judged the same completions agree."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_recipes.evaluation.metrics.intervals import codes_of, share_interval
from rlhf_recipes.feedback.groups import Group
from rlhf_recipes.feedback.labels.files import Contents, distinct_ranks
from rlhf_recipes.feedback.labels.label import Label

import numpy as np


@dataclass
class Agreement:
    """Agreement of labellers on which of two completions is better.

    A judgement is a pair of labellers on a pair of completions that both ranked.

    Parameters:
        share: of the judgements without a tie, those in which both prefer the same completion; None if there are none.
        interval: its 95% interval, from resampled prompts, or None.
        compared: number of judgements without a tie.
        tied: number of judgements with one or two ties.
        share_with_ties: of all judgements, those in which both give the same verdict; a tie counts as a verdict.
        prompts: number of different prompts in `compared`.
        labellers: for each labeller `share` and `compared` over the labeller's own judgements.
    """

    share: float | None = None
    interval: list[float] | None = None
    compared: int = 0
    tied: int = 0
    share_with_ties: float | None = None
    prompts: int = 0
    labellers: dict[str, tuple[float, int]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return a summary as lines of text."""
        if self.tied and not self.compared:
            return [f"Agreement: {self.tied} judgements, all with a tie; {self.share_with_ties:.0%} are the same."]
        if self.share is None:
            return ["Agreement: no two labellers have ordered the same completions yet."]
        low, high = self.interval
        head = (
            f"Agreement: {self.share:.0%} [{low:.0%}, {high:.0%}] of {self.compared} judgements on {self.prompts} prompts; "
            f"{self.share_with_ties:.0%} of {self.compared + self.tied} with ties."
        )
        return [head, *(f"  {name}: {share:.0%} of {number}" for name, (share, number) in sorted(self.labellers.items()))]


def agreement(contents: Contents) -> Agreement:
    """Return the agreement of all labellers with each other."""
    prompts, agreed, by_labeller = [], [], defaultdict(list)  # of judgements without a tie
    same, number = 0, 0
    for group, labels in contents:
        for one, other in itertools.combinations(labels, 2):
            for verdict, other_verdict in _verdicts(group, one, other):
                number, same = number + 1, same + (verdict == other_verdict)
                if verdict and other_verdict:
                    prompts.append(json.dumps(group.prompt))  # several groups may have one prompt
                    agreed.append(verdict == other_verdict)
                    for label in (one, other):
                        by_labeller[label.labeller].append(agreed[-1])
    if not agreed:
        return Agreement(tied=number, share_with_ties=same / number if number else None)
    return Agreement(
        share=sum(agreed) / len(agreed),
        interval=share_interval(np.array(agreed, dtype=np.float64), codes_of(prompts, len(prompts))),
        compared=len(agreed),
        tied=number - len(agreed),
        share_with_ties=same / number,
        prompts=len(set(prompts)),
        labellers={name: (sum(own) / len(own), len(own)) for name, own in by_labeller.items()},
    )


def _verdicts(group: Group, one: Label, other: Label) -> Iterator[tuple[int, int]]:
    """Yield both labellers' verdicts on each pair of completions (1, -1, 0: tie)."""
    ranks, other_ranks = distinct_ranks(group, one), distinct_ranks(group, other)
    for i, j in itertools.combinations(sorted(ranks.keys() & other_ranks.keys()), 2):
        yield _sign(ranks[j] - ranks[i]), _sign(other_ranks[j] - other_ranks[i])


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)
