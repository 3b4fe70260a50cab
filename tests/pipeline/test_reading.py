"""What a pipeline's YAML file says: keys, arguments, placeholders, launchers, rounds and seeds."""

import re
import shutil
from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.config.launcher import default_launcher_config
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.pipeline.checks import check_arguments
from rlhf_recipes.pipeline.early import check_stage_inputs, check_stage_keys
from rlhf_recipes.pipeline.reading import read_stages
from support import ROOT

import pytest
from accelerate.commands.config import default_config_file

SEEDS = [(["a"], ", entry 1"), (0, ""), ([], ""), ([1, 1], ""), ([True], ", entry 1")]


def line(text, path="pipeline.yaml"):
    """Return the number of the first line with a text."""
    return next(number for number, line in enumerate(Path(path).read_text().splitlines(), start=1) if text in line)


def message(project, names=None):
    with pytest.raises(RecipeError) as caught:
        project.read(names)
    return re.sub(r": line \d+", "", str(caught.value))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stage": []}, "pipeline.yaml: unknown key 'stage'; did you mean 'stages'?"),
        ({"output_dir": None}, "pipeline.yaml: output_dir: None"),
        ({"stages": []}, "pipeline.yaml: stages: []"),
        ({"stages": ["sft"]}, "pipeline.yaml: stages, entry 1: 'sft'"),
        ({"stages": [{"name": "sft", "configs": "sft.yaml"}]}, "entry 1: unknown key 'configs'; did you mean 'config'?"),
        ({"stages": [{"name": "a b", "config": "sft.yaml"}]}, "stages, entry 1: name: 'a b'"),
        ({"stages": [{"name": "sft"}]}, "stages, entry 1: config: "),
        ({"stages": [{"name": "sft", "config": 5}]}, "stages, entry 1: config: 5: "),
        ({"stages": [{"name": "sft", "config": "sft.yaml", "arguments": ["a"]}]}, "stages, entry 1: arguments: ['a']"),
        ({"stages": [{"name": "sftt", "config": "sft.yaml"}]}, "pipeline.yaml: stages: sftt: recipe: 'sftt' is none of sft, "),
        ({"stages": [{"name": "sft", "config": "sft.yml"}]}, "pipeline.yaml: stages: sft: config: sft.yml: "),
        ({"stages": [{"name": "sft", "config": "sft.yaml"}] * 2}, "stages: sft: name: 'sft'"),
        (
            {"stages": [{"name": "dpo", "config": "dpo.yaml", "arguments": {"start_from": "{stf}"}}]},
            "pipeline.yaml: stages: dpo: start_from: {stf} ",
        ),
        (
            {"seeds": [0, 1], "stages": [{"name": "sft", "config": "sft.yaml", "arguments": {"output_dir": "here"}}]},
            "pipeline.yaml: stages: sft: output_dir: sft-0 and sft-1 both write to here",
        ),
        ({"arguments": {"betta": 1}}, "pipeline.yaml: arguments: no stage has the key 'betta'; did you mean 'beta'?"),
        ({"arguments": {"kl_coef": 1}}, "pipeline.yaml: arguments: no stage has the key 'kl_coef'"),
        ({"arguments": {"output_dir": "here"}}, "pipeline.yaml: arguments: output_dir: "),
        ({"arguments": {"seed": 3}, "seeds": [0, 1]}, "pipeline.yaml: arguments: seed: `seeds` sets it"),
        ({"arguments": ["a"]}, "pipeline.yaml: arguments: ['a']"),
        ({"accelerate_config": "missing.yaml"}, "pipeline.yaml: accelerate_config: 'missing.yaml'"),
        *(({"jobs": value}, f"pipeline.yaml: jobs: {value!r}") for value in (0, "two", True)),
        *(({"seeds": value}, f"pipeline.yaml: seeds{place}: ") for value, place in SEEDS),
        ({"rounds": 0}, "pipeline.yaml: rounds: 0"),
        ({"rounds": 2}, "pipeline.yaml: rounds: "),
        ({"stages": [{"name": "sft", "config": "sft.yaml", "each_round": True}]}, "pipeline.yaml: rounds: "),
        (
            {
                "rounds": 2,
                "stages": [{"name": name, "recipe": "sft", "config": "sft.yaml", "each_round": name != "b"} for name in "abc"],
            },
            "pipeline.yaml: stages: those with `each_round: true`",
        ),
    ],
)
def test_errors_name_the_key_and_the_value(project, changes, expected):
    project.write(**changes)
    assert expected in message(project)


