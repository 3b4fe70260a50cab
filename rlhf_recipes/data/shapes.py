"""What a stage trains on, and the shapes of data that it can be made of."""

from typing import Literal

SHOWN = 3  # rows named in a message
BATCH = 1000  # rows converted or tokenised at once


Kind = Literal["sft", "preference", "ranking", "prompt"]
"""What a stage trains on. Columns of the result, `T` being text or, in conversational data, a list of messages:

- `"sft"`: `text`, or `messages`, or `prompt: T, completion: T`
- `"preference"`: `prompt: T, chosen: T, rejected: T`, and `margin: float` where the data has it
- `"ranking"`: `prompt: T, completions: list[T], ranks: list[float]` (lower is better)
- `"prompt"`: `prompt: T`, `reference: str` where the data has an answer, and every other column as it came
"""

SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen", "rejected"),),
    "ranking": (("prompt", "responses"), ("prompt", "completions", "ranks")),
    "completion": (("prompt", "completion"), ("instruction", "output")),
    "messages": (("messages",), ("conversations",)),
    "text": (("text",),),
    "prompt": (("prompt",), ("instruction",)),
}
"""The shapes that data may have, and the columns that each is known by."""

ACCEPTED: dict[Kind, tuple[str, ...]] = {
    "sft": ("preference", "ranking", "completion", "messages", "text"),
    "preference": ("preference", "ranking"),
    "ranking": ("ranking", "preference"),
    "prompt": ("preference", "ranking", "completion", "prompt", "messages"),
}
"""The shapes that each kind can be made of; where the columns fit several, the first one is read."""
