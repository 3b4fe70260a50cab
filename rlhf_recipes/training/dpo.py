"""DPO: what TRL's `DPOTrainer` lacks where the reference is an adapter on the policy's own base."""

import copy
from typing import Any

from rlhf_recipes.training.mixin import TrainerMixin

import trl
from peft import PeftModel
from transformers import PreTrainedModel


class DPOTrainer(TrainerMixin, trl.DPOTrainer):
    """TRL's `DPOTrainer`, in which the policy keeps its type and is saved without its reference.

    TRL puts a frozen copy of the policy's adapter on the base as reference, casts the policy to bf16 on a quantised base, where
    it would differ from that copy before it has learnt anything, and saves both with every checkpoint.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: trl.DPOConfig, **options: Any):
        whole = not isinstance(model, PeftModel) and options.get("peft_config") is None
        if whole and not args.precompute_ref_log_probs:  # TRL would load it anew, by its name
            options.setdefault("ref_model", copy.deepcopy(model))
        super().__init__(model, args=args, **options)
