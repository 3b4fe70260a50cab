"""Arguments of `recipes/evaluate.py`."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.config import option
from rlhf_recipes.config.data import DatasetSource


@dataclass
class EvaluateArguments:
    """Which policies are compared, on what, and by which measures."""

    policies: dict[str, Any] = option(
        {},
        "name -> adapter folder; null for the base model; or `{best_of: {policy: sft, n: 4}}` for the best of n answers of "
        "another policy, by its `reward` (default: the first one trained against). `{path: FOLDER, optional: true}` is left "
        "out if the folder is missing.",
    )
    compare_with: str = option("sft", "The baseline of win rates and differences.")
    kl_reference: str | None = option(None, "Policy from which KL is measured; default: the baseline.")
    rewards: list[str] = option(
        [],
        "What scores the answers: paths, as in `reward_funcs` of recipes/ppo.py, or mappings of `path`, `arguments`, `name`, "
        "`trained` (true, or the policies that were trained against it) and `optional: true`.",
    )
    judge: str | None = option(
        None,
        "Who decides which answer wins: one of `rewards` by name (default: the first that is not `trained`), or a chat model "
        "as a mapping of `url`, `model` and the other fields of ChatJudge.",
    )
    group_by: str | None = option(
        None,
        "Column that splits truthfulness and calibration by its values. If it holds true and false, true is what the model "
        "could know, where abstaining is over-abstention.",
    )
    group_names: dict[str, str] = option(
        {},
        "Words for the groups in the report, to follow 'answers': `{known: about people it has read about, not known: about "
        "strangers}`. Without them a group is called by its column and value.",
    )
    truthfulness: bool | None = option(
        None,
        "Compare answers with the column `reference`, word for word; default: if half of the references have at most eight "
        "words. Free text has no single right wording.",
    )
    abstentions: list[str] = option(["I do not know"], "Beginnings of an answer that abstains.")
    num_answers: int = option(1, "Answers of each policy to each prompt.")
    temperature: float = option(1.0, "Temperature of sampling and of probabilities.")
    max_prompt_length: int | None = option(
        512, "Longest prompt in tokens; longer ones are dropped and counted, or an error (`long_rows: error`)."
    )
    max_completion_length: int = option(256, "Longest answer, in tokens.")
    batch_size: int = option(32, "Answers sampled or read at once.")
    frontier: list[str] = option([], "Folders of runs whose checkpoints are plotted by reward and KL.")
    frontier_best_of: list[int] = option([], "Values of n for which best-of-n of the KL reference is plotted beside them.")
    ptx_dataset: list[DatasetSource] = option([], "Pretraining text to measure perplexity on: data with the column `text`.")
    ptx_max_length: int = option(512, "Longest pretraining text, in tokens.")
    lm_eval_tasks: list[str] = option([], "Tasks of lm-eval to run for each policy; needs `pip install lm-eval`.")
    num_examples: int = option(8, "Prompts that the report shows with all answers.")
    seed: int = option(0, "Seed of sampling and of resampling.")
    trust_remote_code: bool = option(False, "Run code that comes with a model.")
    output_dir: str = option("runs/evaluate", "Folder for metrics.json and index.html.")

    def __post_init__(self):
        for key in ("num_answers", "max_completion_length", "batch_size", "ptx_max_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}: must be 1 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature}: must be above 0: greedy answers have no probabilities")
        if any(n < 1 for n in self.frontier_best_of):
            raise ValueError(f"frontier_best_of: {self.frontier_best_of}: each must be 1 or more")
        # A pipeline asks before the stages that are evaluated
        if self.policies and self.compare_with not in self.policies:
            raise ValueError(
                f"compare_with: {self.compare_with!r} is none of the policies. Fix: name one of {', '.join(self.policies)}"
            )
        if self.policies and self.kl_reference is not None and self.kl_reference not in self.policies:
            raise ValueError(f"kl_reference: {self.kl_reference!r} is none of the policies ({', '.join(self.policies)})")
        names = [reward.get("name") if isinstance(reward, dict) else None for reward in self.rewards]
        if isinstance(self.judge, str) and None not in names and self.judge not in names:
            choice = f"name one of {', '.join(names)}, or " if names else ""
            raise ValueError(f"judge: {self.judge!r} is none of the rewards. Fix: {choice}set `judge: null`")
