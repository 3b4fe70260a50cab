"""Arguments of `recipes/dpo.py`."""

from dataclasses import dataclass

from rlhf_recipes.config.launcher import plain
from rlhf_recipes.core.errors import did_you_mean

import trl

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
"""TRL's losses. It lists them nowhere, and rejects another at the first step only."""
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""TRL's f-divergences, as unlisted as its losses."""
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""Losses that read `label_smoothing`; the others silently ignore it."""


@dataclass
class DPOConfig(trl.DPOConfig):
    """TRL's arguments of DPO, checked.

    Raises:
        ValueError: for a loss that TRL lacks, a `beta` that learns nothing, or a `label_smoothing` that no loss reads or that
            leaves labels without meaning.
    """

    def __post_init__(self):
        super().__post_init__()
        if not self.loss_type:
            raise ValueError("loss_type: []: names no loss. Fix: leave it out for sigmoid, or name one")
        for loss in self.loss_type:
            if loss not in LOSSES:
                raise ValueError(f"loss_type: {loss!r} is none of {', '.join(LOSSES)}{did_you_mean(loss, LOSSES)}")
        if (divergence := plain(self.f_divergence_type)) not in DIVERGENCES:
            raise ValueError(f"f_divergence_type: {divergence!r} is none of {', '.join(DIVERGENCES)}")
        if self.beta <= 0 and self.loss_type != ["sft"]:  # it has no reference
            raise ValueError(f"beta: {self.beta}: must be above 0")
        self._check_smoothing()

    def _check_smoothing(self) -> None:
        smoothing, losses = self.label_smoothing, ", ".join(self.loss_type)
        if not 0 <= smoothing < 0.5:
            raise ValueError(f"label_smoothing: {smoothing}: must be 0 or more and below 0.5, where labels mean nothing")
        if smoothing and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing: {smoothing}: {losses} does not read it. Fix: leave it out, or choose one of "
                f"{', '.join(SMOOTHED)} (`robust` is sigmoid with smoothing)"
            )
        if not smoothing and "exo_pair" in self.loss_type:
            raise ValueError("label_smoothing: 0: exo_pair needs it above 0. Fix: set 0.001, as its paper does")
