"""Trackers: what each stage reports, under which name, what is rejected; and the log of every run."""

import json
import os
import shutil
import sys
from types import ModuleType, SimpleNamespace

from rlhf_recipes.config.checks import prepare_trackers, run_name
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.pipeline.reading import read_stages
from rlhf_recipes.training.ensemble import member_arguments
from rlhf_recipes.training.result import _log_line
from rlhf_recipes.training.run import begin_tracking
from support import ROOT
from support.small_stages import small

import pytest
import yaml
from trl import RewardConfig

OWN = ("value_warmup_steps", "ensemble_size")
REPORTED = {
    "sft": {"train/loss", "train/grad_norm", "eval/loss"},
    "reward": {"train/loss", "train/accuracy", "train/margin", "eval/accuracy"},
    "dpo": {"train/loss", "train/rewards/margins", "eval/rewards/margins"},
    "ppo": {"train/kl", "train/score", "train/entropy", "train/value/loss", "train/value/explained_variance", "eval/kl"},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return small(tmp_path_factory.mktemp("files"))


@pytest.fixture
def config(stages, tmp_path):
    """Writes the YAML file of a stage of two steps, from the base model."""

    def write(recipe, **options):
        adapter = {"start_from": None, "lora_r": 4, "lora_target_modules": "all-linear"} if recipe in ("dpo", "ppo") else {}
        short = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "value_warmup_steps": 0, "ensemble_size": 1}
        short = {key: value for key, value in short.items() if key in stages[recipe] or key not in OWN}
        output = {"output_dir": str(tmp_path / "runs" / "mine" / recipe)}
        path = tmp_path / f"{recipe}.yaml"
        path.write_text(yaml.safe_dump(stages[recipe] | adapter | short | output | options))
        return path

    return write


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- What arrives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", REPORTED)
def test_tensorboard_has_what_the_stage_logs(launch, config, tmp_path, recipe):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    status, error = launch(recipe, "--config", config(recipe, report_to="tensorboard"))
    assert status == 0, error
    output = tmp_path / "runs" / "mine" / recipe
    (folder,) = (output / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= REPORTED[recipe]
    key = sorted(REPORTED[recipe])[-1]
    kept = {entry["step"]: entry[key.partition("/")[2]] for entry in read_log(output) if key.partition("/")[2] in entry}
    for event in events.Scalars(key):
        assert event.value == pytest.approx(kept[event.step], rel=1e-5)


def test_each_training_has_its_own_wandb_run(monkeypatch):
    """As the members of an ensemble; Transformers would continue the run that exists."""
    wandb = ModuleType("wandb")
    wandb.run, wandb.finish = None, lambda: setattr(wandb, "run", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "of the shell")
    for project, expected in (("huggingface", "of the shell"), ("mine", "mine")):  # the first is TRL's default
        begin_tracking(SimpleNamespace(report_to=["wandb"], project=project))
        assert os.environ["WANDB_PROJECT"] == expected
        assert wandb.run is None
        wandb.run = "started by Transformers"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/mine/sft", "mine-sft"),
        ("/home/me/runs/mine/seed-0/sft", "mine-seed-0-sft"),
        ("results/sft", "results-sft"),
        ("/tmp/a/b/sft", "b-sft"),
        ("sft", "sft"),
    ],
)
def test_run_name_is_the_folder(folder, name):
    assert run_name(folder) == name


def test_members_of_an_ensemble_have_their_own_names(tmp_path):
    training = RewardConfig(str(tmp_path), run_name="mine-reward", bf16=False, use_cpu=True)
    assert member_arguments(training, 1, size=2).run_name == "mine-reward-member-1"


# --- What is rejected --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("absent", "report_to: wandb is not installed. Fix: `pip install --upgrade wandb`"),
        ("broken", "report_to: wandb cannot be imported (No module named 'nothing_of_this_name')"),
        ("folder", "report_to: wandb is not installed"),  # with wandb's runs
    ],
)
def test_a_missing_tracker_is_an_error_before_a_model_is_loaded(launch, config, monkeypatch, tmp_path, wanted, message):
    if wanted == "absent":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        (tmp_path / "wandb").mkdir()
        if wanted == "broken":
            (tmp_path / "wandb" / "__init__.py").write_text("import nothing_of_this_name")
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # of no model
    status, error = launch("sft", "--config", config("sft", model_name_or_path=str(tmp_path)), "--report_to", "none")
    assert f"model_name_or_path: {tmp_path}: " in error
    status, error = launch("sft", "--config", config("sft", model_name_or_path=str(tmp_path)), "--report_to", "wandb")
    assert status == 2
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_tracker_is_rejected():
    with pytest.raises(RecipeError, match=r"report_to: 'tensorbord' .* did you mean 'tensorboard'"):
        prepare_trackers({"report_to": ["tensorbord"]})


