"""Does PPO find the optimum? Where every answer can be listed, the optimum is known exactly, and so is the distance from it.

    OMP_NUM_THREADS=1 python benchmarks/closed_form.py --seeds 0 1 2 3 4
    OMP_NUM_THREADS=1 python benchmarks/closed_form.py --dpo

A small Llama with random weights is the reference, a table of random numbers the score r of every answer. The objective
J(pi) = E_pi[r] - kl_coef * KL(pi || reference) has its maximum J* = kl_coef * log E_reference[exp(r / kl_coef)] at
pi* = reference * exp(r / kl_coef) / Z. After training, J is computed by listing all answers, not by sampling. The table has the
share of the gap between J at the start and J* that was closed, and the total variation distance between the policy and pi*, at
the start and at the end, both as means over prompts.

With `--dpo`, DPO trains on preferences instead, in which one answer is chosen over another exactly as often as Bradley and
Terry have it of the scores (logarithms of whole numbers there); its optimum is the same pi*.
"""

import argparse
import itertools
import json
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.training.trainers import DPOTrainer

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig

PROMPTS = 4
WORDS = {1: 24, 2: 8}
"""Words that an answer is made of, EOS among them, by the number of its tokens."""
COMMON = {
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Task:
    """A model, and for each of the prompts the score of each answer, (PROMPTS, answers)."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    prompts: list[str]
    answers: list[tuple[int, ...]]
    scores: Tensor

    def score(self, prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        """Return the score of each answer, as a reward function of TRL."""
        place = {answer: number for number, answer in enumerate(self.answers)}
        return [
            self.scores[self.prompts.index(prompt), place[tuple(ids)]].item()
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]


def make_task(seed: int, length: int) -> Task:
    """Answers of `length` words, or fewer with EOS behind, which is one of the words of the vocabulary."""
    set_seed(seed)
    count = WORDS[length]
    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(count - 1)), *(f"p{number}" for number in range(PROMPTS))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.1,  # so that the reference is not uniform
    )
    # Words that no answer holds get no probability: the answers are then all that there is
    model = LlamaForCausalLM(config)
    model.lm_head = torch.nn.Linear(64, len(words), bias=True)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    model.lm_head.bias.data = torch.tensor([0.0 if 1 <= token <= count else -1e4 for token in range(len(words))])
    model.lm_head.bias.requires_grad_(False)
    answers = _answers(count, length)
    return Task(
        model,
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"),
        [f"p{number}" for number in range(PROMPTS)],
        answers,
        torch.randn(PROMPTS, len(answers)),
    )


def _answers(words: int, length: int) -> list[tuple[int, ...]]:
    if length == 0:
        return [()]
    return [(1,), *((word, *rest) for word in range(2, words + 1) for rest in _answers(words, length - 1))]


@torch.no_grad()
def answer_logps(model: torch.nn.Module, task: Task) -> Tensor:
    """Return the log-probability of every answer to every prompt, (PROMPTS, answers)."""
    longest = max(map(len, task.answers))
    answers = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in task.answers])
    rows = []
    for prompt in task.tokenizer(task.prompts)["input_ids"]:
        ids = torch.cat([torch.tensor(prompt).expand(len(answers), -1), answers], dim=1)
        logps = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        picked = logps.gather(2, answers[..., None])[..., 0]
        rows.append(torch.where(answers > 0, picked, 0.0).sum(1))
    return torch.stack(rows).double()


def objective(logps: Tensor, reference: Tensor, scores: Tensor, kl_coef: float) -> float:
    """J, the mean over prompts."""
    return (logps.exp() * (scores - kl_coef * (logps - reference))).sum(1).mean().item()


def optimum(reference: Tensor, scores: Tensor, kl_coef: float) -> tuple[float, Tensor]:
    """J*, the mean over prompts, and log pi*, (PROMPTS, answers)."""
    unnormalised = reference + scores / kl_coef
    log_z = unnormalised.logsumexp(1, keepdim=True)
    return kl_coef * log_z.mean().item(), unnormalised - log_z


@dataclass(frozen=True)
class Result:
    """What is in a row of the table."""

    start: float
    end: float
    best: float
    distance_at_start: float
    distance: float
    seconds: float

    @property
    def closed(self) -> float:
        """The share of the gap that was closed."""
        return (self.end - self.start) / (self.best - self.start)


def train(task: Task, seed: int, length: int, steps: int, peft: LoraConfig | None = None, **options: Any) -> Result:
    """Trains on the task; `options` go over the arguments."""
    started = time.perf_counter()
    reference = answer_logps(task.model, task)
    arguments = COMMON | {
        "per_device_train_batch_size": 256,
        "num_iterations": 2,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "value_learning_rate": 1e-2,
        "kl_coef": 0.3,
        "max_completion_length": length,
        "seed": seed,
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(folder, **arguments)
        trainer = PPOTrainer(
            task.model,
            task.score,
            args,
            train_dataset=Dataset.from_dict({"prompt": task.prompts}),
            processing_class=task.tokenizer,
            peft_config=peft,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return _result(task, trainer.model, reference, args.kl_coef, started)


def train_by_dpo(task: Task, seed: int, steps: int, peft: LoraConfig | None = None, **options: Any) -> Result:
    """Trains on exact preferences between answers of one token; `options` go over the arguments."""
    started = time.perf_counter()
    task = replace(task, scores=task.scores.exp().mul(2).round().clamp(1, 8).log())
    reference = answer_logps(task.model, task)
    arguments = COMMON | {
        "per_device_train_batch_size": 512,
        "max_steps": steps,
        "learning_rate": 3e-3,
        "beta": 0.3,
        "max_length": 2,  # the prompt and one token: TRL puts EOS behind every answer
        "seed": seed,
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(folder, **arguments)
        data = exact_preferences(task)
        trainer = DPOTrainer(task.model, args, train_dataset=data, processing_class=task.tokenizer, peft_config=peft)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return _result(task, trainer.model, reference, args.beta, started)


def exact_preferences(task: Task, neighbours: int = 3) -> Dataset:
    """Pairs of answers, each as often as Bradley and Terry have it: chosen in proportion to exp(score), a whole number.

    Each answer is compared with a few others only; that all are connected is enough for one optimum.
    """
    rows = {"prompt": [], "chosen": [], "rejected": []}
    words = task.tokenizer.convert_ids_to_tokens([answer[0] for answer in task.answers])
    weights = task.scores.exp().round().long().tolist()
    for prompt, row in zip(task.prompts, weights, strict=True):
        for one, step in itertools.product(range(len(words)), range(1, neighbours + 1)):
            other = (one + step) % len(words)
            for chosen, rejected in ((one, other), (other, one)):
                rows["prompt"] += [f"{prompt} "] * row[chosen]
                rows["chosen"] += [words[chosen]] * row[chosen]
                rows["rejected"] += [words[rejected]] * row[chosen]
    return Dataset.from_dict(rows)


def _result(task: Task, model: torch.nn.Module, reference: Tensor, kl_coef: float, started: float) -> Result:
    logps, scores = answer_logps(model.eval(), task), task.scores.double()
    best, log_best = optimum(reference, scores, kl_coef)
    return Result(
        start=objective(reference, reference, scores, kl_coef),
        end=objective(logps, reference, scores, kl_coef),
        best=best,
        distance_at_start=_total_variation(reference, log_best),
        distance=_total_variation(logps, log_best),
        seconds=time.perf_counter() - started,
    )


def _total_variation(logps: Tensor, others: Tensor) -> float:
    return 0.5 * (logps.exp() - others.exp()).abs().sum(1).mean().item()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arguments", type=json.loads, default={}, help='of the trainer, as JSON: {"kl_estimator": "k3"}')
    parser.add_argument("--dpo", action="store_true", help="train by DPO, on answers of one token")
    options = parser.parse_args()
    disable_progress_bars()
    print("| tokens | answers | seed | J at the start | J | J* | gap closed | TV to pi*: start | end | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for length in [1] if options.dpo else options.lengths:
        for seed in options.seeds:
            task = make_task(seed, length)
            if options.dpo:
                result = train_by_dpo(task, seed, options.steps, **options.arguments)
            else:
                result = train(task, seed, length, options.steps, **options.arguments)
            cells = [str(length), str(len(task.answers)), str(seed)]
            cells += [f"{value:.4f}" for value in (result.start, result.end, result.best)]
            cells += [f"{100 * result.closed:.2f}%", f"{result.distance_at_start:.3f}", f"{result.distance:.3f}"]
            print(f"| {' | '.join([*cells, f'{result.seconds:.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
