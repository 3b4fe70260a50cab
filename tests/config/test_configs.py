"""Every YAML file under configs/ parses, describes itself, and has no key that nothing reads."""

import dataclasses
import re

from rlhf_recipes.config import chat, data, evaluate, merge, policy, ppo, rank, reward, sample
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.memory import estimator
from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.stages import STAGES, parse_arguments, parse_values, pipeline_stages
from support import ROOT, published

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from trl import GRPOConfig, ModelConfig

PIPELINES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "stages" in read_yaml(path))
LAUNCHERS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*PIPELINES, *LAUNCHERS})
ALONE = STAGES.keys() - pipeline_stages()  # one process, and a Ctrl-C in a chat would end `accelerate launch`
SOURCES = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "rlhf_recipes").rglob("*.py")]


def test_each_recipe_has_a_tiny_config():
    assert {*STAGES} == {path.stem for path in (ROOT / "recipes").glob("*.py") if "parse_arguments" in path.read_text()}
    assert {*STAGES} == {path.stem for path in CONFIGS if path.parent.name == "tiny"}


@pytest.mark.parametrize("config", PIPELINES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_stage_of_a_pipeline_parses_by_its_recipe_and_fits_the_card(config, monkeypatch):
    monkeypatch.setattr(estimator, "load_config", published.load_config)
    for stage in read_pipeline(config, ROOT / "recipes").stages:  # refused where a stage does not fit
        assert ("gpu_memory" in read_yaml(config)) == (stage.plan is not None)
        parse_values(stage.recipe, stage.values)


@pytest.mark.parametrize("config", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(config):
    parser = launch_command_parser()
    arguments, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(config), "script.py"]))
    expected = {"zero2": "use_deepspeed", "zero3": "use_deepspeed", "fsdp": "use_fsdp", "ddp": "multi_gpu"}
    for option in {*expected.values()}:
        assert getattr(arguments, option) == (expected.get(config.stem) == option)
    assert (ROOT / "docs" / "distributed.md").read_text().count(f"`{config.name}`")
    launch = config.read_text().splitlines()[1]
    assert launch.startswith(f"# Launch: accelerate launch --config_file configs/accelerate/{config.name} ")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_parses_by_its_recipe(config):
    recipe = ROOT / "recipes" / f"{config.stem}.py"
    parsed = parse_arguments(recipe, argv=["--config", str(config)])
    values = {name: value for group in parsed for name, value in vars(group).items()}
    for key, written in read_yaml(config).items():
        if isinstance(written, (int, float, bool)):
            assert values[key] == written
    assert values.get("output_dir") in (None, f"runs/{config.parent.name}/{config.stem}")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_has_a_header_and_titled_groups(config):
    text = config.read_text()
    header, _, body = text.partition("\n\n")
    assert all(line.startswith("# ") for line in header.splitlines())
    assert re.search(r"GPU memory: .*\((measured|predicted)", header)
    options = "" if config.parent.name == "tiny" else f" --config {config.relative_to(ROOT)}"
    launcher = "python" if config.stem in ALONE else "accelerate launch"
    assert header.splitlines()[-1] == f"# Launch: {launcher} recipes/{config.stem}.py{options}"
    groups = body.strip().split("\n\n")
    assert all(re.match(r"# \w+", group) for group in groups), "each group of keys has a title"


FAMILIES = sorted(path.parent for path in PIPELINES if path.parent.name != "tiny" and path.stem == "pipeline")


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda path: path.name)
def test_families_differ_only_where_their_models_do(folder):
    first = FAMILIES[0]
    assert {path.name for path in folder.iterdir()} == {path.name for path in first.iterdir()}
    for path in folder.iterdir():
        assert without_the_model(path) == without_the_model(first / path.name), path


def without_the_model(path) -> str:
    """The text of a file without its model, folder, card, EOS token and adapted layers."""
    text = path.read_text().replace(path.parent.name, "FOLDER")
    text = re.sub(r"(Qwen|meta-llama)/[\w.-]+", "MODEL", text)
    text = re.sub(r"a card of \d+ GB|gpu_memory: \d+", "CARD", text)
    text = re.sub(r"eos_token: .*\n", "", text)
    return re.sub(r"lora_target_modules: .*\n", "", text)


def readers(name: str, *exclude: str) -> list[str]:
    # as an attribute of something that holds arguments: `path.name` reads no key
    holder = r"(?:arguments|source|group|\w+_args|args|training)"
    return [path.name for path in SOURCES if path.name not in exclude and re.search(rf"\b{holder}\.{name}\b", path.read_text())]


def test_every_key_of_ours_is_read():
    modules = (chat, data, evaluate, merge, policy, ppo, rank, reward, sample)
    ours = [cls for module in modules for cls in vars(module).values() if getattr(cls, "__module__", None) == module.__name__]
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    fields = {field.name for cls in ours if dataclasses.is_dataclass(cls) for field in dataclasses.fields(cls)} - inherited
    by_name = {"eos_token", "chat_template_path", "trust_remote_code"}  # `load_tokenizer` reads them from any group
    assert not [name for name in fields - by_name if not readers(name)]


def test_every_model_key_is_read_by_us_or_trl():
    import inspect

    from trl import get_peft_config, get_quantization_config

    readers_of_trl = inspect.getsource(get_peft_config) + inspect.getsource(get_quantization_config)
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert not [name for name in fields if f"model_args.{name}" not in readers_of_trl and not readers(name)]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize(("section", "arguments"), [("Sampling", sample.SampleArguments), ("Ranking", rank.RankArguments)])
def test_tables_of_keys_are_complete(section, arguments):
    text = (ROOT / "docs" / "label.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    keys = [key for line in text.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(keys) == sorted(item.name for item in dataclasses.fields(arguments))


def test_the_map_of_the_library_is_complete():
    text = (ROOT / "docs" / "contributing.md").read_text()
    shown = set(re.findall(r"^(\w+)(?:/|\.py) ", text, re.MULTILINE))
    packages = {path.parent.name for path in (ROOT / "rlhf_recipes").glob("*/__init__.py")}
    assert packages <= shown
    assert all((ROOT / "rlhf_recipes" / name).exists() or (ROOT / "rlhf_recipes" / f"{name}.py").exists() for name in shown)
