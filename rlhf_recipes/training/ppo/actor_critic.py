"""TRL's `GRPOTrainer` with a reference and a critic, as roles on one base."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.kernels import check_vllm, compile_layers, without_compilation
from rlhf_recipes.models.precision import preserve_param_dtypes
from rlhf_recipes.models.roles import use_adapter
from rlhf_recipes.models.tokenizer import answer_messages
from rlhf_recipes.rewards.protocol import checked_reward
from rlhf_recipes.training.ppo.checkpoint import load_ppo_state, save_ppo_state
from rlhf_recipes.training.ppo.critic import CriticOptimizer, make_critic
from rlhf_recipes.training.ppo.data import EpochRepeatSampler, PretrainingText, check_rollout_func, fill_batch
from rlhf_recipes.training.ppo.diagnostics import DiagnosticsCallback, check_rewards
from rlhf_recipes.training.ppo.forward import (
    GenerationRecorder,
    PolicyOutput,
    forward_critic,
    forward_policy,
    read_recorders,
)
from rlhf_recipes.training.ppo.maths import KLController, ScoreScaling
from rlhf_recipes.training.ppo.rollout import IterationProgress, TokenBatch
from rlhf_recipes.training.ppo.setup import load_rewards_onto, make_reference, prepare_policy
from rlhf_recipes.training.ppo.vllm import send_policy_alone
from rlhf_recipes.training.resume import resume_errors
from rlhf_recipes.training.trainers import TrainerMixin

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, get_config_model_id

PLAIN_SAMPLING = {"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
PLAIN_SAMPLING |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "guidance_scale": 1.0}
"""In place of what a base's `generation_config.json` says: completions come from the policy itself."""


