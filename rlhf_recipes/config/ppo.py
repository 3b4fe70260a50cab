"""Arguments of `recipes/ppo.py`: those of TRL's GRPO, on whose trainer PPO stands, and its own."""

import logging
from dataclasses import dataclass, field

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.config.launcher import check_launcher_support, current_launcher
from rlhf_recipes.config.policy import PolicyArguments
from rlhf_recipes.core.errors import RecipeError

from trl import GRPOConfig


@dataclass
class PPOArguments(PolicyArguments):
    """Where the policy begins and what PPO rewards, beyond `PPOConfig`."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What scores completions: folders that recipes/reward.py saved and dotted paths of functions, each alone "
            "or as a mapping of `path`, `weight` and `arguments`; their weighted sum is the score."
        },
    )
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Prompts of more tokens are left out and counted, or stop the run (`long_rows: error`)."}
    )
    ptx_dataset: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "Pretraining text, for `ptx_coef`: a mixture of data with the column `text`."}
    )


logger = logging.getLogger(__name__)
CRITICS = ("shared", "adapter", "model")
LOSSES = ("dapo", "bnpo", "grpo", "dr_grpo")  # TRL's names for ways to average PPO's clipped loss over tokens


class _One(int):
    """The number 1, which passes TRL's demand for two generations a prompt: GRPO needs a group, and PPO has a critic."""

    def __lt__(self, other: int) -> bool:
        return False


