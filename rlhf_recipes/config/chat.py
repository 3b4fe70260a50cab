"""Arguments of `recipes/chat.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ChatArguments:
    """Which policies answer, how they are sampled, and what scores them."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "name -> folder of an adapter, or null for the base model. `{path: FOLDER, optional: true}` is left out "
            "if there is no such folder. The first one answers at the start."
        },
    )
    kl_reference: str | None = field(
        default=None,
        metadata={"help": "The policy from which /score measures KL; by default `sft` if there is one, else the base model."},
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What /score shows, as in recipes/evaluate.py: a path, or a mapping of `path`, `arguments`, `name`, and "
            "`optional: true` for one that is left out if there is no such folder."
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message of every conversation."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling: cumulative probability of the tokens to keep."})
    max_new_tokens: int = field(default=512, metadata={"help": "Greatest length of an answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}: must be 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}: must be above 0 and at most 1")
