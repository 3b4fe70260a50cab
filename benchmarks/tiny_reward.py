"""Can a reward model see what the base knows? The tiny world's answer, for each seed of the experiment.

    python recipes/pipeline.py --config configs/tiny/experiment.yaml --stages reward
    python benchmarks/tiny_reward.py
    python benchmarks/tiny_reward.py --experiment runs/tiny-rounds --reward reward-once

Compares, for each reward model of `configs/tiny/experiment.yaml`, the scores of the true answer, of abstaining and of all false
answers to the questions of the evaluation split: about people that no stage has seen, known to the base or not. Also prints the
base's own verdicts on such answers, in the words with which its pretraining text judges guesses.
"""

import argparse
import json
from pathlib import Path

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.metrics.scores import pair_accuracy
from rlhf_recipes.rewards.reward_models import Scorer
from rlhf_recipes.rewards.saved import load_reward_adapter
from rlhf_recipes.tiny import splits, text
from rlhf_recipes.tiny.world import ABSTENTION, ATTRIBUTES

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

COMPARISONS = ("right over wrong", "right over abstaining", "abstaining over wrong")
WHO = {True: "known", False: "unknown"}
COLUMNS = " | ".join(f"{who}: {what}" for who in WHO.values() for what in COMPARISONS)
HEAD = f"""\
| seed | training accuracy | development | ECE | {COLUMNS} |
|---|---|---|---|{"---|" * len(WHO) * len(COMPARISONS)}"""


def compare_answers(reward: Scorer, rows: int = 600) -> dict[str, dict[str, float]]:
    """Return how often the first answer scores higher, by known or unknown people and by `COMPARISONS`."""
    scores = {}
    for row in splits.evaluation(rows=rows):
        values = next(attribute.values for attribute in ATTRIBUTES if row["reference"].rstrip(".") in attribute.values)
        false = [f"{value}." for value in values if f"{value}." != row["reference"]]
        answers = [[{"role": "assistant", "content": answer}] for answer in (row["reference"], ABSTENTION, *false)]
        scores.setdefault(WHO[row["known"]], []).append(reward([row["prompt"]] * len(answers), answers))
    return {who: _shares(table) for who, table in scores.items()}


def _shares(table: list[list[float]]) -> dict[str, float]:
    """Return the shares of rows with scores of the true answer, of abstaining, and of false answers."""
    sides = (
        [(right, wrong) for right, _, *false in table for wrong in false],
        [(right, abstains) for right, abstains, *_ in table],
        [(abstains, wrong) for _, abstains, *false in table for wrong in false],
    )
    shares = [pair_accuracy(*zip(*pairs, strict=True))["accuracy"] for pairs in sides]
    return dict(zip(COMPARISONS, shares, strict=True))


def judge_as_pretrained(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int = 600) -> dict[str, float]:
    """Return how often the base finds "Right." likelier after a true answer than after a false one."""
    right, wrong = (tokenizer.encode(f" {text.VERDICTS[true]}", add_special_tokens=False)[0] for true in (True, False))
    gains = {}
    for row in splits.evaluation(rows=rows):
        values = next(attribute.values for attribute in ATTRIBUTES if row["reference"].rstrip(".") in attribute.values)
        answers = [row["reference"], *(f"{value}." for value in values if f"{value}." != row["reference"])]
        question = row["prompt"][0]["content"]
        guesses = [
            tokenizer.bos_token + text.GUESS.format(question=question, answer=one, verdict="").rstrip() for one in answers
        ]
        inputs = tokenizer(guesses, add_special_tokens=False, return_tensors="pt")  # of equal length: each answer is one word
        with torch.no_grad():
            logits = base(**inputs).logits[:, -1]
        true, *false = (logits[:, right] - logits[:, wrong]).tolist()
        gains.setdefault(WHO[row["known"]], []).extend((true, other) for other in false)
    return {who: pair_accuracy(*zip(*pairs, strict=True))["accuracy"] for who, pairs in gains.items()}


def main() -> None:
    """Print the table, and the verdicts of the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, default=Path("runs/tiny-experiment"), help="folder of the experiment")
    parser.add_argument("--reward", default="reward", help="folder of the reward model within that of a seed")
    options = parser.parse_args()
    disable_progress_bar()
    print(HEAD, flush=True)
    for folder in sorted(options.experiment.glob("seed-*")):
        print(_row(folder.name.removeprefix("seed-"), folder / options.reward), flush=True)
    path = resolve_path("rlhf_recipes.tiny.base")
    shares = judge_as_pretrained(AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    print(f"\nVerdicts of the base, right over wrong: {', '.join(f'{who} {share:.2f}' for who, share in shares.items())}")


def _row(seed: str, output: Path) -> str:
    """Return a row of the table."""
    (result,) = json.loads((output / "evaluation.json").read_text()).values()
    steps = [entry for entry in json.loads((output / "recipe.json").read_text())["log"] if "accuracy" in entry]
    last = steps[-len(steps) // 4 :]  # the last quarter; each batch before it is trained on
    seen = sum(entry["accuracy"] for entry in last) / len(last)

    tokenizer = AutoTokenizer.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(resolve_path("rlhf_recipes.tiny.base"))
    shares = compare_answers(load_reward_adapter(base, output, "reward", tokenizer))
    low, high = result["accuracy"]["interval"]
    cells = [seed, f"{seen:.2f}", f"{result['accuracy']['accuracy']:.3f} [{low:.3f}, {high:.3f}]"]
    cells.append(f"{result['calibration']['ece']:.3f} ({result['calibration']['ece_if_calibrated']:.3f})")
    cells += [f"{shares[who][what]:.2f}" for who in WHO.values() for what in COMPARISONS]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