@dataclass
class PPOConfig(GRPOConfig):
    """Arguments of `PPOTrainer`. Inherited ones keep TRL's names and meanings, PPO's own those that TRL's PPO had.

    An iteration samples `generation_batch_size` completions and learns from them `num_iterations` times, in
    `steps_per_generation` micro-batches of `per_device_train_batch_size`; there is an optimizer step every
    `gradient_accumulation_steps` of these. KL is in nats.

    Raises:
        ValueError: for values that make no sense, alone or together.
    """

    # GRPO's, with the defaults of PPO
    num_generations: int = field(
        default=1, metadata={"help": "Completions a prompt; the critic is the baseline, so 1 is enough."}
    )
    num_iterations: int = field(default=4, metadata={"help": "Passes over each batch of completions (TRL's `num_ppo_epochs`)."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of the policy."})
    disable_dropout: bool = field(default=True, metadata={"help": "With dropout the ratio would not be 1 at the start."})

    # The KL penalty
    kl_coef: float = field(default=0.05, metadata={"help": "What a nat of KL from the reference costs, in units of the score."})
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "k1: unbiased and noisy. k3: unbiased, never negative.", "choices": ["k1", "k3"]},
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Nats of KL a completion that `kl_coef` is adapted to reach; without it, it is fixed."}
    )
    kl_horizon: float = field(
        default=10_000, metadata={"help": "Completions over which `kl_coef` adapts; only with `kl_target`."}
    )

    # The score
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a completion that does not end by EOS."}
    )
    use_score_scaling: bool = field(default=False, metadata={"help": "Divide scores by their running standard deviation."})
    use_score_norm: bool = field(
        default=False, metadata={"help": "Subtract their running mean too; only with `use_score_scaling`."}
    )
    score_clip: float | None = field(default=None, metadata={"help": "Scores are clipped to [-score_clip, score_clip]."})

    # Advantages
    gamma: float = field(default=1.0, metadata={"help": "Discount of a token."})
    lam: float = field(default=0.95, metadata={"help": "Of GAE: 1 trusts the rewards, 0 the critic."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale token rewards to variance 1, keeping their mean."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Bring advantages to mean 0 and variance 1."})
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Nats a token from the sampling policy; after a step that finds it beyond, the iteration ends."},
    )

    # The critic
    critic: str = field(
        default="shared",
        metadata={
            "help": "shared: a head on the policy's trunk, detached, at no extra pass. adapter: an adapter with a head on the "
            "same base, started from a reward adapter if there is one. model: a separate model, for training without LoRA.",
            "choices": list(CRITICS),
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss; it matters beside `max_grad_norm` only."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "How far a value moves in an iteration; null: freely."}
    )
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the critic; by default 1e-3 for `shared`, and `learning_rate` for the others."}
    )
    value_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps at the start in which the critic alone learns."}
    )

    # Pretraining text (InstructGPT's PPO-ptx)
    ptx_coef: float = field(default=0.0, metadata={"help": "Weight of the language-modelling loss on `ptx_dataset`."})
    ptx_batch_size: int | None = field(
        default=None, metadata={"help": "Texts a micro-batch; by default `per_device_train_batch_size`."}
    )
    ptx_max_length: int = field(default=512, metadata={"help": "Tokens at which a text is cut off."})

    # Memory and speed
    sampler_logps: bool | None = field(
        default=None,
        metadata={
            "help": "Take log-probabilities, and values of the `shared` critic, from the sampler instead of another pass. By "
            "default where that is exact: in fp32. Transformers' `generate` only."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that Transformers' `generate` samples at once; by default all of an iteration. Fewer take "
            "less memory, and longer."
        },
    )
    local_rollout_forward_batch_size: int | None = field(
        default=None,
        metadata={"help": "Completions a pass without gradients; by default `per_device_train_batch_size`."},
    )

    def __post_init__(self):
        if self.num_generations == 1:
            self.num_generations = _One(1)
        super().__post_init__()
        self.num_generations = int(self.num_generations)
        self._refuse_what_is_not_ppo()
        for name in ("kl_coef", "vf_coef", "ptx_coef", "value_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}: must not be negative")
        for name in ("kl_target", "kl_horizon", "score_clip", "cliprange_value", "target_kl", "value_learning_rate"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}: {value}: must be above 0, or null for none")
        sizes = ("ptx_batch_size", "ptx_max_length", "rollout_batch_size", "local_rollout_forward_batch_size", "num_iterations")
        for name in sizes:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: {value}: must be 1 or more")
        if self.ptx_max_length < 2:
            raise ValueError("ptx_max_length: 1: a text of one token has nothing to predict: set 2 or more")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}: must be between 0 and 1")
        if self.top_p != 1 or self.top_k or self.min_p or self.repetition_penalty != 1:
            logger.warning(
                "top_p, top_k, min_p and repetition_penalty shape what is sampled, and not the log-probabilities that PPO has: "
                "it will learn about another policy than the one that speaks. Leave them at 1, 0, null and 1 in training"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm: needs `use_score_scaling: true`")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target: needs a `kl_coef` above 0 to start from")
        if self.rollout_batch_size and (self.use_vllm or self.use_transformers_continuous_batching):
            raise ValueError("rollout_batch_size: vLLM and continuous batching decide themselves how much they sample at once")
        if "disable_compile" in (self.generation_kwargs or {}):
            raise ValueError("generation_kwargs: disable_compile: TRL has it on: leave it out")
        self._refuse_what_engines_cannot()

    def _refuse_what_engines_cannot(self) -> None:
        """As recipes do, for those who make their own."""
        try:
            check_launcher_support("ppo", vars(self), current_launcher())
        except RecipeError as error:
            raise ValueError(str(error)) from error

    def _refuse_what_is_not_ppo(self) -> None:
        if self.beta:
            raise ValueError(f"beta: {self.beta}: that is GRPO's KL term, in the loss; PPO's is in the reward: set `kl_coef`")
        for name, known in (("critic", CRITICS), ("kl_estimator", ("k1", "k3")), ("loss_type", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation: rewards are summed with `reward_weights`; the critic needs one score"
            )
        if self.importance_sampling_level != "token":
            raise ValueError("importance_sampling_level: the critic's advantages are those of tokens: leave it at `token`")
        if self.scale_rewards != "group":
            raise ValueError("scale_rewards: is for groups of completions: set `use_score_scaling` and `whiten_advantages`")
        if self.sync_ref_model:
            raise ValueError("sync_ref_model: the reference of PPO stays what it is")
        if self.fp16:
            raise ValueError("fp16: log-ratios of 1e-3 are lost in it, and gradients underflow: set `bf16: true`, or neither")
