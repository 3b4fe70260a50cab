"""All stages on a real model and real data over several seeds: SFT, reward models, PPO, DPO, evaluation.

    OMP_NUM_THREADS=1 python benchmarks/real_pipeline.py --shared ../shared --seeds 0 1 2

Writes a pipeline for `stories3M` (3M parameters, pretrained on children's stories) and runs it with `recipes/pipeline.py`. SFT
uses `instructions.1100` and the chosen answers of HH-RLHF. Reward models learn from `preferences.1100`, where the polite one of
two answers is preferred. PPO is trained against one reward model, DPO on the same pairs. Win rates come from another reward
model, which is trained on other pairs and never trained against. The prompts of the evaluation are held out from all stages.

The model knows nothing about the world: it can learn a manner here, not answers.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
COMMON = {"dtype": "float32", "bad_rows": "drop"}
TRAINED = COMMON | {
    "eos_token": "<s>",  # ends a story; the model has never seen </s>
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
    "long_rows": "drop",
    "gradient_checkpointing": False,
    "eval_strategy": "epoch",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 6,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
}
# Rows of instructions.1100 and of preferences.1100: both have the same prompts in the same order
TRAIN, FIRST, SECOND, HELD_OUT = "train[:950]", "train[:475]", "train[475:950]", "train[950:]"


def stages(shared: Path, **options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each stage with its recipe and arguments; `options` override the arguments of the stage of that name."""
    model = {"model_name_or_path": str(shared / "models" / "stories3M")}
    data = {name: str(shared / "data" / f"{name}.jsonl.gz") for name in ("instructions.1100", "preferences.1100")}
    preferences = {"dataset_name": data["preferences.1100"]}
    hh, stories = (str(shared / "data" / f"{name}.jsonl.gz") for name in ("hh_pairs.train", "tinystories.1000"))
    reward = {
        **preferences,
        "eval_datasets": [{"path": data["preferences.1100"], "split": HELD_OUT}],
        "train_on": "pairs",
        "max_length": 128,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "lora_dropout": 0.1,
    }
    trained = {
        "sft": {
            "datasets": [{"path": data["instructions.1100"], "split": TRAIN}, {"path": hh, "split": "train[:1000]"}],
            "eval_datasets": [{"path": data["instructions.1100"], "split": HELD_OUT}],
            "max_length": 128,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 2e-3,
        },
        "reward": {**reward, "dataset_train_split": FIRST},
        "judge": {**reward, "dataset_train_split": SECOND},
        "ppo": {
            **preferences,
            "dataset_train_split": TRAIN,
            "start_from": "{sft}",
            "reward_funcs": ["{reward}"],
            "max_prompt_length": 64,
            "max_completion_length": 48,
            "per_device_train_batch_size": 64,
            "num_iterations": 2,
            "max_steps": 80,
            "learning_rate": 5e-4,
            "value_warmup_steps": 8,
            "lam": 1.0,
            "kl_coef": 0.05,
            "save_strategy": "steps",
            "save_steps": 20,
            "eval_strategy": "no",
        },
        "dpo": {
            **preferences,
            "dataset_train_split": FIRST,
            "eval_datasets": [{"path": data["preferences.1100"], "split": HELD_OUT}],
            "start_from": "{sft}",
            "max_length": 128,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 2,
            "learning_rate": 5e-4,
            "beta": 0.1,
        },
    }
    evaluate = {
        "policies": {
            "base": None,
            "sft": "{sft}",
            "best-of-4": {"best_of": {"policy": "sft", "n": 4, "reward": "reward model"}},
            "dpo": "{dpo}",
            "ppo": "{ppo}",
        },
        "compare_with": "sft",
        "eval_datasets": [{"path": data["preferences.1100"], "split": HELD_OUT}],
        "max_prompt_length": 64,
        "max_completion_length": 48,
        "num_answers": 4,
        "rewards": [
            {"path": "{reward}", "name": "reward model", "trained": ["ppo"]},
            {"path": "{judge}", "name": "other reward model"},
        ],
        "judge": "other reward model",
        "frontier": ["{ppo}"],
        "frontier_best_of": [1, 2, 4],
        "ptx_dataset": [{"path": stories, "split": "train[:200]"}],
    }
    recipes = {"judge": "reward"}
    entries = {name: model | TRAINED | values for name, values in trained.items()}
    entries["evaluate"] = model | COMMON | evaluate
    return [
        {"name": name, "recipe": recipes.get(name, name), "arguments": values | options.get(name, {})}
        for name, values in entries.items()
    ]


def write_pipeline(shared: Path, output: Path, seeds: list[int], jobs: int, **options: dict[str, Any]) -> Path:
    """Write the YAML file of the pipeline and one per stage; return the path of the first."""
    output.mkdir(parents=True, exist_ok=True)
    entries = stages(shared, **options)
    for entry in entries:
        config = output / f"{entry['name']}.yaml"
        config.write_text(yaml.safe_dump(entry.pop("arguments"), sort_keys=False))
        entry["config"] = str(config)
    path = output / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(output), "seeds": seeds, "jobs": jobs, "stages": entries}))
    return path


def main() -> None:
    """Write the pipeline and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with `models` and `data`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/real_pipeline"))
    options = parser.parse_args()
    config = write_pipeline(options.shared.resolve(), options.output, options.seeds, options.jobs)
    sys.exit(subprocess.run([sys.executable, ROOT / "recipes" / "pipeline.py", "--config", config]).returncode)


if __name__ == "__main__":
    main()