@pytest.mark.parametrize(
    ("given", "prepared"),
    [
        *[({"report_to": none}, {"report_to": ["none"]}) for none in (None, "none", [], ["none"])],
        ({"report_to": "mlflow,flyte"}, {"report_to": ["mlflow", "flyte"], "run_name": "mine-sft"}),  # left to Transformers
        ({"report_to": ["all"], "run_name": "own"}, {"report_to": ["all"], "run_name": "own"}),
    ],
)
def test_trackers_and_the_name_of_the_run(given, prepared):
    values = given | {"output_dir": "runs/mine/sft"}
    prepare_trackers(values)
    assert values == prepared | {"output_dir": "runs/mine/sft"}


def test_a_tracker_complaint_is_one_message(launch, config, monkeypatch):
    usage_error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})

    def complain(*arguments, **options):
        raise usage_error("No API key configured.")

    monkeypatch.setattr("transformers.Trainer.train", complain)
    status, error = launch("sft", "--config", config("sft"))
    assert status == 2
    assert "report_to: wandb: No API key configured." in error
    assert "`wandb login`" in error
    assert "Traceback" not in error


# --- The pipeline -----------------------------------------------------------------------------------------


def test_a_pipeline_passes_its_tracker_to_training_stages_and_reruns_none(config, tmp_path):
    config("sft")
    (tmp_path / "sample.yaml").write_text("num_completions: 2\n")
    stages = [
        {"name": "sft", "config": str(tmp_path / "sft.yaml")},
        {"name": "own", "recipe": "sft", "config": str(tmp_path / "sft.yaml"), "arguments": {"report_to": "none"}},
        {"name": "sample", "config": str(tmp_path / "sample.yaml")},
    ]
    path = tmp_path / "pipeline.yaml"

    def read(**options):
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "runs"), "stages": stages} | options))
        return read_stages(path, ROOT / "recipes").stages

    without, with_tracker = read(), read(report_to="tensorboard", project="mine")
    assert [stage.values.get("report_to") for stage in with_tracker] == ["tensorboard", "none", None]
    assert [stage.values.get("project") for stage in with_tracker] == ["mine", "mine", None]
    assert [stage.fingerprint for stage in with_tracker] == [stage.fingerprint for stage in without]


# --- The log ----------------------------------------------------------------------------------------------


def test_log_of_a_run_and_of_a_resumed_one(launch, config, tmp_path):
    path = config("sft", save_strategy="steps", save_steps=1, save_total_limit=9, eval_strategy="no")
    output = tmp_path / "runs" / "mine" / "sft"
    assert launch("sft", "--config", path)[0] == 0
    whole, record = read_log(output), json.loads((output / "recipe.json").read_text())
    assert whole == record["log"]
    assert [entry["step"] for entry in whole if "loss" in entry] == [1, 2]
    shutil.rmtree(output / "checkpoint-2")
    assert launch("sft", "--config", path, "--resume_from_checkpoint", "true")[0] == 0
    assert [(e["step"], e["loss"]) for e in read_log(output) if "loss" in e] == [
        (e["step"], e["loss"]) for e in whole if "loss" in e
    ]


def test_log_lines_are_json_for_any_value():
    assert json.loads(_log_line({"kl": float("nan"), "loss": float("inf"), "step": 1})) == {"kl": None, "loss": None, "step": 1}


def test_a_folder_named_like_a_tracker_is_no_tracker(config, launch, tmp_path, monkeypatch):
    """Python finds modules in the current folder, and folders too."""
    for name in ("trackio", "wandb"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    status, error = launch("sft", "--config", config("sft"), "--save_strategy", "steps", "--save_steps", 1)
    assert status == 0, error
