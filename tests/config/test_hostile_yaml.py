"""Typing errors in the YAML files of all recipes: each is read for what it says, or is one message with file and key."""

import math
import string
import sys
from enum import Enum
from functools import cache
from pathlib import Path

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.paths import expand_paths
from rlhf_recipes.core.yaml import read_yaml, to_yaml
from rlhf_recipes.data import load_data
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.pipeline.checks import check_arguments
from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.stages import STAGES, parse_arguments
from support import ROOT, hostile

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.fuzz

texts = st.one_of(
    st.sampled_from(["", " ", "null", "~", "none", "yes", "1e-4", "../..", "a: b", "äöü"]),
    st.text(string.ascii_letters + string.digits + string.punctuation + " ", max_size=20),
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 0.5, math.nan, math.inf]))
values = st.recursive(
    st.one_of(texts, numbers, st.none(), st.booleans()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""What a user may type where something else belongs."""


@cache
def valid(name: str) -> dict:
    return read_yaml(ROOT / "configs" / "tiny" / f"{name}.yaml")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A file that each case overwrites, in the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("yaml")
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder / "my.yaml"


def parse(recipe: str, config: Path, content: dict) -> tuple[dict | None, str | None]:
    """The values of a recipe with this YAML file, or the message."""
    config.write_text(to_yaml(content), encoding="utf-8")
    argv = ["--config", str(config)]
    groups, message = hostile.outcome(lambda: parse_arguments(ROOT / "recipes" / f"{recipe}.py", argv=argv))
    if message is not None:
        assert str(config) in message
        return None, message
    return {key: value for group in groups for key, value in vars(group).items()}, None


def same(read: object, written: object) -> bool:
    """Whether a parsed value is the one in the file: enums and data sources stand for what is written."""
    if isinstance(read, Enum):
        return read.value == written
    if isinstance(read, DatasetSource):
        return isinstance(written, dict) and all(same(getattr(read, key), value) for key, value in written.items())
    if isinstance(written, list) and len(written) == 1 and not isinstance(read, list):  # TRL unpacks it
        return same(read, written[0])
    if isinstance(read, list) and isinstance(written, list):
        return len(read) == len(written) and all(map(same, read, written))
    if isinstance(read, dict) and isinstance(written, dict):
        return read.keys() == written.keys() and all(same(read[key], written[key]) for key in read)
    if isinstance(read, float) and isinstance(written, float) and math.isnan(read):
        return math.isnan(written)
    return read == written and isinstance(read, bool) == isinstance(written, bool)


@pytest.mark.parametrize("recipe", STAGES)
@hostile.examples(12)
@given(data=st.data())
def test_wrong_values(config, recipe, data):
    path = data.draw(st.sampled_from(hostile.places(valid(recipe))))
    content = hostile.replaced(valid(recipe), path, data.draw(values))
    read, message = parse(recipe, config, content)
    if message is None:
        assert same(read[path[0]], expand_paths(content)[path[0]]), (path[0], read[path[0]])
    else:
        assert path[0] in message, message


@pytest.mark.parametrize("recipe", STAGES)
@hostile.examples(5)
@given(data=st.data())
def test_misspelt_keys(config, recipe, data):
    key = data.draw(st.sampled_from(sorted(valid(recipe))))
    place, letter = data.draw(st.integers(1, len(key))), data.draw(st.sampled_from("xqz_"))
    wrong = key[:place] + letter + letter + key[place:]
    _, message = parse(recipe, config, {wrong if other == key else other: value for other, value in valid(recipe).items()})
    assert message is not None
    assert f"unknown key '{wrong}'" in message


@pytest.mark.parametrize("name", ["pipeline", "rounds", "experiment"])
@hostile.examples(8)
@given(data=st.data())
def test_pipelines(config, name, data):
    """A pipeline is planned with every stage that its file names, or is one message with the file."""
    content = valid(name) | {"seeds": [0]}
    path = data.draw(st.sampled_from(hostile.places(content)))
    content = hostile.replaced(content, path, data.draw(values))
    config.write_text(to_yaml(content), encoding="utf-8")

    def check() -> list[str]:
        pipeline = read_pipeline(config, ROOT / "recipes", None)
        check_arguments(pipeline)
        return list(pipeline.describe())

    plan, message = hostile.outcome(check)
    if message is None:
        assert all(stage["name"] in "\n".join(plan) for stage in content["stages"])
    else:
        assert str(config) in message, message


LOADING = ["model_name_or_path", "dtype", "dataset_name", "dataset_arguments", "eval_datasets", "dataset_train_split"]
LOADING += ["column_mapping", "max_length", "test_split_size", "eos_token", "chat_template_path", "model_revision", "datasets"]
LOADING += ["attn_implementation", "model_init_kwargs", "long_rows", "bad_rows", "dataset_config", "seed"]
SMALL = {
    "model_name_or_path": "rlhf_recipes.tiny.base",
    "dtype": "float32",
    "dataset_name": "rlhf_recipes.tiny.splits.demonstrations",
    "dataset_arguments": {"rows": 8, "abstain": 0.25},
    "eval_strategy": "no",
    "max_length": 64,
}


@hostile.examples(20)
@given(data=st.data())
def test_loading(config, data):
    """Data, tokenizer and model are loaded, or there is one message."""
    content = SMALL | {data.draw(st.sampled_from(LOADING)): data.draw(values)}
    config.write_text(to_yaml(content), encoding="utf-8")

    def load() -> object:
        data_args, training, model_args = parse_arguments(ROOT / "recipes" / "sft.py", argv=["--config", str(config)])
        rows = load_data(data_args, "sft", evaluate=False, seed=training.seed)
        tokenizer = load_tokenizer(model_args, training)
        rows = rows.check_rendered(tokenizer, training.max_length, data_args.long_rows)
        return load_policy(model_args, training, None, tokenizer), rows

    loaded, _ = hostile.outcome(load)
    if loaded is not None:
        model, rows = loaded
        assert len(rows.train)
        assert all(weight.isfinite().all() for weight in model.parameters())
