"""Shares of right, abstaining and made-up answers in several evaluations, by any columns of their data.

    python benchmarks/knowledge.py --runs runs/smollm2-135m/knowledge --by known kind stratum
    python benchmarks/knowledge.py --runs runs/smollm2-135m/knowledge --popqa ../shared/data/popqa.1000.jsonl.gz

Reads `answers.jsonl` of `seed-*/evaluate`, and prints a table for each column: mean over the seeds (least to greatest). With
`--popqa` the same policies first answer questions of PopQA (arXiv:2212.10511), which no stage was trained on: about
occupations, directors, places of birth and the like, in thirds by how often the subject's page is read.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

import yaml

ROOT = Path(__file__).parent.parent
ASK = "{question} Answer with the name only, or say that you do not know."  # as in the questions about cities

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


def ask_popqa(folder: Path, popqa: Path, rows: int) -> None:
    """Let the policies of a seed answer some questions of PopQA, into the folder `popqa`."""
    if (folder / "popqa" / "answers.jsonl").exists():
        return
    with gzip.open(popqa, "rt", encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    questions = sorted(questions[:rows], key=lambda row: -row["popularity"])
    path = folder / "popqa.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for rank, row in enumerate(questions):
            prompt = [{"role": "user", "content": ASK.format(question=row["question"])}]
            third = ("most read", "between", "least read")[3 * rank // len(questions)]
            file.write(json.dumps({"prompt": prompt, "reference": row["answers"], "stratum": third}) + "\n")
    seed = folder.name.removeprefix("seed-")
    values = yaml.safe_load((folder.parent / "configs" / f"evaluate-{seed}.yaml").read_text(encoding="utf-8"))
    values = {
        key: value
        for key, value in values.items()
        if key not in ("dataset_name", "dataset_arguments", "group_by", "group_names")
    }
    values |= {"eval_datasets": [{"path": str(path)}], "num_answers": 1, "output_dir": str(folder / "popqa")}
    config = folder / "popqa.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    subprocess.run([sys.executable, ROOT / "recipes" / "evaluate.py", "--config", config], check=True)


def table(folders: list[Path], column: str, stage: str = "evaluate") -> str:
    """Return a table of all policies, by the values of a column."""
    seeds = [shares(folder / stage / "answers.jsonl", column) for folder in folders]
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
    parser.add_argument("--popqa", type=Path, help="JSONL, gzipped, with `question`, `answers` and `popularity`")
    parser.add_argument("--rows", type=int, default=400, help="of PopQA")
    options = parser.parse_args()

    folders = sorted(options.runs.glob("seed-*"))
    if options.popqa:
        for folder in folders:
            ask_popqa(folder, options.popqa, options.rows)
        print(table(folders, "stratum", "popqa"))
        return
    for column in options.by:
        print(f"{table(folders, column)}\n")


if __name__ == "__main__":
    main()
