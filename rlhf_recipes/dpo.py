"""DPO: what TRL's `DPOTrainer` lacks where the reference is an adapter on the policy's own base."""

from typing import Any

from rlhf_recipes.arguments import nearest
from rlhf_recipes.errors import RecipeError
from rlhf_recipes.models import keep_adapter_in_fp32, types_kept
from rlhf_recipes.roles import POLICY, saved_alone

import trl
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired")
LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")
"""Those that TRL has, which it does not list, and refuses at the first step only."""


class DPOTrainer(trl.DPOTrainer):
    """TRL's `DPOTrainer`, in which the policy keeps its type and is saved without its reference.

    TRL puts a frozen copy of the policy's adapter on the base as reference, casts the policy to bf16 on a quantised base, where
    it would differ from that copy before it has learnt anything, and saves both with every checkpoint.

    Raises:
        RecipeError: for a loss that TRL does not have.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: trl.DPOConfig, **options: Any):
        for loss in args.loss_type:
            if loss not in LOSSES:
                raise RecipeError(f"loss_type: {loss!r} is none of {', '.join(LOSSES)}{nearest(loss, LOSSES)}")
        with types_kept(model):
            super().__init__(model, args=args, **options)
        keep_adapter_in_fp32(self)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with saved_alone(self.model, POLICY):
            super()._save(output_dir, state_dict)
