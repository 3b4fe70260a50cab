"""A resumed run of PPO equals the uninterrupted one: logs, policy, critic, optimizers."""

import shutil

from rlhf_recipes.core.errors import RecipeError
from support.small_ppo import (
    Remembering,
    in_4_bits,
    logged,
    lora,
    make_trainer,
    moved,
    prompts,
    save_base,
    save_reward,
    with_adapter,
)

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch")
TEXTS = Dataset.from_dict({"text": ["w5 w6 w7", "w8 w9", "w10 w11 w12", "w13", "w14 w15"]})
EVERYTHING = {
    "use_score_scaling": True,
    "use_score_norm": True,
    "kl_target": 0.05,
    "kl_horizon": 40,
    "missing_eos_penalty": 1.0,
    "ptx_coef": 0.5,
    "lr_scheduler_type": "linear",
}
CASES = {
    # Of 5 prompts an epoch answers 4, in 2 micro-batches and 2 passes: 4 steps, so that most checkpoints fall between a rollout
    # and its last update. `steps` are those that the run is resumed at; one of them is the end of an epoch.
    "lora, shared": {"critic": "shared", "num_generations": 2, "prompts": 3, "eval_strategy": "steps", "eval_steps": 2},
    "lora, adapter from a reward": {
        "critic": "adapter",
        "reward": True,
        "target_kl": 0.02,
        "num_iterations": 3,
        "steps": [4, 10],
    },
    "fresh lora, adapter": {"critic": "adapter", "fresh": True, "value_warmup_steps": 3, "steps": [2, 4]},
    "4 bits, adapter": {"critic": "adapter", "bits": 4, "gradient_checkpointing": True, "steps": [7]},
    "whole, shared": {"critic": "shared", "whole": True, "prompts": 9, "steps": [3, 11], "max_steps": 17},
    "whole, model, over windows": {"critic": "model", "whole": True, "gradient_accumulation_steps": 2, "max_steps": 6},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def reward(base, tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("reward") / "reward", base)


def length(completion_ids, **columns):
    return [0.1 * sum(ids) - 0.3 * len(ids) for ids in completion_ids]


@pytest.fixture
def start(base, reward):
    """A function that makes the trainer of a case, as a new process would."""

    def make(folder, case, **others):
        options = {**EVERYTHING, **CASES[case], **others}
        model = in_4_bits(base) if options.pop("bits", None) else AutoModelForCausalLM.from_pretrained(base)
        fresh, whole = options.pop("fresh", False), options.pop("whole", False)
        judges = [length, str(reward)] if options.pop("reward", False) else [length]
        data = prompts(options.pop("prompts", 5))
        options.pop("steps", None)
        values = {
            "per_device_train_batch_size": 2,
            "steps_per_generation": 2,
            "max_steps": 13 if options.get("num_iterations") else 10,
            "save_strategy": "steps",
            "save_steps": 1,
            "value_learning_rate": 1e-2,
            "learning_rate": 3e-3,
            **options,
        }
        return make_trainer(
            folder, model if fresh or whole else with_adapter(model), judges, Remembering,
            data=data, peft=lora() if fresh else None, init={"ptx_dataset": TEXTS, "eval_dataset": prompts(2)}, **values,
        )  # fmt: skip

    return make


def entries(trainer, after):
    return [
        {key: value for key, value in entry.items() if key not in TIMES}
        for entry in trainer.state.log_history
        if "loss" in entry and entry["step"] > after
    ]


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_uninterrupted_one(start, tmp_path, case):
    whole = start(tmp_path / "whole", case)
    whole.train()
    last = whole.state.global_step
    assert whole.state.epoch > 2, "there should be more than two epochs"
    if whole.args.target_kl is not None:
        assert set(logged(whole, "early_stopped")) == {0, 1}
    final = tmp_path / "whole" / f"checkpoint-{last}"
    assert len({entry["kl_coef"] for entry in whole.state.log_history if "kl_coef" in entry}) > 2
    for step in CASES[case].get("steps", [1, last // 2]):
        broken = tmp_path / f"broken-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", broken / f"checkpoint-{step}")
        torch.manual_seed(step)  # another process would have another random state too
        trainer = start(broken, case, save_steps=last)
        trainer.train(resume_from_checkpoint=str(broken / f"checkpoint-{step}"))
        where = f"resumed at step {step}"
        assert entries(trainer, step) == entries(whole, step), where
        assert trainer.state.global_step == last
        for place, batch in enumerate(reversed(trainer.batches), start=1):
            assert torch.equal(batch["completion_ids"], whole.batches[-place]["completion_ids"]), where
        resumed = broken / f"checkpoint-{last}"
        files = {path.name for path in final.glob("*.safetensors")}
        assert {"critic.safetensors", "rollout-0.safetensors"} < files
        for name in files:
            assert not moved(load_file(final / name), load_file(resumed / name)), f"{where}: {name}"
        for name in ("critic_optimizer.pt", "optimizer.pt"):
            assert same(torch.load(final / name), torch.load(resumed / name)), f"{where}: {name}"
        assert (final / "ppo_state.json").read_text() == (resumed / "ppo_state.json").read_text()


def same(one, other):
    """Whether two nested states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_resuming_trains_the_policy_adapter_only(start, tmp_path):
    """PEFT makes an adapter that it loads trainable; the reference must not change."""
    case = "lora, adapter from a reward"
    first = start(tmp_path / "run", case, max_steps=2)
    reference = {n: w.clone() for n, w in first.model.named_parameters() if ".reference." in n}
    first.train()
    trainer = start(tmp_path / "run", case, max_steps=4)
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    trainer.train(resume_from_checkpoint=True)
    assert trainer.model.active_adapters == ["default"]
    assert {name for name, weight in trainer.model.named_parameters() if weight.requires_grad} == trained
    assert not moved(reference, {n: w for n, w in trainer.model.named_parameters() if ".reference." in n})


def test_checkpoint_with_another_kind_of_critic_is_refused(start, tmp_path):
    start(tmp_path / "run", "lora, shared", max_steps=1).train()
    trainer = start(tmp_path / "run", "4 bits, adapter")
    with pytest.raises(RecipeError, match="from a critic of another kind"):
        trainer.train(resume_from_checkpoint=True)
