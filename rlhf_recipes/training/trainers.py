"""Our trainers: TRL's, and what all of them add.

`tests/ppo/test_trl_assumptions.py` states what is assumed here about Transformers and TRL.
"""

import contextlib
import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_recipes.config.launcher import plain
from rlhf_recipes.core.errors import RecipeError, as_recipe_error, did_you_mean, error_context
from rlhf_recipes.core.files import ADAPTER, read_json, write_json
from rlhf_recipes.models.adapters import check_adapter_complete
from rlhf_recipes.models.dropout import disable_dropout
from rlhf_recipes.models.positions import check_packing, positions_of
from rlhf_recipes.models.precision import keep_adapter_in_fp32, preserve_param_dtypes
from rlhf_recipes.models.roles import POLICY, save_single_adapter
from rlhf_recipes.models.weights import iterate_weights, read_weights
from rlhf_recipes.training.effect import EffectCallback
from rlhf_recipes.training.resume import ARGUMENTS, read_trainer_state, resume_errors

import torch
import trl
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

logger = logging.getLogger(__name__)

SAMPLING_METRICS = ("reward", "reward_std", "frac_reward_zero_std", "rlhf_reward", "score", "score_std", "kl", "kl_coef")
SAMPLING_METRICS += ("entropy", "entropy_coef", "aux_loss", "policy_loss", "num_tokens")
"""What an evaluation of PPO logs, beside names with a slash."""
COUNTERS = "counts-{}.json"
"""File of a checkpoint with the counters of one process."""


