"""Arguments of `recipes/ppo.py`: TRL's GRPO arguments, and those of PPO."""

import dataclasses
import logging
import math
from dataclasses import dataclass

from rlhf_recipes.config import option
from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.config.launcher import check_launcher_support, current_launcher
from rlhf_recipes.config.policy import PolicyArguments
from rlhf_recipes.core.errors import RecipeError

from trl import GRPOConfig

logger = logging.getLogger(__name__)
LOSSES = ("dapo", "bnpo", "grpo", "dr_grpo")
"""TRL's names for ways to average the clipped loss over tokens."""

_NOT_PPO = {
    "beta": (0.0, "this is GRPO's KL term, in the loss. Fix: 0, and `kl_coef` for PPO's, in the reward"),
    "fp16": (False, "log-ratios of 1e-3 are lost, and gradients underflow. Fix: `bf16: true`, or neither"),
    "importance_sampling_level": ("token", "the advantages of the critic are of tokens. Fix: `token`"),
    "multi_objective_aggregation": ("sum_then_normalize", "the critic needs one score. Fix: sum rewards by `reward_weights`"),
    "scale_rewards": ("group", "it scales groups of completions. Fix: `use_score_scaling` and `whiten_advantages`"),
    "sync_ref_model": (False, "the reference of PPO does not change. Fix: false"),
}
"""TRL's options that PPO cannot honour, with the only value that they may have."""

_LEAST = {"kl_coef": 0, "vf_coef": 0, "ptx_coef": 0, "num_iterations": 1, "steps_per_generation": 1, "ptx_max_length": 2}
_POSITIVE = ("kl_target", "kl_horizon", "score_clip", "cliprange_value", "target_kl", "value_learning_rate")
_POSITIVE += ("rollout_batch_size", "local_rollout_forward_batch_size", "ptx_batch_size")


class _One(int):
    """The number 1, past TRL's check for two generations a prompt.

    GRPO needs a group of completions; PPO has a critic.
    """

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class PPOArguments(PolicyArguments):
    """Where the policy starts and what PPO rewards, beside `PPOConfig`."""

    reward_funcs: list[str] = option(
        [],
        "Reward models and functions whose weighted sum is the score: folders that recipes/reward.py saved, or dotted paths of "
        "functions, each alone or as a mapping of `path`, `weight` and `arguments`.",
    )
    max_prompt_length: int | None = option(
        512, "Longest prompt in tokens; longer ones are dropped and counted, or an error (`long_rows: error`)."
    )
    ptx_dataset: list[DatasetSource] = option([], "Pretraining text for `ptx_coef`: a mixture of data with the column `text`.")


