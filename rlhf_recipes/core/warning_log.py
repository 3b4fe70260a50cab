"""Warnings of a run: each once, on a line of its own, and all again at its end."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import printable

logger = logging.getLogger("rlhf_recipes")
_RELAY = "RLHF_RECIPES_WARNINGS"  # environment variable of a launched recipe: the file that its warnings are added to


class _WarningLog(logging.Handler):
    """Handler of the main process, which prints each text once as `warning: TEXT`."""

    def __init__(self, place: Callable[[str], str]) -> None:
        super().__init__(logging.WARNING)
        self.place = place
        self.texts: list[str] = []
        self.relay = os.environ.get(_RELAY)

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(printable(record.getMessage()).split("\n"))
        text = ": ".join(filter(None, (self.place(text), text)))
        if text in self.texts or os.environ.get("RANK", "0") != "0":
            return
        self.texts.append(text)
        below_bar = "\n" if _progress_bars() else ""
        if not getattr(record, "on_terminal", False):
            print(f"{below_bar}{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)
        if self.relay:
            with contextlib.suppress(OSError), open(self.relay, "a", encoding="utf-8") as file:  # a full disk
                file.write(f"{text}\n")

    def repeat(self) -> None:
        """Print all warnings again, unless a launcher will."""
        if self.texts and not self.relay:
            again = (f"warning: {text}" for text in self.texts)
            print("Warnings of this run, again:", *again, sep="\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def repeat_warnings(place: Callable[[str], str] = lambda text: "") -> Iterator[None]:
    """Print this project's warnings as they come, and all of them again at the end.

    The end closes progress bars that a failure left open. `place` returns what a warning is about, to stand in front of it.
    """
    log = _WarningLog(place)
    logger.addHandler(log)
    try:
        yield
    finally:
        logger.removeHandler(log)
        for bar in _progress_bars():
            bar.close()
        log.repeat()


def warnings_so_far() -> list[str]:
    """Return the warnings that `repeat_warnings` has printed, of the main process."""
    return [text for log in logger.handlers if isinstance(log, _WarningLog) for text in log.texts]


@contextlib.contextmanager
def relay_warnings(name: str, on_terminal: bool = False) -> Iterator[dict[str, str]]:
    """Yield the environment for a recipe whose warnings become ours, as `NAME: TEXT`.

    With `on_terminal` the recipe has printed them there: they come again at the end only.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        try:
            yield os.environ | {_RELAY: file.name}
        finally:
            for text in Path(file.name).read_text(encoding="utf-8").splitlines():
                logger.warning("%s: %s", name, text, extra={"on_terminal": on_terminal})


def _progress_bars() -> list[Any]:
    """Return the progress bars that are open; one holds the line of the terminal."""
    tqdm = sys.modules.get("tqdm")
    return [*getattr(tqdm.tqdm, "_instances", ())] if tqdm else []
