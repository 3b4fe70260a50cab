"""What a person at a terminal sees when a recipe cannot go on: one message."""

import contextlib
import sys
from collections.abc import Iterator

from rlhf_recipes.arguments import LAUNCHED, ORIGIN
from rlhf_recipes.errors import RecipeError, lack_of_memory
from rlhf_recipes.plan.exhausted import explain


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Prints a `RecipeError` as one message without a traceback, and exits with status 2.

    What goes wrong after the arguments were parsed is said with the file that they came from, and of none that was parsed
    before: a process may run several recipes. A lack of memory, whatever it is raised as, is said with what to change.
    After a Ctrl-C what is kept is said, and the status is 130.
    """
    tokens = (ORIGIN, ORIGIN.set("")), (LAUNCHED, LAUNCHED.set(None))
    try:
        yield
    except (RecipeError, RuntimeError, MemoryError) as error:
        exhausted = lack_of_memory(error)
        if exhausted is None and not isinstance(error, RecipeError):
            raise
        _print_error(error if exhausted is None else _with_advice(error, exhausted))
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


def _with_advice(error: BaseException, exhausted: BaseException) -> str:
    return explain(exhausted, LAUNCHED.get(), getattr(error, "__notes__", []))