@dataclass
class PPOConfig(GRPOConfig):
    """Arguments of `PPOTrainer`.

    Inherited ones have TRL's meaning; the others have their names from TRL's former PPO.

    An iteration samples `generation_batch_size` completions and learns from them `num_iterations` times, in
    `steps_per_generation` micro-batches of `per_device_train_batch_size`, with an optimizer step every
    `gradient_accumulation_steps` micro-batches. KL is in nats.

    Raises:
        ValueError: for values that make no sense, alone or together.
        RecipeError: for what the launcher does not support, or steps of nothing but value warm-up.
    """

    # GRPO's, with other defaults
    num_generations: int = option(1, "Completions for each prompt. One is enough, since the critic is the baseline.")
    num_iterations: int = option(4, "Passes over each batch of completions (`num_ppo_epochs` in TRL's PPO).")
    loss_type: str = option("dapo", "How TRL averages the clipped loss over tokens.", LOSSES)
    learning_rate: float = option(1e-5, "Learning rate of the policy.")
    disable_dropout: bool = option(True, "Turn dropout off; with it the ratio of PPO would not start at 1.")

    # The KL penalty
    kl_coef: float = option(0.05, "Price of a nat of KL from the reference, in units of the score; 0 for no reference.")
    kl_estimator: str = option("k1", "Estimator of the KL: k1 has the right optimum, k3 another.", ("k1", "k3"))
    kl_target: float | None = option(None, "KL of a completion, in nats, to adapt `kl_coef` to; null keeps `kl_coef` fixed.")
    kl_horizon: float = option(10_000, "Completions over which `kl_coef` adapts; larger is slower. Needs `kl_target`.")

    # The score
    missing_eos_penalty: float | None = option(None, "Subtracted from the score of a completion that does not end with EOS.")
    use_score_scaling: bool = option(False, "Divide scores by their running standard deviation.")
    use_score_norm: bool = option(False, "Subtract their running mean, too. Needs `use_score_scaling`.")
    score_clip: float | None = option(None, "Clip scores to [-score_clip, score_clip].")

    # Advantages
    gamma: float = option(1.0, "Discount factor of a token.")
    lam: float = option(0.95, "Lambda of GAE: 1 trusts the rewards, 0 the critic.")
    whiten_rewards: bool = option(False, "Scale token rewards to variance 1, keeping their mean.")
    whiten_advantages: bool = option(True, "Scale advantages to mean 0 and variance 1.")
    target_kl: float | None = option(
        None, "Nats a token from the policy that sampled; the iteration ends after a step that exceeds it."
    )

    # The critic
    critic: str = option(
        "shared",
        "shared: a head on the policy's hidden states, detached, without another pass. adapter: an adapter with a head on the "
        "same base. model: a second model, without LoRA. The last two start from a reward model if there is one.",
        ("shared", "adapter", "model"),
    )
    vf_coef: float = option(0.1, "Weight of the value loss. It matters for `max_grad_norm` only.")
    cliprange_value: float | None = option(0.2, "How far a value may move in an iteration; null for no limit.")
    value_learning_rate: float | None = option(
        None, "Learning rate of the critic; null: 1e-3 for `shared`, else `learning_rate`."
    )
    value_warmup_steps: int = option(0, "Optimizer steps at the start in which only the critic learns.")

    # Pretraining text (InstructGPT's PPO-ptx)
    ptx_coef: float = option(0.0, "Weight of the language-modelling loss on `ptx_dataset`.")
    ptx_batch_size: int | None = option(None, "Texts in a micro-batch; null: `per_device_train_batch_size`.")
    ptx_max_length: int = option(512, "Tokens after which a text is cut.")

    # Memory and speed
    sampler_logps: bool | None = option(
        None,
        "Take log-probabilities, and values of the `shared` critic, from Transformers' sampler, saving a pass; null: where "
        "that is exact, in fp32.",
    )
    rollout_batch_size: int | None = option(
        None, "Completions that Transformers samples at once; null: all of an iteration. Fewer take less memory and more time."
    )
    local_rollout_forward_batch_size: int | None = option(
        None, "Completions in a pass without gradients; null: `per_device_train_batch_size`."
    )

    def __post_init__(self):
        if self.num_generations == 1:
            self.num_generations = _One(1)
        super().__post_init__()
        self.num_generations = int(self.num_generations)
        for name, (value, problem) in _NOT_PPO.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: {getattr(self, name)}: {problem}")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ValueError(f"{field.name}: {value!r} is unknown. Fix: one of {', '.join(choices)}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: {getattr(self, name)} is too small. Fix: {least} or more")
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: {value} is too small. Fix: above 0, or null for none")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is no discount. Fix: between 0 and 1")
        for name, valid, fix in (
            ("temperature", 0 < self.temperature < math.inf, "above 0, such as 1: PPO learns from samples"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 for none, or more"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1, or null"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is none"),
        ):
            if not valid:
                raise ValueError(f"{name}: {getattr(self, name)} cannot be sampled with. Fix: {fix}")
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm: it needs the scale. Fix: `use_score_scaling: true`")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target: there is no `kl_coef` to adapt. Fix: set it above 0")
        if self.rollout_batch_size and (self.use_vllm or self.use_transformers_continuous_batching):
            raise ValueError("rollout_batch_size: vLLM and continuous batching choose it themselves. Fix: leave it out")
        if self.top_p != 1 or self.top_k or self.min_p or self.repetition_penalty != 1:
            logger.warning(
                "top_p, top_k, min_p or repetition_penalty: the policy that is sampled is not the one that PPO has the "
                "log-probabilities of. Fix: leave them at 1, 0, null and 1 in training"
            )
        check_value_warmup(self.value_warmup_steps, self.max_steps)
        check_launcher_support("ppo", vars(self), current_launcher())


def check_value_warmup(warmup: int, steps: int) -> None:
    """Refuse a run in which only the critic would learn.

    Args:
        warmup: `value_warmup_steps`.
        steps: optimizer steps of the whole run; not positive if they are not known.

    Raises:
        RecipeError: with the key and the fix.
    """
    if 0 < steps <= warmup:
        raise RecipeError(
            f"value_warmup_steps: {warmup}: only the critic would learn in all {steps} steps. Fix: lower it, or train longer"
        )
