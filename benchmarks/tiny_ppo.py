"""Does PPO with a reward for truth repair what supervised fine-tuning broke? The tiny world's answer, over several seeds.

    python benchmarks/tiny_ppo.py --seeds 0 1 2

For each seed, trains `configs/tiny/sft.yaml` and, from its result, a policy by PPO against the automatic reward, and asks base
and policies about held-out people. The seed decides demonstrations and prompts, their order, the first weights and what is
sampled. The learning curves of the first seed are drawn into `--output`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rlhf_recipes.evaluation.report.plots import learning_curves
from rlhf_recipes.tiny.examine import TABLE_HEAD, examine, load_policy, table_row

from tiny_sft import ROOT
from tiny_sft import train as train_sft

ROWS = 19_200
TRUTH = ("--reward_funcs", "rlhf_recipes.rewards.Abstention", "--missing_eos_penalty", "none", "--kl_coef", "0.02")
CURVES = (
    "score",
    "kl",
    "entropy",
    "abstention/right",
    "abstention/abstained",
    "abstention/wrong",
    "value/explained_variance",
    "approx_kl",
    "completions/mean_length",
)


def train_ppo(seed: int, start_from: Path, output: Path, *options: str) -> dict:
    """Run the recipe in a process of its own; return its `recipe.json`."""
    command = [sys.executable, ROOT / "recipes" / "ppo.py", "--seed", str(seed), "--output_dir", output]
    command += ["--start_from", start_from, "--dataset_arguments", json.dumps({"rows": ROWS, "seed": seed})]
    command += [*TRUTH, "--value_warmup_steps", "40", "--eval_steps", "100", "--save_strategy", "no", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "recipe.json").read_text())


def main() -> None:
    """Trains, measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_ppo"))
    options = parser.parse_args()

    policies = {"base": None}
    seconds = []
    for seed in options.seeds:
        sft, ppo = (options.output / f"{stage}-seed-{seed}" for stage in ("sft", "ppo"))
        train_sft(seed, 0.25, sft)
        record = train_ppo(seed, sft, ppo)
        seconds.append(record["run"]["wall_time_s"])
        if seed == options.seeds[0]:
            (options.output / "ppo-run.svg").write_text(learning_curves(record["log"], CURVES))
        policies |= {f"SFT, seed {seed}": sft, f"PPO, seed {seed}": ppo}
    for title, temperature in (("Sampled at temperature 1", 1.0), ("Greedy", 0.0)):
        print(f"\n{title}\n\n{TABLE_HEAD}")
        for name, adapter in policies.items():
            print(table_row(name, examine(*load_policy(adapter), temperature=temperature)))
    print("\nPPO took", ", ".join(f"{value:.0f}" for value in seconds), "s")


if __name__ == "__main__":
    main()
