"""Arguments of `recipes/rank.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RankArguments:
    """Which sampled groups are ranked, and by whom."""

    groups: str = field(default="runs/sample", metadata={"help": "Folder that recipes/sample.py wrote, or a file of groups."})
    labeller: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Who ranks. `{store: FILE}`: people, by recipes/label.py. `{url: ..., model: ...}`: a chat model, as "
            "`judge` in recipes/evaluate.py. `{path: ..., arguments: ..., noise: 0.4}`: a simulated labeller, who prefers what "
            "a reward function scores high, with Gumbel noise of this scale."
        },
    )
    num_groups: int | None = field(default=None, metadata={"help": "Number of groups to rank; by default all."})
    choose: str = field(
        default="random",
        metadata={
            "help": "Which groups to rank: at `random`, or by `disagreement` of the ensemble of reward models in `reward`.",
            "choices": ["random", "disagreement"],
        },
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an ensemble, for `choose: disagreement`. An empty text means that there is none yet, as in a "
            "first round: groups are then chosen at random."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice and of the noise."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    output_dir: str = field(default="runs/rank", metadata={"help": "Folder for rankings.jsonl and rank.json."})

    def __post_init__(self):
        if (self.choose == "disagreement") != (self.reward is not None):
            raise ValueError("reward: names the ensemble for `choose: disagreement`. Fix: set both, or neither")
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"num_groups: {self.num_groups}: must be 1 or more")
