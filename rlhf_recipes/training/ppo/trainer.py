"""PPO for language models as a subclass of TRL's `GRPOTrainer`, which brings generation, rewards, logging and checkpoints.

Everything that it assumes about TRL beyond its public interface is stated, and tested, in `tests/test_trl_assumptions.py`.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import read_json, write_json
from rlhf_recipes.models.backbone import backbone, forward_backbone
from rlhf_recipes.models.kernels import check_vllm, compile_layers, eager_mode, without_compilation
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking, preserve_param_dtypes
from rlhf_recipes.models.roles import NO_ADAPTER, POLICY, copy_adapter, use_adapter
from rlhf_recipes.rewards.protocol import checked_reward
from rlhf_recipes.rewards.reward_funcs import SavedReward
from rlhf_recipes.rewards.reward_models import Ensemble, RewardModel, Scorer
from rlhf_recipes.rewards.saved import load_saved_reward
from rlhf_recipes.training.mixin import TrainerMixin
from rlhf_recipes.training.ppo.critic import make_critic, positions, shift_hidden_states
from rlhf_recipes.training.ppo.diagnostics import DiagnosticsCallback
from rlhf_recipes.training.ppo.maths import (
    KLController,
    Moments,
    ScoreScaling,
    approximate_kl,
    explained_variance,
    gae,
    kl_estimate,
    masked_sum,
    token_rewards,
    value_loss,
    whiten,
)
from rlhf_recipes.training.ppo.sampling import (
    EpochRepeatSampler,
    GenerationRecorder,
    GenerationRecorders,
    PretrainingText,
    at_least_one_batch,
    check_rollouts,
    pad_right,
)
from rlhf_recipes.training.ppo.vllm import send_policy_alone
from rlhf_recipes.training.resume import resume_errors

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_config_model_id,
    print_prompt_completions_sample,
)

logger = logging.getLogger(__name__)

REFERENCE = "reference"
"""Name of the adapter that is a frozen copy of the policy's."""

STATE, ROLLOUT = "ppo_state.json", "rollout-{}.safetensors"


