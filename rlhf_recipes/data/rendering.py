"""Rows as the tokenizer and its chat template render them."""

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import trained_on_conversations
from rlhf_recipes.data.conversion import Kind
from rlhf_recipes.data.rows import reject_bad_rows
from rlhf_recipes.data.sources import BATCH, SHOWN

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length

logger = logging.getLogger(__name__)


def check_rendered(
    dataset: Dataset,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    long_rows: str,
    where: str,
    bad_rows: str = "error",
    assistant_only_loss: bool = False,
) -> tuple[Dataset, dict[str, Any]]:
    """Check rows as TRL encodes them, and take off a BOS that texts have already.

    A row is bad if the chat template leaves out a part of an answer, or makes answers of different rank equal. It is
    `truncated` if it loses only the end of an answer or text at `max_length`. Under `long_rows="truncate"` it stays, and the
    trainer cuts it ("keep_start"). It is `unusable` if nothing of the answer would remain, or if answers of a pair or ranking
    would be cut to the same tokens; it is dropped under "truncate" too. The length of a pair or ranking is that of the prompt
    with the longest answer. Prompts alone are unusable if they are too long.

    Args:
        dataset: in the columns of `kind`.
        kind: what the stage trains on.
        tokenizer: with the chat template of the stage.
        max_length: in tokens; None: no limit.
        long_rows: `"truncate"`, `"drop"` (both sorts) or `"error"`.
        where: names the data in messages (`"train"`).
        bad_rows: `"drop"` or `"error"`.
        assistant_only_loss: as for TRL, which then encodes with its training variant of many templates.

    Returns:
        The rows that stay; their number (`rows`), the bad ones by reason (`dropped`), and `longer_than_max_length`.

    Raises:
        RecipeError: for bad or long rows under `"error"`, no rows left, or conversations that the chat template rejects.
    """
    _warn_of_plain_prompts(dataset, tokenizer, where)
    dataset = strip_bos(dataset, next(name for name in _COLUMNS[kind] if name in dataset.column_names), tokenizer)
    template = _training_template(tokenizer) if assistant_only_loss else None
    checks = _check(dataset, kind, _Renderer(tokenizer, template, kind == "prompt", where), max_length)
    bad = [(_beginning(dataset[row], kind), check.problem) for row, check in enumerate(checks) if check.problem]
    reject_bad_rows(bad, len(dataset), bad_rows, where)
    if cut := sum(check.lost_context for check in checks):
        logger.warning("%s: the chat template leaves out a part of earlier turns in %d of %d rows.", where, cut, len(checks))

    good = [row for row, check in enumerate(checks) if not check.problem]
    verdicts = {row: checks[row].verdict for row in good}
    count = Counter(verdicts.values())
    counts = f"{where}: of {len(good)} rows, {count['truncated']} lose the end of an answer or text at "
    key = "max_prompt_length" if kind == "prompt" else "max_length"
    counts += f"`{key}: {max_length}`, and {count['unusable']} are too long to be used"
    if long_rows == "error" and (count["truncated"] or count["unusable"]):
        # Row numbers of the file are lost by now: the text of a row finds it
        rows = [_beginning(dataset[row], kind) for row, verdict in verdicts.items() if verdict][:SHOWN]
        raise RecipeError(f"{counts} ({', '.join(rows)}). Fix: raise `{key}`, or set `long_rows` to `truncate` or `drop`.")
    rejected = {"unusable", "truncated"} if long_rows == "drop" else {"unusable"}
    keep = [row for row, verdict in verdicts.items() if verdict not in rejected]
    if count["truncated"] or count["unusable"]:
        logger.warning("%s; %d are dropped", counts, len(good) - len(keep))
    if not keep:
        raise RecipeError(f"{counts}: no row is left. Fix: raise `{key}`.")
    context = tokenizer.model_max_length
    if max_length is not None and context < max_length and (beyond := sum(checks[row].size > context for row in keep)):
        logger.warning(
            "%s: %d of %d rows have more than %d tokens, the `model_max_length` of %s. Most models write nonsense beyond it.",
            where,
            beyond,
            len(keep),
            context,
            tokenizer.name_or_path,
        )
    lengths = {"truncated": count["truncated"], "unusable": count["unusable"], "dropped": len(good) - len(keep)}
    report = {"rows": len(keep), "dropped": dict(Counter(reason for _, reason in bad)), "longer_than_max_length": lengths}
    return dataset if len(keep) == len(dataset) else dataset.select(keep), report