class TrainerMixin:
    """Mixin: `class DPOTrainer(TrainerMixin, trl.DPOTrainer)`.

    - Weights keep their types. TRL casts what it trains on a quantised base to bf16.
    - `disable_dropout` reaches dropout that is a number in the configuration, too.
    - A checkpoint holds one adapter, though several share the base. TRL writes no model card beside it.
    - A resumed run logs what the unbroken one does: tokens, averages and losses are saved with each checkpoint.
    - A damaged checkpoint is one message.
    - A run that cannot change the model is refused, and one that has not changed it fails.
    """

    run_arguments: dict[str, Any] | None = None
    """Saved with each checkpoint, for `checkpoint_to_resume` to compare."""
    first_token = 0
    """Tokens that earlier processes of this run trained on."""
    _resumed_counters: dict[str, Any] | None = None

    def __init__(self, model: str | nn.Module, *args: Any, **kwargs: Any):
        types = preserve_param_dtypes(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
        with as_recipe_error(self._name.lower()), types:
            super().__init__(model, *args, **kwargs)
        self.add_callback(EffectCallback())
        keep_adapter_in_fp32(self)
        if getattr(self.args, "disable_dropout", False):
            disable_dropout(self.model)
        if getattr(self, "padding_free", False):
            check_packing(self.model, self.data_collator, "packing" if self.args.packing else "padding_free")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: at a checkpoint, TRL would replace an earlier result's card."""

    def check_before_training(self) -> None:
        """Refuse a run without a step, or whose evaluation would fail; warn of few rows.

        Raises:
            RecipeError: with the key.
        """
        args, samples = self.args, hasattr(self, "reward_funcs")
        rows, batch = len(self.train_dataset), args.train_batch_size * args.world_size
        if args.dataloader_drop_last and rows < batch and not samples:  # PPO repeats its prompts
            raise RecipeError(
                f"dataloader_drop_last: {rows} rows are less than a batch of {batch}: no step would be trained. Fix: set it to "
                "false, or a smaller `per_device_train_batch_size`"
            )
        batch *= args.gradient_accumulation_steps
        if rows < batch and not samples:
            logger.warning(
                "per_device_train_batch_size: %d rows do not fill a batch of %d: one step an epoch. Fix: lower it, or raise "
                "`num_train_epochs`",
                *(rows, batch),
            )
        wrapped, limit = getattr(args, "packing", False) and not self.padding_free, positions_of(self.model)
        if wrapped and limit is not None and args.max_length > limit:
            raise RecipeError(
                f"max_length: {args.max_length}: packed rows are as long, and the model has {limit} positions. Fix: set "
                f"`max_length: {limit}`"
            )
        wanted, sharded = args.metric_for_best_model, self.is_fsdp_enabled or self.is_deepspeed_enabled
        if args.eval_strategy != "no" and wanted not in (None, "loss", "eval_loss") and not sharded:
            # Sampling takes long; a name with a slash may be of a reward function
            names = self._evaluation_metrics() if not samples else [wanted] if "/" in wanted else SAMPLING_METRICS
            self._check_metric(wanted, {"loss", *names})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer; what it rejects is one message."""
        with as_recipe_error(f"optim: {plain(self.args.optim)}"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the scheduler; what it rejects is one message."""
        name = plain(self.args.lr_scheduler_type)
        with error_context(f"lr_scheduler_type: {name}", TypeError, ValueError, fix="set or correct `lr_scheduler_kwargs`"):
            return super().create_scheduler(*args, **kwargs)

    def _evaluation_metrics(self) -> set[str]:
        """Return the names that TRL logs in an evaluation, found by its first batch."""
        training = self.model.training
        with torch.random.fork_rng():  # iterating draws a seed
            batch = next(iter(self.get_eval_dataloader()))
            self.model.eval()
            self.prediction_step(self.model, batch, prediction_loss_only=True)
        self.model.train(training)
        names = set(self._metrics["eval"])
        self._metrics["eval"].clear()
        return names

    def _determine_best_metric(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> bool:
        if self.args.metric_for_best_model is not None:
            self._check_metric(self.args.metric_for_best_model, metrics)
        return super()._determine_best_metric(metrics, *args, **kwargs)

    def _check_metric(self, wanted: str, known: Iterable[str]) -> None:
        names = {name.removeprefix("eval_") for name in known}
        if wanted.removeprefix("eval_") not in names:
            raise RecipeError(
                f"metric_for_best_model: {wanted!r} is none of {', '.join(sorted(names))}{did_you_mean(wanted, names)}"
            )

    @property
    def tokens_seen(self) -> int:
        """Number of tokens since the first step, of all processes; PPO's are sampled."""
        return getattr(self, "_total_train_tokens", 0) or self.state.num_input_tokens_seen

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the training loss averaged over all steps of a resumed run."""
        if "train_loss" in logs and self._resumed_counters:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; only load a checkpoint of the last step (else one more is trained)."""
        if not isinstance(resume_from_checkpoint, str):
            return super().train(resume_from_checkpoint, *args, **kwargs)
        state = read_trainer_state(Path(resume_from_checkpoint))
        steps, epochs = self.args.max_steps, self.args.num_train_epochs
        if not (state.global_step >= steps if steps > 0 else state.epoch >= epochs):
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        self._load_rng_state(resume_from_checkpoint)
        summarised = any("train_loss" in entry for entry in state.log_history)
        if self._resumed_counters and not summarised:  # killed between the checkpoint and the last line of its log
            self._total_loss_scalar += self._tr_loss.item()
            self.model.train(self._resumed_counters["training"])
            self.log({"total_flos": state.total_flos, "train_loss": 0.0})
        return None

    # --- Checkpoints -------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with save_single_adapter(self.model, POLICY):
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save counters and arguments too, before the trainer's state, which is last."""
        super()._save_rng_state(output_dir)
        metrics = getattr(self, "_metrics", {}).get("train", {})
        counters = {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tokens": getattr(self, "_total_train_tokens", 0),
            "training": self.model.training,  # TRL logs the metrics of this mode
            "metrics": json.loads(json.dumps(metrics, default=float)),
        }
        write_json(self._counters_path(output_dir), counters)
        if self.run_arguments is not None and self.is_world_process_zero():
            write_json(Path(output_dir) / ARGUMENTS, self.run_arguments)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights, which must be complete and finite."""
        with resume_errors(resume_from_checkpoint):
            for path in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
                if path.name == ADAPTER and is_peft_model(self.model):
                    name = f"resume_from_checkpoint: {resume_from_checkpoint}"
                    check_adapter_complete(self.model, self.model.active_adapters[0], read_weights(path), name)
                else:
                    for _ in iterate_weights(path):  # checks each that it reads
                        pass
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with resume_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random state, and the counters, which Transformers has reset by now."""
        with resume_errors(checkpoint):
            super()._load_rng_state(checkpoint)
        if checkpoint is None or not (path := self._counters_path(checkpoint)).exists():
            return
        with resume_errors(path):
            counters = self._resumed_counters = read_json(path)
            self._tr_loss = torch.tensor(counters["loss"], device=self.args.device)
            self._total_loss_scalar = counters["total_loss"]
            self._globalstep_last_logged = counters["last_logged"]
            self._total_train_tokens = counters["tokens"]
            for name, values in counters["metrics"].items():
                self._metrics["train"][name] = [*values]
        self.first_token = self.tokens_seen

    def _counters_path(self, folder: str | Path) -> Path:
        return Path(folder) / COUNTERS.format(self.args.process_index)


def extend_trainer(trainer: type[Trainer]) -> type[Trainer]:
    """Return a trainer of TRL with `TrainerMixin`."""
    return type(trainer.__name__, (TrainerMixin, trainer), {"__doc__": trainer.__doc__, "__module__": __name__})


SFTTrainer = extend_trainer(trl.SFTTrainer)


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
