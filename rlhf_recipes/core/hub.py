"""What the Hub's client says when it gives no model or data, in one message with the remedy."""

import importlib.util
from pathlib import Path

from rlhf_recipes.core.errors import causes, first_line

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_FILES = {
    "model": "config.json, generation_config.json, *.safetensors (with their index), tokenizer.json, tokenizer_config.json",
    "dataset": "its .parquet, .jsonl or .csv files",
}


def explain_load_error(name: str, error: BaseException, kind: str = "model") -> str:
    """Why something could not be loaded, and what to do: by the Hub's own errors, which other libraries wrap.

    Args:
        name: its name on the Hub, or a folder, of which the Hub is not asked.
        error: what was raised.
        kind: `model` or `dataset`.
    """
    if Path(name).exists():
        return first_line(error)
    if kind == "model" and (name.count("/") > 1 or name.startswith((".", "/", "~"))):  # names on the Hub are OWNER/NAME
        return "there is no such folder" + ("" if Path(name).is_absolute() else f" (looked in {Path.cwd()})")
    here = f"there is no folder {name} here, and " if kind == "model" else ""
    address = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    for cause in causes(error):
        absent = isinstance(cause, DatasetNotFoundError)  # which `datasets` raises without its cause
        if isinstance(cause, GatedRepoError) or (absent and "gated" in str(cause)):
            return f"it is gated: accept its licence at {address}, and log in by `hf auth login` as who did (or set HF_TOKEN)"
        if isinstance(cause, RevisionNotFoundError):
            return f"it has no such revision: {address}/tree/main lists those that there are"
        if isinstance(cause, RepositoryNotFoundError) or absent:
            remedy = "correct it, or log in by `hf auth login`"
            return f"{here}there is no {kind} of this name on the Hub, or it is private: {remedy}"
        if isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError):
            return f"the Hub refused: {first_line(cause)}: try again later, or name a folder that holds it"
    if any(map(_is_unreachable, causes(error))):
        asked = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        lacking = f"the Hub could not be reached{asked}, and the cache of this machine does not have it"
        return f"{here}{lacking}. {_by_hand(name, kind)}"
    return first_line(error)


def is_of_the_hub(error: BaseException) -> bool:
    """Whether the Hub, the way to it or the disk is at fault, and not this code; they have no class in common."""
    of = OSError | HFValidationError | RuntimeError  # the last of hf_xet, which uploads large files
    return any(isinstance(cause, of) or _is_unreachable(cause) for cause in causes(error))


def _is_unreachable(error: BaseException) -> bool:
    # the client's own HTTP library has more than one name
    of_http = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return of_http or isinstance(error, LocalEntryNotFoundError | ConnectionError)


def _by_hand(name: str, kind: str) -> str:
    download = f"hf download {'--repo-type dataset ' if kind == 'dataset' else ''}{name} --local-dir FOLDER"
    return f"Where there is a network, `{download}`; place FOLDER ({_FILES[kind]}) on this machine, and name it in its stead"


def resolve_path(name: str) -> str:
    """The folder of a package's data for a dotted path such as `rlhf_recipes.tiny.base`; any other name unchanged."""
    package, *folders = name.split(".")
    if Path(name).exists() or not folders or not all(part.isidentifier() for part in (package, *folders)):
        return name
    try:
        spec = importlib.util.find_spec(package)  # of what is within it, this would run code, and adapters name their base
    except ValueError:  # of `__main__`
        return name
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((str(path) for place in places if (path := Path(place, *folders)).is_dir()), name)
