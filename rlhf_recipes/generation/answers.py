"""Answers of a policy to prompts, and how probable they are."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.models.lm_head import token_log_probs
from rlhf_recipes.models.tokenizer import answer_text

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """An answer of a policy."""

    text: str  # without special tokens and what the chat template itself writes around an answer
    ids: tuple[int, ...]  # with the EOS if it has one
    ended: bool  # by EOS; False where it was cut off


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Answer]:
    """Sample one answer to each prompt, greedily at temperature 0.

    Answers come from the model's own distribution at `temperature`. The model's generation config is ignored; its mode and
    the global random state are restored.
    """
    answers = []
    devices = [model.device] if model.device.type == "cuda" else []
    with _generation_config(model, tokenizer, temperature), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            answers += _answer_batch(model, tokenizer, prompts[start : start + batch_size], max_new_tokens)
    return answers


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    streamer: TextStreamer,
    stopped: Callable[[], bool],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
) -> Answer:
    """Sample one answer as `sample` does, with the global random state.

    `streamer` receives each token. `stopped` is called after each token, and True ends the answer. `top_p` samples from the
    likeliest tokens that have this much of the probability.
    """
    with _generation_config(model, tokenizer, temperature, top_p=top_p):
        options = {"streamer": streamer, "stopping_criteria": [_Stop(stopped)]}
        (answer,) = _answer_batch(model, tokenizer, [prompt], max_new_tokens, **options)
    return answer


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


@contextlib.contextmanager
def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float, **options: float
) -> Iterator[None]:
    """Set eval mode and a generation config of our own."""
    # A PeftModel hands its config to its base at every call if it is one of a causal model, and not otherwise
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    stored, was_training = [holder.generation_config for holder in holders], model.training
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, **options} if temperature else {"do_sample": False}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for holder in holders:
        holder.generation_config = GenerationConfig(**sampling, **ids)
    model.eval()
    try:
        yield
    finally:
        for holder, config in zip(holders, stored, strict=True):
            holder.generation_config = config
        model.train(was_training)


def _answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    **options: Any,
) -> list[Answer]:
    sequences = encode_prompts(tokenizer, prompts)
    inputs = tokenizer.pad({"input_ids": sequences}, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    answers = []
    for prompt, ids in zip(prompts, output, strict=True):
        ended = tokenizer.eos_token_id in ids
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids
        text = answer_text(tokenizer, prompt, tokenizer.decode(ids, skip_special_tokens=True), ids)
        answers.append(Answer(text, tuple(ids), ended))
    return answers


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of each prompt, with the generation prompt."""
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    return tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the log-probability of each answer with its EOS, (N,), in nats.

    The answers are this model's or another's. The adapters that are active count, and the model's mode is restored.
    """
    prompt_ids, was_training = encode_prompts(tokenizer, prompts), model.training
    starts = [len(ids) for ids in prompt_ids]
    sequences = [[*ids, *answer.ids] for ids, answer in zip(prompt_ids, answers, strict=True)]
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))  # similar lengths together: little padding
    result = np.zeros(len(sequences))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [sequences[row] for row in rows]}, padding_side="right", return_tensors="pt")
            inputs = inputs.to(model.device)
            wanted = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            for place, row in enumerate(rows):
                wanted[place, starts[row] : len(sequences[row])] = True
            logps = token_log_probs(model, **inputs, wanted=wanted, temperature=temperature).double().cpu()
            result[rows] = [of_answer.sum() for of_answer in logps.split([len(answers[row].ids) for row in rows])]
    finally:
        model.train(was_training)
    return result
