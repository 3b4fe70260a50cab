"""Shares of right, abstaining and made-up answers in several evaluations, by any columns of their data.

    python benchmarks/knowledge.py --runs runs/smollm2-135m/knowledge --by known kind stratum

Reads `answers.jsonl` of `seed-*/evaluate`, and prints a table for each column: mean over the seeds (least to greatest).
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

KINDS = {"right": "right", "abstained": "abstained", "made_up": "made up", "contains_reference": "made up"}
SHOWN = tuple(dict.fromkeys(KINDS.values()))


def shares(path: Path, column: str) -> dict[tuple[str, str], dict[str, float]]:
    """Return (policy, value of the column) -> shares of the kinds of answers, and their number."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        counts[row["policy"], str(row[column])].update(KINDS[answer["kind"]] for answer in row["answers"])
    return {key: {kind: count[kind] / count.total() for kind in SHOWN} | {"n": count.total()} for key, count in counts.items()}


def over_seeds(values: list[float]) -> str:
    """Return the mean of the seeds, with the least and the greatest."""
    text = f"{mean(values):.2f}"
    return text if max(values) - min(values) < 0.005 else f"{text} ({min(values):.2f}-{max(values):.2f})"


def table(folders: list[Path], column: str) -> str:
    """Return a table of all policies, by the values of a column."""
    seeds = [shares(folder / "evaluate" / "answers.jsonl", column) for folder in folders]
    lines = [f"| {column} | policy | answers a seed | {' | '.join(SHOWN)} |", "|---" * (3 + len(SHOWN)) + "|"]
    for policy, value in sorted(seeds[0], key=lambda key: key[1]):
        found = [seed[policy, value] for seed in seeds]
        cells = (over_seeds([one[kind] for one in found]) for kind in SHOWN)
        lines.append(f"| {value} | {policy} | {found[0]['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of a pipeline with seeds")
    parser.add_argument("--by", nargs="+", default=["known", "kind", "stratum"], help="columns of the data")
    options = parser.parse_args()

    folders = sorted(options.runs.glob("seed-*"))
    for column in options.by:
        print(f"{table(folders, column)}\n")


if __name__ == "__main__":
    main()
