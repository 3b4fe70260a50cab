"""The one kind of error that is the user's to mend."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "No executable batch size",
)


_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_NOT_WRITTEN_BY_TORCH = ("PytorchStreamWriter failed writing", "file write failed", "unexpected pos", "cannot be opened")

_LONGEST = 3000  # characters of a message


class RecipeError(Exception):
    """Something in a YAML file, on the command line, or in the data is wrong.

    The message names the file, the key or row, and the remedy. Recipes print it without a traceback and exit with status 2
    (`rlhf_recipes.cli.exit_on_recipe_error`). What it quotes of a file may be anything: a terminal shows it, and does not obey
    it, and of a very long message it shows both ends.
    """

    def __init__(self, message: object):
        super().__init__(_readable(str(message)))


def _readable(message: str) -> str:
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST * 2 // 3]} [...] {message[-_LONGEST // 3 :]}"
    if message.isprintable():
        return message
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode() for letter in message
    )


def first_line(error: BaseException) -> str:
    """The first line of somebody else's error, to go into a message of ours; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def causes(error: BaseException) -> list[BaseException]:
    """An error, what it was raised from or while handling, and so on to the first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def lack_of_memory(error: BaseException) -> BaseException | None:
    """The error in the chain by which a GPU or the machine said that it has no memory left; None where none did."""
    return next((cause for cause in causes(error) if _says_no_memory(cause)), None)


def refused_to_write(error: BaseException) -> tuple[str, str] | None:
    """What a file system said that did not take what was to be written, and of which file ("": unknown); None where none did.

    Of a file that may not be opened it is not known whether it was to be written: that is asked of its place.
    """
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _NOT_WRITTEN:
            return os.strerror(cause.errno), str(cause.filename or "")
        # Of a safetensors file, and of a pickle of PyTorch, which keeps the reason to itself
        code = re.search(r"\(os error (\d+)\)", str(cause)) if type(cause).__name__ == "SafetensorError" else None
        if code and int(code[1]) in _NOT_WRITTEN:
            return os.strerror(int(code[1])), ""
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _NOT_WRITTEN_BY_TORCH):
            return "is the disk full, or read-only?", ""
    return None


def _says_no_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError is a RuntimeError; those of cuBLAS and of the CPU's allocator are nothing more
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
    )


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the most similar of `words`, and others that are nearly as similar; or nothing."""
    close = difflib.get_close_matches(word, list(words))
    alike = [difflib.SequenceMatcher(None, word, other).ratio() for other in close]
    close = [repr(other) for other, ratio in zip(close, alike, strict=True) if ratio > alike[0] - 0.05]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """Somebody else's error, to go into a message of ours, without its line breaks."""
    return " ".join(str(error).split())
