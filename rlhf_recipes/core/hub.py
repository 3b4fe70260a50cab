"""Models and data of the Hub: explained load errors, and paths inside packages."""

import importlib.util
from pathlib import Path

from rlhf_recipes.core.errors import causes, first_line

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
    """Return why loading failed, and the fix, from the Hub's error in the chain.

    `name` is one on the Hub, or a folder; `kind` is `model` or `dataset`.
    """
    if Path(name).exists():
        return first_line(error)
    if kind == "model" and (name.count("/") > 1 or name.startswith((".", "/", "~"))):  # names on the Hub are OWNER/NAME
        return "there is no such folder" + ("" if Path(name).is_absolute() else f" (looked in {Path.cwd()})")
    not_local = f"there is no folder {name} here, and " if kind == "model" else ""
    address = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    for cause in causes(error):
        absent = type(cause).__name__ == "DatasetNotFoundError"  # of `datasets`, which takes a second to import
        if isinstance(cause, GatedRepoError) or (absent and "gated" in str(cause)):
            return f"it is gated. Fix: accept its licence at {address}, and log in with `hf auth login` (or set HF_TOKEN)"
        if isinstance(cause, RevisionNotFoundError):
            return f"it has no such revision. Fix: choose one of {address}/tree/main"
        if isinstance(cause, RepositoryNotFoundError) or absent:
            problem = f"{not_local}there is no {kind} of this name on the Hub, or it is private"
            return f"{problem}. Fix: correct it, or log in with `hf auth login`"
        if isinstance(cause, HfHubHTTPError) and not isinstance(cause, EntryNotFoundError):
            return f"the Hub refused: {first_line(cause).rstrip('.')}. Fix: try again later, or name a folder that holds it"
    if any(map(_is_unreachable, causes(error))):
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        problem = f"the Hub could not be reached{offline}, and the cache of this machine does not have it"
        option = "--repo-type dataset " if kind == "dataset" else ""
        fix = f"run `hf download {option}{name} --local-dir FOLDER` on a machine with a network"
        return f"{not_local}{problem}. Fix: {fix}; copy FOLDER ({_FILES[kind]}) to this one, and name it instead"
    return first_line(error)


def is_hub_error(error: BaseException) -> bool:
    """Return whether the Hub, the network or the disk is at fault, and not this code."""
    types = OSError | HFValidationError | RuntimeError  # the last is hf_xet's, which uploads large files
    return any(isinstance(cause, types) or _is_unreachable(cause) for cause in causes(error))


def _is_unreachable(error: BaseException) -> bool:
    # the HTTP library of the client differs between its versions
    transport = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    return transport or isinstance(error, LocalEntryNotFoundError | ConnectionError)


def resolve_path(name: str) -> str:
    """Return the folder of a dotted path (`rlhf_recipes.tiny.base`), or `name` itself."""
    package, *folders = name.split(".")
    if Path(name).exists() or not folders or not all(part.isidentifier() for part in (package, *folders)):
        return name
    try:
        spec = importlib.util.find_spec(package)  # the top package alone: finding what is within it would run its code
    except ValueError:  # for `__main__`
        return name
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((str(path) for place in places if (path := Path(place, *folders)).is_dir()), name)
