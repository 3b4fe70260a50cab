"""Launchers: which one a file or a process has, and what is rejected under each."""

import json

from rlhf_recipes.config.launcher import (
    Launcher,
    check_launcher_support,
    current_launcher,
    read_launcher,
    uses_bitsandbytes,
)
from rlhf_recipes.core.errors import RecipeError
from support import ROOT

import pytest
from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS
from transformers.training_args import OptimizerNames

FSDP, ZERO2, ZERO3 = Launcher(fsdp=2), Launcher(zero=2), Launcher(zero=3)


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("one_gpu", Launcher()), ("cpu", Launcher()), ("ddp", Launcher()), ("fsdp", FSDP), ("zero2", ZERO2), ("zero3", ZERO3)],
)
def test_launcher_of_a_file(name, launcher):
    assert read_launcher(ROOT / "configs" / "accelerate" / f"{name}.yaml") == launcher


def test_deepspeed_config_file(tmp_path):
    zero, path = tmp_path / "zero.json", tmp_path / "launcher.yaml"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    path.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {zero}}}\n")
    assert read_launcher(path) == ZERO3
    zero.unlink()
    with pytest.raises(RecipeError, match=r"launcher.yaml: deepspeed_config_file: .*zero\.json"):
        read_launcher(path)


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, Launcher()),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, FSDP),
        ({"ACCELERATE_USE_FSDP": "true"}, Launcher(fsdp=1)),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ZERO3),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ZERO2),
    ],
)
def test_launcher_of_a_process(monkeypatch, variables, launcher):
    for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert current_launcher() == launcher


@pytest.mark.parametrize(
    ("recipe", "values", "launcher", "message"),
    [
        ("ppo", {"critic": "adapter"}, FSDP, "critic: adapter: .* Fix: "),
        ("sft", {"optim": "paged_adamw_8bit"}, FSDP, "optim: paged_adamw_8bit: .* `optim: adamw_torch`"),
        ("dpo", {"optim": OptimizerNames.LION}, FSDP, "optim: lion_32bit: bitsandbytes"),
        ("ppo", {}, ZERO3, "PPO does not run under DeepSpeed ZeRO-3"),
        ("sft", {"load_in_4bit": True}, ZERO3, "load_in_4bit: DeepSpeed ZeRO-3"),
        ("reward", {"load_in_8bit": True}, ZERO3, "load_in_8bit: DeepSpeed ZeRO-3"),
        ("reward", {"ensemble_size": 3}, ZERO2, "ensemble_size: DeepSpeed"),
        ("ppo", {"ptx_coef": 0.5}, ZERO2, "ptx_coef: DeepSpeed"),
        ("ppo", {"value_warmup_steps": 5}, ZERO2, "value_warmup_steps: DeepSpeed"),
        ("ppo", {"target_kl": 0.1}, ZERO2, "target_kl: DeepSpeed"),
        ("ppo", {"critic": "adapter", "fsdp": True}, Launcher(), "critic: adapter"),  # set by the stage itself
        ("ppo", {"deepspeed": {"zero_optimization": {"stage": 3}}}, Launcher(), "PPO does not run"),
    ],
)
def test_unsupported_values_are_rejected(recipe, values, launcher, message):
    with pytest.raises(RecipeError, match=message):
        check_launcher_support(recipe, values, launcher)
    others = {key: value for key, value in values.items() if key not in ("fsdp", "deepspeed")}
    check_launcher_support(recipe, others, Launcher())


@pytest.mark.parametrize(
    ("recipe", "values", "launcher"),
    [
        ("ppo", {"critic": "shared", "optim": "adamw_torch", "load_in_4bit": True, "ptx_coef": 0.5}, FSDP),
        ("ppo", {"critic": "adapter", "optim": "paged_adamw_8bit", "ptx_coef": 0.0, "target_kl": None}, ZERO2),
        ("reward", {"ensemble_size": 1, "load_in_4bit": False}, ZERO3),
        ("reward", {"ensemble_size": 3}, FSDP),
        ("sft", {"optim": "adamw_8bit"}, Launcher(fsdp=1)),
    ],
)
def test_supported_values_are_accepted(recipe, values, launcher):
    check_launcher_support(recipe, values, launcher)


def test_optimizers_of_bitsandbytes():
    assert {name for name in OptimizerNames if uses_bitsandbytes(name)} == set(_BITSANDBYTES_OPTIMIZERS)
