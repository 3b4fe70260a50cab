"""The terminal of a chat, or the pipe in its place: lines in, answers out, Ctrl-C."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_recipes.models.tokenizer import answer_text, template_text

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer

PROMPT = "you> "

# Control characters of a model's text must not reach the terminal
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

Write = Callable[[str], None]


class Writer(TextStreamer):
    """Passes on complete words, without template text and control characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write, prompt: list[dict[str, str]]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.started, self.prompt, self.held, self.ids = write, False, prompt, "", []
        own = tokenizer(template_text(tokenizer, prompt)[0], add_special_tokens=False)["input_ids"]
        self.own = tokenizer.decode(own, skip_special_tokens=True).strip()

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the first are the prompt."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of the answer."""
        if not self.started:
            self.held += text
            if self.own.startswith(self.held.strip()) and not stream_end:
                return  # perhaps the template's own text
            sampled = self.tokenizer.decode(self.ids, skip_special_tokens=True)
            answer = answer_text(self.tokenizer, self.prompt, sampled, self.ids)
            text = self.held[sampled.index(answer) if answer else len(sampled) :].lstrip()
        if text:
            self.started = True
            self.write(text.translate(_CONTROLS))


def read_lines(console: Console) -> Iterator[str]:
    """Yield lines, and show those of a pipe. Ctrl-C discards a line."""
    typed = sys.stdin.isatty()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and arrow keys
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(Text("\n/quit or Ctrl-D ends", "dim"))
            continue
        if not typed:
            console.print(Text(line.translate(_CONTROLS)))
        yield line


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed; a second one interrupts."""
    pressed = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