class ActorCriticTrainer(TrainerMixin, GRPOTrainer):
    """Roles, forward passes and checkpoints of `PPOTrainer`.

    Parameters: those of `PPOTrainer`.

    The reference is `ref_model`, or `reference_adapter` where it is an adapter or the bare base.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        ptx_dataset: Dataset | None = None,
        **options: Any,
    ):
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = args or PPOConfig(f"{Path(name).name}-PPO")
        set_seed(args.seed)  # before a fresh adapter is initialised
        revision = (args.model_init_kwargs or {}).get("revision", "main")
        model, args = prepare_policy(model, args, quantization_config, peft_config)
        check_vllm(args, bool(getattr(model, "is_quantized", False)))
        if compile_layers(model, args):
            args = without_compilation(args)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=args.trust_remote_code
        )
        # All roles come before TRL sees the model, since it wraps, casts and places it
        reference = make_reference(model, fresh_adapter=peft_config is not None) if args.kl_coef > 0 else None
        rewards = load_rewards_onto(model, reward_funcs, reward_processing_classes, tokenizer, args)
        self.critic = make_critic(args.critic, model, rewards)
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_scaling = ScoreScaling(args.use_score_scaling, args.use_score_norm, args.score_clip)
        self.pretraining_text = PretrainingText(ptx_dataset, tokenizer, args) if args.ptx_coef else None
        super().__init__(
            model=model,
            reward_funcs=[reward if isinstance(reward, nn.Module) else checked_reward(reward) for reward in rewards],
            args=args,
            train_dataset=fill_batch(train_dataset, args),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            reward_processing_classes=reward_processing_classes,
            callbacks=[DiagnosticsCallback(), *(callbacks or [])],
            optimizers=optimizers,
            rollout_func=check_rollout_func(rollout_func) if rollout_func else None,
            **options,
        )
        if self.aux_loss_enabled and not hasattr(self.model.config.get_text_config(), "num_experts"):
            raise RecipeError("router_aux_loss_coef: TRL does not know this family's load-balancing loss. Fix: set it to 0")
        if hasattr(self, "generation_config"):
            for option, value in PLAIN_SAMPLING.items():
                if getattr(self.generation_config, option) is None:
                    setattr(self.generation_config, option, value)
        send_policy_alone(self)
        self.reference_adapter = None if isinstance(reference, nn.Module) else reference
        if isinstance(reference, nn.Module):
            add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.critic.place(args, self.accelerator.device)
        self.critic_optimizer = CriticOptimizer(self.critic, args, self.model)
        self.progress = IterationProgress()
        self.policy_trained = False  # by this object; `train()` may be called again
        # Results inside TRL's methods that these do not return; each is read right after
        self._rewards: Tensor | None = None
        self._recorders: list[GenerationRecorder] = []
        self._policy_output: PolicyOutput | None = None

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochRepeatSampler:
        return EpochRepeatSampler(
            epoch=lambda: int(self.state.epoch or 0),
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    # --- Forward passes of the roles ---------------------------------------------------------------------

    def sampling_policy(self, tokens: TokenBatch, batch_size: int) -> PolicyOutput:
        """Return log-probabilities and values under the policy that sampled."""
        # TRL may have computed them already, or the sampler
        output, self._policy_output = self._policy_output, None
        recorders, self._recorders = self._recorders, []
        if output is not None:
            return output
        if recorders:
            return read_recorders(recorders, tokens.completion_ids)
        return self._forward_policy(self.model, tokens, batch_size)

    def reference_logps(self, tokens: TokenBatch, batch_size: int) -> Tensor:
        """Return log-probabilities under the reference, (B, T)."""
        if self.ref_model is not None:
            return self._forward_policy(self.ref_model, tokens, batch_size).logps
        with use_adapter(self.accelerator.unwrap_model(self.model), self.reference_adapter):
            return self._forward_policy(self.model, tokens, batch_size).logps

    def _forward_policy(self, model: nn.Module, tokens: TokenBatch, size: int) -> PolicyOutput:
        return self._forward(model, tokens.input_ids, tokens.attention_mask, tokens.length, batch_size=size)

    def _forward(self, model: nn.Module, *tokens: Any, **options: Any) -> PolicyOutput:
        return forward_policy(model, *tokens, accelerator=self.accelerator, critic=self.critic, **options)

    def critic_values(self, tokens: TokenBatch, batch_size: int | None = None) -> Tensor:
        """Return values, (B, T), by a pass of the critic, which must be active."""
        options = {"accelerator": self.accelerator, "batch_size": batch_size}
        return forward_critic(self.critic, self.model, tokens.input_ids, tokens.attention_mask, tokens.length, **options)

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference: without a `kl_coef` there is none."""
        return self.ref_model is not None or self.reference_adapter is not None

    @property
    def is_exact(self) -> bool:
        """Whether two ways to compute the same differ by the rounding of fp32 at most."""
        quantised = getattr(self.model, "is_quantized", False)
        return self.model.dtype in (torch.float32, torch.float64) and not (self.accelerator.native_amp or quantised)

    # --- What TRL calls for a rollout --------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **options: Any
    ) -> tuple[list[list[int]], Any]:
        """Sample in parts of `rollout_batch_size`; record log-probabilities and values."""
        rest = (images, multimodal_fields, num_generations)
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *rest, **options)
        if self.use_transformers_continuous_batching:
            # TRL casts all weights to bf16 for it, for good, and leaves the model in training mode
            with preserve_param_dtypes(self.model), use_adapter(self.model, None, train=True):
                return super()._generate_single_turn(prompt_ids, *rest, **options)
        size = self.args.rollout_batch_size or len(prompt_ids)
        completions = []
        for start in range(0, len(prompt_ids), size):
            recorder = GenerationRecorder(self.accelerator.unwrap_model(self.model), self.temperature, self.critic)
            with recorder if self._records_generation else contextlib.nullcontext():
                part = super()._generate_single_turn(prompt_ids[start : start + size], *rest, **options)[0]
            if self._records_generation:
                recorder.check(part)
                self._recorders.append(recorder)
            completions += part
        return completions, None

    @property
    def _records_generation(self) -> bool:
        """Whether to record what Transformers' sampler computes."""
        if self.rollout_func or self.tools or self.args.generation_kwargs:  # several turns, or beams, which swap rows
            return False
        return self.is_exact if self.args.sampler_logps is None else self.args.sampler_logps

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what TRL needs of a pass, and keep all of it in `_policy_output`."""
        if any(value is not None for value in multimodal.values()):
            raise RecipeError("prompts: images. Fix: PPOTrainer reads text only; remove them")
        if self._recorders:
            output = read_recorders(self._recorders, input_ids[:, -logits_to_keep:])
        else:
            size = batch_size and (self.args.local_rollout_forward_batch_size or batch_size)
            options = {"batch_size": size, "entropy": compute_entropy, "aux_loss": compute_aux_loss}
            output = self._forward(model, input_ids, attention_mask, logits_to_keep, **options)
        self._policy_output = output
        return output.logps, output.entropies, output.aux_loss

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Return, and keep, the rewards of all processes, (N, functions)."""
        try:
            completions[:] = answer_messages(self.processing_class, prompts, completions, completion_ids_list)  # logged too
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            first_row = self.accelerator.process_index * len(prompts)
            models = [isinstance(reward, nn.Module) for reward in self.reward_funcs]
            check_rewards(self._rewards, self.reward_func_names, models, dict(enumerate(prompts, start=first_row)))
        except Exception as error:
            message = str(error) if isinstance(error, RecipeError) else f"a reward failed: {error!r}"
            raise RecipeError(f"step {self.state.global_step}: {message}") from error
        return self._rewards

    # --- Checkpoints -------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the policy and the critic."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.critic.save(output_dir or self.args.output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the state of PPO with the random state."""
        super()._save_rng_state(output_dir)
        save_ppo_state(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        with resume_errors(resume_from_checkpoint):
            self.critic.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            with resume_errors(checkpoint):
                self.critic.load(checkpoint)  # DeepSpeed loads its policy without `_load_from_checkpoint`
                load_ppo_state(self, checkpoint)
