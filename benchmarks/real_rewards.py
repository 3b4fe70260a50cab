"""Does a small reward model beat a bag of words on real preferences? Three data sets, several seeds, one table.

    OMP_NUM_THREADS=1 python benchmarks/real_rewards.py --shared ../shared --seeds 0 1 2

For each data set and seed, `recipes/reward.py` trains `stories3M` (3M parameters, pretrained on children's stories) by LoRA; on
`preferences.1100`, an ensemble of three. A logistic regression learns from the words of the answers, on the same rows. Both are
measured on the same held-out comparisons. The last row of a data set has the means, and the difference over the comparisons of
all seeds with its 95% interval (a little narrow, since held-out rows of two seeds overlap).

The bag of words counts the words of each answer, without prompt and order. It is fitted to the difference of counts, chosen
minus rejected, with both signs. Its penalty is the best of six in a 5-fold cross-validation within the training rows, with no
conversation in two folds.

Splits: `preferences.1100` by prompt (`test_split_size`, with the seed); `hh_pairs` as it comes, with `--hh_rows` training rows
sampled with the seed (the file is sorted by subset); `rankings.oasst_en100` by conversation tree, a quarter held out with the
seed. Prompts of one tree differ, so a split by prompt would leak. Sampled rows are written to `--output`. Rows longer than
`max_length` are dropped on both sides, for both contestants, and counted.
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

from rlhf_recipes.data import Data
from rlhf_recipes.evaluation.reward_evaluation import measure_reward
from rlhf_recipes.rewards.saved import load_saved_reward
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.ensemble import load_comparisons

import yaml
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from scipy.sparse import vstack
from scipy.stats import bootstrap
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

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
        "ensemble_size": 3,
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
        "num_train_epochs": 1,
    },
}
HEAD = """\
| data | seed | trained on | held out | reward model | its members | bag of words | ECE (by chance) | score, length | CPU s |
|---|---|---|---|---|---|---|---|---|---|"""


# --- Data ----------------------------------------------------------------------------


def write_config(name: str, shared: Path, seed: int, output: Path, hh_rows: int, **options: Any) -> Path:
    """Write the YAML file of one run, with `options` over it, and the rows that it samples."""
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
    """Return the rows to train on, and held-out rows of `share` of the trees."""
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
    """Logistic regression on the words of the answers, fitted to comparisons; called like a reward function.

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
        """Return scores, whose differences are log-odds of preference."""
        return (self.words.transform(map(_text, completions)) @ self.weights).tolist()


def pairs_of(rows: Dataset) -> Iterator[tuple[str, str, str]]:
    """Yield of each comparison the first turn of its conversation, and the better and the worse answer."""
    for prompt, better, worse in (pair for row in rows for pair in _pairs(row)):
        yield repr(prompt[:1]), _text(better), _text(worse)


