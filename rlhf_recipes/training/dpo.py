"""DPO: what TRL's `DPOTrainer` lacks where the reference is an adapter on the policy's own base."""

import copy
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import did_you_mean
from rlhf_recipes.models.loading import keep_adapter_in_fp32, preserve_param_dtypes
from rlhf_recipes.models.roles import POLICY, save_single_adapter

import trl
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

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


class DPOTrainer(trl.DPOTrainer):
    """TRL's `DPOTrainer`, in which the policy keeps its type and is saved without its reference.

    TRL puts a frozen copy of the policy's adapter on the base as reference, casts the policy to bf16 on a quantised base, where
    it would differ from that copy before it has learnt anything, and saves both with every checkpoint.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: trl.DPOConfig, **options: Any):
        whole = not isinstance(model, PeftModel) and options.get("peft_config") is None
        if whole and not args.precompute_ref_log_probs:  # TRL would load it anew, by its name
            options.setdefault("ref_model", copy.deepcopy(model))
        with preserve_param_dtypes(model):
            super().__init__(model, args=args, **options)
        keep_adapter_in_fp32(self)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with save_single_adapter(self.model, POLICY):
            super()._save(output_dir, state_dict)