def test_the_file_of_a_recipe_is_no_pipeline():
    with pytest.raises(RecipeError, match="model_name_or_path: this is the file of one recipe"):
        read_stages(ROOT / "configs" / "tiny" / "sft.yaml", ROOT / "recipes")


def test_an_unknown_stage_cannot_be_selected(project):
    assert "--stages: 'stf' is none of sft, other, dpo; did you mean 'sft'" in message(project, ["stf"])


def test_values_that_are_no_paths_and_keys_of_any_type_are_read(project):
    arguments = {"policies": {1: "a", "b": None}, "judge": {"instructions": "long " * 60, "home": "~nobody-here/x"}}
    project.write(stages=[{"name": "evaluate", "config": "dpo.yaml", "arguments": arguments}])
    assert project.read().stages[0].values["policies"] == {1: "a", "b": None}


# --- Arguments of all stages -----------------------------------------------------------------------------


def test_shared_arguments_go_over_the_files_and_under_the_arguments_of_a_stage(project):
    project.write(arguments={"learning_rate": 5e-5, "lora_r": 4, "beta": 0.2, "seed": 3})
    project.change("other", lora_r=8)
    sft, other, dpo = (stage.values for stage in project.read().stages)
    shared = {"learning_rate": 5e-5, "seed": 3}
    assert sft == {"dataset_name": "data.jsonl", **shared, "lora_r": 4, "output_dir": "runs/sft"}  # it has no `beta`
    assert other == {"dataset_name": "me/rows", **shared, "lora_r": 8, "output_dir": "runs/other"}
    assert dpo == {**shared, "lora_r": 4, "beta": 0.3, "start_from": "runs/sft", "output_dir": "runs/dpo"}


def test_keys_in_place_of_a_file_are_the_stages_own(project):
    entry = {"name": "sft", "config": {"dataset_name": "data.jsonl", "lora_r": 8}}
    project.write(arguments={"lora_r": 4, "seed": 3}, stages=[entry])
    (sft,) = project.read().stages
    assert (sft.values["lora_r"], sft.values["seed"]) == (8, 3)
    entry["config"]["lora_r"] = "eight"
    project.write()
    with pytest.raises(RecipeError, match=rf"line {line('eight')}: stages: sft: lora_r: expected int"):
        check_arguments(project.read())


def test_a_shared_share_of_held_out_rows_leaves_the_data_of_an_evaluation(project):
    data = {"dataset_name": "t.jsonl", "eval_datasets": [{"path": "q.jsonl"}]}
    project.write(arguments={"test_split_size": 10}, stages=[{"name": "evaluate", "config": {"policies": {"a": None}, **data}}])
    values = project.read().stages[0].values
    assert {key: values[key] for key in data} == data
    assert "test_split_size" not in values


def test_the_seed_of_one_stage_is_refused_where_the_pipeline_has_several(project):
    project.write(seeds=[0, 1])
    project.change("dpo", seed=7)
    assert "stages: dpo: seed: `seeds` sets it" in message(project)


def test_shared_data_replace_those_of_the_files(project):
    Path("sft.yaml").write_text("dataset_name: a.function\ndataset_arguments: {rows: 3}\ncolumn_mapping: {q: prompt}\n")
    project.write(arguments={"datasets": [{"path": "mine.jsonl"}]})
    sft, other, _ = (stage.values for stage in project.read().stages)
    assert sft == {"datasets": [{"path": "mine.jsonl"}], "output_dir": "runs/sft"}
    assert other["dataset_name"] == "me/rows"
    assert "datasets" not in other


