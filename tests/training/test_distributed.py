"""Two processes equal one at the same global batch: every stage, with DDP and with FSDP.

DeepSpeed is not installed with the tests: docs/distributed.md has what was measured by hand.
"""

import json

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.training.ppo import PPOConfig
from support import NO_EVALUATION
from support.ppo_cases import AGAIN, CASES, assert_the_update_of_one, read, run
from support.processes import in_two_processes, run_stages
from support.small_ppo import moved, save_base, save_reward

import pytest
import torch
from safetensors.torch import load_file

SGD = ("--optim", "sgd", "--learning_rate", 0.1)  # Adam makes full steps even of rounding errors
SHORT = (*SGD, "--max_steps", 4, "--logging_steps", 1, "--warmup_steps", 0, *NO_EVALUATION, "--save_strategy", "no")
TEST = '[{"path": "rlhf_recipes.tiny.splits.rankings", "split": "test", "arguments": {"rows": 20, "k": 4}}]'
END = ("--eval_datasets", TEST, "--per_device_eval_batch_size", 10)  # evaluated at the end
SFT = ("--dataset_arguments", '{"rows": 128}')
RANKINGS = ("--dataset_name", "rlhf_recipes.tiny.splits.rankings", "--dataset_arguments", '{"rows": 64, "k": 4}')
RANKINGS += ("--test_split_size", "none")
TRUTH = ("--reward_funcs", "rlhf_recipes.rewards.Abstention")
IN_4_BITS = ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true")
SAVING = ("--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 2)
METRICS = ("loss", "grad_norm", "num_tokens", "rewards/margins", "accuracy", "margin", "max_reward", "eval_loss")


def short(recipe, folder, batch, processes, *options):
    """Return the words of a short run, with the same global batch for any number of processes."""
    size = ("--per_device_train_batch_size", batch // processes, "--output_dir", folder)
    return [str(part) for part in (recipe, *SHORT, *size, *options)]


def stages(folder, processes):
    """Return SFT, DPO, PPO and an ensemble, which comes last: its first member must not end the process group."""
    policy = ("--start_from", folder / "sft", "--needs", "[]")
    evaluation = ("--eval_strategy", "steps", "--eval_steps", 4, *END)
    return [
        short("sft", folder / "sft", 16, processes, *SFT),
        short("dpo", folder / "dpo", 8, processes, *RANKINGS, *policy, *evaluation),
        short("ppo", folder / "ppo", 16, processes, *policy, *TRUTH, "--max_steps", 1, "--value_warmup_steps", 0),
        short("reward", folder / "reward", 8, processes, *RANKINGS, *evaluation, "--ensemble_size", 2),
    ]


def sharded_stages(folder, processes):
    """Return the same in 4 bits, with resumed runs."""
    sft, policy = (*SFT, *IN_4_BITS), ("--start_from", folder / "sft", "--needs", "[]", *IN_4_BITS)
    adam = (*sft, "--optim", "adamw_torch", "--learning_rate", 1e-3)  # PyTorch cannot load SGD without a state
    again = ("--resume_from_checkpoint", folder / "unbroken" / "checkpoint-2")
    return [
        short("sft", folder / "sft", 16, processes, *sft),
        short("sft", folder / "unbroken", 16, processes, *adam, *SAVING),
        short("sft", folder / "resumed", 16, processes, *adam, *again),
        short("dpo", folder / "dpo", 8, processes, *RANKINGS, *policy),
        short("reward", folder / "reward", 8, processes, *RANKINGS, *END, *IN_4_BITS),
    ]


def cases(folder, names, unbroken, *steps, **options):
    """Return PPO runs on fixed completions, then an unbroken one and one resumed from each step."""
    folder.mkdir()
    save_reward(folder / "reward", save_base(folder / "base"))
    runs = [(name, name, options) for name in names]
    runs += [("unbroken", unbroken, options | AGAIN)]
    for step in steps:
        checkpoint = str(folder / "unbroken" / f"checkpoint-{step}")
        runs += [(f"broken-{step}", unbroken, options | AGAIN | {"checkpoint": checkpoint})]
    return [["ppo_cases", str(folder / name), case, others] for name, case, others in runs]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """Return the folders of one process and of two with DDP."""
    one, two = tmp_path_factory.mktemp("one_ddp"), tmp_path_factory.mktemp("ddp")
    run_stages(stages(one, 1))
    in_two_processes("ddp", [*stages(two, 2), *cases(two / "cases", CASES, "adapter", 3, 11)], two)
    return one, two


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """Return those with FSDP, where the two processes sample completions of different lengths."""
    one, two = tmp_path_factory.mktemp("one_fsdp"), tmp_path_factory.mktemp("fsdp")
    run_stages(sharded_stages(one, 1))
    ppo = cases(two / "cases", ("shared", "whole"), "shared", 11, use_cpu=False)
    for _, _, _, options in ppo[2:]:
        options["terse"] = True
    in_two_processes("fsdp", [*sharded_stages(two, 2), *ppo], two)
    return one, two


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a function that runs a case of PPO in this process, once, and returns the folder."""
    folder = tmp_path_factory.mktemp("alone")
    save_reward(folder / "reward", save_base(folder / "base"))

    def run_once(case):
        if not (folder / case).exists():
            run(folder / case, case, 1)
        return folder

    return run_once


def assert_same_adapters(one, two, *stages):
    for stage in stages:
        mine, theirs = (load_file(folder / stage / "adapter_model.safetensors") for folder in (one, two))
        assert mine.keys() == theirs.keys()
        assert max(weight.abs().max() for name, weight in mine.items() if "lora_B" in name) > 1e-3, "nothing was trained"
        for name, weight in mine.items():
            torch.testing.assert_close(theirs[name], weight, atol=1e-6, rtol=0)


def assert_same_log(one, two, *stages):
    for stage in stages:
        mine, theirs = (json.loads((folder / stage / "recipe.json").read_text())["log"] for folder in (one, two))
        assert len(mine) == len(theirs)
        for here, there in zip(mine, theirs, strict=True):
            assert here.keys() == there.keys()
            assert {key: there[key] for key in METRICS if key in there} == pytest.approx(
                {key: here[key] for key in METRICS if key in here}, abs=1e-4
            )


@pytest.mark.slow
def test_ddp_equals_one_process(ddp):
    stages = ("sft", "dpo", "reward/member-0", "reward/member-1")
    assert_same_adapters(*ddp, *stages)
    assert_same_log(*ddp, *stages)
    for stage in ("sft", "dpo", "ppo", "reward"):  # the second process writes no other files
        mine, theirs = (sorted(path.name for path in (folder / stage).iterdir()) for folder in ddp)
        assert mine == theirs
    mine, theirs = (json.loads((folder / "reward" / "evaluation.json").read_text()) for folder in ddp)
    assert theirs["ensemble"]["accuracy"]["accuracy"] == mine["ensemble"]["accuracy"]["accuracy"]


@pytest.mark.slow
def test_fsdp_equals_one_process(fsdp):
    """In 4 bits, with adapters in fp32, resumed too."""
    assert_same_adapters(*fsdp, "sft", "dpo", "reward")
    assert_same_log(*fsdp, "sft", "dpo", "reward")
    assert_same_adapters(fsdp[1] / "unbroken", fsdp[1] / "resumed", "")
    fingerprints = [json.loads((folder / "sft" / "recipe.json").read_text())["base_model"] for folder in fsdp]
    assert fingerprints[0] == fingerprints[1]


# --- PPO ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ddp_update_of_ppo_equals_one_process(ddp, alone, case):
    assert_the_update_of_one(ddp[1] / "cases", alone(case), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["shared", "whole"])
def test_fsdp_update_of_ppo_equals_one_process(fsdp, alone, case):
    assert_the_update_of_one(fsdp[1] / "cases", alone(case), case)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 11])
def test_resumed_ddp_run_equals_unbroken_one(ddp, step):
    """In the first and second epoch, between a rollout and its last update."""
    whole, broken = (ddp[1] / "cases" / name for name in ("unbroken", f"broken-{step}"))
    assert read(whole)["kl"][-1] == read(broken)["kl"][-1]
    files = ("adapter_model.safetensors", "critic.safetensors", "checkpoint-14/rollout-0.safetensors")
    for file in (*files, "checkpoint-14/rollout-1.safetensors"):
        assert not moved(load_file(whole / file), load_file(broken / file)), f"resumed at step {step}: {file}"
    # Each process samples its own answers
    rollouts = [load_file(whole / f"checkpoint-14/rollout-{rank}.safetensors") for rank in (0, 1)]
    assert not torch.equal(*(rollout["0/prompt_ids"] for rollout in rollouts))


@pytest.mark.slow
def test_resumed_fsdp_run_of_ppo_equals_unbroken_one(fsdp):
    for file in ("adapter_model.safetensors", "critic.safetensors"):
        whole, broken = (fsdp[1] / "cases" / name / file for name in ("unbroken", "broken-11"))
        assert not moved(load_file(whole), load_file(broken)), file


# --- Refusals ------------------------------------------------------------------------------


def test_ppo_rejects_a_separate_critic_under_fsdp(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RecipeError, match=r"critic: adapter: "):
        PPOConfig(str(tmp_path), critic="adapter", bf16=False)


def test_recipe_rejects_a_paged_optimizer_under_fsdp(tmp_path, launch, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    status, message = launch("sft", *SFT, "--optim", "paged_adamw_8bit", "--output_dir", tmp_path)
    assert status == 2
    assert "optim: paged_adamw_8bit: " in message
