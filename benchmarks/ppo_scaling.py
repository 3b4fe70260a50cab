"""How PPO's cost grows with the size of the model, the length of its answers and the batch, beside the arithmetic of it.

    python benchmarks/ppo_scaling.py --rounds 2

Runs `PPOTrainer` with `critic: shared` and a reward adapter as `ppo_vs_trl.py` does, on random Llamas in fp32 with one thread,
and changes one thing at a time. A line has the median of seconds of CPU that an iteration takes for one completion, its phases,
and the floor: floating-point operations at this machine's rate of matrix products. Each run is a process of its own; they take
turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import ppo_vs_trl
import torch
from datasets import disable_progress_bars

SIZES = {  # hidden, intermediate, layers, heads
    "11M": {"HIDDEN": 320, "INTERMEDIATE": 896, "LAYERS": 8, "HEADS": 5},
    "25M": {"HIDDEN": 512, "INTERMEDIATE": 1376, "LAYERS": 8, "HEADS": 8},
    "85M": {"HIDDEN": 768, "INTERMEDIATE": 2048, "LAYERS": 12, "HEADS": 12},
}
PHASES = ("rollout", "reference", "reward", "update")
USUAL = {**SIZES["25M"], "PROMPTS": 16, "PROMPT_LENGTH": 32, "COMPLETION_LENGTH": 48}
CHANGES: dict[str, dict[str, int]] = {
    "as it is: 25M in the layers, 32 + 48 tokens, 16 completions": {},
    "layers of 11M": SIZES["11M"],
    "layers of 85M": SIZES["85M"],
    "32 + 24 tokens": {"COMPLETION_LENGTH": 24},
    "32 + 96 tokens": {"COMPLETION_LENGTH": 96},
    "32 + 192 tokens": {"COMPLETION_LENGTH": 192},
    "128 + 48 tokens": {"PROMPT_LENGTH": 128},
    "4 completions": {"PROMPTS": 4},
    "64 completions": {"PROMPTS": 64},
}


def set_up(changes: dict[str, int]) -> None:
    """Return the constants of the benchmark that does the work."""
    for name, value in (USUAL | changes).items():
        setattr(ppo_vs_trl, name, value)


def run_alone(change: str) -> dict[str, Any]:
    """Return what the trainer reports in a process of its own with one thread."""
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--alone", change]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **single})
    return json.loads(run.stdout.splitlines()[-1])


def line(change: str, runs: list[dict[str, Any]]) -> str:
    """Return a row of the table."""
    set_up(CHANGES[change])
    count = ppo_vs_trl.PROMPTS
    seconds = statistics.median(seconds for run in runs for seconds in run["iterations"]) / count
    floor = ppo_vs_trl.operations("shared") / ppo_vs_trl.matmul_rate(torch.float32) / count
    phases = [
        statistics.mean(run["phases"][phase] for run in runs) / count for phase in ("rollout", "reference", "reward", "update")
    ]
    cells = (seconds, floor, seconds / floor, *phases)
    return f"| {change} | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3, help="of each run, the first of which is not counted")
    parser.add_argument("--alone", choices=CHANGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bars()
    if options.alone:
        set_up(CHANGES[options.alone])
        ppo_vs_trl.run_ours(torch.float32, 4, options.iterations, "shared")
        return
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, Any]]] = {change: [] for change in CHANGES}
    for _ in range(options.rounds):
        for change, results in runs.items():
            results.append(run_alone(change))
    print(f"| | s | floor, s | times the floor | {' | '.join(PHASES)} |\n|---|---|---|---|{'---|' * len(PHASES)}")
    print(*(line(change, results) for change, results in runs.items()), sep="\n")


if __name__ == "__main__":
    main()
