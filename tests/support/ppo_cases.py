"""Runs of PPO that two processes must make as one does, and one to interrupt."""

import json

from rlhf_recipes.training.run import shutdown_distributed
from support.small_ppo import (
    EOS,
    PROMPTS,
    WORDS,
    Remembering,
    answers_of,
    count_words,
    logged,
    lora,
    make_trainer,
    prompts,
    with_adapter,
)

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TEXTS = Dataset.from_dict({"text": [f"w{5 + row} w{6 + row} w{7 + row}" for row in range(6)]})  # of one length: means of means
WHITENED = {"whiten_rewards": True, "whiten_advantages": True, "use_score_scaling": True, "kl_target": 0.05, "kl_horizon": 30}


def some(prompts, completion_ids, **columns):
    """Score all prompts but one, so that two processes have unequal numbers of tokens."""
    scores = count_words(completion_ids)
    return [None if prompt == PROMPTS[3] else score for prompt, score in zip(prompts, scores, strict=True)]


# Options for one process; two have half of `per_device_train_batch_size` each.
CASES = {
    "shared": {"critic": "shared", "ptx_coef": 0.5, "ptx_batch_size": 2, "reward": True, "value_warmup_steps": 1},
    "adapter": {"critic": "adapter", "reward": True},
    "fresh": {"critic": "adapter", "fresh": True, "gradient_accumulation_steps": 2, "value_warmup_steps": 1},
    "checkpointing": {"critic": "adapter", "gradient_checkpointing": True, "ptx_coef": 0.5, "ptx_batch_size": 2},
    "whole": {"critic": "model", "whole": True},
    "stopping": {"critic": "shared", "target_kl": 1e-6, "num_iterations": 4},
    "unscored": {"critic": "shared", "unscored": True},
}


def make(folder, case, processes, **others):
    """Make the trainer of a case for one of `processes`."""
    options = {**WHITENED, **CASES[case], **others}
    base, reward = folder.parent / "base", folder.parent / "reward"
    fresh, whole, terse = (options.pop(name, False) for name in ("fresh", "whole", "terse"))
    judges = [some if options.pop("unscored", False) else count_words]
    judges += [str(reward)] if options.pop("reward", False) else []
    values = {
        "per_device_train_batch_size": 8 // options.get("gradient_accumulation_steps", 1),
        "optim": "sgd",  # Adam makes full steps of gradients that are nothing but rounding
        "learning_rate": 0.1,
        "value_learning_rate": 0.1,
        "max_steps": 6,
        "kl_coef": 0.2,
        "shuffle_dataset": False,
        **options,
    }
    for name in ("per_device_train_batch_size", "ptx_batch_size"):
        if name in values:
            values[name] //= processes
    model = AutoModelForCausalLM.from_pretrained(base)
    if terse:  # a process may be through with its completions while the other samples on
        model.generation_config.eos_token_id = [EOS, *range(4, WORDS // 2)]
    return make_trainer(
        folder,
        model if fresh or whole else with_adapter(model),
        judges,
        Remembering,
        prompts(16),
        lora() if fresh else None,
        {"ptx_dataset": TEXTS, "rollout_func": None if values.pop("sampled", False) else answers_of()},
        **values,
    )


def run(folder, case, processes, checkpoint=None, **others):
    """Train, and save policy, critic and log in the folder."""
    folder.mkdir(exist_ok=True)
    trainer = make(folder, case, processes, **others)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder))
    if trainer.accelerator.is_main_process:
        log = {"log": trainer.state.log_history, "kl_coef": trainer.kl.coefficient, "kl": logged(trainer, "kl")}
        (folder / "log.json").write_text(json.dumps(log))
    assert trainer.accelerator.num_processes == processes
    shutdown_distributed(trainer, last=False)


# Two batches of 8 an epoch, each of them learnt from in 4 steps; the eleventh is in the middle of the second epoch.
AGAIN = {"sampled": True, "steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": 4, "max_steps": 14}
AGAIN |= {
    "optim": "adamw_torch",
    "learning_rate": 3e-3,
    "shuffle_dataset": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "ptx_coef": 0.5,
    "ptx_batch_size": 2,
}


def read(folder):
    return json.loads((folder / "log.json").read_text())


def assert_the_update_of_one(folder, alone, case):
    """Compare policy, critic and log of two processes in `folder` with those of one in `alone`."""
    start = make(alone / case, case, 1)
    name = "model.safetensors" if CASES[case].get("whole") else "adapter_model.safetensors"
    for file, before in ((name, start.model), ("critic.safetensors", start.critic)):
        # not beside `reward`, over which PEFT would write the adapter of that name
        begun = alone / case / "begun"
        begun.mkdir(exist_ok=True)
        before.save(begun) if file.startswith("critic") else before.save_pretrained(begun)
        first, mine, theirs = (load_file(place / file) for place in (begun, alone / case, folder / case))
        assert mine.keys() == theirs.keys() <= first.keys()
        steps = max((mine[key] - first[key]).abs().max().item() for key in mine)
        assert steps > 1e-3, "nothing was learnt"
        for key in mine:
            torch.testing.assert_close(theirs[key], mine[key], atol=2e-6, rtol=0)
    one, two = read(alone / case), read(folder / case)
    assert two["kl_coef"] == pytest.approx(one["kl_coef"], rel=1e-5)
    assert len(two["log"]) == len(one["log"])
    keys = {"kl", "score", "score_std", "kl_coef", "value/mean", "value/explained_variance", "approx_kl", "grad_norm", "loss"}
    keys |= {"value/grad_norm", "early_stopped", "rlhf_reward"}
    for mine, theirs in zip(one["log"], two["log"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in keys & mine.keys():
            assert theirs[key] == pytest.approx(mine[key], abs=1e-4, rel=1e-4), f"{key} at step {mine['step']}"