def test_placeholders_and_fingerprints_of_shared_arguments(project):
    before = project.read().stages
    project.write(seeds=[7], arguments={"data_seed": "{seed}"})
    assert [stage.values["data_seed"] for stage in project.read().stages] == [7] * 3
    project.write(seeds=None, arguments={"beta": 0.5})
    assert [stage.fingerprint for stage in project.read().stages] == [stage.fingerprint for stage in before]
    project.write(arguments={"lora_r": 4})
    assert not {stage.fingerprint for stage in project.read().stages} & {stage.fingerprint for stage in before}


# --- Settings of the command line --------------------------------------------------------------------------


def values_with(project, *settings):
    return {stage.name: stage.values for stage in project.read(settings=settings).stages}


def test_settings_go_over_the_file(project):
    project.write(arguments={"lora_r": 4})
    values = values_with(project, "dpo.beta=0.5", "arguments.seed=3", "arguments.lora_r=8", "other.learning_rate=1e-4")
    assert (values["dpo"]["beta"], values["dpo"]["start_from"]) == (0.5, "runs/sft")
    assert {(stage["seed"], stage["lora_r"]) for stage in values.values()} == {(3, 8)}
    assert (values["sft"]["learning_rate"], values["other"]["learning_rate"]) == (1e-3, 1e-4)
    assert project.read(settings=["jobs=2", "output_dir=elsewhere"]).file.jobs == 2
    assert project.read(settings=["output_dir=elsewhere"]).folder == Path("elsewhere")
    fingerprints = [stage.fingerprint for stage in project.read(settings=["dpo.beta=0.5"]).stages]
    assert [one == stage.fingerprint for one, stage in zip(fingerprints, project.read().stages, strict=True)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('dataset_arguments={"rows": 3}', {"rows": 3}),
        ("dataset_arguments={rows: 3}", {"rows": 3}),
        ("dataset_name=me=more", "me=more"),
        ("report_to=", None),
        ("reference={sft}", "runs/sft"),
        ("use_peft=true", True),
        ("start_from={sft}/checkpoint-2", "runs/sft/checkpoint-2"),
        ("model_name_or_path=$SCRATCH/base", "/disk/base"),
    ],
)
def test_values_of_settings_are_yaml(project, monkeypatch, text, expected):
    monkeypatch.setenv("SCRATCH", "/disk")
    text = text if "sft}/" not in text else f'start_from="{text.partition("=")[2]}"'
    assert values_with(project, f"dpo.{text}")["dpo"][text.partition("=")[0]] == expected


def test_a_comment_is_no_value(project):
    with pytest.raises(RecipeError, match=r"--set: dpo.run_name: '#3' is a comment in YAML"):
        project.read(settings=["dpo.run_name=#3"])


def test_other_data_in_settings_replace_those_of_the_file(project):
    values = values_with(project, "sft.datasets=[{path: mine.jsonl}]")
    assert "dataset_name" not in values["sft"]
    assert values["other"]["dataset_name"] == "me/rows"


# --- Launchers -------------------------------------------------------------------------------------------


def test_accelerate_config_may_be_in_the_checkout(project):
    project.write(accelerate_config="configs/accelerate/ddp.yaml")
    assert project.read().file.accelerate_config == str(ROOT / "configs" / "accelerate" / "ddp.yaml")


@pytest.mark.parametrize(
    ("launcher", "recipe", "arguments", "expected"),
    [
        ("fsdp", "ppo", {"critic": "adapter"}, "critic: adapter: FSDP"),
        ("fsdp", "dpo", {"optim": "paged_adamw_8bit"}, "optim: paged_adamw_8bit: "),
        ("zero3", "ppo", {}, "DeepSpeed ZeRO-3"),
        ("zero2", "reward", {"ensemble_size": 2}, "ensemble_size: "),
    ],
)
def test_what_the_launcher_cannot_do_is_rejected_before_the_first_stage(project, launcher, recipe, arguments, expected):
    late = {"name": "late", "recipe": recipe, "config": "dpo.yaml", "arguments": arguments}
    stages = [{"name": "sft", "config": "sft.yaml"}, late]
    project.write(accelerate_config=f"configs/accelerate/{launcher}.yaml", stages=stages)
    text = message(project)
    assert text.startswith("pipeline.yaml: stages: late: ")
    assert expected in text
    project.write(accelerate_config="configs/accelerate/ddp.yaml")
    project.read()


