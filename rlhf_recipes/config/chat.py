"""Arguments of `recipes/chat.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ChatArguments:
    """Who is talked to, how answers are sampled, and what scores them."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "name -> the folder of an adapter, or null for the base; `{path: FOLDER, optional: true}` is left out, and "
            "said so, where there is no such folder. The first one is talked to first."
        },
    )
    kl_reference: str | None = field(
        default=None,
        metadata={"help": "The policy from which /score measures KL; by default `sft` where there is one, else the base."},
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What /score shows, as in recipes/evaluate.py: a path, or a mapping of `path`, `arguments`, `name`, and "
            "`optional: true` for one that is left out where there is no such folder."
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "What every conversation begins with."})
    temperature: float = field(default=1.0, metadata={"help": "At which answers are sampled; 0 takes the likeliest token."})
    top_p: float = field(
        default=1.0, metadata={"help": "The likeliest tokens that have this much of the probability are sampled from."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens after which an answer is cut off."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}: must be 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}: must be above 0, and at most 1")
