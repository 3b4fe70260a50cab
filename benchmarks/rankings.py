"""The cost of a ranking as one element of a batch, against its pairs as TRL's `RewardTrainer` needs them.

    OMP_NUM_THREADS=1 python benchmarks/rankings.py

A random Llama is trained on the same random rankings in both forms: forward, backward, optimizer step. Both forms take turns in
one process, and the table compares medians of CPU seconds. The memory of each form is measured in a new process, by Linux: the
peak during three steps, minus the memory before them.
"""

import argparse
import itertools
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.training.reward import RankingTrainer

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import ModelConfig, RewardConfig, RewardTrainer

TOKENIZER = resolve_path("rlhf_recipes.tiny.base")
VOCABULARY = 4096
MIB = 2**20


def rankings(k: int, rows: int, length: int) -> Dataset:
    """Return random tokenised rankings without ties."""
    rng = random.Random(0)
    ids = [[[rng.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(k)] for _ in range(rows)]
    return Dataset.from_dict({"ranked_ids": ids, "ranks": [rng.sample(range(k), k) for _ in range(rows)]})


def expand_to_pairs(dataset: Dataset) -> Dataset:
    """Return all pairs of the same rankings."""
    table = {"chosen_ids": [], "rejected_ids": []}
    for row in dataset:
        best_first = [ids for _, ids in sorted(zip(row["ranks"], row["ranked_ids"], strict=True))]
        for chosen, rejected in itertools.combinations(best_first, 2):
            table["chosen_ids"].append(chosen)
            table["rejected_ids"].append(rejected)
    return Dataset.from_dict(table)


def make_trainer(form: str, k: int, options: argparse.Namespace) -> RewardTrainer:
    """Return a trainer for steps on `options.rankings` rankings; `form` is "rankings" or "pairs"."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    rows = 1 if form == "rankings" else k * (k - 1) // 2
    training = RewardConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=options.rankings * rows,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        use_cpu=True,
    )
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=TOKENIZER), training)
    data = rankings(k, options.rankings, options.length)
    trainer_class, data = (RankingTrainer, data) if form == "rankings" else (RewardTrainer, expand_to_pairs(data))
    trainer = trainer_class(
        LlamaForSequenceClassification(config), args=training, train_dataset=data, processing_class=tokenizer
    )
    trainer.create_optimizer()
    trainer.model.train()
    trainer.batch = next(iter(trainer.get_train_dataloader()))
    return trainer


def step(trainer: RewardTrainer) -> tuple[float, float]:
    """Run one optimizer step and return its CPU seconds and its loss."""
    start = time.process_time()
    loss = trainer.compute_loss(trainer.model, dict(trainer.batch))
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.process_time() - start, loss.item()


def print_memory(trainer: RewardTrainer) -> None:
    """Print the peak growth of this process during three steps, in bytes."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for _ in range(3):
        step(trainer)
    print(resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    """Return the memory of this process in bytes: current ("VmRSS") or peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure_memory(form: str, k: int, options: argparse.Namespace) -> int:
    """Return what `print_memory` prints in a new process."""
    command = [sys.executable, __file__, "--rankings", str(options.rankings), "--length", str(options.length)]
    run = subprocess.run([*command, "--alone", form, str(k)], check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.splitlines()[-1])


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, default=1, help="rankings in a batch")
    parser.add_argument("--length", type=int, default=96, help="tokens of a prompt and a completion")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each form; the table has their median")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 9], help="completions in a ranking")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bars()
    if options.alone:
        print_memory(make_trainer(options.alone[0], int(options.alone[1]), options))
        return

    print(f"`{shlex.join(['python', 'benchmarks/rankings.py', *sys.argv[1:]])}`, {torch.get_num_threads()} thread(s)\n")
    print("| K | way | sequences a ranking | CPU s a ranking | times faster | MiB of a step | first loss |")
    print("|---|---|---|---|---|---|---|")
    for k in options.k:
        trainers = {form: make_trainer(form, k, options) for form in ("pairs", "rankings")}
        losses = {form: step(trainer)[1] for form, trainer in trainers.items()}
        seconds = {form: [] for form in trainers}
        for _ in range(options.rounds):
            for form, trainer in trainers.items():
                seconds[form].append(step(trainer)[0] / options.rankings)
        medians = {form: statistics.median(times) for form, times in seconds.items()}
        for form, sequences in (("pairs", k * (k - 1)), ("rankings", k)):
            memory = measure_memory(form, k, options) / MIB
            print(
                f"| {k} | {form} | {sequences} | {medians[form]:.3f} | {medians['pairs'] / medians[form]:.1f} "
                f"| {memory:.0f} | {losses[form]:.6f} |"
            )


if __name__ == "__main__":
    main()