def test_the_launcher_that_accelerate_finds_by_itself_counts(project, monkeypatch):
    assert str(default_launcher_config()) == default_config_file
    monkeypatch.setenv("HF_HOME", str(project.path.parent.absolute()))
    Path("accelerate").mkdir()
    shutil.copy(ROOT / "configs" / "accelerate" / "zero3.yaml", "accelerate/default_config.yaml")
    project.write(stages=[{"name": "ppo", "config": "dpo.yaml"}])
    project.read()
    project.write(accelerate_config=None)
    assert "DeepSpeed ZeRO-3" in message(project)


# --- Checks before the first stage -----------------------------------------------------------------------


def check(project):
    """Check all that recipes/pipeline.py checks before the first stage."""
    file = read_stages(project.path, ROOT / "recipes")
    check_stage_keys(file)
    check_stage_inputs(file, file.stages)
    check_arguments(project.read())


def test_a_misspelt_argument_of_the_last_stage_is_found_at_once(project, capsys):
    project.change("dpo", max_stps=3)
    with pytest.raises(SystemExit), exit_on_recipe_error():
        check(project)
    error = capsys.readouterr().err
    assert error == (
        f"error: pipeline.yaml: line {line('max_stps')}: stages: dpo: unknown key 'max_stps'; did you mean 'max_steps'?\n"
    )


def test_a_stage_that_is_named_without_braces(project):
    project.change("dpo", start_from="sft")
    with pytest.raises(RecipeError, match=r'stages: dpo: start_from: sft: is a stage, not a folder\. Fix: write "\{sft\}"'):
        check(project)


def test_missing_data_are_found_at_once_unless_a_stage_writes_them(project):
    project.change("dpo", datasets=[{"path": "{sft}/rows.jsonl"}, {"path": "nothing.jsonl"}])
    with pytest.raises(RecipeError, match=r"stages: dpo: datasets, entry 2: nothing\.jsonl: "):
        check(project)
    project.change("dpo", datasets=[{"path": "{sft}/rows.jsonl"}])
    check(project)


@pytest.mark.parametrize(
    ("content", "expected"), [("", "no rows"), ('{"question": "a"}\n', "columns .*question"), ('{"prompt": "a", \n', "line 1")]
)
@pytest.mark.parametrize("key", ["datasets", "dataset_name"])
def test_unusable_data_are_found_at_once(project, content, expected, key):
    Path("late.jsonl").write_text(content)
    project.change("dpo", **{key: "late.jsonl" if key == "dataset_name" else [{"path": "late.jsonl"}]})
    with pytest.raises(RecipeError, match=rf"stages: dpo: {key}.*: late\.jsonl: .*{expected}"):
        check(project)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rewards": ["rlhf_recipes.rewards.Abstention"], "judge": "Abstension"}, "judge: 'Abstension' .*'Abstention'"),
        ({"rewards": ["early_rewards.missing_import"]}, "rewards, entry 1: .*: cannot import early_rewards.*no_such_package"),
        (
            {"rewards": [{"path": "rlhf_recipes.rewards.LengthPenalty", "arguments": {"slop": 1}}]},
            "rewards, entry 1: .*unknown argument 'slop'",
        ),
        ({"policies": {"sft": None}, "kl_reference": "stf"}, "kl_reference: 'stf' is none of the policies"),
        ({"judge": {"url": "http://here", "modl": "x"}}, "judge: "),
        ({"policies": {"sft": None, "best": {"best_of": {"policy": "stf", "n": 2}}}}, "policies: best: best_of: policy: 'stf'"),
        ({"batch_size": "eight"}, "batch_size: expected int"),
        ({}, "eval_datasets: missing, and there is no `dataset_name`"),
        ({"rewards": ["early_rewards_exit.leave"]}, "rewards: early_rewards_exit.leave: importing it ended Python"),
    ],
)
def test_an_evaluation_is_checked_before_what_it_evaluates(project, monkeypatch, arguments, expected):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("early_rewards_exit.py").write_text("import os\ndef leave(**columns): ...\nos._exit(3)\n")
    Path("early_rewards.py").write_text("import no_such_package\ndef missing_import(**columns): ...\n")
    Path("evaluate.yaml").write_text("policies: {sft: null}\n")
    evaluate = {"name": "evaluate", "config": "evaluate.yaml", "arguments": arguments}
    project.write(stages=[{"name": "sft", "config": "sft.yaml"}, evaluate])
    with pytest.raises(RecipeError, match=rf"pipeline\.yaml: line \d+: stages: evaluate: {expected}"):
        check(project)


