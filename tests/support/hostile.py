"""What the tests on broken and hostile input share: strategies that spoil valid input, and what may come of it.

`HOSTILE_EXAMPLES=2000 pytest tests/config/test_hostile_yaml.py` looks at that many cases a test; by default they are few, and
the same each time.
"""

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from support import ROOT

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

LONGEST = 4_000  # characters of a message
SECONDS = 60  # for one case; those that hang take for ever

# A surrogate alone, right to left, NUL, BOM, combining marks, an emoji of four letters, a line separator, a cursor
ODD_TEXTS = [
    "",
    " ",
    "\x00",
    "\ufeff",
    "\u202eabc",
    "e\u0301" * 50,
    "👩‍👩‍👧",
    "\u2028",
    "\x1b[2J",
    "'",
    '"',
    "{",
    "null",
    "../..",
    "~",
    "NaN",
]
LONG = "x" * 100_000
ODD_NUMBERS = [0, -1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]

texts = st.one_of(st.sampled_from([*ODD_TEXTS, LONG]), st.text(max_size=20))
numbers = st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(), st.floats())
leaves = st.one_of(texts, numbers, st.none(), st.booleans())
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
"""Values of any type and shape, few of which anything was meant for."""


def examples(usual: int) -> Callable[..., Any]:
    """The settings of a test that looks at so many cases."""
    wanted = os.environ.get("HOSTILE_EXAMPLES")
    return settings(
        max_examples=int(wanted) if wanted else usual,
        derandomize=not wanted,
        database=None,
        deadline=None,  # machines differ, and `outcome` has a limit of its own
        print_blob=False,
        phases=[Phase.explicit, Phase.generate],  # a case that fails is shown as it is: to shrink it takes minutes
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """No `Exception`, which the code under test may turn into a message."""


def outcome(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What an action returns, or the one message that it ends in; any other error, and a hang, is the test's failure."""
    try:
        with _limited():
            return action(), None
    except RecipeError as error:
        message = str(error)
        ours = (NameError, AttributeError, UnboundLocalError)
        frames = traceback.extract_tb(error.__cause__.__traceback__) if isinstance(error.__cause__, ours) else []
        assert not (frames and f"{ROOT}/rlhf_recipes/" in frames[-1].filename), "a mistake of our own, in a message"
    assert message.strip()
    assert len(message) <= LONGEST, f"{len(message)} characters: {message[:LONGEST]}"
    assert not [letter for letter in message if letter != "\n" and not (letter.isprintable() or letter.isspace())], message
    assert message.count("\n") <= 3, message
    message.encode()
    return None, message


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError(f"it had not ended after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in nested lists and mappings, the whole left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*path, key), *places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are cut off, or of which some are others, or with something put in."""
    place = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(["cut", "beginning", "change", "insert", "remove"]))
    if kind == "cut":
        return content[:place]
    if kind == "beginning":
        return content[place:]
    if kind == "remove":
        return content[:place] + content[place + draw(st.integers(1, 20)) :]
    pieces = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\t", b'"', b"\n", b"\r", b"{", b"[", b"}", b"\xed\xa0\x80", b"NaN", b"-"]
    piece = draw(st.one_of(st.sampled_from(pieces), st.binary(min_size=1, max_size=4)))
    return content[:place] + piece + content[place + (len(piece) if kind == "change" else 0) :]
