"""Where each argument of a run was written: what messages begin with."""

import contextlib
import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.paths import user_path
from rlhf_recipes.core.yaml import line_of

COMMAND_LINE = "the command line"
WRITTEN_FOR = "# Written by recipes/pipeline.py for "
"""The first line of a stage's YAML file, before the stage's place in the file of the pipeline.

The comment above each key says where it was written.
"""


@dataclass(frozen=True)
class Source:
    """A place where some arguments are written.

    Parameters:
        label: what messages call it, after its file and line.
        keys: of the arguments.
        file: the YAML file that they are in, or None.
        steps: keys and positions that lead to them in the file.
    """

    label: str = ""
    keys: Collection[str] = ()
    file: Path | None = None
    steps: tuple[str | int, ...] = ()

    def place(self, steps: tuple[str | int, ...] = ()) -> str:
        """Return the file, the line of a key in it, and the label."""
        line = line_of(self.file, (*self.steps, *steps)) if self.file else None
        return ": ".join(str(part) for part in (self.file, line and f"line {line}", self.label) if part)


@dataclass(frozen=True)
class Origin:
    """Where the arguments of a run come from.

    Parameters:
        sources: those of single keys; the first that has a key counts.
        default: of everything else.
    """

    sources: tuple[Source, ...]
    default: Source

    def place(self, message: str) -> str:
        """Return where the key that a message begins with was written."""
        return self.written_at(message) or self.default.place(_steps(message))

    def written_at(self, message: str) -> str:
        """Return the place of the key that a message begins with; "" if it has none."""
        steps = _steps(message)
        return next((source.place(steps) for source in self.sources if steps[0] in source.keys), "")

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Put the place of the key that it begins with in front of a `RecipeError`."""
        try:
            yield
        except RecipeError as error:
            raise RecipeError(f"{self.place(str(error))}: {error}") from error


def config_of(recipe: Path, option: str | None) -> Path:
    """Return a recipe's YAML file: that of `--config`, else the tiny world's."""
    with error_context(f"{COMMAND_LINE}: --config"):
        return user_path(option or str(recipe.parent.parent / "configs" / "tiny" / f"{recipe.stem}.yaml"))


def origin_of(config: Path, values: Collection[str], overrides: Collection[str] = ()) -> Origin:
    """Return where the arguments of a recipe come from.

    Args:
        config: its YAML file. In one that a pipeline wrote, comments name the places in the user's files.
        values: the keys in that file.
        overrides: the keys on the command line.
    """
    first, *lines = config.read_text(encoding="utf-8").splitlines() or [""]
    if first.startswith(WRITTEN_FOR):
        pairs = [(line, below.partition(":")[0]) for line, below in itertools.pairwise(lines) if line.startswith("# ")]
        sources = (Source(line.removeprefix("# "), [key]) for line, key in pairs)
        return Origin(tuple(sources), Source(first.removeprefix(WRITTEN_FOR)))
    both = Source(f"{config} and {COMMAND_LINE}") if overrides else Source(file=config)
    return Origin((Source(COMMAND_LINE, overrides), Source(keys=values, file=config)), both)


def _steps(message: str) -> tuple[str | int, ...]:
    """Return the key that a message begins with: `datasets, entry 2` is "datasets", 1."""
    steps: list[str | int] = []
    for part in message.split(": "):
        quoted = re.match(r"(?:unknown|no stage has the) (?:key|option) '([^']+)'", part)
        name, _, number = (quoted[1] if quoted else part).partition(", entry ")
        steps += [name, int(number) - 1] if number.isdecimal() else [name]
    return tuple(steps)
