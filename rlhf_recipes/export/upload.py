"""Results on the Hub: uploaded at once, when they are whole, and with nothing in them that is of this machine alone."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import PENDING, RECIPE, read_json
from rlhf_recipes.core.hub import is_of_the_hub
from rlhf_recipes.export.model_card import shown

from huggingface_hub import CommitOperationAdd, HfApi
from transformers import TrainingArguments

_NOT_FOR_OTHERS = (PENDING, "training_args.bin", "checkpoint-*", ".*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")


def repository_name(folder: str | Path, hub_model_id: str | None) -> str:
    """The name on the Hub of what is in a folder: by itself that of the folder, as TRL's trainers have it."""
    return hub_model_id or Path(folder).resolve().name


def publish(training: TrainingArguments) -> None:
    """Uploads what a stage has left, if `push_to_hub` asks for it; of several processes the first one does.

    Args:
        training: the trainer's arguments as they were parsed, after the stage has written its record and its card.

    Raises:
        RecipeError: as `upload`.
    """
    if training.push_to_hub and training.process_index == 0:
        repository = repository_name(training.output_dir, training.hub_model_id)
        options = {"private": training.hub_private_repo, "token": training.hub_token, "revision": training.hub_revision}
        print(f"It is at {upload(training.output_dir, repository, **options)}")


def upload(
    folder: str | Path,
    repository: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Uploads a result in one commit, without checkpoints and pickles; returns its address.

    Args:
        folder: of the result.
        repository: on the Hub; it is made if it is not there.
        private: whether it is made so; None: as the account has it.
        token: in place of that of `hf auth login`.
        revision: the branch; None: the main one.

    Raises:
        RecipeError: if the Hub cannot be reached or refuses, or the repository holds weights that would be loaded in place of
            these, or with them; the result stays in its folder.
    """
    folder = Path(folder)
    try:
        api = HfApi(token=token)
        url = api.create_repo(repository, private=private, exist_ok=True)
        _refuse_other_weights(api.list_repo_files(url.repo_id, revision=revision), folder, url.repo_id)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder) for path in files]
        kept = [name for name in names if not any(fnmatch(part, of) for part in name.parts for of in _NOT_FOR_OTHERS)]
        operations = [CommitOperationAdd(name.as_posix(), _content(folder / name)) for name in kept]
        api.create_commit(url.repo_id, operations, commit_message="From rlhf-recipes", revision=revision)
    except Exception as error:
        if not is_of_the_hub(error):
            raise
        raise RecipeError(
            f"push_to_hub: {repository}: {first_line(error)}; the result is in {folder}. With a network, and after `hf auth "
            f"login`, upload it with `hf upload {repository} {folder} --exclude 'checkpoint-*'` (recipe.json names folders)"
        ) from error
    return str(url)


def redact(value: Any, key: str = "") -> Any:
    """A record as it may be read elsewhere: without the folders of this machine, and without what opens doors."""
    if isinstance(value, dict):
        return {name: redact(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if key.split("_")[-1] in ("token", "password", "secret") and key != "eos_token" and isinstance(value, str):
        return "<not shown>"
    return shown(value) if isinstance(value, str) else value


def _content(path: Path) -> str | bytes:
    """What is uploaded of a file: a record as others may read it, else the file that is named."""
    if path.name != RECIPE:
        return str(path)
    return json.dumps(redact(read_json(path)), indent=2, ensure_ascii=False).encode()


def _refuse_other_weights(there: list[str], folder: Path, repository: str) -> None:
    """Of a model in one file and one in shards Transformers takes the first, and an adapter goes on top of either."""
    left = [name for name in there if any(map(Path(name).match, _WEIGHTS)) and not (folder / name).exists()]
    if left:
        raise RecipeError(
            f"push_to_hub: {repository} holds weights of another model ({', '.join(sorted(left)[:3])}), which would be loaded "
            f"in place of these or with them: name another `hub_model_id`, or delete them there. The result is in {folder}"
        )
