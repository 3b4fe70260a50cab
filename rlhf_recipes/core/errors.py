"""Errors that the user can fix, and what others' errors say."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator

from jinja2 import TemplateError

_LONGEST = 3000  # characters of a message
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "No executable batch size",
)
# PEFT's, for the weights of experts in a mixture, which are no linear layers
_REMEDIES = {
    "ParamWrapper does not work with lora_dropout": "set `lora_dropout: 0`, since LoRA on experts has no dropout",
    "ParamWrapper does not work with use_dora": "set `use_dora: false`, since LoRA on experts has no such variant",
}
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_NOT_WRITTEN_BY_TORCH = ("PytorchStreamWriter failed writing", "file write failed", "unexpected pos", "cannot be opened")


class RecipeError(Exception):
    """An error in a YAML file, the command line, or the data, which the user can fix.

    The message has the form `file: key: problem. Fix: action.` Recipes print it without a traceback and exit with status 2
    (`rlhf_recipes.cli.exit_on_recipe_error`). Control characters that it quotes are escaped; a very long one is shortened.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message)))


class LabelsMissingError(RecipeError):
    """Labels that people have yet to give: the run stops, and is not at fault.

    Recipes print it as `waiting: ...` and exit with `LabelsMissingError.STATUS`, by which a pipeline knows it.
    """

    STATUS = 3


def printable(text: str) -> str:
    """Return a text with control characters escaped, shortened if very long."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 2 // 3]} [...] {text[-_LONGEST // 3 :]}"
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


@contextlib.contextmanager
def error_context(place: str, *errors: type[Exception], fix: str = "") -> Iterator[None]:
    """Put a place in front of errors, and turn a library's errors into `RecipeError`.

    Args:
        place: what the block is about: a file, a key, a stage.
        errors: types of others' errors that become a `RecipeError`.
        fix: what to do about those.

    Raises:
        RecipeError: `place: message`, for a `RecipeError` and for `errors`.
    """
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from error
    except errors as error:
        fix = fix or next((remedy for sign, remedy in _REMEDIES.items() if sign in str(error)), "")
        reason = f"{one_line(error).rstrip('.')}. Fix: {fix}" if fix else one_line(error)
        raise RecipeError(f"{place}: {reason}") from error


@contextlib.contextmanager
def as_recipe_error(stage: str) -> Iterator[None]:
    """Turn a trainer's rejection of its arguments or data into a `RecipeError`."""
    with error_context(stage, ValueError, ImportError, TemplateError, NotImplementedError):
        try:
            yield
        except (RuntimeError, OSError) as error:  # TRL's for rows and vLLM, Transformers' for trackers
            if not any(words in str(error) for words in ("assistant_only_loss", "The vLLM server", "to be installed")):
                raise
            raise RecipeError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of somebody else's error; its type if it has none."""
    if "weights_only" in str(error):  # PyTorch advises to run what is in the file
        return "it holds something else than tensors and numbers, or is damaged"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def causes(error: BaseException) -> list[BaseException]:
    """Return an error, its cause or context, and so on to the first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def lack_of_memory(error: BaseException) -> BaseException | None:
    """Return the out-of-memory error (GPU or machine) in the chain, or None."""
    return next((cause for cause in causes(error) if _is_lack_of_memory(cause)), None)


def _is_lack_of_memory(error: BaseException) -> bool:
    # torch.OutOfMemoryError is a RuntimeError; cuBLAS and the CPU's allocator raise a plain one
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
    )


def failed_write(error: BaseException) -> tuple[str, str] | None:
    """Return why a file could not be written, and its name ("": unknown), or None.

    For `PermissionError` it is not known whether the file was to be written or read.
    """
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _NOT_WRITTEN:
            return os.strerror(cause.errno), str(cause.filename or "")
        # safetensors and tokenizers put the code into their text, PyTorch leaves it out
        code = re.search(r"\(os error (\d+)\)", str(cause))
        if code and int(code[1]) in _NOT_WRITTEN:
            return os.strerror(int(code[1])), ""
        if isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in _NOT_WRITTEN_BY_TORCH):
            return "is the disk full, or read-only?", ""
    return None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` with the most similar of `words`, or an empty text."""
    close = difflib.get_close_matches(word, list(words))
    ratios = [difflib.SequenceMatcher(None, word, other).ratio() for other in close]
    close = [repr(other) for other, ratio in zip(close, ratios, strict=True) if ratio > ratios[0] - 0.05]
    return f"; did you mean {' or '.join(close)}?" if close else ""
