"""Does a small reward model beat a bag of words on real preferences? Three data sets, several seeds, one table.

    OMP_NUM_THREADS=1 python benchmarks/real_rewards.py --shared ../shared --seeds 0 1 2

For each data set and seed, `recipes/reward.py` trains `stories3M` (3M parameters, which have read children's stories only) by
LoRA, and a logistic regression learns from the words of the answers, on the same rows; both are measured on the same held-out
comparisons.

The bag of words counts the words of each answer and looks at nothing else, neither the prompt nor the order. It is fitted to
the difference of counts, chosen less rejected, with both signs; its penalty is that of six candidates with the best likelihood
in a 5-fold cross-validation inside the training rows, where no conversation is in two folds.

Splits: `preferences.1100` by prompt (`test_split_size`, drawn with the seed); `hh_pairs` as it comes, with `--hh_rows` training
rows drawn with the seed (the file is sorted by subset); `rankings.oasst_en100` by conversation tree, a quarter held out, drawn
with the seed: the prompts of one tree differ, so a split by prompt would leak. Drawn rows are written to `--output`. Rows
longer than `max_length` are left out on both sides, for both contestants, and counted.
"""

import argparse
import gzip
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.arguments import DataArguments, RewardArguments, parse_arguments
from rlhf_recipes.data import Data
from rlhf_recipes.evaluation.rewards import measure_reward
from rlhf_recipes.reward_stage import load_comparisons

import yaml
from datasets import Dataset, disable_progress_bars
from scipy.sparse import vstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, RewardConfig

RECIPE = Path(__file__).parent.parent / "recipes" / "reward.py"
CANDIDATES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
COMMON = {
    "dtype": "float32",
    "eos_token": "<s>",  # ends a story; </s> was never trained
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": "all-linear",
    "bad_rows": "drop",
    "per_device_eval_batch_size": 32,
    "learning_rate": 5e-4,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "gradient_checkpointing": False,
    "eval_strategy": "epoch",
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
}
DATA = {
    "preferences.1100": {
        "train_on": "pairs",
        "test_split_size": 200,
        "max_length": 128,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
    },
    "hh_pairs": {
        "train_on": "pairs",
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
    },
    "rankings.oasst_en100": {
        "train_on": "rankings",
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
    },
}
HEAD = """\
| data | seed | trained on | comparisons held out | reward model | bag of words | ECE (by chance) | score, length | CPU s |
|---|---|---|---|---|---|---|---|---|"""


# --- What the recipe is given ----------------------------------------------------------------------------


def write_config(name: str, shared: Path, seed: int, output: Path, hh_rows: int, **options: Any) -> Path:
    """Writes the YAML file of one run, and the rows that it reads where they have to be drawn; `options` go over the file's."""
    output.mkdir(parents=True, exist_ok=True)
    values = {"model_name_or_path": str(shared / "models" / "stories3M"), **COMMON, **DATA[name]}
    values |= {"seed": seed, "output_dir": str(output)}
    if name == "hh_pairs":
        rows = _read(shared / "data" / "hh_pairs.train.jsonl.gz")
        values["dataset_name"] = _write(output / "train.jsonl", random.Random(seed).sample(rows, min(hh_rows, len(rows))))
        values["eval_datasets"] = [{"path": str(shared / "data" / "hh_pairs.eval.jsonl.gz")}]
    elif name == "rankings.oasst_en100":
        train, held_out = split_by_tree(_read(shared / "data" / "rankings.oasst_en100.jsonl.gz"), seed)
        values["dataset_name"] = _write(output / "train.jsonl", train)
        values["eval_datasets"] = [{"path": _write(output / "eval.jsonl", held_out)}]
    else:
        values["dataset_name"] = str(shared / "data" / f"{name}.jsonl.gz")
    config = output / "reward.yaml"
    config.write_text(yaml.safe_dump(values | options, sort_keys=False))
    return config


def split_by_tree(rows: list[dict[str, Any]], seed: int, share: float = 0.25) -> tuple[list[Any], list[Any]]:
    """Rows to train on, and those of `share` of the trees, to hold out."""
    trees = list(dict.fromkeys(row["tree_id"] for row in rows))
    held_out = set(random.Random(seed).sample(trees, round(share * len(trees))))
    return tuple([row for row in rows if (row["tree_id"] in held_out) == side] for side in (False, True))


def _read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- The contestants -------------------------------------------------------------------------------------


