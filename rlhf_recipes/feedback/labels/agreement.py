"""How often labellers who judged the same completions agree."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_recipes.feedback.labels.files import different, ranked
from rlhf_recipes.feedback.labels.groups import Group
from rlhf_recipes.feedback.labels.store import Label, Store

Judgement = tuple[int, int]
"""What two labellers say of the same two completions: 1, the first is better; -1, the second; 0, a tie."""


@dataclass
class Agreement:
    """Agreement of two labellers on which of two completions is better.

    Parameters:
        share: of the judgements in which neither ties, those in which both prefer the same completion; None without any.
        interval: its 95% interval, prompts being resampled; None where `share` is.
        compared: how many judgements these are: each two labellers on each two completions of each prompt that both ranked.
        tied: how many more there are in which one or both tie.
        share_with_ties: of all judgements, those in which both say the same: one, the other, or a tie.
        prompts: on how many prompts `compared` stands.
        labellers: for each labeller, the same share over judgements of this labeller with any other, and their number.
    """

    share: float | None = None
    interval: list[float] | None = None
    compared: int = 0
    tied: int = 0
    share_with_ties: float | None = None
    prompts: int = 0
    labellers: dict[str, tuple[float, int]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The same, for people."""
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


def agreement(store: Store) -> Agreement:
    """The agreement of all labellers of a store with each other."""
    labels, groups = defaultdict(list), {}
    for group, label in ranked(store):
        groups[group.id] = group
        labels[group.id].append(label)
    strict, same, number = [], 0, 0  # strict: (prompt, the labellers, whether they agree)
    for code, (identity, group) in enumerate(groups.items()):
        for one, other in itertools.combinations(labels[identity], 2):
            for mine, yours in _judgements(group, one, other):
                number, same = number + 1, same + (mine == yours)
                if mine and yours:
                    strict.append((code, (one.labeller, other.labeller), mine == yours))
    return _summary(strict, same, number)


def _judgements(group: Group, one: Label, other: Label) -> Iterator[Judgement]:
    mine, yours = different(group, one), different(group, other)
    for i, j in itertools.combinations(sorted(mine.keys() & yours.keys()), 2):
        yield _sign(mine[j] - mine[i]), _sign(yours[j] - yours[i])


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _summary(strict: list[tuple[int, tuple[str, str], bool]], same: int, number: int) -> Agreement:
    if not strict:
        return Agreement(tied=number, share_with_ties=same / number if number else None)
    # Imported here: the page starts without the libraries of the evaluation, which take seconds to load
    from rlhf_recipes.evaluation.metrics.intervals import share_interval

    import numpy as np

    codes = np.unique([code for code, _, _ in strict], return_inverse=True)[1]
    agree = np.array([agreed for _, _, agreed in strict], dtype=np.float64)
    by_labeller = defaultdict(list)
    for _, names, agreed in strict:
        for name in names:
            by_labeller[name].append(agreed)
    return Agreement(
        share=float(agree.mean()),
        interval=share_interval(agree, codes),
        compared=len(strict),
        tied=number - len(strict),
        share_with_ties=same / number,
        prompts=int(codes.max()) + 1,
        labellers={name: (sum(agreed) / len(agreed), len(agreed)) for name, agreed in by_labeller.items()},
    )
