"""Arguments of `recipes/sample.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SampleArguments:
    """What is sampled, for people or judges to rank."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "name -> the folder of an adapter, or null for the base; several write the completions in turns."},
    )
    num_completions: int = field(default=4, metadata={"help": "Different completions of each prompt."})
    max_attempts: int = field(
        default=4, metadata={"help": "How often a prompt is asked for what it lacks, where completions are alike."}
    )
    temperature: float = field(default=1.0, metadata={"help": "At which completions are sampled."})
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Prompts of more tokens are left out and counted, or stop the run (`long_rows: error`)."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens after which a completion is cut off."})
    batch_size: int = field(default=32, metadata={"help": "Completions that are sampled at once."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})
    output_dir: str = field(default="runs/sample", metadata={"help": "Where groups.jsonl is written, and gone on with."})

    def __post_init__(self):
        for key, least in (("num_completions", 2), ("max_attempts", 1), ("max_completion_length", 1), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}: must be {least} or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature}: must be above 0: greedy completions are all alike")
