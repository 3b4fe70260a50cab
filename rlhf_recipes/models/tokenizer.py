"""Load tokenizers, encode prompts with completions, and read answers."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context, first_line
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.models.loading import model_path

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

logger = logging.getLogger(__name__)
# For tokenizers without a chat template. Plain words: a new special token would need an embedding, and LoRA trains none. Single
# line breaks: every pretraining text has them. EOS is inside the assistant's turn, so that it is learnt.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_PROBE = "Is 1 + 1 = 2?\nYes: Straße, 东京."


def load_tokenizer(arguments: ModelConfig, *groups: Any, start_from: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a chat template, EOS, and a PAD that is not EOS.

    A tokenizer without a template gets `PLAIN_CHAT_TEMPLATE`. One that ends every text with EOS does so no more: prompts would
    end before their answer.

    Args:
        arguments: as in `load_model`.
        groups: the recipe's other arguments; some have `eos_token`, `chat_template_path` and `trust_remote_code`.
        start_from: folder of an earlier stage. Its tokenizer, with the template and EOS that the policy learnt, comes before
            that of the base.

    Raises:
        RecipeError: if there is no tokenizer, a token is not in its vocabulary, or its template never ends a turn with EOS.
    """
    saved = start_from is not None and (Path(start_from) / "tokenizer_config.json").is_file()
    path = str(start_from) if saved else model_path(arguments)
    names = ("eos_token", "chat_template_path", "trust_remote_code")
    options = {name: value for group in groups for name in names if (value := getattr(group, name, None))}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision="main" if saved else arguments.model_revision,
            trust_remote_code=options.get("trust_remote_code", False),
        )
        _set_eos(tokenizer, options.get("eos_token"))
        _set_pad(tokenizer)
        _end_no_text(tokenizer)
        _set_chat_template(tokenizer, options.get("chat_template_path"))
        _check_turn_ends(tokenizer)
    except RecipeError:
        raise
    except Exception as error:  # tokenizers raises plain `Exception`
        reason = explain_load_error(path, error)
        if Path(path).is_dir():
            reason = f"no usable tokenizer there ({reason}). Fix: add tokenizer.json and tokenizer_config.json"
        raise RecipeError(f"model_name_or_path: {path}: {reason}") from error
    return tokenizer


