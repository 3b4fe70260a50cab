"""Strategies that spoil valid input, and the check that bad input ends in one clear message.

By default tests see few cases, the same each time. `HOSTILE_EXAMPLES=2000 pytest -m fuzz` tries
that many random ones a test.
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
SECONDS = 60  # of one case, before it counts as hanging

ODD_TEXTS = ["", " ", "\x00", "\ufeff", "\u202eabc", "e\u0301" * 50, "👩‍👩‍👧", "\u2028", "\x1b[2J"]
ODD_TEXTS += ["'", '"', "{", "null", "../..", "~", "NaN"]
LONG = "x" * 100_000
ODD_NUMBERS = [0, -1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]

texts = st.one_of(st.sampled_from([*ODD_TEXTS, LONG]), st.text(max_size=20))
numbers = st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(), st.floats())
leaves = st.one_of(texts, numbers, st.none(), st.booleans())
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
"""Values of any type and shape."""


def examples(usual: int) -> Callable[..., Any]:
    """Settings of a test that tries `usual` cases by default."""
    wanted = os.environ.get("HOSTILE_EXAMPLES")
    return settings(
        max_examples=int(wanted) if wanted else usual,
        derandomize=not wanted,
        database=None,
        deadline=None,  # `outcome` has a limit of its own
        print_blob=False,
        phases=[Phase.explicit, Phase.generate],  # shrinking a failing case takes minutes
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """A case that hangs; no `Exception`, since the code under test may catch those."""


def outcome(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return the result of an action and None, or None and its `RecipeError`'s message.

    Any other exception, a hang, or a message that cannot be read fails the test.
    """
    try:
        with _time_limit():
            return action(), None
    except RecipeError as error:
        message = str(error)
        bugs = (NameError, AttributeError, UnboundLocalError)
        frames = traceback.extract_tb(error.__cause__.__traceback__) if isinstance(error.__cause__, bugs) else []
        assert not (frames and f"{ROOT}/rlhf_recipes/" in frames[-1].filename), "a bug of this project, shown as a message"
    assert message.strip()
    assert len(message) <= LONGEST, f"{len(message)} characters: {message[:LONGEST]}"
    assert not [letter for letter in message if letter != "\n" and not (letter.isprintable() or letter.isspace())], message
    assert message.count("\n") <= 3, message
    message.encode()
    return None, message


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every item in nested lists and mappings."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with another item at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of a file that are cut off, changed, removed or inserted somewhere."""
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
