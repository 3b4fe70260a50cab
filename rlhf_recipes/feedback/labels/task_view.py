"""A group as one labeller sees it: shuffled, without repetitions and sources."""

import hashlib
import random
from typing import Any

from rlhf_recipes.feedback.groups import Group
from rlhf_recipes.feedback.labels.label import Label

Ranks = list[int | None]


class TaskView:
    """The N different completions of a group, in an order fixed for each labeller.

    Args:
        group: to be shown.
        labeller: name of the labeller.
        seed: of the store.
    """

    def __init__(self, group: Group, labeller: str, seed: str) -> None:
        self.group = group
        self._secret = f"{seed}/{labeller.casefold()}/{group.id}"
        indices: dict[str, list[int]] = {}
        for index, text in enumerate(group.texts()):
            indices.setdefault(text, []).append(index)
        self._shown = list(indices.items())
        random.Random(self._secret).shuffle(self._shown)

    def group_ranks(self, shown_ranks: Ranks) -> Ranks:
        """Convert ranks of the N completions shown to ranks of the group's K.

        Raises:
            ValueError: if there are not N.
        """
        ranks: Ranks = [None] * len(self.group.completions)
        for (_, indices), rank in zip(self._shown, shown_ranks, strict=True):
            for index in indices:
                ranks[index] = rank
        return ranks

    def content(self, withdrawn: Label | None) -> dict[str, Any]:
        """Return what the page needs, JSON-serialisable.

        Args:
            withdrawn: the labeller's label on this group that was undone, if any.
        """
        prompt = self.group.prompt
        return {
            "id": self.group.id,
            "key": hashlib.sha256(self._secret.encode()).hexdigest()[:16],
            "prompt": prompt if self.group.conversational else [{"role": "", "content": prompt}],
            "completions": [text for text, _ in self._shown],
            "before": withdrawn and self._label(withdrawn),
        }

    def _label(self, label: Label) -> dict[str, Any]:
        ranks = label.ranks and [label.ranks[indices[0]] for _, indices in self._shown]
        return {"ranks": ranks, "demonstration": label.demonstration or "", "note": label.note or ""}
