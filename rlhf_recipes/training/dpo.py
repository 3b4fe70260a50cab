"""Direct preference optimisation."""

import copy
from typing import Any

from rlhf_recipes.training.mixin import TrainerMixin

import trl
from peft import PeftModel
from transformers import PreTrainedModel


class DPOTrainer(TrainerMixin, trl.DPOTrainer):
    """TRL's `DPOTrainer` with `TrainerMixin`.

    TRL's reference is a frozen copy of the policy's adapter on the same base. TRL casts the policy to bf16 on a quantised base,
    where it would differ from the copy at the first step, and saves both with every checkpoint.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: trl.DPOConfig, **options: Any):
        trains_all_weights = not isinstance(model, PeftModel) and options.get("peft_config") is None
        if trains_all_weights and not args.precompute_ref_log_probs:  # TRL would load the model again, by its name
            options.setdefault("ref_model", copy.deepcopy(model))
        super().__init__(model, args=args, **options)
