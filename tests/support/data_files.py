"""Data files, and what is read from them."""

import gzip
import json
from pathlib import Path

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.data import load_data

import pytest
from datasets import Dataset


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


TALK = [user("Hi"), bot("Hello"), user("Why?")]


def write_rows(path: Path, rows: list | str) -> str:
    """Write rows, or raw text, in the format of the file's name. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.with_name(path.name.removesuffix(".gz"))
    if isinstance(rows, str):
        plain.write_text(rows, encoding="utf-8")
    elif plain.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(plain)
    elif plain.suffix == ".csv":
        Dataset.from_list(rows).to_csv(plain)
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows), encoding="utf-8")
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return str(path)


def load(path, kind, evaluate=False, seed=0, **arguments):
    return load_data(DataArguments(dataset_name=str(path), **arguments), kind, evaluate=evaluate, seed=seed)


def rows_of(path, kind, **arguments):
    return load(path, kind, **arguments).train.to_list()


def failure(path, kind, **arguments):
    """The message that loading ends in."""
    with pytest.raises(RecipeError) as caught:
        load(path, kind, **arguments)
    return str(caught.value)
