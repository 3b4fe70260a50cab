"""YAML files of every recipe, spoilt: each is read for what it says, or refused in one message that names file and key."""

import math
import sys
from enum import Enum
from functools import cache
from pathlib import Path

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.data import load_data
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.pipeline import check_arguments, read_pipeline
from rlhf_recipes.stages import STAGES, parse_arguments
from support import ROOT, hostile

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

PIPELINES = ("pipeline", "rounds", "experiment")


@cache
def valid(name: str) -> str:
    return (ROOT / "configs" / "tiny" / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config(tmp_path_factory, module_patch) -> Path:
    """A file to be overwritten by each case."""
    folder = tmp_path_factory.mktemp("hostile")
    module_patch.chdir(folder)
    return folder / "my.yaml"


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield patch


def parse(recipe: str, config: Path, content: str | bytes) -> tuple[dict | None, str | None]:
    """The values of a recipe by a file of this content, or the message."""
    config.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    argv = ["--config", str(config)]
    groups, message = hostile.outcome(lambda: parse_arguments(ROOT / "recipes" / f"{recipe}.py", argv=argv))
    if message is not None:
        assert str(config) in message
        return None, message
    return {key: value for group in groups for key, value in vars(group).items()}, None


def same(read: object, written: object) -> bool:
    """Whether a value is what a YAML file says: but for what numbers are written as, and for types that stand for texts."""
    if isinstance(read, Enum):
        return read.value == written
    if isinstance(read, DatasetSource):
        return isinstance(written, dict) and all(same(getattr(read, key), value) for key, value in written.items())
    if isinstance(written, list) and len(written) == 1 and not isinstance(read, list):  # which TRL takes out of its list
        return same(read, written[0])
    if isinstance(read, list) and isinstance(written, list):
        return len(read) == len(written) and all(map(same, read, written))
    if isinstance(read, dict) and isinstance(written, dict):
        return read.keys() == written.keys() and all(same(read[key], written[key]) for key in read)
    if isinstance(read, float) and isinstance(written, str):  # 1e-4, which YAML takes for a text
        return read == float(written)
    if isinstance(read, float) and isinstance(written, float) and math.isnan(read):
        return math.isnan(written)
    return read == written and isinstance(read, bool) == isinstance(written, bool)


@st.composite
def spoilt_values(draw, name: str) -> tuple[str, dict]:
    """The name of a key of a valid file, and its values with another one there, or deep in it."""
    content = yaml.safe_load(valid(name))
    path = draw(st.sampled_from(hostile.places(content)))
    return path[0], hostile.replaced(content, path, draw(hostile.values))


@pytest.mark.parametrize("recipe", STAGES)
@hostile.examples(12)
@given(data=st.data())
def test_values(config, recipe, data):
    key, values = data.draw(spoilt_values(recipe))
    text = yaml.safe_dump(values, allow_unicode=True)
    read, message = parse(recipe, config, text)
    if message is None:
        assert same(read[key], yaml.safe_load(text)[key]), (key, read[key])
    else:
        assert key in message or "YAML" in message, message


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(12)
)
SNIPPETS = [
    BOMB,
    "seed: &a [*a]\n",
    "dataset_arguments: &a {x: *a}\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "1: 2\n",
    "2001-01-01: 2\n",
    "~: 2\n",
    "seed: 2001-13-45\n",
    "seed: 0x_\n",
    "seed: 0b_\n",
    "seed: 1_000\n",
    "seed: 1:30\n",
    "seed: " + "9" * 5000 + "\n",
    "seed: 0x" + "f" * 5000 + "\n",
    "dataset_arguments: {x: 0x" + "f" * 5000 + "}\n",
    "learning_rate: 0x" + "f" * 500 + "\n",
    "learning_rate: 1e999\n",
    "seed: !!int maybe\n",
    "use_peft: !!bool maybe\n",
    "seed: !!float x\n",
    "seed: !!timestamp x\n",
    "seed: !!binary '*'\n",
    "seed: !!set {1, 2}\n",
    "seed: !!omap [1]\n",
    "dataset_name: !!binary aGVsbG8=\n",
    "seed: !!python/object/apply:os.system ['touch executed']\n",
    "seed: !!python/object/new:subprocess.Popen [['touch', 'executed']]\n",
    "seed: !!python/name:os.system\n",
    "seed: !mine 1\n",
    "dataset_name: " + "[" * 3000 + "]" * 3000 + "\n",
    "dataset_arguments: " + "{a: " * 60 + "1" + "}" * 60 + "\n",
    'dataset_name: "\\ud800"\n',
    'dataset_name: "a\\0b"\n',
    'dataset_name: "\\x1b[2J"\n',
    "datasets: [{1: 2, path: a.csv}]\n",
    'datasets: [{path: "\\0"}]\n',
    "model_init_kwargs: text\n",
    "lr_scheduler_kwargs: '[1]'\n",
    "seed:\t1\n",
    "\tseed: 1\n",
    "%YAML 9.9\n---\nseed: 1\n",
    "seed: 1\n---\nseed: 2\n",
    "seed: 1\n...\nrubbish",
    "seed: *nobody\n",
    "<<: [{seed: 1}, {seed: 2}]\n",
    "<<: 1\n",
    "<<: {seed: 1}\nseed: 2\n",
    "seed: |\n  1\n",
    "sed\u202e: 1\n",
    "\ufeffseed: 1\n",
    "'': 1\n",
    "x" * 100_000 + ": 1\n",
    "seed: " + "x" * 100_000 + "\n",
    "optim: " + "adamw" * 20_000 + "\n",
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[repr(snippet[:30]) for snippet in SNIPPETS])
def test_snippets(config, snippet):
    """Each alone in a file: what is wrong is said, and no tag makes anything run."""
    read, message = parse("sft", config, snippet)
    assert not (config.parent / "executed").exists()
    if message is None:
        content = yaml.safe_load(snippet)
        assert all(same(read[key], value) for key, value in content.items()), content


