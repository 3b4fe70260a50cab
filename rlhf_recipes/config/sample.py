"""Arguments of `recipes/sample.py`."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.config import option
from rlhf_recipes.config.policy import NEEDS

MAX_COMPLETIONS = 64  # of a group, for labellers and the files of groups


@dataclass
class SampleArguments:
    """What is sampled, for people or judges to rank."""

    policies: dict[str, Any] = option(
        {}, "name -> adapter folder, or null for the base model; several take turns in each group."
    )
    num_completions: int = option(4, "Different completions of each prompt.")
    max_attempts: int = option(4, "Rounds of sampling, at most, for a prompt whose completions are alike.")
    temperature: float = option(1.0, "Sampling temperature.")
    max_prompt_length: int | None = option(
        512, "Longest prompt in tokens; longer ones are dropped and counted, or an error (`long_rows: error`)."
    )
    max_completion_length: int = option(256, "Longest completion, in tokens.")
    batch_size: int = option(32, "Completions sampled at once.")
    needs: list[str] = option([], NEEDS)
    seed: int = option(0, "Seed of sampling.")
    trust_remote_code: bool = option(False, "Run code that comes with a model.")
    output_dir: str = option("runs/sample", "Folder for groups.jsonl; an interrupted run there is resumed.")

    def __post_init__(self):
        for key, least in (("num_completions", 2), ("max_attempts", 1), ("max_completion_length", 1), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}: must be {least} or more")
        if self.num_completions > MAX_COMPLETIONS:
            raise ValueError(f"num_completions: {self.num_completions}: must be {MAX_COMPLETIONS} or less")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature}: must be above 0: greedy completions are all alike")
