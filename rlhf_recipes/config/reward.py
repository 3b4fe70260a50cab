"""Arguments of `recipes/reward.py`."""

from dataclasses import dataclass, field

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.config.policy import NEEDS


@dataclass
class RewardArguments:
    """How a reward model is trained and measured, beyond TRL's `RewardConfig`."""

    start_from: str | None = field(
        default=None,
        metadata={"help": "Folder of the SFT adapter from whose weights the reward adapter starts; by default a fresh one."},
    )
    needs: list[str] = field(default_factory=list, metadata=NEEDS)
    train_on: str = field(
        default="rankings",
        metadata={
            "help": "`rankings`: each ranking is one element of the batch; a pair is a ranking of two. `pairs`: rankings are "
            "expanded, and the column `margin` is read.",
            "choices": ["rankings", "pairs"],
        },
    )
    ensemble_size: int = field(
        default=1, metadata={"help": "Number of reward adapters to train, with the seeds seed, seed + 1, ..."}
    )
    ensemble_shards: bool = field(
        default=False, metadata={"help": "Train each adapter of the ensemble on its part of the rows instead of all."}
    )
    ensemble_combine: str = field(
        default="mean",
        metadata={
            "help": "The ensemble's score: the mean, the minimum, or the mean less `uncertainty_coef` standard deviations.",
            "choices": ["mean", "min", "uncertainty"],
        },
    )
    uncertainty_coef: float = field(default=1.0, metadata={"help": "For `ensemble_combine: uncertainty`."})
    demonstrations: list[DatasetSource] = field(
        default_factory=list,
        metadata={
            "help": "Demonstrations, on which scores are scaled to mean 0 and standard deviation 1; by default the best "
            "answers of the training rows."
        },
    )

    def __post_init__(self):
        if self.ensemble_size < 1:
            raise ValueError(f"ensemble_size: {self.ensemble_size}: must be 1 or more")
        if self.uncertainty_coef < 0:
            raise ValueError(f"uncertainty_coef: {self.uncertainty_coef}: must be 0 or more")
