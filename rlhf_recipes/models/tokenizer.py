"""Tokenizers: EOS, PAD and chat template, and token ids of a prompt with its completion."""

import logging
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.models.loading import model_path

from jinja2 import TemplateError
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

logger = logging.getLogger(__name__)
_OF_TOKENIZERS = ("eos_token", "chat_template_path", "trust_remote_code")
# For tokenizers without a chat template. Plain words, since a new special token would need an embedding, and LoRA trains none;
# single line breaks, which every pretraining text has. EOS stands inside the assistant's turn, so that it is learnt.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def load_tokenizer(arguments: ModelConfig, *groups: Any, start_from: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model, with a chat template, and an EOS that ends a turn and is not PAD.

    `eos_token` and `chat_template_path` of `groups` are honoured. Without a template of its own the tokenizer gets
    `PLAIN_CHAT_TEMPLATE`.

    Args:
        arguments: as in `load_model`.
        groups: the recipe's other arguments, of which some have `eos_token`, `chat_template_path` and `trust_remote_code`.
        start_from: the folder of an earlier stage, whose tokenizer, with the template and the EOS that the policy was taught,
            is taken where there is one.

    Raises:
        RecipeError: if there is no tokenizer, a token is not in its vocabulary, or its template never ends a turn by EOS.
    """
    taught = start_from is not None and (Path(start_from) / "tokenizer_config.json").is_file()
    path = str(start_from) if taught else model_path(arguments)
    options = {name: value for group in groups for name in _OF_TOKENIZERS if (value := getattr(group, name, None))}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            revision="main" if taught else arguments.model_revision,
            trust_remote_code=options.get("trust_remote_code", False),
        )
        _set_eos(tokenizer, options.get("eos_token"))
        _set_pad(tokenizer)
        _set_chat_template(tokenizer, options.get("chat_template_path"))
        _check_turn_ends(tokenizer)
    except RecipeError:
        raise
    except Exception as error:  # the tokenizers' own is nothing more
        reason = explain_load_error(path, error)
        if Path(path).is_dir():
            reason = f"no usable tokenizer there ({reason}); the folder needs tokenizer.json and tokenizer_config.json"
        raise RecipeError(f"model_name_or_path: {path}: {reason}") from error
    return tokenizer


def _set_eos(tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> None:
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            own = f", whose own is '{tokenizer.eos_token}': leave the key out for that one" if tokenizer.eos_token else ""
            raise RecipeError(f"eos_token: '{eos_token}' is not in the vocabulary of {tokenizer.name_or_path}{own}")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise RecipeError(f"{tokenizer.name_or_path} has no EOS, so answers would never end: set `eos_token`")


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keeps PAD, or picks one that is not EOS: a model for which they are one cannot be seen to stop."""
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    # No text ever holds these, so their embeddings need not be trained; a new token would need a larger embedding matrix.
    special = [token for token in tokenizer.get_added_vocab() if token not in tokenizer.all_special_tokens]
    spare = [token for word in ("pad", "reserved", "unused") for token in special if word in token.lower()]
    # The last of the vocabulary is a rare word: where it stands in a text it is not masked, for masks go by length.
    last = max(set(tokenizer.get_vocab()) - {tokenizer.eos_token}, key=tokenizer.get_vocab().get)
    candidates = [*spare, tokenizer.unk_token, tokenizer.bos_token, last]
    tokenizer.pad_token = next(token for token in candidates if token not in (None, tokenizer.eos_token))
    logger.warning("%s has no PAD besides its EOS: '%s' serves as PAD", tokenizer.name_or_path, tokenizer.pad_token)


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    if path is None:
        if tokenizer.chat_template is None:
            logger.warning("%s has no chat template: one of plain words is added", tokenizer.name_or_path)
            tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        return
    if Path(path).suffix in (".jinja", ".j2"):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"chat_template_path: {path}: cannot be read ({first_line(error)})") from error
        return
    try:
        source = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as in `load_tokenizer`
        reason = explain_load_error(path, error)
        raise RecipeError(f"chat_template_path: {path}: neither a .jinja file nor a tokenizer: {reason}") from error
    if source.chat_template is None:
        raise RecipeError(f"chat_template_path: the tokenizer {path} has no chat template")
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in source.get_added_vocab() if t in source.chat_template and t not in vocabulary]
    if missing:
        raise RecipeError(
            f"chat_template_path: the template of {path} uses {', '.join(missing)}, which {tokenizer.name_or_path} does not "
            "know. New tokens need trained embeddings, which LoRA leaves alone: leave `chat_template_path` out for a template "
            "of plain words, or write one in a .jinja file"
        )
    tokenizer.chat_template = source.chat_template


def _check_turn_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template whose assistant turns do not end by EOS: the model would never learn to stop."""
    answer = "answer"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:  # a program's
        raise RecipeError(f"the chat template of {tokenizer.name_or_path} is not valid: {first_line(error)}") from error
    if answer not in text:
        raise RecipeError(
            f"the chat template of {tokenizer.name_or_path} leaves out what the assistant says: set `chat_template_path`"
        )
    end = text[text.rindex(answer) + len(answer) :]
    ids = tokenizer(end, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id not in ids:
        ends = [token for token in tokenizer.get_added_vocab() if token in end]
        remedy = f"set `eos_token: '{ends[0]}'`" if ends else "put `eos_token` after the assistant's content in the template"
        raise RecipeError(
            f"the chat template of {tokenizer.name_or_path} ends an answer by {end!r}, and its EOS is '{tokenizer.eos_token}': "
            f"the model would never learn to stop; {remedy}"
        )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> list[int]:
    """Token ids of a prompt and its completion, as TRL's `RewardTrainer` has them.

    Args:
        tokenizer: with a chat template, where the prompt is a list of messages.
        prompt: a text, or a list of messages.
        completion: likewise; EOS is added to a text that does not end by it.
    """
    if isinstance(prompt, str):
        end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return tokenizer(text=prompt + completion + end)["input_ids"]
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)["input_ids"]


def template_gap(tokenizer: PreTrainedTokenizerBase) -> str:
    """The blank text that the chat template puts between a generation prompt and the answer; "" where there is none."""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    gap = whole.removeprefix(prompt).partition("answer")[0]
    return gap if whole.startswith(prompt) and gap.isspace() else ""
