"""Arguments of `recipes/evaluate.py`."""

from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.config.data import DatasetSource


@dataclass
class EvaluateArguments:
    """Which policies are compared, on what, and by which measures."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "name -> folder of an adapter; null for the base model; or `{best_of: {policy: sft, n: 4}}` for the best "
            "of n answers of another policy, by the reward named in `reward` (default: the first one trained against). "
            "`{path: FOLDER, optional: true}` is left out if there is no such folder."
        },
    )
    compare_with: str = field(
        default="sft", metadata={"help": "The baseline: the policy against which win rates and differences are measured."}
    )
    kl_reference: str | None = field(
        default=None, metadata={"help": "The policy from which KL is measured; by default the baseline."}
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What scores the answers, as in `reward_funcs` of recipes/ppo.py: a path, or a mapping of `path`, "
            "`arguments`, `name`, `trained` (true, or the list of the policies that were trained against it), and "
            "`optional: true` for one that is left out if there is no such folder."
        },
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "What decides who wins: the name of one of `rewards` (default: the first that is not `trained`), or a "
            "mapping for a chat model at an OpenAI-compatible address: `url`, `model`, and the other fields of ChatJudge."
        },
    )
    group_by: str | None = field(
        default=None,
        metadata={
            "help": "Column of the data by whose values truthfulness and calibration are split too. If it holds true and "
            "false, true is what the model could know, and abstaining there is over-abstention."
        },
    )
    truthfulness: bool | None = field(
        default=None,
        metadata={
            "help": "Compare answers with the column `reference`, word for word; by default if at least half of the references "
            "have at most eight words. Free text has no single right wording."
        },
    )
    abstentions: list[str] = field(
        default_factory=lambda: ["I do not know"], metadata={"help": "Beginnings of an answer that abstains."}
    )
    num_answers: int = field(default=1, metadata={"help": "Number of answers of each policy to each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling and of probabilities."})
    max_prompt_length: int | None = field(
        default=512,
        metadata={"help": "Longer prompts, in tokens, are left out and counted, or stop the run (`long_rows: error`)."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Greatest length of an answer, in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Number of answers sampled or read at once."})
    frontier: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of runs; their checkpoints are plotted by reward and KL."},
    )
    frontier_best_of: list[int] = field(
        default_factory=list,
        metadata={"help": "Values of n for which best-of-n of the KL reference is plotted beside them."},
    )
    ptx_dataset: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "Pretraining text to measure perplexity on: data with the column `text`."}
    )
    ptx_max_length: int = field(default=512, metadata={"help": "Greatest length of pretraining text, in tokens."})
    lm_eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-eval to run for each policy; needs `pip install lm-eval`."}
    )
    num_examples: int = field(default=8, metadata={"help": "Number of prompts that the report shows with all answers."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling and of resampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Folder for metrics.json and index.html."})

    def __post_init__(self):
        for key in ("num_answers", "max_completion_length", "batch_size", "ptx_max_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}: must be 1 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature}: must be above 0: greedy answers have no probabilities")
        if any(n < 1 for n in self.frontier_best_of):
            raise ValueError(f"frontier_best_of: {self.frontier_best_of}: each must be 1 or more")
