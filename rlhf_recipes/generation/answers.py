"""Answers of a policy to prompts, for every metric of answers, and how probable they are."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer
from trl.trainer.utils import selective_log_softmax

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a policy said.

    Parameters:
        text: without special tokens; space around it as it came.
        ids: its tokens, with the EOS where it has one.
        ended: whether it ended by EOS, and was not cut off.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], **options: Any) -> list[str]:
    """The texts of `sample`, which has the same options, without surrounding space."""
    return [one.text.strip() for one in sample(model, tokenizer, prompts, **options)]


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
    """One answer to each prompt: sampled from the model's own distribution at `temperature`, or greedy at 0.

    Nothing else shapes the distribution, whatever the model's generation config says. The model's mode and the global random
    state are left as they were.
    """
    answers = []
    with _asked(model, tokenizer, temperature), torch.random.fork_rng(devices=_devices(model)):
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
    """One answer, as `sample` draws it, told to `streamer` token by token, with the global random state.

    Args:
        model: as in `sample`.
        tokenizer: likewise.
        prompt: a text, or a conversation.
        streamer: of Transformers.
        stopped: asked after every token; if it says so, the answer ends there.
        temperature: as in `sample`.
        top_p: the share of the probability, from the likeliest token on, that is sampled from.
        max_new_tokens: after which the answer is cut off.
    """
    with _asked(model, tokenizer, temperature, top_p=top_p):
        options = {"streamer": streamer, "stopping_criteria": [_Stop(stopped)]}
        (one,) = _answer_batch(model, tokenizer, [prompt], max_new_tokens, **options)
    return one


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)


@contextlib.contextmanager
def _asked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float, **shaping: float) -> Iterator[None]:
    """The model in eval mode with a generation config of its own, since `generate` fills what is unset from the stored one."""
    # A PeftModel of a causal model hands its own to its base at every call, which keeps it; one of no task leaves the base's.
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    stored, was_training = [holder.generation_config for holder in holders], model.training
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, **shaping} if temperature else {"do_sample": False}
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


def _devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


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
    for ids in output:
        ended = tokenizer.eos_token_id in ids
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids
        answers.append(Answer(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), ended))
    return answers


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: a text as it is, a conversation up to where the answer begins."""
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
    """The log-probability of each answer, the sum over its tokens and the EOS where it has one; nats, (N,).

    Of the distribution at `temperature`, so that of a sampled answer it is the log of the chance that it had. It depends on
    the batches by rounding only; the model's mode is left as it was.

    Args:
        model: a causal language model, with its adapters as they are.
        tokenizer: of the model.
        prompts: (N,) texts or conversations.
        answers: (N,) from `sample`, by this model or another.
        temperature: above 0.
        batch_size: answers a forward pass.
    """
    asked, was_training = encode_prompts(tokenizer, prompts), model.training
    starts = [len(ids) for ids in asked]
    sequences = [[*ids, *one.ids] for ids, one in zip(asked, answers, strict=True)]
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))  # alike lengths together: little padding
    result = np.zeros(len(sequences))
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [sequences[row] for row in rows]}, padding_side="right", return_tensors="pt")
            inputs = inputs.to(model.device)
            first = min(starts[row] for row in rows)  # logits are large: none of what all prompts share in length
            kept = inputs["input_ids"].shape[1] - first + 1
            logits = model(**inputs, logits_to_keep=kept).logits[:, :-1].float() / temperature
            logps = selective_log_softmax(logits, inputs["input_ids"][:, first:]).double().cpu().numpy()
            for place, row in enumerate(rows):
                result[row] = logps[place, starts[row] - first : len(sequences[row]) - first].sum()
    finally:
        model.train(was_training)
    return result
