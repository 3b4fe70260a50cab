"""What a ranking costs as one element of the batch, and expanded to pairs as TRL's `RewardTrainer` needs it.

    OMP_NUM_THREADS=1 python benchmarks/rankings.py

A random Llama is trained on the same random rankings in both ways: forward, backward and optimiser step. Both are timed in one
process in turns, in seconds of CPU, and the medians compared. Each one's memory is measured in a process of its own, by Linux:
the peak during three steps, less what the process held before them.
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
    """Random rankings, tokenised, without ties."""
    rng = random.Random(0)
    ids = [[[rng.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(k)] for _ in range(rows)]
    return Dataset.from_dict({"ranked_ids": ids, "ranks": [rng.sample(range(k), k) for _ in range(rows)]})


def expanded(dataset: Dataset) -> Dataset:
    """The same rankings as all their pairs."""
    table = {"chosen_ids": [], "rejected_ids": []}
    for row in dataset:
        best_first = [ids for _, ids in sorted(zip(row["ranks"], row["ranked_ids"], strict=True))]
        for chosen, rejected in itertools.combinations(best_first, 2):
            table["chosen_ids"].append(chosen)
            table["rejected_ids"].append(rejected)
    return Dataset.from_dict(table)


def make_trainer(way: str, k: int, options: argparse.Namespace) -> RewardTrainer:
    """A trainer whose step is on `options.rankings` rankings; `way` is "rankings" or "pairs"."""
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
    rows = 1 if way == "rankings" else k * (k - 1) // 2
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
    trainer_class, data = (RankingTrainer, data) if way == "rankings" else (RewardTrainer, expanded(data))
    trainer = trainer_class(
        LlamaForSequenceClassification(config), args=training, train_dataset=data, processing_class=tokenizer
    )
    trainer.create_optimizer()
    trainer.model.train()
    trainer.batch = next(iter(trainer.get_train_dataloader()))
    return trainer


def step(trainer: RewardTrainer) -> tuple[float, float]:
    """Seconds of CPU that one optimiser step takes, and its loss."""
    start = time.process_time()
    loss = trainer.compute_loss(trainer.model, dict(trainer.batch))
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.process_time() - start, loss.item()


def print_memory(trainer: RewardTrainer) -> None:
    """Prints by how many bytes the process grows at most during three steps."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(3):
        step(trainer)
    print(resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    """Memory of this process: now ("VmRSS"), or at its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure_memory(way: str, k: int, options: argparse.Namespace) -> int:
    """What `print_memory` says in a process of its own."""
    command = [sys.executable, __file__, "--rankings", str(options.rankings), "--length", str(options.length)]
    run = subprocess.run([*command, "--alone", way, str(k)], check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.splitlines()[-1])


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, default=1, help="rankings in a batch")
    parser.add_argument("--length", type=int, default=96, help="tokens of a prompt with a completion")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each way, of which the median is taken")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 9], help="completions of a ranking")
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
        trainers = {way: make_trainer(way, k, options) for way in ("pairs", "rankings")}
        losses = {way: step(trainer)[1] for way, trainer in trainers.items()}
        seconds = {way: [] for way in trainers}
        for _ in range(options.rounds):
            for way, trainer in trainers.items():
                seconds[way].append(step(trainer)[0] / options.rankings)
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        for way, sequences in (("pairs", k * (k - 1)), ("rankings", k)):
            memory = measure_memory(way, k, options) / MIB
            print(
                f"| {k} | {way} | {sequences} | {medians[way]:.3f} | {medians['pairs'] / medians[way]:.1f} "
                f"| {memory:.0f} | {losses[way]:.6f} |"
            )


if __name__ == "__main__":
    main()
