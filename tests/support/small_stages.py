"""Stages of a second or two each, and comparison of their results."""

import json
import re

from rlhf_recipes.config.overrides import merge_overrides
from rlhf_recipes.tiny import splits
from support import ROOT

import yaml

TIMES = re.compile("runtime|per_second|step_time|wall_time|tokens_per_s|^seconds$|^peak_memory$|^run$|^resume_from_checkpoint$")
CHECKPOINTS = {"save_steps": 1, "save_total_limit": 2, "eval_steps": 2, "logging_steps": 2, "warmup_steps": 0}


def write_rows(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(recipe, **values):
    config = yaml.safe_load((ROOT / "configs" / "tiny" / f"{recipe}.yaml").read_text())
    for key in ("needs", "output_dir"):
        config.pop(key, None)
    return merge_overrides(config, values)


def small(folder):
    """Return the configuration of each small stage, by its name; tests kill and resume each."""
    policies = {"sft": str(folder / "whole" / "sft")}
    texts = write_rows(folder, "sft", splits.demonstrations(rows=24))
    rankings = write_rows(folder, "rankings", splits.rankings(rows=16, k=3))
    prompts = write_rows(folder, "prompts", splits.prompts(rows=24))
    evaluation = write_rows(folder, "evaluation", splits.evaluation(rows=8))

    held_out = {
        "reward": write_rows(folder, "held_out", splits.rankings("test", rows=8, k=3)),
        "ppo": write_rows(folder, "asked", splits.prompts("test", rows=8)),
    }

    def training(recipe, data, size, steps, **values):
        common = {"dataset_name": data, "eval_datasets": [{"path": held_out.get(recipe, data)}], "max_steps": steps}
        common |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": 8, "disable_tqdm": True}
        return settings(recipe, **common, **CHECKPOINTS, **values)

    ppo = {"reward_funcs": ["rlhf_recipes.rewards.Abstention"], "value_warmup_steps": 1, "max_completion_length": 6}
    asked = {"dataset_name": prompts, "max_completion_length": 6, "batch_size": 16}
    return {
        "sft": training("sft", texts, 4, 5, lora_dropout=0.1),
        "reward": training("reward", rankings, 4, 3, ensemble_size=2),
        "dpo": training("dpo", rankings, 4, 3, start_from=policies["sft"]),
        "ppo": training("ppo", prompts, 8, 4, start_from=policies["sft"], **ppo),
        "sample": settings("sample", **asked, policies=policies, num_completions=4, temperature=2.0),
        "rank": settings("rank", groups=str(folder / "whole" / "sample")),
        "evaluate": settings(
            "evaluate",
            dataset_name=evaluation,
            policies={"base": None, **policies},
            rewards=[{"path": "rlhf_recipes.rewards.Abstention"}],
            judge="Abstention",
            frontier=[],
            ptx_dataset=[],
            num_answers=1,
            batch_size=32,
        ),
        "merge": settings("merge", adapter=policies["sft"]),
    }


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not TIMES.search(key)}
    return [without_times(item) for item in value] if isinstance(value, list) else value
