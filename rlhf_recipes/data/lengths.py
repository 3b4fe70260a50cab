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

_COLUMNS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "completions")


def check_lengths(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    long_rows: str,
    where: str,
    positions: int | None = None,
    new_tokens: int = 0,
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
        positions: those of the model, if they end; None: they do not.
        new_tokens: longest completion that is sampled, which needs positions too.

    Returns:
        The rows that stay, and the counts `rows`, `truncated`, `unusable`, `dropped`.

    Raises:
        RecipeError: for long rows under `"error"`, no rows left, conversations that the chat template rejects, or rows beyond
            the positions of the model.
    """
    _warn_of_plain_prompts(dataset, tokenizer, where)
    verdicts, sizes = _measure(dataset, tokenizer, max_length, where)
    truncated, unusable = verdicts.count("truncated"), verdicts.count("unusable")
    counts = f"{where}: of {len(dataset)} rows, {truncated} lose the end of an answer or text at `max_length: {max_length}`"
    counts += f", and {unusable} are too long to be used"
    if long_rows == "error" and (truncated or unusable):
        # Row numbers of the file are lost by now: the text of a row finds it
        rows = [_beginning(_split_answers(dataset[row])[1][0]) for row, verdict in enumerate(verdicts) if verdict][:SHOWN]
        raise RecipeError(f"{counts} ({', '.join(rows)}). Fix: raise `max_length`, or set `long_rows` to `truncate` or `drop`.")
    rejected = {"unusable", "truncated"} if long_rows == "drop" else {"unusable"}
    keep = [row for row, verdict in enumerate(verdicts) if verdict not in rejected]
    if truncated or unusable:
        logger.warning("%s; %d are dropped", counts, len(dataset) - len(keep))
    if not keep:
        raise RecipeError(f"{counts}: no row is left. Fix: raise `max_length`.")
    context = tokenizer.model_max_length
    if max_length is not None and context < max_length and (beyond := sum(sizes[row] > context for row in keep)):
        logger.warning(
            "%s: %d of %d rows have more than %d tokens, the `model_max_length` of %s. Most models write nonsense beyond it.",
            where,
            beyond,
            len(keep),
            context,
            tokenizer.name_or_path,
        )
    report = {"rows": len(keep), "truncated": truncated, "unusable": unusable, "dropped": len(dataset) - len(keep)}
    kept = dataset if len(keep) == len(dataset) else dataset.select(keep)
    check_positions(kept, tokenizer, max_length, where, positions, new_tokens)
    return kept, report


def check_positions(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    where: str,
    positions: int | None,
    new_tokens: int = 0,
    key: str = "max_length",
) -> None:
    """Refuse rows that are longer than the model has positions, as `check_lengths`.

    `key` is the option that sets `max_length`.
    """
    if positions is None or (max_length is not None and max_length + new_tokens <= positions):
        return
    verdicts, _ = _measure(dataset, tokenizer, max(positions - new_tokens, 0), where)
    if not any(verdicts):
        return
    limit, fix = f"{key}: {max_length}", f"set `{key}: {positions}`"
    if new_tokens:
        limit = f"max_completion_length: {new_tokens}"
        fix = f"set `max_prompt_length` and `max_completion_length` to {positions} in all"
    rows = f"{len(verdicts) - verdicts.count('')} of {len(dataset)} rows need more"
    raise RecipeError(f"{limit}: the model has positions for {positions} tokens; {where}: {rows}. Fix: {fix}")


def drop_overlong_mode(long_rows: str) -> str:
    """Return `long_rows` for data that cannot be cut: `"truncate"` becomes `"drop"`."""
    return "error" if long_rows == "error" else "drop"


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


def _measure(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, where: str
) -> tuple[list[str], list[int]]:
    """Return a verdict on each row, and the tokens of its longest sequence (a bound).

    A verdict is "" (fits), "truncated" or "unusable".
    """
    verdicts, sizes = [], []
    limit = math.inf if max_length is None else min(max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add() + 1  # some tokenizers put a space in front
    names = [name for name in _COLUMNS if name in dataset.column_names]
    for batch in dataset.select_columns(names).iter(BATCH):
        rows = [_split_answers(dict(zip(names, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        texts = [[_render(tokenizer, sequence, names == ["prompt"], where) for sequence in sequences] for _, sequences in rows]
        bounds = [max(len(text.encode()) for text in row) + special for row in texts]  # every token has at least one byte
        suspects = [text for row, bound in zip(texts, bounds, strict=True) if bound > limit for text in row]
        encoded = iter(_encode(tokenizer, suspects, rows[0][1][0]))
        for (prompt, _), row, bound in zip(rows, texts, bounds, strict=True):
            ids = list(itertools.islice(encoded, len(row))) if bound > limit else []
            sizes.append(max(map(len, ids), default=bound))
            if ids and sizes[-1] > max_length:
                (prompt_ids,) = _encode(tokenizer, [_render(tokenizer, prompt, True, where)], prompt) if prompt else ([],)
                verdicts.append(_judge(prompt_ids, ids, max_length))
            else:
                verdicts.append("")
    return verdicts, sizes


def _split_answers(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the prompt ("": none), and the prompt with each answer, if any."""
    if "text" in row:
        return "", [row["text"]]
    if "messages" in row:
        roles = [message["role"] for message in row["messages"]]
        return row["messages"][: roles.index("assistant")], [row["messages"]]
    answers = row.get("completions") or [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    return row["prompt"], [row["prompt"] + answer for answer in answers] or [row["prompt"]]


def _beginning(sequence: Any, length: int = 40) -> str:
    text = sequence if isinstance(sequence, str) else " ".join(message["content"] for message in sequence)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def _render(tokenizer: PreTrainedTokenizerBase, sequence: Any, is_prompt: bool, where: str) -> str:
    """Return the text that TRL encodes; of a prompt with the generation prompt."""
    if isinstance(sequence, str):
        return sequence if is_prompt or sequence.endswith(tokenizer.eos_token) else sequence + tokenizer.eos_token
    try:
        return tokenizer.apply_chat_template(sequence, tokenize=False, add_generation_prompt=is_prompt)
    except TemplateError as error:  # often for a system turn
        roles = ", ".join(message["role"] for message in sequence)
        raise RecipeError(
            f"{where}: the chat template of {tokenizer.name_or_path} rejects the turns {roles} of the row that begins "
            f"{_beginning(sequence)}: {first_line(error)}. Fix: change the row, or set `chat_template_path`."
        ) from error


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], sequence: Any) -> list[list[int]]:
    """Return the token ids of rendered texts; with BOS if `sequence` is plain text."""
    if not texts:
        return []
    # No warning of sequences longer than the model reads, which are found here
    return tokenizer(texts, add_special_tokens=isinstance(sequence, str), verbose=False)["input_ids"]


def _judge(prompt: list[int], sequences: list[list[int]], max_length: int) -> str:
    """Return the verdict on a row with a sequence longer than `max_length`."""
    if prompt and min(common_prefix_length(prompt, sequence) for sequence in sequences) >= max_length:
        return "unusable"
    cut = {tuple(sequence[:max_length]) for sequence in sequences}
    return "unusable" if len(cut) < len(set(map(tuple, sequences))) else "truncated"
