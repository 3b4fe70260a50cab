"""Arguments of `recipes/rank.py`."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.config import option
from rlhf_recipes.config.policy import NEEDS


@dataclass
class RankArguments:
    """Which sampled groups are ranked, and by whom."""

    groups: str = option("runs/sample", "Folder that recipes/sample.py wrote, or a file of groups.")
    labeller: dict[str, Any] = option(
        {},
        "Who ranks. People: `{store: FILE}`, labelled by recipes/label.py. A chat model: `{url: ..., model: ...}`, as `judge` "
        "in recipes/evaluate.py. A simulated labeller: `{path: ..., arguments: ..., noise: 0.4}`, which ranks by a reward "
        "function with Gumbel noise of this scale.",
    )
    num_groups: int | None = option(None, "Groups to rank; default: all.")
    choose: str = option(
        "random",
        "Which groups: at `random`, or by `disagreement` of the ensemble of reward models in `reward`.",
        ["random", "disagreement"],
    )
    reward: str | None = option(
        None,
        "Folder of an ensemble, for `choose: disagreement`; empty text in a first round, which has none: groups are then "
        "chosen at random.",
    )
    needs: list[str] = option([], NEEDS)
    seed: int = option(0, "Seed of the choice and of the noise.")
    trust_remote_code: bool = option(False, "Run code that comes with a model.")
    output_dir: str = option("runs/rank", "Folder for rankings.jsonl and rank.json.")

    def __post_init__(self):
        if (self.choose == "disagreement") != (self.reward is not None):
            raise ValueError("reward: names the ensemble for `choose: disagreement`. Fix: set both, or neither")
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"num_groups: {self.num_groups}: must be 1 or more")
