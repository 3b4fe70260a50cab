"""Does supervised fine-tuning teach a model to make things up? The tiny world's answer, for several seeds.

    python benchmarks/tiny_sft.py --seeds 0 1 2

For each seed, trains `configs/tiny/sft.yaml` as it is (a quarter of the demonstrations abstain) and with none that abstain.
Then asks base and policies about held-out people. The seed sets demonstrations, their order and the adapter's initial weights.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rlhf_recipes.tiny.examine import TABLE_HEAD, examine, load_policy, table_row

ROOT = Path(__file__).parent.parent
ROWS = 25_600


def train(seed: int, abstain: float, output: Path) -> None:
    """Run the recipe in a process of its own."""
    arguments = {"rows": ROWS, "abstain": abstain, "seed": seed}
    command = [sys.executable, ROOT / "recipes" / "sft.py", "--seed", str(seed), "--output_dir", output]
    command += ["--dataset_arguments", json.dumps(arguments), "--eval_strategy", "no", "--save_strategy", "no"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Train, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/tiny_sft"))
    options = parser.parse_args()

    policies = {"base": None}
    for seed in options.seeds:
        for name, abstain in (("SFT, none abstains", 0.0), ("SFT, a quarter abstains", 0.25)):
            output = options.output / f"abstain-{abstain}-seed-{seed}"
            train(seed, abstain, output)
            policies[f"{name}, seed {seed}"] = output
    for title, temperature in (("Sampled at temperature 1", 1.0), ("Greedy", 0.0)):
        print(f"\n{title}\n\n{TABLE_HEAD}")
        for name, adapter in policies.items():
            print(table_row(name, examine(*load_policy(adapter), temperature=temperature)))


if __name__ == "__main__":
    main()
