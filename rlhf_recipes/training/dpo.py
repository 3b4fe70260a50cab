"""DPO: what TRL's `DPOTrainer` lacks where the reference is an adapter on the policy's own base."""

import copy
from typing import Any

from rlhf_recipes.models.precision import keep_adapter_in_fp32, preserve_param_dtypes
from rlhf_recipes.models.roles import POLICY, save_single_adapter

import trl
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel


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
