"""Arguments of `recipes/chat.py`."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.config import option


@dataclass
class ChatArguments:
    """Which policies answer, how they are sampled, and what scores them."""

    policies: dict[str, Any] = option(
        {},
        "name -> adapter folder, or null for the base model. The first answers at the start. `{path: FOLDER, optional: true}` "
        "is left out if the folder is missing.",
    )
    kl_reference: str | None = option(
        None, "Policy from which /score measures KL; default: `sft` if there is one, else the base model."
    )
    rewards: list[str] = option(
        [],
        "What /score shows: paths, or mappings of `path`, `arguments`, `name` and `optional: true`, as in recipes/evaluate.py.",
    )
    system_prompt: str | None = option(None, "System message of every conversation.")
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Nucleus sampling: cumulative probability of the tokens to keep.")
    max_new_tokens: int = option(512, "Longest answer, in tokens.")
    seed: int = option(0, "Seed of sampling.")
    trust_remote_code: bool = option(False, "Run code that comes with a model.")

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}: must be 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}: must be above 0 and at most 1")
