"""Answers of a policy to prompts, for every metric of answers."""

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> list[str]:
    """One answer to each conversation: sampled from the model's own distribution at `temperature`, or greedy at 0.

    Nothing else shapes the distribution, whatever the model's generation config says. The model's mode and the global random
    state are left as they were.
    """
    answers = []
    with _asked(model, tokenizer, temperature), torch.random.fork_rng(devices=_devices(model)):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            answers += _answer_batch(model, tokenizer, prompts[start : start + batch_size], max_new_tokens)
    return answers


@contextlib.contextmanager
def _asked(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float) -> Iterator[None]:
    """The model in eval mode with a generation config of its own, since `generate` fills what is unset from the stored one."""
    # A PeftModel hands its own to its base at every call, and the base keeps it.
    holders = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    stored, was_training = model.generation_config, model.training
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**sampling, **ids)
    model.eval()
    try:
        yield
    finally:
        for holder in holders:
            holder.generation_config = stored
        model.train(was_training)


def _devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict[str, str]]], max_new_tokens: int
) -> list[str]:
    inputs = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