@pytest.mark.parametrize("recipe", ["sft", "evaluate", "pipeline"])
@hostile.examples(60)
@given(data=st.data())
def test_bytes(config, recipe, data):
    """Read as PyYAML reads it, or refused; a file that PyYAML reads and we do not has a key twice, or one that is no text."""
    content = data.draw(hostile.spoilt_bytes(valid(recipe).encode()))
    config.write_bytes(content)
    values, message = hostile.outcome(lambda: read_yaml(config))
    if message is None:
        assert same(values, yaml.safe_load(content.decode()) or {})
    else:
        assert str(config) in message


@st.composite
def misspelt(draw, name: str) -> tuple[str, str]:
    """A key that no recipe has, and a valid file with it in place of another."""
    content = yaml.safe_load(valid(name))
    key = draw(st.sampled_from(sorted(content)))
    letter = draw(st.sampled_from("xqz_\u0301"))
    place = draw(st.integers(1, len(key)))
    wrong = key[:place] + letter + letter + key[place:]
    return wrong, yaml.safe_dump({wrong if other == key else other: value for other, value in content.items()})


@hostile.examples(12)
@given(data=st.data())
def test_misspelt_keys(config, data):
    recipe = data.draw(st.sampled_from([*STAGES]))
    wrong, text = data.draw(misspelt(recipe))
    _, message = parse(recipe, config, text)
    assert message is not None
    assert f"unknown key '{wrong}'" in message


def plan_of(config: Path, content: str | bytes) -> tuple[object, str | None]:
    config.write_bytes(content if isinstance(content, bytes) else content.encode())

    def check() -> object:
        pipeline = read_pipeline(config, ROOT / "recipes", None)
        check_arguments(pipeline, config)
        return list(pipeline.describe())

    return hostile.outcome(check)


@pytest.mark.parametrize("name", PIPELINES)
@hostile.examples(8)
@given(data=st.data())
def test_pipelines(config, name, data):
    """A pipeline is planned with every stage that its file names, or refused with the file's name and what is wrong."""
    content = yaml.safe_load(valid(name)) | {"seeds": [0]}
    path = data.draw(st.sampled_from(hostile.places(content)))
    values = hostile.replaced(content, path, data.draw(hostile.values))
    plan, message = plan_of(config, yaml.safe_dump(values, allow_unicode=True))
    if message is None:
        text = "\n".join(plan)
        assert all(stage["name"] in text for stage in values["stages"])
    else:
        assert str(config) in message, message


# --- Through to what a YAML file loads -------------------------------------------------------------------

LOADING = ["model_name_or_path", "dtype", "dataset_name", "dataset_arguments", "eval_datasets", "dataset_train_split"]
LOADING += ["column_mapping", "max_length", "test_split_size", "eos_token", "chat_template_path", "model_revision", "datasets"]
LOADING += ["attn_implementation", "model_init_kwargs", "long_rows", "bad_rows", "dataset_config", "seed", "start_from"]
LITTLE = {
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
    """One key of a recipe's YAML file is anything: data, tokenizer and model are loaded, or one message says why not."""
    key = data.draw(st.sampled_from(LOADING))
    new = data.draw(hostile.values)
    text = yaml.safe_dump(LITTLE | {key: new}, allow_unicode=True)
    config.write_text(text, encoding="utf-8", errors="surrogatepass")
    recipe = ROOT / "recipes" / "sft.py"

    def load() -> object:
        data_args, training, model_args = parse_arguments(recipe, argv=["--config", str(config)])
        data = load_data(data_args, "sft", evaluate=False, seed=training.seed)
        tokenizer = load_tokenizer(model_args, training)
        fitted = data.filter_by_length(tokenizer, training.max_length, data_args.long_rows)
        return load_policy(model_args, training, None, tokenizer), fitted

    loaded, _ = hostile.outcome(load)
    if loaded is not None:
        model, fitted = loaded
        assert len(fitted.train)
        assert all(weight.isfinite().all() for weight in model.parameters())
