"""What a person at a terminal sees when a recipe cannot go on: one message."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from rlhf_recipes.config.parser import LAUNCHED, ORIGIN
from rlhf_recipes.core.errors import RecipeError, causes, lack_of_memory, refused_to_write
from rlhf_recipes.memory.out_of_memory import explain_out_of_memory


@contextlib.contextmanager
def exit_on_recipe_error() -> Iterator[None]:
    """Prints a `RecipeError` as one message without a traceback, and exits with status 2.

    What goes wrong after the arguments were parsed is said with the file that they came from, and of none that was parsed
    before: a process may run several recipes. A lack of memory, whatever it is raised as, is said with what to change,
    and so is a disk that is full or may not be written to. After a Ctrl-C what is kept is said, and the status is 130.
    """
    with contextlib.suppress(AttributeError):  # of what stands in its place in notebooks
        sys.stdout.reconfigure(line_buffering=True)  # in a file too, where it goes between the lines of stderr
    tokens = (ORIGIN, ORIGIN.set("")), (LAUNCHED, LAUNCHED.set(None))
    try:
        yield
    except Exception as error:
        exhausted = lack_of_memory(error)
        told = error if isinstance(error, RecipeError) else _not_written(error)
        if exhausted is None and told is None:
            raise
        _print_error(told if exhausted is None else _with_advice(error, exhausted))
        sys.exit(2)
    except KeyboardInterrupt as stop:
        when, *kept = getattr(stop, "__notes__", [""])
        print("; ".join([f"stopped {when}".rstrip(), *kept]), file=sys.stderr)
        sys.exit(130)
    finally:
        for variable, token in tokens:
            variable.reset(token)


def _print_error(message: object) -> None:
    origin = ORIGIN.get()
    named = f"{origin}: " if origin and not str(message).startswith(origin) else ""
    print(f"error: {named}{message}", file=sys.stderr)


def _not_written(error: BaseException) -> str | None:
    """A message where a disk is full, or may not be written to; None where it is something else."""
    found, launched = refused_to_write(error), LAUNCHED.get()
    if found is None:
        return None
    values = launched.values if launched else {}
    (reason, file), output = found, values.get("output_dir")
    within = bool(output) and (not file or Path(output).resolve() in (Path(file).resolve(), *Path(file).resolve().parents))
    if not within and (not file or any(isinstance(cause, PermissionError) for cause in causes(error))):
        return None  # one that could not be read
    again = " with `resume_from_checkpoint: true`" if within and "resume_from_checkpoint" in values else ""
    place = f"output_dir: {output}" if within else file
    return f"{place}: cannot be written to ({reason}); what was whole before is kept: make room, and run again{again}"


def _with_advice(error: BaseException, exhausted: BaseException) -> str:
    return explain_out_of_memory(exhausted, LAUNCHED.get(), getattr(error, "__notes__", []))
