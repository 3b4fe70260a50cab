"""A group as one labeller sees it: in an order of its own, equal completions once, and nobody told who wrote what."""

import hashlib
import random
from typing import Any

from rlhf_recipes.feedback.labels.groups import Group
from rlhf_recipes.feedback.labels.store import Label

Ranks = list[int | None]


class TaskView:
    """The completions of a group in a random order, the same whenever this labeller comes back to it.

    Args:
        group: what is shown; of N completions that differ.
        labeller: to whom.
        seed: of the store.
    """

    def __init__(self, group: Group, labeller: str, seed: str) -> None:
        self.group = group
        self._secret = f"{seed}/{labeller.casefold()}/{group.id}"
        places: dict[str, list[int]] = {}
        for place, text in enumerate(group.texts()):
            places.setdefault(text, []).append(place)
        self._shown = list(places.items())
        random.Random(self._secret).shuffle(self._shown)

    def ranks_of_group(self, shown: Ranks) -> Ranks:
        """From one rank for each of the N that are shown to one for each of the K completions.

        Raises:
            ValueError: if there are not N.
        """
        ranks: Ranks = [None] * len(self.group.completions)
        for (_, places), rank in zip(self._shown, shown, strict=True):
            for place in places:
                ranks[place] = rank
        return ranks

    def page(self, before: Label | None) -> dict[str, Any]:
        """What the page needs, JSON-serialisable.

        Args:
            before: what the labeller said of it and undid.
        """
        prompt = self.group.prompt
        turns = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
        return {
            "id": self.group.id,
            "key": hashlib.sha256(self._secret.encode()).hexdigest()[:16],
            "prompt": turns,
            "completions": [text for text, _ in self._shown],
            "before": before and self._before(before),
        }

    def _before(self, label: Label) -> dict[str, Any]:
        ranks = label.ranks and [label.ranks[places[0]] for _, places in self._shown]
        return {"ranks": ranks, "demonstration": label.demonstration or "", "note": label.note or ""}