class PPOTrainer(TrainerMixin, GRPOTrainer):
    """Proximal policy optimisation with a critic and a KL penalty in the reward (Ziegler et al., 2019; Ouyang et al., 2022).

    It maximises E[score - kl_coef * KL(policy || reference)] + ptx_coef * E[log-likelihood of pretraining text].

    The reference is the policy as it is given: a frozen copy of the adapter of a `PeftModel`; the base without the fresh
    adapter of `peft_config`; a frozen copy of a model without adapters.

    Parameters:
        model: name or folder, model, or `PeftModel` whose adapter "default" is the SFT policy.
        reward_funcs: what scores completions, one or a list: functions in TRL's protocol, sync or async; `RewardModel`s and
            `Ensemble`s; sequence classifiers; folders that `recipes/reward.py` saved, whose adapters are put on the policy's
            base.
        args: the arguments.
        train_dataset: with the column `prompt`, texts or lists of messages; other columns go to the reward functions.
        eval_dataset: likewise.
        processing_class: the tokenizer; by default that of the model.
        reward_processing_classes: as in TRL.
        callbacks: as in Transformers.
        optimizers: of the policy, as in Transformers; the critic has its own.
        quantization_config: for a model given by name.
        peft_config: for a model that is not a `PeftModel`.
        rollout_func: as in TRL.
        ptx_dataset: with the column `text`, for `ptx_coef`.
        options: TRL's `tools` and `environment_factory`.

    Raises:
        RecipeError: for rewards, a critic or data that do not fit; and during training, naming the step, for a reward that is
            no finite number or a rollout without tokens, or where policy and reference differ before anything was learnt.
    """

    _tag_names: ClassVar = ["trl", "ppo", "rlhf-recipes"]
    _name = "PPO"
    _paper: ClassVar = {
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        rollout_func: Callable[..., dict[str, Any]] | None = None,
        ptx_dataset: Dataset | None = None,
        **options: Any,
    ):
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = args or PPOConfig(f"{Path(name).name}-PPO")
        set_seed(args.seed)  # before an adapter is drawn
        revision = (args.model_init_kwargs or {}).get("revision", "main")
        model, args = _loaded(model, args, quantization_config, peft_config)
        check_vllm(args, bool(getattr(model, "is_quantized", False)))
        if compile_layers(model, args):
            args = without_compilation(args)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=args.trust_remote_code
        )
        given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs is not None else []

        # Roles: all of them before TRL sees the model, since it wraps, casts and places it
        reference = _make_reference(model, fresh=peft_config is not None, needed=args.kl_coef > 0)
        rewards = [_as_reward(reward, model, tokenizer, args) for reward in given]
        self.critic = make_critic(args.critic, model, _first_reward_model(rewards))
        self.kl = KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        self.score_scaling = ScoreScaling(args.use_score_scaling, args.use_score_norm, args.score_clip)
        self._ptx = PretrainingText(ptx_dataset, tokenizer, args) if args.ptx_coef else None
        super().__init__(
            model=model,
            reward_funcs=[reward if isinstance(reward, nn.Module) else checked_reward(reward) for reward in rewards],
            args=args,
            train_dataset=at_least_one_batch(train_dataset, args),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            reward_processing_classes=reward_processing_classes,
            callbacks=[DiagnosticsCallback(), *(callbacks or [])],
            optimizers=optimizers,
            rollout_func=check_rollouts(rollout_func) if rollout_func else None,
            **options,
        )
        send_policy_alone(self)
        self._place_roles(reference)
        self._forward, self._record, self._has_learnt = _Forward(), None, False
        self._reset_iteration()

    # --- Set-up ------------------------------------------------------------------------------------------

    def _place_roles(self, reference: Any) -> None:
        """Puts reference and critic on the device, and makes the critic's optimizer."""
        self._reference_adapter = None if isinstance(reference, nn.Module) else reference
        if isinstance(reference, nn.Module):
            add_fused_lm_head(reference, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.critic.head.to(self.accelerator.device)
        if self.critic.model is not None and self.critic.adapter is None:
            self.critic.model.to(self.accelerator.device)
            if self.args.disable_dropout:
                disable_dropout_in_model(self.critic.model)
            if self.args.gradient_checkpointing:  # Transformers sees to the policy alone
                self.critic.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        self._critic_weights = list(self.critic.trainable().values())
        rate = self.args.value_learning_rate
        if rate is None:
            rate = 1e-3 if self.critic.shares_backbone else self.args.learning_rate
        self._value_learning_rate = rate
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = [
            {"params": [weight for weight in self._critic_weights if (weight.ndim > 1) == decays], "weight_decay": decay}
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
        ]
        self.critic_optimizer = optimizer(groups, **{**options, "lr": rate})

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochRepeatSampler:
        """TRL's, in an order that depends on seed and epoch alone, so that a resumed run has that of an unbroken one."""
        return EpochRepeatSampler(
            epoch=lambda: int(self.state.epoch or 0),
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    # --- Forward passes ----------------------------------------------------------------------------------

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
        """TRL's, with each micro-batch cut to its longest row, and the LM head on the completions' tokens alone.

        The values of a critic that reads the policy's states are left in `self._forward`.
        """
        if any(value is not None for value in multimodal.values()):
            raise RecipeError("PPOTrainer reads text only, and these prompts have images")
        if self._record is not None:  # TRL asks for the log-probabilities of what was just sampled
            return self._record.of(input_ids[:, -logits_to_keep:])[0], None, None
        size = len(input_ids) if batch_size is None else self.args.local_rollout_forward_batch_size or batch_size
        rows = _by_length(attention_mask, size)
        pieces = [
            self._pass(model, input_ids[chunk], attention_mask[chunk], logits_to_keep, compute_entropy, compute_aux_loss)
            for chunk in rows.split(size)
        ]
        back = rows.argsort()
        logps, entropies, values, aux = zip(*pieces, strict=True)
        self._forward.values = torch.cat(values)[back] if values[0] is not None else None
        self._forward.logps = torch.cat(logps)[back]
        entropy = torch.cat(entropies)[back] if compute_entropy else None
        return self._forward.logps, entropy, torch.stack(aux).mean() if compute_aux_loss else None

    def _pass(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int, entropy: bool, aux: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One micro-batch: log-probabilities, entropies and values, (B, count) each, and the router's loss."""
        ids, mask, kept = _trimmed(input_ids, attention_mask, count)
        labels = ids[:, -kept:].masked_fill(mask[:, -kept:] == 0, -100)
        options = {"output_router_logits": True} if aux else {}
        with self._states_of(model, kept) as states, self.accelerator.autocast():
            outputs = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                shift_labels=labels,  # of the states that the hook leaves: those in which the completion was written
                fused_lm_head=True,
                **options,
            )
        values = None
        if self.critic.shares_backbone:
            values = pad_right(self.critic(states[0], ids, mask, kept), count)
        return (
            pad_right(outputs.log_probs, count),
            pad_right(outputs.entropy, count) if entropy else None,
            values,
            outputs.aux_loss if aux else None,
        )

    @contextlib.contextmanager
    def _states_of(self, model: nn.Module, count: int) -> Iterator[list[Tensor]]:
        """Within, the trunk returns the states of the last `count` tokens only; they are in the list after a pass."""
        states: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, outputs: Any) -> Any:
            outputs.last_hidden_state = shift_hidden_states(outputs.last_hidden_state, count)
            states.append(outputs.last_hidden_state)
            return outputs

        handle = backbone(self.accelerator.unwrap_model(model)).register_forward_hook(keep)
        try:
            yield states
        finally:
            handle.remove()

    # --- Rollout -----------------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **options: Any
    ) -> tuple[list[list[int]], Any]:
        """TRL's, in parts of `rollout_batch_size`, with what the sampler computes on its way kept where that is exact."""
        rest = (images, multimodal_fields, num_generations)
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *rest, **options)
        if self.use_transformers_continuous_batching:
            # TRL casts all weights to bf16 for it, for good, and leaves the model in training mode
            with preserve_param_dtypes(self.model), use_adapter(self.model, None, train=True):
                return super()._generate_single_turn(prompt_ids, *rest, **options)
        size = self.args.rollout_batch_size or len(prompt_ids)
        completions, records = [], []
        for start in range(0, len(prompt_ids), size):
            with self._watched() as record:
                completions += super()._generate_single_turn(prompt_ids[start : start + size], *rest, **options)[0]
            records.append(record)
        self._record = GenerationRecorders(records, size) if self._keeps_record else None
        return completions, None

    def _watched(self) -> contextlib.AbstractContextManager[GenerationRecorder | None]:
        """A record of what the sampler computes within, or of nothing."""
        if not self._keeps_record:
            return contextlib.nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        return GenerationRecorder(model, self.temperature, self.critic if self.critic.shares_backbone else None)

    @property
    def _keeps_record(self) -> bool:
        """Whether the sampler is a model of ours that computes what another pass would."""
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func or self.tools
        watched = not (elsewhere or self.args.generation_kwargs)  # which may ask for beams, and other orders of rows
        wanted = self.args.sampler_logps
        return watched and (self._exact if wanted is None else wanted)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards of each function, of all processes (N, functions); kept for the advantages."""
        try:
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except Exception as error:
            message = str(error) if isinstance(error, RecipeError) else f"a reward failed: {error!r}"
            raise RecipeError(f"step {self.state.global_step}: {message}") from error
        self._check_finite(self._rewards, prompts)
        return self._rewards

    def _check_finite(self, rewards: Tensor, prompts: Any) -> None:
        """Functions that were given are checked when called; what is left are models, and the rewards of environments."""
        models = torch.tensor([isinstance(reward, nn.Module) for reward in self.reward_funcs], device=rewards.device)
        wrong = (rewards.isinf() | (rewards.isnan() & models)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            local = row - self.accelerator.process_index * len(prompts)
            shown = f"; the prompt: {prompts[local]!r:.300}" if 0 <= local < len(prompts) else ""
            raise RecipeError(
                f"step {self.state.global_step}: the reward {self.reward_func_names[column]} returned "
                f"{rewards[row, column].item()} for completion {row} of the batch{shown}"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with advantages and returns of each token in place of advantages of each completion."""
        with eager_mode(self.model):
            return self._build_rollout(inputs)

    def _build_rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._record, self._forward.values = None, None
        batch = super()._generate_and_score_completions(inputs)
        record, self._record = self._record, None
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._reset_iteration()
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._add_logps_and_values(batch, record)
            ref_logps = self._reference_logps(batch)
        mask = self._scored_mask(batch)
        kl = kl_estimate(batch["old_per_token_logps"], ref_logps, self.args.kl_estimator)
        self._check_reference(batch["old_per_token_logps"] - ref_logps, mask)
        scores = self._scores(batch, mode, mask.any(dim=1))
        rewards = token_rewards(scores, kl, mask, self.kl.coefficient)
        if self.args.whiten_rewards:
            rewards = whiten(rewards, mask, self._moments(rewards, mask), shift_mean=False)
        advantages, returns = gae(rewards, batch["old_values"], mask, self.args.gamma, self.args.lam)
        self._measure_rollout(mode, scores, kl, batch["old_values"], returns, mask)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, self._moments(advantages, mask))
        self._log_advantages(advantages, mask)
        return {**batch, "advantages": advantages, "returns": returns}

    def _add_logps_and_values(self, batch: dict[str, Any], record: GenerationRecorders | None) -> None:
        """Log-probabilities and values under the sampling policy; sampler or TRL may have computed them already."""
        ids, mask, count, size = self.concat_prompt_completion(batch)
        values = self._forward.values
        if record is not None:
            batch["old_per_token_logps"], values = record.of(batch["completion_ids"])
        elif "old_per_token_logps" not in batch or (self.critic.shares_backbone and values is None):
            logps, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, count, batch_size=size)
            batch["old_per_token_logps"], values = logps, self._forward.values
        if not self.critic.shares_backbone:
            values = self._critic_values(ids, mask, count, size)
        batch["old_values"] = values

    def _critic_values(self, ids: Tensor, mask: Tensor, count: int, size: int) -> Tensor:
        """Values (B, count) of a critic with a pass of its own."""
        rows = _by_length(mask, size)
        values = []
        with self.critic.active(), self.accelerator.autocast():
            for chunk in rows.split(size):
                piece_ids, piece_mask, kept = _trimmed(ids[chunk], mask[chunk], count)
                values.append(pad_right(self.critic(None, piece_ids, piece_mask, kept), count))
        return torch.cat(values)[rows.argsort()]

    def _reference_logps(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities under the reference, (B, T); those of the policy where no KL is asked for."""
        ids, mask, count, size = self.concat_prompt_completion(batch)
        if self.ref_model is not None:
            logps, _, _ = self._get_per_token_logps_and_entropies(self.ref_model, ids, mask, count, batch_size=size)
            return logps
        if not self._has_reference:  # nobody asks for the KL
            return batch["old_per_token_logps"]
        with use_adapter(self.accelerator.unwrap_model(self.model), self._reference_adapter):
            logps, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, count, batch_size=size)
        return logps

    @property
    def _has_reference(self) -> bool:
        return self.ref_model is not None or self._reference_adapter is not None

    def concat_prompt_completion(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, int, int]:
        """Ids and mask of prompts with completions, (B, P + T), T, and the size of a pass without gradients."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        return ids, mask, batch["completion_ids"].size(1), args.local_rollout_forward_batch_size or size

    def _scored_mask(self, batch: dict[str, Any]) -> Tensor:
        """The tokens to learn from, (B, T); a completion that no reward function scored is left out of everything."""
        mask = batch["completion_mask"] * batch.get("tool_mask", torch.ones_like(batch["completion_mask"]))
        unscored = self._rewards.isnan().all(dim=1)
        if self._rewards.size(1) and unscored.any():
            mask = mask * ~self._local(unscored)[:, None]
            batch["tool_mask"] = mask  # by which TRL masks its losses, and nothing else
            batch["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        return mask

    def _local(self, values: Tensor) -> Tensor:
        """Of the rows of all processes those of this one."""
        count = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * count :][:count]

    def _scores(self, batch: dict[str, Any], mode: str, scored: Tensor) -> Tensor:
        """One score of each completion, (B,): the weighted sum of rewards, less the penalty, in the scale of those `scored`."""
        total = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(dim=1)
        scores = self._local(total)
        if self.args.missing_eos_penalty is not None:
            ends = torch.tensor(self.eos_token_ids, device=scores.device)
            ended = torch.isin(_last_tokens(batch["completion_ids"], batch["completion_mask"]), ends)
            scores = scores - self.args.missing_eos_penalty * ~ended
        if mode == "train" and self.score_scaling.scale:
            self.score_scaling.update(self._moments(scores, scored))
        return self.score_scaling(scores)

    def _moments(self, values: Tensor, mask: Tensor | None = None) -> Moments:
        """Those of the values of all processes."""
        return sum(gather_object([Moments.of(values, mask)]), Moments())

    def _check_reference(self, log_ratio: Tensor, mask: Tensor) -> None:
        """At the start the policy is the reference; if not, a role is not what it should be."""
        if self.state.global_step or self._has_learnt or not self.model.training:
            return
        gap = self._moments(log_ratio.abs(), mask)
        if not gap.mean <= self._tolerance(gap.count):
            raise RecipeError(
                f"step 0: policy and reference differ by {gap.mean:.3g} nats a token before anything was learnt. Their weights "
                "are not the same (an adapter that is not the one it was copied from), or not of one type, or one has dropout"
            )

    @property
    def _exact(self) -> bool:
        """Whether two ways to compute one thing differ by the rounding of fp32 at the most."""
        quantised = getattr(self.model, "is_quantized", False)
        return self.model.dtype in (torch.float32, torch.float64) and not (self.accelerator.native_amp or quantised)

    def _tolerance(self, tokens: float) -> float:
        """What two passes may differ by, in nats a token, by rounding alone; in bf16 by more where tokens are few."""
        return 1e-3 if self._exact else 0.05 + 0.2 / max(tokens, 1) ** 0.5

    def _measure_rollout(self, mode: str, scores: Tensor, kl: Tensor, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Logs what the iteration begins with, and leads the KL coefficient."""
        metrics = self._metrics[mode]
        scored = mask.any(dim=1)
        kl_sum = torch.where(mask.bool(), kl, 0.0).sum(1)
        summed, score = self._moments(kl_sum, scored), self._moments(scores, scored)
        if self._has_reference:
            metrics["kl"].append(summed.mean)
        metrics["score"].append(score.mean)
        metrics["score_std"].append(score.std)
        metrics["rlhf_reward"].append(score.mean - self.kl.coefficient * summed.mean)
        metrics["kl_coef"].append(self.kl.coefficient)
        metrics["value/mean"].append(self._moments(values, mask).mean)
        errors, total = self._moments(returns - values, mask), self._moments(returns, mask)
        metrics["value/explained_variance"].append(explained_variance(errors, total))
        metrics["completions/ended_ratio"].append(1 - metrics["completions/clipped_ratio"][-1])
        metrics.pop("frac_reward_zero_std", None)  # of GRPO's groups
        if mode == "train":
            self.kl.update(summed.mean, int(summed.count))

    def _log_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Replaces, in TRL's table of completions, GRPO's advantages by the means of those of the tokens."""
        means = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        gathered = self.accelerator.gather(means).tolist()
        for place in range(1, min(len(gathered), len(self._logs["advantages"])) + 1):
            self._logs["advantages"][-place] = gathered[-place]

    def print_samples(self, count: int = 8) -> None:
        """Prints some of the newest completions with their rewards, as TRL does under `log_completions`."""
        if self.accelerator.is_main_process and self._logs["prompt"]:
            newest = {name: list(self._logs[name])[-count:] for name in ("prompt", "completion")}
            rewards = {name: list(values)[-count:] for name, values in self._logs["rewards"].items()}
            print_prompt_completions_sample(newest["prompt"], newest["completion"], rewards, None, self.state.global_step)

    # --- Update ------------------------------------------------------------------------------------------

    def _reset_iteration(self) -> None:
        """Forgets what was known of the last batch of completions."""
        self._stopped, self._updated = False, False
        self._window: list[Tensor] = []  # of the micro-batches since the last step: sums over tokens, and their number

    @property
    def _warming_up(self) -> bool:
        return self.model.training and self.state.global_step < self.args.value_warmup_steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch: pretraining text, the policy, then the critic.

        Each loss is back-propagated while its adapter is the active one: gradient checkpointing would recompute with another.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._stopped:
            self._critic_step(self._inputs)
        if self.accelerator.sync_gradients:
            self._on_optimizer_step()
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's clipped loss of the policy, with advantages of each token."""
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._inputs = inputs
        if self._stopped or self._warming_up:
            # Nothing for the policy to learn, and no gradient for its optimizer. DeepSpeed wants a loss that was computed
            return torch.zeros((), device=self.accelerator.device, requires_grad=True).clone()
        if self._ptx is not None:
            with self.accelerator.no_sync(model):  # the backward pass of the policy's loss sends off both
                self._ptx_step(model)
        loss = super()._compute_loss(model, inputs)
        self._measure_step(inputs)
        return loss

    def _measure_step(self, inputs: dict[str, Any]) -> None:
        """Keeps by how much the policy differs from the one that sampled: sums over tokens, and their number."""
        mask = _loss_mask(inputs)
        logps, old_logps = self._forward.logps.detach(), inputs["old_per_token_logps"]
        gap = masked_sum((logps - old_logps).abs(), mask)
        self._window.append(torch.stack([approximate_kl(logps, old_logps, mask), gap, mask.sum()]))

    def _check_ratio(self, gap: float, tokens: float) -> None:
        """Before the first step of an iteration the policy is the one that sampled, or something is wrong."""
        if not self._updated and not gap <= self._tolerance(tokens):
            raise RecipeError(
                f"step {self.state.global_step}: the policy differs by {gap:.3g} nats a token from the one that sampled, "
                "before its first step on this batch, so the ratio of PPO is not 1: something differs between rollout and "
                "update (dropout, the active adapter, the temperature, padding, the type of the weights)"
            )

    def _critic_step(self, inputs: dict[str, Any]) -> None:
        """Adds the gradient of the clipped value loss of one micro-batch to the critic's weights."""
        mask = _loss_mask(inputs)
        ids, attention, count, _ = self.concat_prompt_completion(inputs)
        with self.critic.active(train=True):
            values = self._values_now(ids, attention, count)
            total, clipped = value_loss(values, inputs["old_values"], inputs["returns"], mask, self.args.cliprange_value)
            (self.args.vf_coef * total / self._tokens_of_a_step(inputs)).backward()
        tokens = mask.sum().clamp(min=1)
        self._metrics["train"]["value/loss"].append(self.accelerator.gather(total.detach() / tokens).mean().item())
        self._metrics["train"]["value/clip_ratio"].append(self.accelerator.gather(clipped / tokens).mean().item())

    def _values_now(self, ids: Tensor, attention: Tensor, count: int) -> Tensor:
        """Values (B, count) with gradients, from the policy's pass where there was one."""
        if self.critic.shares_backbone and not self._warming_up:
            return self._forward.values
        ids, attention, kept = _trimmed(ids, attention, count)
        with self.accelerator.autocast():
            if not self.critic.shares_backbone:
                return pad_right(self.critic(None, ids, attention, kept), count)
            with torch.no_grad():  # the policy does not learn yet
                model = self.accelerator.unwrap_model(self.model)
                inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": positions(attention)}
                outputs = forward_backbone(model, **inputs, use_cache=False)
            return pad_right(self.critic(shift_hidden_states(outputs.last_hidden_state, kept), ids, attention, kept), count)

    def _tokens_of_a_step(self, inputs: dict[str, Any]) -> Tensor:
        """By what the sum over a micro-batch is divided, so that an optimizer step has the mean over all its tokens."""
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation

    def _ptx_step(self, model: nn.Module) -> None:
        """Adds the gradient of the language-modelling loss on pretraining text to the policy's weights."""
        ids, mask = (tensor.to(self.accelerator.device) for tensor in self._ptx.batch(self._step, self.accelerator))
        labels = ids.masked_fill(mask == 0, -100)
        with self.compute_loss_context_manager():
            # The fused head, which keeps no logits of all tokens, has the temperature of sampling built in
            fused = {"fused_lm_head": True} if self.temperature == 1 else {"use_cache": False}
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, **fused).loss
        self.accelerator.backward(self.args.ptx_coef * loss / self.current_gradient_accumulation_steps)
        self._metrics["train"]["ptx_loss"].append(self.accelerator.gather(loss.detach()).mean().item())

    def _on_optimizer_step(self) -> None:
        """Lets the critic take its step, before the policy takes its own, and looks whether the iteration should end."""
        if self._window:
            sums = self.accelerator.reduce(torch.stack(self._window).sum(0), reduction="sum")
            kl, gap = (sums[:2] / sums[2].clamp(min=1)).tolist()
            self._check_ratio(gap, sums[2].item())
        if not self._stopped:
            self._step_critic()
        if self._window:
            self._metrics["train"]["approx_kl"].append(kl)
            self._updated, self._has_learnt, self._window = True, True, []
            self._stopped = self._stopped or (self.args.target_kl is not None and kl > self.args.target_kl)
        if self.args.target_kl is not None:
            self._metrics["train"]["early_stopped"].append(float(self._stopped))

    def _step_critic(self) -> None:
        """The critic's optimizer step, on the mean gradient of all processes."""
        for weight in self._critic_weights:
            if weight.grad is not None:
                weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")
        if self.args.max_grad_norm > 0:
            norm = torch.nn.utils.clip_grad_norm_(self._critic_weights, self.args.max_grad_norm)
            self._metrics["train"]["value/grad_norm"].append(norm.item())
        base = self.lr_scheduler.base_lrs[0]  # which is not `learning_rate` where an optimizer was given
        schedule = self.lr_scheduler.get_last_lr()[0] / base if base else 1.0
        for group in self.critic_optimizer.param_groups:
            group["lr"] = self._value_learning_rate * schedule
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()

    # --- Checkpoints -------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the policy and the critic."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.critic.save(output_dir or self.args.output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves, beside the random state, all else that an unbroken run would still know."""
        super()._save_rng_state(output_dir)
        folder, rank = Path(output_dir), self.accelerator.process_index
        if self._buffered_inputs is not None:
            tensors = {
                f"{place}/{name}": value.detach().cpu().clone()  # slices of one tensor cannot be saved
                for place, batch in enumerate(self._buffered_inputs)
                for name, value in batch.items()
                if isinstance(value, Tensor)
            }
            save_file(tensors, folder / ROLLOUT.format(rank))
        if self.accelerator.is_main_process:
            torch.save(self.critic_optimizer.state_dict(), folder / "critic_optimizer.pt")
            state = {
                "step": self._step,
                "stopped": self._stopped,
                "updated": self._updated,
                "kl_coef": self.kl.coefficient,
                "scores": asdict(self.score_scaling.moments),
            }
            write_json(folder / STATE, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads policy and critic: of a run that is over, nothing else is."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        with resume_errors(resume_from_checkpoint):
            self.critic.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load all of it again."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / STATE).exists():
            raise RecipeError(f"{folder}: no checkpoint that PPO can go on from (no {STATE}; `save_only_model` leaves none)")
        with resume_errors(checkpoint):
            self._load_ppo_state(folder)

    def _load_ppo_state(self, folder: Path) -> None:
        self.critic.load(folder)  # again, since DeepSpeed loads its policy by itself
        optimizer = torch.load(folder / "critic_optimizer.pt", map_location="cpu", weights_only=True)
        self.critic_optimizer.load_state_dict(optimizer)  # which moves it to where the weights are
        state = read_json(folder / STATE)
        self._step, self._stopped, self._updated = state["step"], state["stopped"], state["updated"]
        self.kl.coefficient, self.score_scaling.moments = state["kl_coef"], Moments(**state["scores"])
        rollout = folder / ROLLOUT.format(self.accelerator.process_index)
        if rollout.exists():
            batches: dict[int, dict[str, Tensor]] = {}
            for name, value in load_file(rollout).items():
                place, _, key = name.partition("/")
                batches.setdefault(int(place), {})[key] = value.to(self.accelerator.device)
            self._buffered_inputs = [batches[place] for place in sorted(batches)]


class _Forward:
    """What the last pass of the policy left: log-probabilities and values of its completions, (B, T)."""

    logps: Tensor | None = None
    values: Tensor | None = None


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """The tokens that losses are taken over, (B, T)."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _trimmed(input_ids: Tensor, attention_mask: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Ids and mask without the columns in which every row is padding, and how many of the `count` last tokens are left.

    TRL pads a whole batch of completions to its longest prompt and its longest completion. The mask may have holes, so it is
    the first and the last token of each row that count. At least one token of prompt and of completion stays.
    """
    used = attention_mask.any(dim=0)
    prompt = input_ids.size(1) - count
    start = min(int(used[:prompt].int().argmax()) if used[:prompt].any() else prompt - 1, prompt - 1)
    tail = used[prompt:].nonzero()
    kept = max(int(tail[-1]) + 1 if len(tail) else 1, 1)
    columns = slice(start, prompt + kept)
    return input_ids[:, columns], attention_mask[:, columns], kept


def _by_length(mask: Tensor, size: int) -> Tensor:
    """An order of the rows of a mask (B, T) in which passes of `size` rows have little padding."""
    if size >= len(mask):
        return torch.arange(len(mask), device=mask.device)
    return mask.sum(1).argsort(stable=True, descending=True)


def _last_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    """The last token of each row (B,); that of an empty row is its padding."""
    places = torch.arange(mask.size(1), device=mask.device)
    last = torch.where(mask.bool(), places, 0).amax(dim=1)
    return ids.gather(1, last[:, None])[:, 0]


# --- Roles -----------------------------------------------------------------------------------------------


def _loaded(
    model: str | PreTrainedModel | PeftModel,
    args: PPOConfig,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
) -> tuple[PreTrainedModel | PeftModel, PPOConfig]:
    """The model in memory, with the fresh adapter of `peft_config`, and the arguments without those that are honoured."""
    if isinstance(model, str):
        options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            options["device_map"] = None
        model = create_model_from_path(model, **options)
        args = copy.copy(args)
        args.model_init_kwargs = None
    elif quantization_config is not None:
        raise RecipeError("quantization_config: the model is in memory already: quantise it when it is loaded")
    disable_cpu_4bit_repacking(model)
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise RecipeError("peft_config: the model has an adapter already, which is trained; merge it, or leave this out")
        if model.active_adapters != [POLICY]:
            raise RecipeError(
                f"the policy must be the adapter '{POLICY}', active and alone; active are {model.active_adapters}"
            )
        if not any(weight.requires_grad for weight in model.parameters()):
            raise RecipeError(
                "the policy's adapter is frozen: load it with `PeftModel.from_pretrained(..., is_trainable=True)`"
            )
        return model, args
    return model if peft_config is None else get_peft_model(model, peft_config), args


def _make_reference(model: PreTrainedModel | PeftModel, fresh: bool, needed: bool) -> Any:
    """The reference: a frozen model, the name of an adapter, or `NO_ADAPTER` for the base; None where none is needed."""
    if not needed:
        return None
    if not isinstance(model, PeftModel):
        return copy.deepcopy(model).requires_grad_(False).eval()
    if fresh:
        return NO_ADAPTER
    copy_adapter(model, POLICY, REFERENCE)
    return REFERENCE


def _as_reward(reward: Any, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Any:
    """A folder that a reward model was saved in as a role on this base; anything else as it is, for TRL."""
    reward = SavedReward(str(reward)) if isinstance(reward, str | Path) else reward
    if not isinstance(reward, SavedReward):
        return reward
    size = args.local_rollout_forward_batch_size or args.per_device_train_batch_size
    return load_saved_reward(reward.folder, model, tokenizer, reward.combine, reward.uncertainty_coef, size)


def _first_reward_model(rewards: list[Any]) -> RewardModel | None:
    """The reward model that the critic starts from."""
    for reward in rewards:
        if isinstance(reward, Scorer):
            return reward.members[0] if isinstance(reward, Ensemble) else reward
    return None
