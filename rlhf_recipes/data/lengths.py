"""Rows with more tokens than `max_length`."""

import itertools
import logging
import math
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import trained_on_conversations
from rlhf_recipes.data.sources import BATCH, SHOWN

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

logger = logging.getLogger(__name__)


def check_lengths(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, long_rows: str, where: str
) -> tuple[Dataset, dict[str, int]]:
    """Find rows that have more than `max_length` tokens as TRL encodes them.

    A row is `truncated` if it loses only the end of an answer or text. Under `long_rows="truncate"` it stays, and the trainer
    cuts it ("keep_start"). A row is `unusable` if nothing of the answer would remain, or if answers of a pair or ranking would
    be cut to the same tokens; it is dropped under "truncate" too. The length of a pair or ranking is that of the prompt with
    the longest answer. Prompts alone are unusable if they are too long.

    Args:
        dataset: in the columns of one of the `Kind`s.
        tokenizer: with the chat template of the stage.
        max_length: in tokens; None: no limit.
        long_rows: `"truncate"`, `"drop"` (both sorts) or `"error"`.
        where: names the data in messages (`"train"`).

    Returns:
        The rows that stay, and the counts `rows`, `truncated`, `unusable`, `dropped`.

    Raises:
        RecipeError: for long rows under `"error"`, no rows left, or conversations that the chat template rejects.
    """
    _check_template(dataset, tokenizer, where)
    _warn_of_plain_prompts(dataset, tokenizer, where)
    if max_length is None:
        return dataset, {"rows": len(dataset), "truncated": 0, "unusable": 0, "dropped": 0}
    verdicts = _verdicts(dataset, tokenizer, max_length)
    truncated, unusable = verdicts.count("truncated"), verdicts.count("unusable")
    counts = f"{where}: of {len(dataset)} rows, {truncated} lose the end of an answer or text at `max_length: {max_length}`"
    counts += f", and {unusable} are too long to be used"
    if long_rows == "error" and (truncated or unusable):
        # Row numbers of the file are lost by now: the text of a row finds it
        rows = [_beginning(dataset[row]) for row, verdict in enumerate(verdicts) if verdict][:SHOWN]
        raise RecipeError(f"{counts} ({', '.join(rows)}). Fix: raise `max_length`, or set `long_rows` to `truncate` or `drop`.")
    rejected = {"unusable", "truncated"} if long_rows == "drop" else {"unusable"}
    keep = [row for row, verdict in enumerate(verdicts) if verdict not in rejected]
    if truncated or unusable:
        logger.warning("%s; %d are dropped", counts, len(dataset) - len(keep))
    if not keep:
        raise RecipeError(f"{counts}: no row is left. Fix: raise `max_length`.")
    report = {"rows": len(keep), "truncated": truncated, "unusable": unusable, "dropped": len(dataset) - len(keep)}
    kept = dataset if len(keep) == len(dataset) else dataset.select(keep)
    _warn_beyond_context(kept, tokenizer, max_length, where)
    return kept, report


def drop_overlong_mode(long_rows: str) -> str:
    """Return `long_rows` for data that cannot be cut: `"truncate"` becomes `"drop"`."""
    return "error" if long_rows == "error" else "drop"


# --- Warnings --------------------------------------------------------------------------------------------


def _warn_beyond_context(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str) -> None:
    context = tokenizer.model_max_length
    if context < max_length and (beyond := len(dataset) - _verdicts(dataset, tokenizer, context).count("")):
        logger.warning(
            "%s: %d of %d rows have more than %d tokens, the `model_max_length` of %s. Most models write nonsense beyond it.",
            where,
            beyond,
            len(dataset),
            context,
            tokenizer.name_or_path,
        )


def _warn_of_plain_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Warn of plain-text prompts after a stage on conversations, or in a first one."""
    if "prompt" not in dataset.column_names or not isinstance(dataset[0]["prompt"], str):
        return
    if trained_on_conversations(tokenizer.name_or_path):
        logger.warning(
            "%s: the prompts are plain text, and %s was trained on conversations. Its chat template is not used, and answers "
            "may be nonsense. To make conversations of the prompts, set `column_mapping: {prompt: instruction}`.",
            where,
            tokenizer.name_or_path,
        )
    elif "completion" in dataset.column_names and where == "train":
        logger.warning(
            "train: `prompt` and `completion` are plain text, so the completion follows the prompt without the chat template. "
            "For questions and answers, set `column_mapping: {prompt: instruction, completion: output}`."
        )


def _check_template(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Reject conversations that the chat template rejects, often for a system turn."""
    seen: set[tuple[str, ...]] = set()
    for row in dataset if tokenizer.chat_template else ():
        conversation = _split_answers(row)[1][0]
        if isinstance(conversation, str):
            return
        roles = tuple(message["role"] for message in conversation)
        if roles in seen:
            continue
        seen.add(roles)
        try:
            tokenizer.apply_chat_template(conversation, tokenize=False)
        except TemplateError as error:
            raise RecipeError(
                f"{where}: the chat template of {tokenizer.name_or_path} rejects the turns {', '.join(roles)} of the row that "
                f"begins {_beginning(row)}: {first_line(error)}. Fix: change the row, or set `chat_template_path`."
            ) from error


