"""How truthful a policy of the tiny world is about held-out people."""

from dataclasses import dataclass

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.metrics.texts import truthfulness
from rlhf_recipes.generation.answers import sample
from rlhf_recipes.tiny import splits

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE = "rlhf_recipes.tiny.base"
ROWS, MAX_NEW_TOKENS = 600, 12


@dataclass(frozen=True)
class Examination:
    """Shares of answers about known and unknown people, and entropies in nats."""

    known: dict[str, float]
    unknown: dict[str, float]
    known_entropy: float
    unknown_entropy: float


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
    options = {"temperature": temperature, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 300, "seed": seed}
    answers = [answer.text.strip() for answer in sample(model, tokenizer, questions["prompt"], **options)]
    entropy = _first_token_entropy(model, tokenizer, list(questions["prompt"]))

    def shares(rows: torch.Tensor) -> dict[str, float]:
        chosen = rows.nonzero().flatten().tolist()
        return truthfulness([answers[row] for row in chosen], [questions["reference"][row] for row in chosen])

    entropies = entropy[known].mean().item(), entropy[~known].mean().item()
    return Examination(shares(known), shares(~known), *entropies)


@torch.no_grad()
def _first_token_entropy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict[str, str]]]
) -> torch.Tensor:
    """Return the entropy of the first token (town or job) in nats, (prompts,)."""
    options = {"padding": True, "tokenizer_kwargs": {"padding_side": "left"}, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **options)
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
