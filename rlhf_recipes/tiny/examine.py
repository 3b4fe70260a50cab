"""Print how truthful policies of the tiny world are about held-out people.

python -m rlhf_recipes.tiny.examine runs/tiny/sft
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.metrics.truthfulness import Truthfulness
from rlhf_recipes.generation.answers import sample
from rlhf_recipes.tiny import splits

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

BASE = "rlhf_recipes.tiny.base"
ROWS, MAX_NEW_TOKENS, EXAMPLES = 600, 12, 8


@dataclass(frozen=True)
class Examination:
    """Shares of answers about known and unknown people, entropies (nats), examples."""

    known: dict[str, float]
    unknown: dict[str, float]
    known_entropy: float
    unknown_entropy: float
    examples: list[str]


def load_policy(adapter: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the tiny base, with an adapter if one is named."""
    base = resolve_path(BASE)
    model = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, trust_remote_code=False)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(adapter or base, trust_remote_code=False)


def examine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0, seed: int = 0) -> Examination:
    """Ask `ROWS` questions about people of the evaluation split, half of them known."""
    questions = splits.evaluation(rows=ROWS)
    known = torch.tensor(questions["known"])
    sampled = sample(
        model, tokenizer, questions["prompt"], temperature=temperature, max_new_tokens=MAX_NEW_TOKENS, batch_size=300, seed=seed
    )
    answers = [answer.text.strip() for answer in sampled]
    entropy = first_token_entropy(model, tokenizer, questions["prompt"])

    def shares(rows: torch.Tensor) -> dict[str, float]:
        chosen = rows.nonzero().flatten().tolist()
        return Truthfulness().compute(
            predictions=[answers[row] for row in chosen], references=[questions["reference"][row] for row in chosen]
        )

    return Examination(
        known=shares(known),
        unknown=shares(~known),
        known_entropy=entropy[known].mean().item(),
        unknown_entropy=entropy[~known].mean().item(),
        examples=[_example(questions[row], answers[row]) for row in range(EXAMPLES)],
    )


def _example(row: dict[str, Any], answer: str) -> str:
    who, question = "known" if row["known"] else "unknown", row["prompt"][0]["content"]
    return f"  {who:8} {question:34} {answer:18} (truth: {row['reference']})"


@torch.no_grad()
def first_token_entropy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[list[dict[str, str]]]
) -> torch.Tensor:
    """Return the entropy of the answer's first token in nats, shape (prompts,).

    The token names the town or the job.
    """
    inputs = tokenizer.apply_chat_template(
        list(prompts),
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    log_probs = model(**inputs, logits_to_keep=1).logits[:, -1].log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def table_row(name: str, result: Examination) -> str:
    """Return a row of the table that `TABLE_HEAD` begins."""
    cells = [*result.known.values(), result.known_entropy, *result.unknown.values(), result.unknown_entropy]
    return f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"


TABLE_HEAD = (
    "| policy | known: right | abstains | made up | entropy | unknown: right | abstains | made up | entropy |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table of the base and the named adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", help="folders of adapters on the tiny base")
    disable_progress_bar()
    print("Answers sampled at temperature 1 about people whom no stage was trained on. Entropy in nats (uniform: 2.48).\n")
    print(TABLE_HEAD)
    for adapter in [None, *parser.parse_args().adapters]:
        result = examine(*load_policy(adapter))
        print(table_row(adapter or "base", result))
    print(f"\n{adapter or 'base'} answers:\n", *result.examples, sep="\n")


if __name__ == "__main__":
    main()