def test_a_judge_may_have_a_name_that_only_its_reward_knows(project, monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    Path("made_rewards.py").write_text("def make(size):\n    def made(prompts, completions, **columns): ...\n    return made\n")
    rewards = [{"path": "made_rewards.make", "arguments": {"size": 3}}, "{sft}"]
    Path("evaluate.yaml").write_text("policies: {sft: null}\ndataset_name: rlhf_recipes.tiny.splits.prompts\n")
    evaluate = {"name": "evaluate", "config": "evaluate.yaml", "arguments": {"rewards": rewards, "judge": "made"}}
    project.write(stages=[{"name": "sft", "config": "sft.yaml"}, evaluate])
    check(project)


# --- Rounds ----------------------------------------------------------------------------------------------


@pytest.fixture
def rounds(project):
    """SFT; three rounds of a reward model on the results of all rounds, and of PPO from the newest policy; evaluation."""
    start = {"start_from": "{ppo|sft}"}
    reward = {"arguments": {**start, "dataset_arguments": {"seed": "{round}"}}}
    ppo = {"arguments": {**start, "datasets": [{"path": "first.jsonl"}, {"path": "{reward*}/rows.jsonl"}]}}
    project.write(
        rounds=3,
        stages=[
            {"name": "sft", "config": "sft.yaml"},
            {"name": "reward", "config": "dpo.yaml", "each_round": True, **reward},
            {"name": "ppo", "config": "dpo.yaml", "each_round": True, **ppo},
            {"name": "evaluate", "config": "dpo.yaml", "arguments": {"policies": {"one": "{ppo@1}", "last": "{ppo}"}}},
        ],
    )
    return project


def test_placeholders_name_stages_of_this_and_other_rounds(rounds):
    stages = {stage.name: stage for stage in rounds.read().stages}
    turns = [f"{name}-round-{turn}" for turn in (1, 2, 3) for name in ("reward", "ppo")]
    assert list(stages) == ["sft", *turns, "evaluate"]
    starts = [stages[f"ppo-round-{turn}"].values["start_from"] for turn in (1, 2, 3)]
    assert starts == ["runs/sft", "runs/round-1/ppo", "runs/round-2/ppo"]
    assert stages["reward-round-2"].values["start_from"] == "runs/round-1/ppo"
    assert stages["reward-round-2"].values["dataset_arguments"] == {"seed": 2}
    assert [entry["path"] for entry in stages["ppo-round-2"].values["datasets"]] == [
        "first.jsonl",
        "runs/round-1/reward/rows.jsonl",
        "runs/round-2/reward/rows.jsonl",
    ]
    assert stages["evaluate"].values["policies"] == {"one": "runs/round-1/ppo", "last": "runs/round-3/ppo"}
    assert stages["ppo-round-2"].inputs == ("ppo-round-1", "reward-round-1", "reward-round-2")


def test_a_placeholder_may_be_empty_in_the_first_round(rounds):
    rounds.change("reward", start_from="{ppo|}")
    values = [stage.values["start_from"] for stage in rounds.read().stages if stage.entry == "reward"]
    assert values == ["", "runs/round-1/ppo", "runs/round-2/ppo"]


@pytest.mark.parametrize(("value", "expected"), [("{ppo}", "start_from: {ppo} "), (["{sftt*}"], "start_from: {sftt} ")])
def test_a_placeholder_must_name_an_earlier_stage(rounds, value, expected):
    rounds.change("reward", start_from=value)
    assert f"stages: reward: {expected}" in message(rounds)
