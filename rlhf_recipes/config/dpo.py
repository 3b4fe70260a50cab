"""Arguments of `recipes/dpo.py`."""

from dataclasses import dataclass

from rlhf_recipes.core.errors import did_you_mean

import trl

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
"""Those that TRL has, which it does not list, and refuses at the first step only."""
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Those of them that read `label_smoothing`, which the others silently leave alone."""


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's arguments of DPO.

    Raises:
        ValueError: for a loss that TRL does not have, or none; a `beta` by which nothing is learnt; a `label_smoothing` that no
            loss reads, or that leaves labels no meaning.
    """

    def __post_init__(self):
        super().__post_init__()
        if not self.loss_type:
            raise ValueError("loss_type: names no loss: leave the key out for sigmoid, or name one")
        for loss in self.loss_type:
            if loss not in LOSSES:
                raise ValueError(f"loss_type: {loss!r} is none of {', '.join(LOSSES)}{did_you_mean(loss, LOSSES)}")
        if self.beta <= 0 and self.loss_type != ["sft"]:  # which has no reference
            raise ValueError(f"beta: {self.beta}: must be above 0")
        self._check_smoothing()

    def _check_smoothing(self) -> None:
        smoothing, losses = self.label_smoothing, ", ".join(self.loss_type)
        if not 0 <= smoothing < 0.5:
            raise ValueError(f"label_smoothing: {smoothing}: must be below 0.5, where labels say nothing, and not below 0")
        if smoothing and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing: {smoothing}: {losses} does not read it: choose one of {', '.join(SMOOTHED)} (`robust` is "
                "sigmoid with smoothing), or leave it out"
            )
        if not smoothing and "exo_pair" in self.loss_type:
            raise ValueError("label_smoothing: exo_pair needs it above 0: set 0.001, as its paper does, or choose another loss")