def _pairs(row: dict[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield prompt, better and worse answer of each comparison in a row."""
    if "chosen" in row:
        yield row["prompt"], row["chosen"], row["rejected"]
        return
    ranked = list(zip(row["ranks"], row["completions"], strict=True))
    yield from ((row["prompt"], a, b) for rank, a in ranked for other, b in ranked if rank < other)


def _text(answer: list[dict[str, str]]) -> str:
    return answer[-1]["content"]


def load_as_recipe(config: Path) -> tuple[Data, PreTrainedTokenizerBase]:
    """Return the rows that the recipe trains on and holds out with this YAML file, and its tokenizer."""
    reward_args, data_args, training_args, model_args = parse_arguments(RECIPE, argv=["--config", str(config)])
    return load_comparisons(reward_args, data_args, training_args, model_args)


def train_reward_model(config: Path) -> tuple[dict[str, Any], list[float], float]:
    """Run the recipe in a process; return its evaluation, accuracies of members, and CPU seconds."""
    before = _children_cpu()
    with open(config.with_suffix(".log"), "w") as log:
        subprocess.run([sys.executable, RECIPE, "--config", config], check=True, stdout=log, stderr=log)
    results = json.loads((config.parent / "evaluation.json").read_text())
    whole = results.pop("ensemble", None) or results["reward"]
    return whole, [result["accuracy"]["accuracy"] for result in results.values()], _children_cpu() - before


def gains(folder: Path, base_model: str | Path, words: BagOfWords, rows: Dataset) -> list[float]:
    """Return how much better the reward model in `folder` is than the words, per comparison: -1 to 1."""
    base = AutoModelForCausalLM.from_pretrained(base_model)
    policy = get_peft_model(base, LoraConfig(target_modules="all-linear"))  # as in PPO; it changes nothing
    reward = load_saved_reward(folder, policy, words.tokenizer)
    prompts, better, worse = zip(*(pair for row in rows for pair in _pairs(row)), strict=True)
    credits = []
    for scorer in (reward, words):
        scores = zip(scorer(prompts, better), scorer(prompts, worse), strict=True)
        credits.append([float(one > other) + 0.5 * (one == other) for one, other in scores])
    return [model - bag for model, bag in zip(*credits, strict=True)]


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- The table -------------------------------------------------------------------------------------------


def main() -> None:
    """Train, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with `models` and `data`")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hh_rows", type=int, default=1000, help="training rows of `hh_pairs`, before long ones are left out")
    parser.add_argument("--output", type=Path, default=Path("runs/real_rewards"))
    options = parser.parse_args()
    disable_progress_bars()

    start = time.perf_counter()
    print(HEAD, flush=True)
    notes = []
    for name in options.data:
        results, differences = [], []
        for seed in options.seeds:
            config = write_config(name, options.shared, seed, options.output / f"{name}-{seed}", options.hh_rows)
            model, members, seconds = train_reward_model(config)
            data, tokenizer = load_as_recipe(config)
            words = BagOfWords(data.train, tokenizer)
            results.append((model, measure_reward(words, data.eval)))
            differences += gains(config.parent, options.shared / "models" / "stories3M", words, data.eval)
            print(_row(name, str(seed), f"{len(data.train)} rows", *results[-1], members, seconds), flush=True)
            left_out = {split: data.report[split]["longer_than_max_length"]["dropped"] for split in ("train", "eval")}
            notes.append(f"{name}, seed {seed}: {left_out} rows left out as too long; C = {words.penalty:g}")
        print(_mean_row(name, results, differences), flush=True)
    print(f"\n{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), {time.perf_counter() - start:.0f} s in all")
    print(*notes, sep="\n")


def _row(
    name: str, seed: str, rows: str, model: dict[str, Any], words: dict[str, Any], members: list[float], seconds: float
) -> str:
    accuracies = []
    for result in (model, words):
        low, high = result["accuracy"]["interval"]
        accuracies.append(f"{result['accuracy']['accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    error, correlation = model["calibration"], model["score_length"]["spearman"]
    alone = ", ".join(f"{accuracy:.3f}" for accuracy in members) if len(members) > 1 else ""
    cells = [name, seed, rows, str(model["accuracy"]["n"]), accuracies[0], alone, accuracies[1]]
    cells += [f"{error['ece']:.3f} ({error['ece_if_calibrated']:.3f})", f"{correlation:.2f}", f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def _mean_row(name: str, results: list[tuple[dict[str, Any], dict[str, Any]]], differences: list[float]) -> str:
    means = []
    for side in zip(*results, strict=True):
        values = [result["accuracy"]["accuracy"] for result in side]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        means.append(f"**{statistics.mean(values):.3f}**{spread}")
    drawn = bootstrap((differences,), statistics.fmean, vectorized=False, n_resamples=2000, method="percentile", random_state=0)
    low, high = drawn.confidence_interval
    gain = f"difference {statistics.fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"| {name} | mean ± sd | | | {means[0]} | | {means[1]} | {gain} | | |"


if __name__ == "__main__":
    main()