def _beginning(row: dict[str, Any], length: int = 40) -> str:
    conversation = _split_answers(row)[1][0]
    text = conversation if isinstance(conversation, str) else " ".join(message["content"] for message in conversation)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


# --- Verdicts --------------------------------------------------------------------------------------------


def _verdicts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Return "" (fits), "truncated" or "unusable" for each row."""
    names = ("text", "messages", "prompt", "completion", "chosen", "rejected", "completions")
    names = [name for name in names if name in dataset.column_names]
    counter = _TokenCounter(tokenizer)
    verdicts: list[str] = []
    for batch in dataset.select_columns(names).iter(BATCH):
        rows = [_split_answers(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        suspects = {
            place: (prompt, sequences)
            for place, (prompt, sequences) in enumerate(rows)
            if any(counter.bound(sequence) > max_length for sequence in sequences)
        }
        sequences = [sequence for _, sequences in suspects.values() for sequence in sequences]
        encoded = iter(counter.encode(sequences, prompts=names == ["prompt"]))
        batch_verdicts = [""] * len(rows)
        for place, (prompt, sequences) in suspects.items():
            ids = list(itertools.islice(encoded, len(sequences)))
            if max(map(len, ids)) > max_length:
                prompt_ids = counter.encode([prompt], prompts=True)[0] if prompt else []
                batch_verdicts[place] = _judge(prompt_ids, ids, max_length)
        verdicts += batch_verdicts
    return verdicts


def _split_answers(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the prompt, and the prompt with each answer.

    The prompt is "" if there is none; without answers it stands alone.
    """
    if "text" in row:
        return "", [row["text"]]
    if "messages" in row:
        roles = [message["role"] for message in row["messages"]]
        return row["messages"][: roles.index("assistant")], [row["messages"]]
    answers = row.get("completions") or [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    return row["prompt"], [row["prompt"] + answer for answer in answers] or [row["prompt"]]


def _judge(prompt: list[int], sequences: list[list[int]], max_length: int) -> str:
    """Return the verdict on a row with a sequence longer than `max_length`."""
    if prompt and min(common_prefix_length(prompt, sequence) for sequence in sequences) >= max_length:
        return "unusable"
    cut = {tuple(sequence[:max_length]) for sequence in sequences}
    return "unusable" if len(cut) < len(set(map(tuple, sequences))) else "truncated"


class _TokenCounter:
    """Tokenises as TRL's trainers do, and bounds token numbers without tokenising."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token or ""
        self._special = tokenizer.num_special_tokens_to_add() + 1  # some tokenizers put a space in front
        self._template: tuple[int, int] | None = None

    def bound(self, sequence: Any) -> float:
        """Return an upper bound of the number of tokens: one for each byte."""
        if isinstance(sequence, str):
            return len(sequence.encode()) + len(self._eos) + self._special
        self._template = self._template or self._measure_template()
        if any(message["role"] == "tool" for message in sequence):  # templates differ too much here
            return math.inf
        once, each = self._template
        return once + sum(each + len(message["content"].encode()) for message in sequence)

    def _measure_template(self) -> tuple[int, int]:
        """Return the bytes that the template adds to a conversation and to a message."""
        if not self._tokenizer.chat_template:
            raise RecipeError("chat_template_path: the data are conversations, and the tokenizer has no template. Fix: set it.")
        user, assistant, system = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
        once = self._rendered_bytes([user])
        conversations = ([user, assistant], [user, assistant, user], [system, user], [user, assistant, user, assistant])
        sizes = (self._rendered_bytes(conversation) - once for conversation in conversations)
        return once + self._special, max(0, *sizes)

    def _rendered_bytes(self, conversation: list[dict[str, str]]) -> int:
        try:
            return len(self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True).encode())
        except TemplateError:  # some templates reject a system turn
            return 0

    def encode(self, sequences: list[Any], prompts: bool = False) -> list[list[int]]:
        """Return token ids; of prompts without EOS, and with the generation prompt."""
        if not sequences:
            return []
        quiet = {"verbose": False}  # no warning of sequences longer than the model reads, which are found here
        if not isinstance(sequences[0], str):
            options = {"tokenize": True, "return_dict": True, "add_generation_prompt": prompts, "tokenizer_kwargs": quiet}
            return self._tokenizer.apply_chat_template(sequences, **options)["input_ids"]
        eos = "" if prompts else self._eos
        return self._tokenizer([text if text.endswith(eos) else text + eos for text in sequences], **quiet)["input_ids"]
