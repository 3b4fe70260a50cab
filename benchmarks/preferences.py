"""Preferences of people on a real model: SFT, reward models, DPO, PPO and best-of-n, over several seeds.

    python benchmarks/preferences.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data hh --seeds 0 1 2

Runs configs/smollm2-135m/preferences.yaml with data of ../shared, and prints tables. `hh` are pairs of HH-RLHF with short
conversations; `polite` is `preferences.1100`, in which the polite one of two answers is chosen, after SFT on
`instructions.1100`. PPO, DPO and best-of-n learn from one half of the pairs; the judge is a reward model of the other half.
All policies are also asked how likely the answers of held-out instructions are.
"""

import argparse
import gzip
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
PIPELINE = ROOT / "configs" / "smollm2-135m" / "preferences.yaml"
TRAINED = ("sft", "reward", "judge", "dpo", "ppo")


def sources(shared: Path, data: str) -> dict[str, dict[str, Any]]:
    """Return stage -> its data, for the stages of the pipeline."""
    folder = shared / "data"
    if data == "hh":
        train, held_out = str(folder / "hh_pairs.train.jsonl.gz"), [{"path": str(folder / "hh_pairs.eval.jsonl.gz")}]
        first, second, sft = [{"path": train, "split": "train[:50%]"}], [{"path": train, "split": "train[50%:]"}], None
    else:
        pairs = str(folder / "preferences.1100.jsonl.gz")
        first, second = [{"path": pairs, "split": "train[:475]"}], [{"path": pairs, "split": "train[475:950]"}]
        held_out = [{"path": pairs, "split": "train[950:]"}]
        sft = [{"path": str(folder / "instructions.1100.jsonl.gz"), "split": "train[:950]"}]
    stages: dict[str, dict[str, Any]] = {name: {"datasets": first} for name in TRAINED}
    stages["sft"]["datasets"] = sft or first
    stages["judge"] = {"datasets": second, "eval_datasets": held_out}
    stages["reward"]["eval_datasets"] = held_out
    stories = {"path": str(folder / "tinystories.1000.jsonl.gz"), "split": "train[:200]"}
    stages["evaluate"] = {"eval_datasets": held_out, "ptx_dataset": [stories]}
    return stages


def write_pipeline(
    model: str, shared: Path, output: Path, seeds: list[int], data: str, arguments: dict[str, Any], **stages: dict[str, Any]
) -> Path:
    """Write the pipeline with other data; return its path.

    `arguments` go over those of all stages, and `stages` over those of single ones.
    """
    output.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))
    own = sources(shared, data)
    for entry in content["stages"]:
        entry["config"] |= own[entry["name"]] | stages.get(entry["name"], {})
    content |= {"output_dir": str(output), "seeds": seeds, "arguments": content["arguments"] | arguments}
    content["arguments"]["model_name_or_path"] = model
    content["stages"].append(_likelihood_of_instructions(content["stages"][-1], model, shared, output))
    path = output / "pipeline.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _likelihood_of_instructions(evaluate: dict[str, Any], model: str, shared: Path, output: Path) -> dict[str, Any]:
    """Return a stage that measures the perplexity of held-out instructions with their answers, as the model reads them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with gzip.open(shared / "data" / "instructions.1100.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][950:]
    texts = []
    for row in rows:
        asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        plain = f"{asked}\n{row['output']}"
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False) if tokenizer.chat_template else plain)
    path = output / "instructions.jsonl"
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    config = {key: evaluate["config"][key] for key in ("policies", "compare_with", "eval_datasets", "rewards", "judge")}
    config |= {"ptx_dataset": [{"path": str(path)}], "max_completion_length": 1, "num_answers": 1}
    config["eval_datasets"] = [{**config["eval_datasets"][0], "split": "train[:16]"}]
    return {"name": "instructions", "recipe": "evaluate", "config": config}


# --- Tables ------------------------------------------------------------------------------------------------


def rewards(folders: list[Path]) -> str:
    """Return a table of the reward models of all seeds on held-out pairs."""
    header = ["seed", "reward model", "pairs", "accuracy", "by quarters, the least sure first"]
    header += ["calibration error (chance)", "score, length"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for folder in folders:
        for stage in ("reward", "judge"):
            models = _read(folder / stage / "evaluation.json")
            for name, one in models.items():
                accuracy, calibration = one["accuracy"], one["calibration"]
                low, high = accuracy["interval"]
                bins = ", ".join(f"{part['accuracy']:.2f}" for part in accuracy["by_predicted_margin"])
                lines.append(
                    f"| {folder.name[5:]} | {stage if len(models) == 1 else f'{stage}, {name}'} | {accuracy['n']} "
                    f"| {accuracy['accuracy']:.3f} [{low:.3f}, {high:.3f}] | {bins} "
                    f"| {calibration['ece']:.3f} ({calibration['ece_if_calibrated']:.3f}) "
                    f"| {one['score_length']['spearman']:.2f} |"
                )
    return "\n".join(lines)


def policies(folders: list[Path]) -> str:
    """Return a table of the policies: means over seeds, least and greatest."""
    results = [_read(folder / "evaluate" / "metrics.json") for folder in folders]
    instructions = [_read(folder / "instructions" / "metrics.json") for folder in folders]
    header = ["wins by the judge", "at equal length", "tokens", "KL, nats", "perplexity: stories", "instructions"]
    lines = [f"| policy | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for name in results[0]["policies"]:
        found = [one["policies"][name] for one in results]
        rates = [policy.get("win_rate") or {} for policy in found]
        cells = [
            _over_seeds([rate["win_rate"] for rate in rates if rate]),
            _over_seeds([rate["equal_length"]["mean"] for rate in rates if rate]),
            _over_seeds([policy["length"]["mean"] for policy in found], 1),
            _over_seeds([policy["kl"]["mean"] for policy in found if policy["kl"]], 1),
            _over_seeds([policy["perplexity"] for policy in found if "perplexity" in policy], 1),
            _over_seeds(
                [one["policies"][name]["perplexity"] for one in instructions if "perplexity" in one["policies"][name]], 1
            ),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_seeds(values: list[float], digits: int = 2) -> str:
    """Return the mean over seeds, with the least and the greatest."""
    if not values:
        return ""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Write the pipeline, run it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="on the Hub, or a folder")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with `data`")
    parser.add_argument("--data", choices=("hh", "polite"), default="polite")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: runs/preferences-DATA")
    options = parser.parse_args()

    output = options.output or Path(f"runs/preferences-{options.data}")
    config = write_pipeline(options.model, options.shared.resolve(), output, options.seeds, options.data, {})
    command = [sys.executable, ROOT / "recipes" / "pipeline.py", "--config", config, "--set", f"jobs={options.jobs}"]
    if code := subprocess.run(command).returncode:
        sys.exit(code)
    folders = [output / f"seed-{seed}" for seed in options.seeds]
    print(rewards(folders), policies(folders), sep="\n\n")


if __name__ == "__main__":
    main()
