"""Upload finished results to the Hub, without paths and secrets of this machine."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import PENDING, RECIPE, read_json, write_json
from rlhf_recipes.core.hub import is_hub_error
from rlhf_recipes.export.model_card import display_name

from huggingface_hub import HfApi
from transformers import TrainingArguments

_NOT_UPLOADED = (PENDING, "checkpoint-*", "*.bin", "*.pt", "*.pth", ".*")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")


def repository_name(folder: str | Path, hub_model_id: str | None) -> str:
    """Return the name on the Hub; by default that of the folder, as in TRL's trainers."""
    return hub_model_id or Path(folder).resolve().name


def publish(training: TrainingArguments) -> None:
    """Upload a stage's result from the main process if `push_to_hub` is set.

    Raises:
        RecipeError: as `upload`.
    """
    if training.push_to_hub and training.process_index == 0:
        repository = repository_name(training.output_dir, training.hub_model_id)
        options = {"private": training.hub_private_repo, "token": training.hub_token, "revision": training.hub_revision}
        print(f"Uploaded to {upload(training.output_dir, repository, **options)}")


def upload(
    folder: str | Path,
    repository: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a result without checkpoints and pickles, and return its address.

    `private` and `token` are by default those of the account. `revision` is the branch, by default the main one.

    Raises:
        RecipeError: if the Hub is unreachable or refuses, or if the repository holds other weights. The result stays in its
            folder.
    """
    try:
        api = HfApi(token=token)
        url = api.create_repo(repository, private=private, exist_ok=True)
        present = api.list_repo_files(url.repo_id, revision=revision)
        others = [name for name in present if any(map(Path(name).match, _WEIGHTS)) and not (Path(folder) / name).exists()]
        if others:  # which Transformers might load
            raise RecipeError(
                f"push_to_hub: {url.repo_id} holds weights of another model ({', '.join(sorted(others)[:3])}). Fix: name "
                f"another `hub_model_id`, or delete them there. The result is in {folder}"
            )
        with tempfile.TemporaryDirectory() as links:  # so that recipe.json can differ in the same commit
            ignored = shutil.ignore_patterns(*_NOT_UPLOADED)
            shutil.copytree(Path(folder).resolve(), links, ignore=ignored, copy_function=os.symlink, dirs_exist_ok=True)
            for record in Path(links).rglob(RECIPE):
                write_json(record, redact(read_json(record)))
            api.upload_folder(repo_id=url.repo_id, folder_path=links, commit_message="From rlhf-recipes", revision=revision)
    except Exception as error:
        if not is_hub_error(error):
            raise
        raise RecipeError(
            f"push_to_hub: {repository}: {first_line(error)}; the result is in {folder}. Fix: after `hf auth login`, "
            f"run `hf upload {repository} {folder} --exclude 'checkpoint-*'` (recipe.json names local folders)"
        ) from error
    return str(url)


def redact(value: Any, key: str = "") -> Any:
    """Return a record without absolute paths, tokens and passwords."""
    if isinstance(value, dict):
        return {name: redact(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if key.split("_")[-1] in ("token", "password", "secret") and key != "eos_token" and isinstance(value, str):
        return "<not shown>"
    return display_name(value) if isinstance(value, str) else value
