"""Runs that cannot change the model, hardly change it, or have not changed it."""

import json
from types import SimpleNamespace

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.training.effect import EffectCallback, check_schedule
from rlhf_recipes.training.ppo import PPOConfig
from rlhf_recipes.training.ppo.data import fill_batch
from rlhf_recipes.training.ppo.diagnostics import DiagnosticsCallback

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

ROWS = ("--dataset_arguments", '{"rows": 24}', "--eval_strategy", "no", "--eval_datasets", "[]", "--save_strategy", "no")


def config(cls, **options):
    return cls("none", report_to="none", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    ("options", "steps", "warning"),
    [
        ({"warmup_steps": 50}, 2, "warmup_steps: 50: in 2 steps the learning rate reaches 2% "),
        ({"warmup_steps": 10}, 10, "reaches 90% "),
        ({"warmup_steps": 9}, 10, None),
        ({"warmup_steps": 0.5}, 2, None),
        ({"warmup_steps": 50, "lr_scheduler_type": "constant"}, 2, None),
        ({"warmup_steps": 50, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, 2, None),
        ({"warmup_steps": 50}, 0, None),
    ],
)
def test_a_learning_rate_that_is_not_reached(caplog, options, steps, warning):
    check_schedule(config(SFTConfig, **options), steps)
    assert [warning in message for message in caplog.messages] == ([True] if warning else [])


def test_the_only_step_would_have_no_learning_rate():
    with pytest.raises(RecipeError, match="warmup_steps: the learning rate of the only step would be 0"):
        check_schedule(config(SFTConfig, warmup_steps=0.1), 1)


@pytest.mark.parametrize(("steps", "warning"), [(6, "only 2 of 6 steps train the policy"), (8, None)])
def test_few_steps_of_the_policy(caplog, steps, warning):
    check_schedule(config(PPOConfig, value_warmup_steps=4), steps)
    assert [warning in message for message in caplog.messages] == ([True] if warning else [])


@pytest.mark.parametrize(("rate", "warns"), [(1e-9, True), (1e-7, False)])
def test_a_learning_rate_that_moves_nothing(caplog, rate, warns):
    check_schedule(config(SFTConfig, learning_rate=rate), 100)
    assert ("learning_rate: 1e-09: in 100 steps no weight moves farther than about 1e-07" in caplog.text) == warns


def test_a_batch_of_more_than_all_rows(caplog):
    arguments = config(PPOConfig, per_device_train_batch_size=8)
    assert len(fill_batch(Dataset.from_dict({"prompt": ["a", "b", "c"]}), arguments)) == 8
    assert "3 prompts do not fill a rollout of 8" in caplog.text


def test_a_short_run_logs_and_warns_of_few_rows(launch, tmp_path):
    options = ("--max_steps", 3, "--warmup_steps", 7, "--logging_steps", 10, *ROWS)
    status, error = launch("sft", *options, "--per_device_train_batch_size", 32, "--output_dir", tmp_path)
    warnings = [line for line in error.splitlines() if line.startswith("warning: ")]
    assert status == 0
    assert "warning: the command line: per_device_train_batch_size: 24 rows do not fill a batch of 32" in warnings[0]
    assert "reaches 29%" in warnings[1]
    assert warnings[2:] == warnings[:2]
    record = json.loads((tmp_path / "recipe.json").read_text())
    assert record["warnings"] == [warning.removeprefix("warning: ") for warning in warnings[:2]]
    assert record["metrics"]["loss"] > 0


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo"])
def test_a_model_that_training_left_as_it_was_is_an_error(launch, tmp_path, recipe):
    """The steps are smaller than bf16 can add to the weights."""
    options = ("--use_peft", "false", "--dtype", "bfloat16", "--learning_rate", 1e-12, "--warmup_steps", 0, "--max_steps", 2)
    others = {"dpo": ("--needs", "[]", "--start_from", "null")}.get(recipe, ())
    if recipe != "sft":
        others += ("--test_split_size", "null", "--datasets", "[]", "--dataset_name", "rlhf_recipes.tiny.splits.rankings")
    size = ("--per_device_train_batch_size", 4, "--output_dir", tmp_path)
    status, error = launch(recipe, *options, *ROWS, *others, *size)
    assert status == 2
    assert "2 steps have not changed the model by one bit. Fix: check `learning_rate` (1e-12)" in error
    assert not (tmp_path / "recipe.json").exists()


def test_a_learning_rate_of_zero_is_warned_of(launch, tmp_path):
    """Some measure a model's loss so."""
    options = ("--learning_rate", 0, "--max_steps", 2, "--warmup_steps", 0, "--per_device_train_batch_size", 8)
    status, _ = launch("sft", *options, *ROWS, "--output_dir", tmp_path)
    assert status == 0
    before, after = json.loads((tmp_path / "recipe.json").read_text())["warnings"]
    assert "in 2 steps no weight moves farther than about 0e+00" in before
    assert "2 steps have not changed the model by one bit" in after


def diagnose(*logs):
    """Log these figures, one every ten steps, and end the training."""
    callback, state = DiagnosticsCallback(), SimpleNamespace(global_step=0, is_world_process_zero=True)
    for values in logs:
        state.global_step += 10
        callback.on_log(None, state, None, logs=values)

    callback.on_train_end(None, state, None)


@pytest.mark.parametrize(
    ("logs", "warning"),
    [
        ([{"kl": 60.0}] * 3, "step 30: kl is 60, above 50: "),
        ([{"kl": 60.0}, {"kl": 60.0}], "step 20: kl is 60, above 50: "),  # over before the third
        ([{"kl": 60.0}, {"kl": 9.0}, {"kl": 60.0}], None),
        ([{"score_std": 0.0}], "step 10: score_std is 0, below 1e-06: all scores are equal"),
        ([{"completions/ended_ratio": 0.0}, {"completions/ended_ratio": 1.0}], "step 10: completions/ended_ratio is 0"),
        ([{"value/explained_variance": -9.0}] * 2, None),
    ],
)
def test_unhealthy_figures(caplog, logs, warning):
    diagnose(*logs)
    assert [message.startswith(warning) for message in caplog.messages] == ([True] if warning else [])


def test_a_resumed_run_that_changed_nothing_is_warned_of(caplog):
    """Its last steps may be smaller than the weights' type can add."""
    callback, model, arguments = EffectCallback(), torch.nn.Linear(2, 2), config(SFTConfig)
    state = SimpleNamespace(global_step=3, max_steps=4)
    callback.on_train_begin(arguments, state, None, model)
    state.global_step = 4
    callback.on_train_end(arguments, state, None, model)
    assert "1 steps have not changed the model by one bit" in caplog.text
