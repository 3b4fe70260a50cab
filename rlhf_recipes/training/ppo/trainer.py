"""PPO for language models.

TRL's `GRPOTrainer` brings generation, reward functions, logging and checkpoints.

One iteration, in the order in which it runs. TRL calls the methods; the numbers are those of the comments in them.

    training_step, for each micro-batch
        _generate_and_score_completions, when a new rollout is due
             1. sample completions, and score them with each reward function (TRL)
             2. log-probabilities of policy and reference, values of the critic
             3. one score for each completion
             4. token rewards: KL penalty, score at the last token
             5. advantages (GAE) and returns
             6. whiten the advantages, log, adapt the KL coefficient
        _compute_loss
             7. loss on pretraining text, backward
             8. clipped policy loss (TRL), backward
         9. clipped value loss, backward
        10. after the last micro-batch of an optimizer step: check the ratio; step of the critic, then of the policy

`tests/ppo/test_trl_assumptions.py` states, and tests, what this assumes about TRL beyond its public interface.
"""

from typing import Any, ClassVar

from rlhf_recipes.models.kernels import eager_mode
from rlhf_recipes.models.roles import use_adapter
from rlhf_recipes.training.ppo import maths
from rlhf_recipes.training.ppo.actor_critic import ActorCriticTrainer
from rlhf_recipes.training.ppo.diagnostics import check_fused_head, check_ratio, check_reference, warn_of_unscored
from rlhf_recipes.training.ppo.rollout import IterationProgress, Rollout, TokenBatch, global_moments, rollout_metrics

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import print_prompt_completions_sample


