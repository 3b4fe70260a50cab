"""Stages that are run because others need them."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import rlhf_recipes.training.dependencies
from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.stages import STAGES
from rlhf_recipes.training.dependencies import run_dependencies

import pytest
import yaml


@dataclass
class Arguments:
    needs: list[str]
    start_from: str | None = None
    reward_funcs: list[str] = field(default_factory=list)
    datasets: list[DatasetSource] = field(default_factory=list)
    output_dir: str = "mine"


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Return the YAML files of four recipes that write their result, and fail with `broken: true`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    reads = {
        "sft": {"model_name_or_path": "base"},
        "sample": {"policies": {"sft": "runs/sft"}},
        "rank": {"groups": "runs/sample"},
        "reward": {"datasets": [{"path": "runs/rank/rankings.jsonl"}]},
    }
    for name, values in reads.items():
        (tmp_path / "recipes" / f"{name}.py").write_text(
            "import pathlib, sys, yaml\n"
            "config = yaml.safe_load(open(sys.argv[2]))\n"
            "assert not config.get('broken')\n"
            "pathlib.Path(config['output_dir']).mkdir(parents=True)\n"
            f"pathlib.Path(config['output_dir'], '{STAGES[name].result}').write_text('{{}}')\n"
        )
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values | {"output_dir": f"runs/{name}"}))
    return [f"{name}.yaml" for name in reads]


def run(*needs, **values):
    run_dependencies("recipes/ppo.py", (Arguments([*needs], **values),))


def done(tmp_path):
    return sorted(folder.name for folder in tmp_path.glob("runs/*"))


def test_needed_stage_without_result_is_run_once(stages, tmp_path, capfd):
    for _ in range(2):
        run("sft.yaml", start_from="runs/sft")
        assert done(tmp_path) == ["sft"]
    assert capfd.readouterr().out.count("no result yet: running") == 1


def test_stages_behind_a_needed_one_run_first(stages, tmp_path, capfd):
    """PPO reads the reward model, which reads rankings, which read samples, which read SFT."""
    run(*stages, start_from=None, reward_funcs=["runs/reward"])
    lines = [line for line in capfd.readouterr().out.splitlines() if "no result yet" in line]
    assert [line.split()[0] + line.split("running ")[1] for line in lines] == [
        "[1/4]sft.yaml first",
        "[2/4]sample.yaml first",
        "[3/4]rank.yaml first",
        "[4/4]reward.yaml first",
    ]
    assert done(tmp_path) == ["rank", "reward", "sample", "sft"]


def test_files_in_a_stage_s_folder_need_it(stages, tmp_path):
    run("rank.yaml", datasets=[DatasetSource(path="runs/rank/rankings.jsonl")])
    assert done(tmp_path) == ["rank"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"start_from": "elsewhere/sft"}, []),
        ({"start_from": "runs/sft", "reward_funcs": ["my.reward"]}, ["sft"]),  # no rankings without a reward model
        ({"start_from": "runs/sft-other"}, []),
    ],
)
def test_stage_that_is_not_read_is_not_run(stages, tmp_path, values, expected):
    run(*stages, **values)
    assert done(tmp_path) == expected


def test_several_processes_refuse_to_wait_for_a_stage(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(rlhf_recipes.training.dependencies, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(RecipeError, match=r"needs: runs/sft .* `accelerate launch .*sft.py --config"):
        run("sft.yaml", start_from="runs/sft")
    assert done(tmp_path) == []


def test_failed_stage_is_named(stages, tmp_path):
    (tmp_path / "sample.yaml").write_text((tmp_path / "sample.yaml").read_text() + "broken: true\n")
    with pytest.raises(RecipeError, match=r"needs: sample\.yaml"):
        run(*stages, reward_funcs=["runs/reward"])
    assert done(tmp_path) == ["sft"]