def check_positions(
    dataset: Dataset,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    where: str,
    positions: int | None,
    new_tokens: int = 0,
    key: str = "max_length",
) -> None:
    """Refuse rows for which the model has too few positions.

    Args:
        dataset: after `check_rendered`.
        kind: as in `check_rendered`.
        tokenizer: as in `check_rendered`.
        max_length: as in `check_rendered`.
        where: as in `check_rendered`.
        positions: those of the model, if they end; None: they do not.
        new_tokens: longest completion that is sampled, which needs positions too.
        key: the option that sets `max_length`.

    Raises:
        RecipeError: with what to set.
    """
    if positions is None:
        return
    room = positions
    if new_tokens:
        room = max(positions - new_tokens - _closing_tokens(tokenizer, dataset[0]["prompt"]), 0)
    if max_length is not None and max_length <= room:
        return
    checks = _check(dataset, kind, _Renderer(tokenizer, None, kind == "prompt", where), room)
    if not (beyond := sum(bool(check.verdict) for check in checks)):
        return
    limit, fix = f"{key}: {max_length}", f"set `{key}: {positions}`"
    if new_tokens:
        limit = f"max_completion_length: {new_tokens}"
        fix = f"set `max_prompt_length` and `max_completion_length` to {positions} in all"
    rows = f"{where}: {beyond} of {len(dataset)} rows need more"
    raise RecipeError(f"{limit}: the model has positions for {positions} tokens; {rows}. Fix: {fix}")


def _closing_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> int:
    """Return the tokens that a reward model reads after a completion that was cut off."""
    if isinstance(prompt, str):
        return 1  # EOS
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "answer"}], tokenize=False)
    return len(tokenizer(text.rpartition("answer")[2], add_special_tokens=False)["input_ids"])


def drop_overlong_mode(long_rows: str) -> str:
    """Return `long_rows` for data that cannot be cut: `"truncate"` becomes `"drop"`."""
    return "error" if long_rows == "error" else "drop"