class PPOTrainer(ActorCriticTrainer):
    """Proximal policy optimisation with a critic and a KL penalty in the reward.

    It maximises E[score - kl_coef * KL(policy || reference)] + ptx_coef * E[log-likelihood of pretraining text]
    (Ziegler et al., 2019; Ouyang et al., 2022).

    The reference is the policy at the start: a frozen copy of the adapter of a `PeftModel`; the base without the fresh adapter
    of `peft_config`; or a frozen copy of a model without adapters.

    Parameters: those of TRL's `GRPOTrainer`, and

        model: name, folder, model, or `PeftModel` with the SFT policy as its adapter "default".
        reward_funcs: one or a list of: functions in TRL's protocol, sync or async; `RewardModel`s and `Ensemble`s; sequence
            classifiers; folders that `recipes/reward.py` saved.
        train_dataset: with the column `prompt`, texts or lists of messages; other columns go to the reward functions.
        optimizers: of the policy; the critic has its own.
        ptx_dataset: with the column `text`, for `ptx_coef`.

    Raises:
        RecipeError: for rewards, a critic or data that do not fit. In training, with the step: for a reward that is not a
            finite number, a rollout without tokens, or a policy that differs from the reference at the start.
    """

    _tag_names: ClassVar = ["trl", "ppo", "rlhf-recipes"]
    _name = "PPO"
    _paper: ClassVar = {
        "title": "Training language models to follow instructions with human feedback",
        "id": "2203.02155",
    }

    # --- Rollout -----------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Sample completions, and compute all that policy and critic learn from them."""
        with eager_mode(self.model):
            return self._make_rollout(inputs).to_trl()

    def _make_rollout(self, inputs: list[dict[str, Any]]) -> Rollout:
        args, training = self.args, self.model.training
        if training:
            self.progress = IterationProgress()

        # 1. Sample completions, and score them with each reward function: (N, functions), N of all processes
        self._recorders, self._policy_output = [], None
        batch = super()._generate_and_score_completions(inputs)
        tokens, rewards = TokenBatch.from_trl(batch), self._rewards
        unscored = rewards.isnan().all(dim=1) & (rewards.size(1) > 0)
        if training and not self.state.global_step:
            warn_of_unscored(unscored)
        mask = tokens.completion_mask * batch.get("tool_mask", 1) * ~self._local(unscored)[:, None]

        # 2. Log-probabilities of policy and reference, and values of the critic, on the same tokens
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        size = args.local_rollout_forward_batch_size or size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            policy = self.sampling_policy(tokens, size)
            values = policy.values
            if not self.critic.shares_backbone:
                with self.critic.active():
                    values = self.critic_values(tokens, size)
            ref_logps = self.reference_logps(tokens, size) if self.has_reference else policy.logps
        if training and not (self.state.global_step or self.policy_trained):
            self._check_fused_head(tokens)
            check_reference(global_moments((policy.logps - ref_logps).abs(), mask), exact=self.is_exact)

        # 3. One score for each completion: the weighted sum of its rewards, less the penalty for a missing EOS, scaled
        scores = self._local((rewards * self.reward_weights.to(rewards.device)).nansum(dim=1))
        if args.missing_eos_penalty is not None:
            last = tokens.completion_mask.cumsum(1).argmax(1, keepdim=True)
            last = tokens.completion_ids.gather(1, last)[:, 0]
            ended = torch.isin(last, torch.tensor(self.eos_token_ids, device=scores.device))
            scores = scores - args.missing_eos_penalty * ~ended
        if training and self.score_scaling.scale:
            self.score_scaling.update(global_moments(scores, mask.any(dim=1)))
        scores = self.score_scaling(scores)

        # 4. Token rewards: the KL penalty at each token, and the score at the last
        kl = maths.kl_estimate(policy.logps, ref_logps, args.kl_estimator)
        token_rewards = maths.token_rewards(scores, kl, mask, self.kl.coefficient)
        if args.whiten_rewards:
            token_rewards = maths.whiten(token_rewards, mask, global_moments(token_rewards, mask), shift_mean=False)

        # 5. Advantages and returns
        advantages, returns = self.compute_advantages(token_rewards, values, mask)

        # 6. Whiten the advantages over the whole batch, log, and adapt the KL coefficient
        if args.whiten_advantages:
            advantages = maths.whiten(advantages, mask, global_moments(advantages, mask))
        rollout = Rollout(
            **vars(tokens),
            loss_mask=mask,
            num_items=self.accelerator.gather(mask.sum()).sum(),
            old_logps=policy.logps,
            ref_logps=ref_logps,
            old_values=values,
            scores=scores,
            advantages=advantages,
            returns=returns,
            vllm_logps=batch.get("sampling_per_token_logps"),
            importance_sampling_ratio=batch.get("importance_sampling_ratio"),
        )
        completion_kl = global_moments(torch.where(mask.bool(), kl, 0.0).sum(dim=1), mask.any(dim=1))
        self._log_rollout(rollout, completion_kl)
        if training:
            self.kl.update(completion_kl.mean, int(completion_kl.count))
        return rollout

    @torch.no_grad()
    def _check_fused_head(self, tokens: TokenBatch) -> None:
        ids = tokens.input_ids[0][tokens.attention_mask[0].bool()][None, -16:]
        with use_adapter(self.accelerator.unwrap_model(self.model), None), self.accelerator.autocast():
            check_fused_head(self.model, ids, self.temperature, self.is_exact)

    def compute_advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return advantages and returns, (B, T) each. Override it for another estimator.

        Rewards and values are of each token, (B, T). Advantages and returns are 0 where the mask is 0.
        """
        return maths.gae(rewards, values, mask, self.args.gamma, self.args.lam)

    def _local(self, values: Tensor) -> Tensor:
        """Return the rows of this process from those of all processes."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _log_rollout(self, rollout: Rollout, kl: maths.Moments) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        figures = rollout_metrics(rollout, kl, self.kl.coefficient)
        if not self.has_reference:
            del figures["kl"]
        for name, value in figures.items():
            metrics[name].append(value)
        metrics["completions/ended_ratio"].append(1 - metrics["completions/clipped_ratio"][-1])
        metrics.pop("frac_reward_zero_std", None)  # of GRPO's groups
        # TRL's table of completions has one advantage for each: the mean over its tokens
        means = (rollout.advantages * rollout.loss_mask).sum(1) / rollout.loss_mask.sum(1).clamp(min=1)
        table, gathered = self._logs["advantages"], self.accelerator.gather(means).tolist()
        for place in range(1, min(len(gathered), len(table)) + 1):
            table[-place] = gathered[-place]

    def print_samples(self, count: int = 8) -> None:
        """Print some of the newest completions with their rewards."""
        if self.accelerator.is_main_process and self._logs["prompt"]:
            newest = {name: list(self._logs[name])[-count:] for name in ("prompt", "completion")}
            rewards = {name: list(values)[-count:] for name, values in self._logs["rewards"].items()}
            print_prompt_completions_sample(newest["prompt"], newest["completion"], rewards, None, self.state.global_step)

    # --- Update ------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Learn from one micro-batch; sample a new rollout first where one is due.

        Each loss is back-propagated while its adapter is the active one: gradient checkpointing would recompute with another.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)  # 1 to 8

        # 9. Clipped value loss, backward
        if not self.progress.stopped:
            self._backward_value_loss(self._micro_batch)
        self._policy_output = None

        # 10. After the last micro-batch of an optimizer step: steps of critic and, in Trainer, policy
        if self.accelerator.sync_gradients:
            self._on_optimizer_step()
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the clipped policy loss of one micro-batch."""
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._micro_batch = micro_batch = Rollout.from_trl(inputs)
        if self.progress.stopped or self._warming_up:
            # No gradient for the policy's optimizer. DeepSpeed wants a loss that was computed
            return torch.zeros((), device=self.accelerator.device, requires_grad=True).clone()

        # 7. Loss on pretraining text, backward; gradients are sent with those of the policy loss
        if self.pretraining_text is not None:
            with self.accelerator.no_sync(model):
                self._backward_ptx_loss(model)

        # 8. Clipped policy loss; Trainer goes backward
        loss = super()._compute_loss(model, inputs)
        logps, mask = self._policy_output.logps.detach(), micro_batch.loss_mask
        kl = maths.approximate_kl(logps, micro_batch.old_logps, mask)
        gap = maths.masked_sum((logps - micro_batch.old_logps).abs(), mask)
        self.progress.drift.append(torch.stack([kl, gap, mask.sum()]))
        return loss

    @property
    def _warming_up(self) -> bool:
        """Whether the critic alone learns."""
        return self.state.global_step < self.args.value_warmup_steps

    def _backward_ptx_loss(self, model: nn.Module) -> None:
        """Add the gradient of the loss on pretraining text to the policy's weights."""
        ids, mask = (tensor.to(self.accelerator.device) for tensor in self.pretraining_text.batch(self._step, self.accelerator))
        # The fused head, which keeps no logits of all tokens, divides them by the temperature of sampling
        options = {"fused_lm_head": True} if self.temperature == 1 else {"use_cache": False}
        with self.compute_loss_context_manager():
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, **options).loss
        self.accelerator.backward(self.args.ptx_coef * loss / self.current_gradient_accumulation_steps)
        self._metrics["train"]["ptx_loss"].append(self.accelerator.gather(loss.detach()).mean().item())

    def _backward_value_loss(self, micro_batch: Rollout) -> None:
        """Add the gradient of the clipped value loss to the critic's weights."""
        mask = micro_batch.loss_mask
        with self.critic.active(train=True):
            if self.critic.shares_backbone and not self._warming_up:
                values = self._policy_output.values
            else:
                values = self.critic_values(micro_batch)
            total, clipped = maths.value_loss(
                values, micro_batch.old_values, micro_batch.returns, mask, self.args.cliprange_value
            )
            # The sum over all micro-batches of an optimizer step is the mean over its tokens, on all processes
            tokens = micro_batch.num_items.clamp(min=1) / self.accelerator.num_processes
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
            (self.args.vf_coef * total / tokens).backward()
        count = mask.sum().clamp(min=1)
        self._metrics["train"]["value/loss"].append(self.accelerator.gather(total.detach() / count).mean().item())
        self._metrics["train"]["value/clip_ratio"].append(self.accelerator.gather(clipped / count).mean().item())

    def _on_optimizer_step(self) -> None:
        """Check the ratio, let the critic step, and stop the iteration at `target_kl`."""
        progress = self.progress
        if progress.drift:
            sums = self.accelerator.reduce(torch.stack(progress.drift).sum(0), reduction="sum")
            kl, gap = (sums[:2] / sums[2].clamp(min=1)).tolist()
            if not progress.updated:
                check_ratio(gap, sums[2].item(), self.state.global_step, exact=self.is_exact)
        if not progress.stopped:
            self._step_critic()
        if progress.drift:
            self._metrics["train"]["approx_kl"].append(kl)
            progress.updated, self.policy_trained, progress.drift = True, True, []
            progress.stopped = progress.stopped or (self.args.target_kl is not None and kl > self.args.target_kl)
        if self.args.target_kl is not None:
            self._metrics["train"]["early_stopped"].append(float(progress.stopped))

    def _step_critic(self) -> None:
        """Take the critic's optimizer step, by the policy's schedule."""
        base = self.lr_scheduler.base_lrs[0]  # not `learning_rate` where an optimizer was passed
        schedule = self.lr_scheduler.get_last_lr()[0] / base if base else 1.0
        norm = self.critic_optimizer.step(self.accelerator, self.args.max_grad_norm, schedule)
        if norm is not None:
            self._metrics["train"]["value/grad_norm"].append(norm)
