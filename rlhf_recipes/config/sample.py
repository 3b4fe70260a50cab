"""Arguments of `recipes/sample.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SampleArguments:
    """What is sampled, for people or judges to rank."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "name -> folder of an adapter, or null for the base model; several take turns in each group."},
    )
    num_completions: int = field(default=4, metadata={"help": "Number of different completions of each prompt."})
    max_attempts: int = field(
        default=4, metadata={"help": "Greatest number of rounds of sampling for a prompt whose completions are alike."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    max_prompt_length: int | None = field(
        default=512,
        metadata={"help": "Longer prompts, in tokens, are left out and counted, or stop the run (`long_rows: error`)."},
    )
    max_completion_length: int = field(default=256, metadata={"help": "Greatest length of a completion, in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Number of completions sampled at once."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    output_dir: str = field(default="runs/sample", metadata={"help": "Output folder, with groups.jsonl; resumes if it exists."})

    def __post_init__(self):
        for key, least in (("num_completions", 2), ("max_attempts", 1), ("max_completion_length", 1), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}: must be {least} or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature}: must be above 0: greedy completions are all alike")