def strip_bos(dataset: Dataset, column: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Take off the BOS of texts in a column, if the tokenizer adds another one."""
    bos = tokenizer.bos_token
    if bos is None or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id] or not isinstance(dataset[0][column], str):
        return dataset
    if not any(text.startswith(bos) for text in dataset[column]):
        return dataset
    options = {"features": dataset.features, "load_from_cache_file": False}
    return dataset.map(lambda row: {column: re.sub(rf"^(?:{re.escape(bos)})+", "", row[column])}, **options)


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


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # TRL has none, and says so when the trainer is made
        return None


@dataclass(frozen=True)
class _Check:
    problem: str  # why the row is bad, or ""
    lost_context: bool  # whether a part of the turns before the answer is left out
    verdict: str  # "" (fits), "truncated" or "unusable"
    size: float  # tokens of the longest sequence, or a bound of them


def _check(dataset: Dataset, kind: Kind, renderer: "_Renderer", max_length: int | None) -> list[_Check]:
    limit = math.inf if max_length is None else min(max_length, renderer.tokenizer.model_max_length)
    special = renderer.tokenizer.num_special_tokens_to_add() + 1  # some tokenizers put a space in front
    checks = []
    names = [name for name in _COLUMNS[kind] if name in dataset.column_names]
    for batch in dataset.select_columns(names).iter(BATCH):
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        parts = [_split_answers(row, kind) for row in rows]
        texts = [[renderer.render(sequence) for sequence in sequences] for _, sequences in parts]
        bounds = [max(len(text.encode()) for text in row) + special for row in texts]  # every token has at least one byte
        suspects = [text for row, bound in zip(texts, bounds, strict=True) if bound > limit for text in row]
        encoded = iter(renderer.encode(suspects, parts[0][1][0]))
        for row, (prompt, sequences), rendered, bound in zip(rows, parts, texts, bounds, strict=True):
            problem, lost_context = _find_problem(row, prompt, sequences, rendered)
            ids = list(itertools.islice(encoded, len(rendered))) if bound > limit else []
            size, verdict = max(map(len, ids), default=bound), ""
            if ids and size > max_length:
                (prompt_ids,) = renderer.encode([renderer.render(prompt, True)], prompt) if prompt else ([],)
                verdict = _judge(prompt_ids, ids, max_length)
            checks.append(_Check(problem, lost_context, verdict, size))
    return checks


_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "sft": ("text", "messages", "prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "ranking": ("prompt", "completions", "ranks"),
    "prompt": ("prompt",),  # other columns are for reward functions, whatever their names
}


def _split_answers(row: dict[str, Any], kind: Kind) -> tuple[Any, list[Any]]:
    """Return the prompt ("": none), and the prompt with each answer, if any."""
    if kind == "prompt":
        return row["prompt"], [row["prompt"]]
    if "text" in row:
        return "", [row["text"]]
    if "messages" in row:
        roles = [message["role"] for message in row["messages"]]
        return row["messages"][: roles.index("assistant")], [row["messages"]]
    answers = row["completions"] if kind == "ranking" else [row[name] for name in _COLUMNS[kind] if name in row][1:]
    return row["prompt"], [row["prompt"] + answer for answer in answers]


def _beginning(row: dict[str, Any], kind: Kind, length: int = 40) -> str:
    sequence = _split_answers(row, kind)[1][0]
    text = sequence if isinstance(sequence, str) else " ".join(message["content"] for message in sequence)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


@dataclass(frozen=True)
class _Renderer:
    """Renders and encodes as TRL's trainers do."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None  # in place of the tokenizer's
    are_prompts: bool  # whether sequences are prompts, without EOS and with the generation prompt
    where: str

    def render(self, sequence: Any, is_prompt: bool = False) -> str:
        """Return the text that is encoded."""
        is_prompt, eos = is_prompt or self.are_prompts, self.tokenizer.eos_token
        if isinstance(sequence, str):
            return sequence if is_prompt or sequence.endswith(eos) else sequence + eos
        options = {"chat_template": self.template, "add_generation_prompt": is_prompt}
        try:
            return self.tokenizer.apply_chat_template(sequence, tokenize=False, **options)
        except TemplateError as error:  # often for a system turn
            roles = ", ".join(message["role"] for message in sequence)
            raise RecipeError(
                f"{self.where}: the chat template of {self.tokenizer.name_or_path} rejects the turns {roles} of the row that "
                f"begins {_beginning({'prompt': sequence}, 'prompt')}: {first_line(error)}. Fix: change the row, or set "
                "`chat_template_path`."
            ) from error

    def encode(self, texts: list[str], sequence: Any) -> list[list[int]]:
        """Return the token ids of rendered texts; with BOS if `sequence` is plain text."""
        if not texts:
            return []
        # No warning of sequences longer than the model reads, which are found here
        return self.tokenizer(texts, add_special_tokens=isinstance(sequence, str), verbose=False)["input_ids"]


def _find_problem(row: dict[str, Any], prompt: Any, sequences: list[Any], texts: list[str]) -> tuple[str, bool]:
    """Return why a rendered row is bad ("": good), and whether it lost earlier turns."""
    lost_context = False
    for sequence, text in zip(sequences, texts, strict=True) if not isinstance(sequences[0], str) else ():
        for place in _left_out(sequence, text):
            if sequence[place]["role"] == "assistant" and place >= len(prompt):
                return (
                    "the chat template leaves out a part of the answer (set `chat_template_path` to one that keeps it)",
                    lost_context,
                )
            lost_context = True
    ranks = row.get("ranks", range(len(texts)))
    if len(set(zip(texts, ranks, strict=True))) > len(set(texts)):
        equal = "equal completions of different rank" if "ranks" in row else "chosen equal to rejected"
        return f"{equal}, once rendered", lost_context
    return "", lost_context


def _left_out(messages: list[dict[str, str]], text: str) -> Iterable[int]:
    """Yield the places of messages that a rendered conversation lacks a part of.

    Space does not count.
    """
    text, start = "".join(text.split()), 0
    for place, message in enumerate(messages):
        content = "".join(message["content"].split())
        moves = message["role"] == "system"  # some templates put it into a later turn
        found = text.find(content, 0 if moves else start)
        if found < 0:
            if message["role"] != "tool":  # results of tools are often written anew
                yield place
        elif not moves:
            start = max(start, found + len(content))


def _judge(prompt: list[int], sequences: list[list[int]], max_length: int) -> str:
    """Return the verdict on a row with a sequence longer than `max_length`."""
    if prompt and min(common_prefix_length(prompt, sequence) for sequence in sequences) >= max_length:
        return "unusable"
    cut = {tuple(sequence[:max_length]) for sequence in sequences}
    return "unusable" if len(cut) < len(set(map(tuple, sequences))) else "truncated"
