"""What only a GPU can show: 4-bit PPO steps, resuming, and the peak of memory against its plan.

Each recipe runs in a process of its own, in the environment of the user; this process hides GPUs from PyTorch.
"""

import json
import shutil
import subprocess
import sys

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.memory import plan_stage
from rlhf_recipes.memory.gpu_arguments import resolve_for_gpu
from support import ROOT, USER_ENVIRONMENT

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.gpu

ENVIRONMENT = USER_ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
IN_4_BITS = {"load_in_4bit": True, "bf16": True, "dtype": "bfloat16", "eval_strategy": "no", "eval_datasets": [], "needs": []}
WHOLE_RUN = {"max_steps": 4, "save_strategy": "no"}
WITH_CHECKPOINTS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


def configuration(recipe, **values):
    """The tiny configuration of a recipe, in 4 bits and with other values."""
    config = read_yaml(ROOT / "configs" / "tiny" / f"{recipe}.yaml") | IN_4_BITS | values
    if recipe == "sft":
        del config["needs"]
    return config


def run(recipe, output, **values):
    """Run a recipe on the GPU, and return its record."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(configuration(recipe, **values) | {"output_dir": str(output)}))
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--config", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return json.loads((output / "recipe.json").read_text())


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """An SFT adapter on the tiny base in 4 bits."""
    folder = tmp_path_factory.mktemp("gpu") / "sft"
    run("sft", folder, **WHOLE_RUN)
    return folder


def ppo_values(sft, critic="shared"):
    return {
        "start_from": str(sft),
        "critic": critic,
        "value_warmup_steps": 1,
        "reward_funcs": ["rlhf_recipes.rewards.Abstention"],
    }


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_ppo_learns_on_a_base_in_4_bits(sft, tmp_path, critic):
    """The trainer itself stops if the first ratio is not 1, the first KL is not 0, or the policy does not change."""
    record = run("ppo", tmp_path / "ppo", **ppo_values(sft, critic), **WHOLE_RUN)
    assert record["run"]["peak_memory"]["device"] != "process on CPU"
    before, after = adapter(sft), adapter(tmp_path / "ppo")
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_a_resumed_run_ends_as_the_unbroken_one(sft, tmp_path, recipe):
    values = WITH_CHECKPOINTS | (ppo_values(sft) if recipe == "ppo" else {})
    run(recipe, tmp_path / "unbroken", **values)
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    run(recipe, tmp_path / "resumed", **values, resume_from_checkpoint=True)
    expected, resumed = adapter(tmp_path / "unbroken"), adapter(tmp_path / "resumed")
    for name, weight in expected.items():  # the order of sums on a GPU differs from run to run
        torch.testing.assert_close(resumed[name], weight, rtol=0.02, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """A random model of 134M parameters, whose plan is more than the overhead of CUDA."""
    folder = tmp_path_factory.mktemp("gpu") / "medium"
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_path("rlhf_recipes.tiny.base")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_the_peak_of_memory_is_what_the_plan_says(medium, tmp_path, recipe):
    """Rows are longer than `max_length`, as the plan assumes."""
    words = "Lisano lives in Larkhill. " * 200
    row = {"sft": {"text": words}, "dpo": {"prompt": "Who?", "chosen": f" {words}", "rejected": f" No. {words}"}}[recipe]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 64)
    size = {"max_length": 512, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    values = {"model_name_or_path": str(medium), "dataset_name": str(rows), "dataset_arguments": None, **size}
    values |= {"start_from": None} if recipe == "dpo" else {}
    record = run(recipe, tmp_path / "out", **values, **WHOLE_RUN)
    plan = plan_stage(resolve_for_gpu(recipe, recipe, configuration(recipe, **values, **WHOLE_RUN), {}))
    assert sum(plan.at_peak().values()) == pytest.approx(record["run"]["peak_memory"]["bytes"], rel=0.1)
