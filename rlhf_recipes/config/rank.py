"""Arguments of `recipes/rank.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RankArguments:
    """Which sampled groups are ranked, and by whom."""

    groups: str = field(
        default="runs/sample", metadata={"help": "What recipes/sample.py wrote: its folder, or a file of groups."}
    )
    labeller: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Who ranks: `{store: FILE}` people, by recipes/label.py; `{url: ..., model: ...}` a chat model, as judge "
            "in recipes/evaluate.py; `{path: ..., arguments: ..., noise: 0.4}` a simulated labeller, who likes what a reward "
            "function scores high, with Gumbel noise of this scale."
        },
    )
    num_groups: int | None = field(default=None, metadata={"help": "How many are ranked; by default all."})
    choose: str = field(
        default="random",
        metadata={"help": "Which: at `random`, or by `disagreement` of the ensemble of reward models in `reward`."},
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "The folder of an ensemble, for `choose: disagreement`; an empty text: there is none yet, as in a first "
            "round, and they are drawn at random."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the choice and of the noise."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})
    output_dir: str = field(default="runs/rank", metadata={"help": "Where rankings.jsonl and rank.json are written."})

    def __post_init__(self):
        if self.choose not in ("random", "disagreement"):
            raise ValueError(f"choose: {self.choose!r}: must be random or disagreement")
        if (self.choose == "disagreement") != (self.reward is not None):
            raise ValueError("reward: names the ensemble for `choose: disagreement`, and goes with that alone")
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"num_groups: {self.num_groups}: must be 1 or more")
