"""Arguments of `recipes/reward.py`."""

from dataclasses import dataclass

from rlhf_recipes.config import option
from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.config.policy import NEEDS


@dataclass
class RewardArguments:
    """How a reward model is trained and measured, beyond TRL's `RewardConfig`."""

    start_from: str | None = option(
        None, "Folder of the SFT adapter from whose weights the reward adapter starts; default: a fresh one."
    )
    needs: list[str] = option([], NEEDS)
    train_on: str = option(
        "rankings",
        "`rankings`: each ranking is one element of the batch, and a pair is a ranking of two. `pairs`: rankings are expanded, "
        "and the column `margin` is read.",
        ["rankings", "pairs"],
    )
    ensemble_size: int = option(1, "Reward adapters to train, with the seeds seed, seed + 1, ...")
    ensemble_shards: bool = option(False, "Train each adapter of the ensemble on its part of the rows instead of all.")
    ensemble_combine: str = option(
        "mean",
        "The ensemble's score: the mean, the minimum, or the mean less `uncertainty_coef` standard deviations.",
        ["mean", "min", "uncertainty"],
    )
    uncertainty_coef: float = option(1.0, "For `ensemble_combine: uncertainty`.")
    demonstrations: list[DatasetSource] = option(
        [], "Demonstrations whose scores get mean 0 and standard deviation 1; default: the best answers of the training rows."
    )

    def __post_init__(self):
        if self.ensemble_size < 1:
            raise ValueError(f"ensemble_size: {self.ensemble_size}: must be 1 or more")
        if self.uncertainty_coef < 0:
            raise ValueError(f"uncertainty_coef: {self.uncertainty_coef}: must be 0 or more")