def _set_eos(tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> None:
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            fix = f". Fix: leave the key out for '{tokenizer.eos_token}'" if tokenizer.eos_token else ""
            raise RecipeError(f"eos_token: '{eos_token}' is not in the vocabulary of {tokenizer.name_or_path}{fix}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise RecipeError(f"{tokenizer.name_or_path} has no EOS, so completions would never end. Fix: set `eos_token`")


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Choose a PAD that is not EOS: a masked EOS is never learned."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    # No text contains these, so their embeddings need no training; a new token would need a larger embedding matrix
    special = [token for token in tokenizer.get_added_vocab() if token not in tokenizer.all_special_tokens]
    spare = [token for word in ("pad", "reserved", "unused") for token in special if word in token.lower()]
    # The last token of the vocabulary is rare; in a text it is not masked, since masks go by length
    last = max(set(tokenizer.get_vocab()) - {tokenizer.eos_token}, key=tokenizer.get_vocab().get)
    candidates = [*spare, tokenizer.unk_token, tokenizer.bos_token, last]
    tokenizer.pad_token = next(token for token in candidates if token not in (None, tokenizer.eos_token))
    logger.info("%s has no PAD other than EOS: '%s' becomes PAD", tokenizer.name_or_path, tokenizer.pad_token)


def _end_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep a tokenizer from adding EOS, or any other token, at the end of texts."""
    if not (added := _added_tokens(tokenizer))[1]:
        return
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
    if _added_tokens(tokenizer)[1] and (backend := getattr(tokenizer, "backend_tokenizer", None)):
        tokens = tokenizer.convert_ids_to_tokens(added[0])
        backend.post_processor = TemplateProcessing(
            single=[*tokens, "$A"], pair=[*tokens, "$A", "$B"], special_tokens=list(zip(tokens, added[0], strict=True))
        )
    if _added_tokens(tokenizer) != (added[0], []):
        raise RecipeError(
            f"{tokenizer.name_or_path}: its tokenizer adds {tokenizer.convert_ids_to_tokens(added[1])} to every text, so that "
            "prompts end before their answer. Fix: set `add_eos_token` to false in tokenizer_config.json"
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer adds before and after a text."""
    ids, text = (tokenizer(_PROBE, add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = range(len(ids) - len(text) + 1)
    start = next((start for start in starts if ids[start : start + len(text)] == text), 0) if text else len(ids)
    return ids[:start], ids[start + len(text) :]


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    if path is None:
        if tokenizer.chat_template is None:
            logger.warning("%s has no chat template: it gets one of plain words", tokenizer.name_or_path)
            tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        return
    if Path(path).suffix in (".jinja", ".j2"):
        with error_context(f"chat_template_path: {path}: cannot be read", OSError, UnicodeDecodeError):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    try:
        source = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        reason = explain_load_error(path, error)
        raise RecipeError(f"chat_template_path: {path}: neither a .jinja file nor a tokenizer: {reason}") from error
    if source.chat_template is None:
        raise RecipeError(f"chat_template_path: the tokenizer {path} has no chat template")
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in source.get_added_vocab() if t in source.chat_template and t not in vocabulary]
    if missing:
        raise RecipeError(
            f"chat_template_path: the template of {path} uses {', '.join(missing)}, which {tokenizer.name_or_path} does not "
            "have. New tokens need trained embeddings, and LoRA trains none. Fix: leave the key out for a template of plain "
            "words, or write one in a .jinja file"
        )
    tokenizer.chat_template = source.chat_template


def _check_turn_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template without EOS after assistant turns: none would be learned."""
    where, answer = f"the chat template of {tokenizer.name_or_path}", "answer"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    with error_context(f"{where} is not valid", Exception):  # a template is a program
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    if answer not in text:
        raise RecipeError(f"{where} leaves out the assistant's content. Fix: set `chat_template_path`")
    end = text[text.rindex(answer) + len(answer) :]
    if tokenizer.eos_token_id not in tokenizer(end, add_special_tokens=False)["input_ids"]:
        ends = [token for token in tokenizer.get_added_vocab() if token in end]
        fix = f"set `eos_token: '{ends[0]}'`" if ends else "put `eos_token` after the assistant's content in the template"
        raise RecipeError(
            f"{where} ends completions with {end!r}, and EOS is '{tokenizer.eos_token}': the model would never learn to stop. "
            f"Fix: {fix}"
        )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> list[int]:
    """Return token ids of a prompt and its completion, as in TRL's `RewardTrainer`.

    Both are texts, or lists of messages. A text without EOS at its end gets one.
    """
    if isinstance(prompt, str):
        end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return tokenizer(text=prompt + completion + end)["input_ids"]
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)["input_ids"]


def template_text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> tuple[str, str]:
    """Return what the chat template itself writes before and after an answer.

    Before: from the generation prompt to the content, as Qwen3's empty `<think>`. After: from the content to EOS. A policy is
    taught both, and samples both. A prompt that is a text has neither.
    """
    if isinstance(prompt, str):
        return "", ""
    content = "Content5150"
    turns = [*prompt, {"role": "assistant", "content": content}]
    generation_prompt = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    conversation = tokenizer.apply_chat_template(turns, tokenize=False)
    # Some templates open a thought in the generation prompt only: what comes after the common part counts
    common = os.path.commonprefix([generation_prompt, conversation])  # noqa: RUF071 - texts
    before, _, after = conversation[len(common) :].rpartition(content)
    return before, after.partition(tokenizer.eos_token)[0]


def answer_text(tokenizer: PreTrainedTokenizerBase, prompt: Any, text: str, ids: Sequence[int] | None = None) -> str:
    """Return a sampled text without what the chat template itself writes.

    Args:
        tokenizer: of the policy.
        prompt: a text, or a list of messages.
        text: sampled, without special tokens.
        ids: the sampled tokens, which show special tokens that the template wrote.
    """
    before, after = template_text(tokenizer, prompt)
    if before and ids is not None:
        if tokenizer.decode(ids, skip_special_tokens=True).strip() != text.strip():
            return text  # it has been stripped before, as TRL's completions by `PPOTrainer`
        own = tokenizer(before, add_special_tokens=False)["input_ids"]
        before = tokenizer.decode(own, skip_special_tokens=True) if [*ids[: len(own)]] == own else before
    if not text.startswith(before) and before.strip() and text.lstrip().startswith(before.strip()):
        text, before = text.lstrip(), before.strip()  # an empty answer, or other space
    return text.removeprefix(before).removesuffix(after if after.strip() else "")


def answer_messages(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    ids: Sequence[Sequence[int]] | None = None,
) -> list[Any]:
    """Return TRL's completions, texts or messages, with `answer_text` as content."""
    result = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(completion, str) or not completion:
            result.append(completion)
            continue
        first, *others = completion
        content = answer_text(tokenizer, prompt, first.get("content") or "", ids[row] if ids else None)
        result.append([{**first, "content": content}, *others])
    return result


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer or chat template that differs from the one saved in `folder`.

    Raises:
        RecipeError: names both tokenizers and the differences.
    """
    try:
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _end_no_text(saved)
    except Exception as error:  # tokenizers raises plain `Exception`
        raise RecipeError(
            f"{folder}: no readable tokenizer to compare with the policy's ({first_line(error)}). Fix: save it there"
        ) from error
    differences = []
    if saved.get_vocab() != tokenizer.get_vocab():
        differences.append(f"vocabulary ({len(saved)} tokens against {len(tokenizer)})")
    if saved.chat_template != tokenizer.chat_template:
        differences.append(f"chat template ({saved.chat_template!r:.60} against {tokenizer.chat_template!r:.60})")
    for name in ("bos_token", "eos_token"):
        if getattr(saved, name) != getattr(tokenizer, name):
            differences.append(f"{name} ('{getattr(saved, name)}' against '{getattr(tokenizer, name)}')")
    if not differences and saved(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        differences.append("the way it splits text into tokens")
    if differences:
        raise RecipeError(
            f"the tokenizers in {folder} and of the model in use, {tokenizer.name_or_path}, differ in "
            f"{', '.join(differences)}. Fix: train both with one tokenizer"
        )