class BagOfWords:
    """A logistic regression on the words of the answers, fitted to comparisons; called as a reward function is.

    Parameters:
        tokenizer: of the reward model: lengths are measured in its tokens.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        pairs = list(pairs_of(rows))
        self.words = CountVectorizer().fit(text for _, *texts in pairs for text in texts)
        better, worse = (self.words.transform([pair[side] for pair in pairs]).astype(float) for side in (1, 2))
        features = vstack([better - worse, worse - better]).tocsr()
        labels = [1] * len(pairs) + [0] * len(pairs)
        folds = list(GroupKFold(5).split(features, labels, groups=[group for group, *_ in pairs] * 2))
        model = LogisticRegressionCV(
            Cs=CANDIDATES,
            cv=folds,
            scoring="neg_log_loss",
            fit_intercept=False,
            max_iter=1000,
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
        )
        self.weights = model.fit(features, labels).coef_[0]
        self.penalty = float(model.C_)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The score of each completion: the log-odds of two are the difference of their scores."""
        return (self.words.transform(map(_text, completions)) @ self.weights).tolist()


def pairs_of(rows: Dataset) -> Iterator[tuple[str, str, str]]:
    """Of each comparison: how its conversation opens, the text of the better answer, and that of the worse one."""
    for row in rows:
        opening = repr(row["prompt"][:1])
        if "chosen" in row:
            yield opening, _text(row["chosen"]), _text(row["rejected"])
            continue
        ranked = list(zip(row["ranks"], row["completions"], strict=True))
        yield from ((opening, _text(a), _text(b)) for rank, a in ranked for other, b in ranked if rank < other)


def _text(answer: list[dict[str, str]]) -> str:
    return answer[-1]["content"]


def load_as_recipe(config: Path) -> tuple[Data, PreTrainedTokenizerBase]:
    """The rows that the recipe trains on and holds out, given this YAML file, and its tokenizer."""
    groups = (RewardArguments, DataArguments, RewardConfig, ModelConfig)
    reward_args, data_args, training_args, model_args = parse_arguments(RECIPE, *groups, argv=["--config", str(config)])
    return load_comparisons(reward_args, data_args, training_args, model_args)


def train_reward_model(config: Path) -> tuple[dict[str, Any], float]:
    """Runs the recipe in a process of its own; what `evaluation.json` says, and the seconds of CPU it took in all."""
    before = _children_cpu()
    with open(config.with_suffix(".log"), "w") as log:
        subprocess.run([sys.executable, RECIPE, "--config", config], check=True, stdout=log, stderr=log)
    (result,) = json.loads((config.parent / "evaluation.json").read_text()).values()
    return result, _children_cpu() - before


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- The table -------------------------------------------------------------------------------------------


def main() -> None:
    """Trains, measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with `models` and `data`")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hh_rows", type=int, default=3000, help="training rows of `hh_pairs`, before long ones are left out")
    parser.add_argument("--output", type=Path, default=Path("runs/real_rewards"))
    options = parser.parse_args()
    disable_progress_bars()

    start = time.perf_counter()
    print(HEAD, flush=True)
    notes = []
    for name in options.data:
        results = []
        for seed in options.seeds:
            config = write_config(name, options.shared, seed, options.output / f"{name}-{seed}", options.hh_rows)
            model, seconds = train_reward_model(config)
            data, tokenizer = load_as_recipe(config)
            words = BagOfWords(data.train, tokenizer)
            results.append((model, measure_reward(words, data.eval)))
            print(_row(name, str(seed), f"{len(data.train)} rows", *results[-1], seconds), flush=True)
            left_out = {split: data.report[split]["longer_than_max_length"]["dropped"] for split in ("train", "eval")}
            notes.append(f"{name}, seed {seed}: {left_out} rows left out as too long; C = {words.penalty:g}")
        print(_mean_row(name, results), flush=True)
    print(f"\n{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), {time.perf_counter() - start:.0f} s in all")
    print(*notes, sep="\n")


def _row(name: str, seed: str, rows: str, model: dict[str, Any], words: dict[str, Any], seconds: float) -> str:
    accuracies = []
    for result in (model, words):
        low, high = result["accuracy"]["interval"]
        accuracies.append(f"{result['accuracy']['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    error, correlation = model["calibration"], model["score_length"]["spearman"]
    cells = [name, seed, rows, str(model["accuracy"]["n"]), *accuracies]
    cells += [f"{error['ece']:.3f} ({error['ece_if_calibrated']:.3f})", f"{correlation:.2f}", f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def _mean_row(name: str, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    means = []
    for side in zip(*results, strict=True):
        values = [result["accuracy"]["accuracy"] for result in side]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        means.append(f"**{statistics.mean(values):.3f}**{spread}")
    return f"| {name} | mean ± sd | | | {means[0]} | {means[1]} | | | |"


if __name__ == "__main__":
    main()
