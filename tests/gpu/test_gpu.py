"""What only a GPU can show: 4-bit PPO steps, resuming, and the peak of memory against its plan.

Each recipe runs in a process of its own, in the environment of the user; this process hides GPUs from PyTorch.
"""

import json
import shutil
import subprocess
import sys

from support import ROOT, USER_ENVIRONMENT

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu

ENVIRONMENT = USER_ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
IN_4_BITS = ("--load_in_4bit", "true", "--bf16", "true", "--dtype", "bfloat16", "--eval_strategy", "no", "--logging_steps", "1")


def run(recipe, output, *options):
    """Run a recipe on the GPU, and return its record."""
    command = [
        sys.executable,
        str(ROOT / "recipes" / f"{recipe}.py"),
        *IN_4_BITS,
        "--output_dir",
        str(output),
        *map(str, options),
    ]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return json.loads((output / "recipe.json").read_text())


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """An SFT adapter on the tiny base in 4 bits."""
    folder = tmp_path_factory.mktemp("gpu") / "sft"
    run("sft", folder, "--max_steps", 20, "--save_strategy", "no")
    return folder


def ppo(output, sft, critic, *options):
    start = ("--start_from", sft, "--needs", "[]", "--critic", critic, "--value_warmup_steps", 1)
    reward = ("--reward_funcs", "rlhf_recipes.rewards.Abstention")
    return run("ppo", output, *start, *reward, *options)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_ppo_learns_on_a_base_in_4_bits(sft, tmp_path, critic):
    """The trainer itself stops if the first ratio is not 1, the first KL is not 0, or the policy does not change."""
    record = ppo(tmp_path, sft, critic, "--max_steps", 4, "--save_strategy", "no")
    assert record["run"]["peak_memory"]["device"] != "process on CPU"
    before, after = adapter(sft), adapter(tmp_path)
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_a_resumed_run_ends_as_the_unbroken_one(sft, tmp_path, recipe):
    start = {"sft": lambda *options: run("sft", *options), "ppo": lambda output, *options: ppo(output, sft, "shared", *options)}
    options = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2)
    start[recipe](tmp_path / "unbroken", *options)
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    start[recipe](tmp_path / "resumed", *options, "--resume_from_checkpoint", "true")
    expected, resumed = adapter(tmp_path / "unbroken"), adapter(tmp_path / "resumed")
    for name, weight in expected.items():  # the order of sums on a GPU differs from run to run
        torch.testing.assert_close(resumed[name], weight, rtol=0.02, atol=1e-4, msg=name)
