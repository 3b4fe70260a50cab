"""How many tokens the rows have, and what becomes of those that have too many."""

import itertools
import logging
import math
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import taught_conversations
from rlhf_recipes.data.sources import BATCH, SHOWN

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

logger = logging.getLogger(__name__)


def check_lengths(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, long_rows: str, where: str
) -> tuple[Dataset, dict[str, int]]:
    """Find the rows of a dataset from `load_data` that have more than `max_length` tokens, in the sequences that TRL makes.

    A row is `truncated` where only the end of an answer or text is lost: it stays (the trainer cuts it, "keep_start") under
    `long_rows="truncate"`. It is `unusable` where nothing of the answer would remain, or answers of a pair or ranking would be
    cut to the same tokens: it is dropped under "truncate" too. The length of a pair or ranking is that of the prompt with the
    longest answer; prompts alone are unusable where they are longer.

    Args:
        dataset: in the columns of one of the `Kind`s.
        tokenizer: with the chat template of the stage, where the rows are conversations.
        max_length: in tokens; None: nothing is checked.
        long_rows: `"truncate"`, `"drop"` (both sorts) or `"error"`.
        where: names the data in messages (`"train"`).

    Returns:
        The rows that stay, and the counts `rows`, `truncated`, `unusable`, `dropped`.

    Raises:
        RecipeError: long rows under `"error"`, no rows left, conversations without a chat template, or ones that it refuses.
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
        # Rows were shuffled and joined on their way here: what they say finds them, where a number would not.
        rows = [_beginning(dataset[row]) for row, verdict in enumerate(verdicts) if verdict][:SHOWN]
        raise RecipeError(
            f"{counts} (such as {', '.join(rows)}). Raise `max_length`, or set `long_rows` to `truncate` or `drop`."
        )
    gone = {"unusable", "truncated"} if long_rows == "drop" else {"unusable"}
    keep = [row for row, verdict in enumerate(verdicts) if verdict not in gone]
    if truncated or unusable:
        logger.warning("%s; %d are dropped", counts, len(dataset) - len(keep))
    if not keep:
        raise RecipeError(f"{counts}: no row is left. Raise `max_length`.")
    report = {"rows": len(keep), "truncated": truncated, "unusable": unusable, "dropped": len(dataset) - len(keep)}
    kept = dataset if len(keep) == len(dataset) else dataset.select(keep)
    _warn_beyond_context(kept, tokenizer, max_length, where)
    return kept, report


def _warn_beyond_context(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str) -> None:
    """Says so where rows are longer than what the tokenizer was made for, and would not be cut."""
    context = tokenizer.model_max_length
    if context < max_length and (beyond := len(dataset) - _verdicts(dataset, tokenizer, context).count("")):
        logger.warning(
            "%s: %d of %d rows have more than %d tokens, which is what %s says that its model reads (`model_max_length`): "
            "beyond that most models say nothing of sense",
            where,
            beyond,
            len(dataset),
            context,
            tokenizer.name_or_path,
        )


def drop_overlong_mode(long_rows: str) -> str:
    """What `long_rows` means where half a row is of no use: `"truncate"` is `"drop"`."""
    return "error" if long_rows == "error" else "drop"


def _warn_of_plain_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Says so where prompts are texts: what demonstrations of them teach, and where an earlier stage taught conversations."""
    if "prompt" not in dataset.column_names or not isinstance(dataset[0]["prompt"], str):
        return
    if taught_conversations(tokenizer.name_or_path):
        logger.warning(
            "%s: the prompts are plain texts, and %s was taught conversations: its chat template is not used, and the answers "
            "may be nonsense. With `column_mapping: {prompt: instruction}` the prompts become conversations",
            where,
            tokenizer.name_or_path,
        )
    elif "completion" in dataset.column_names and where == "train":
        logger.warning(
            "train: `prompt` and `completion` are plain texts: one follows the other as it stands, without the chat template. "
            "For questions and answers: `column_mapping: {prompt: instruction, completion: output}`"
        )


def _check_template(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses conversations whose order of roles the chat template refuses (a system turn, often)."""
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
                f"{where}: the chat template of {tokenizer.name_or_path} refuses the turns {', '.join(roles)} of the row that "
                f"begins {_beginning(row)}: {first_line(error)}. Change the row, or set `chat_template_path`"
            ) from error


def _beginning(row: dict[str, Any], length: int = 40) -> str:
    conversation = _split_answers(row)[1][0]
    text = conversation if isinstance(conversation, str) else " ".join(message["content"] for message in conversation)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def _verdicts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Per row "" (fits), "truncated" or "unusable"."""
    names = ("text", "messages", "prompt", "completion", "chosen", "rejected", "completions")
    names = [name for name in names if name in dataset.column_names]
    counter = _TokenCounter(tokenizer)
    verdicts: list[str] = []
    for batch in dataset.select_columns(names).iter(BATCH):
        rows = [_split_answers(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        suspects = {
            place: (prompt, wholes)
            for place, (prompt, wholes) in enumerate(rows)
            if any(counter.bound(whole) > max_length for whole in wholes)
        }
        encoded = iter(
            counter.encode([whole for _, wholes in suspects.values() for whole in wholes], prompts=names == ["prompt"])
        )
        judged = [""] * len(rows)
        for place, (prompt, wholes) in suspects.items():
            sequences = list(itertools.islice(encoded, len(wholes)))
            if max(map(len, sequences)) > max_length:
                judged[place] = _judge(counter.encode([prompt], prompts=True)[0] if prompt else [], sequences, max_length)
        verdicts += judged
    return verdicts


def _split_answers(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The prompt ("" where there is none) and, for each answer, prompt and answer in one; prompt-only data have no answers."""
    if "text" in row:
        return "", [row["text"]]
    if "messages" in row:
        roles = [message["role"] for message in row["messages"]]
        return row["messages"][: roles.index("assistant")], [row["messages"]]
    answers = row.get("completions") or [row[name] for name in ("completion", "chosen", "rejected") if name in row]
    return row["prompt"], [row["prompt"] + answer for answer in answers] or [row["prompt"]]


def _judge(prompt: list[int], sequences: list[list[int]], max_length: int) -> str:
    """The verdict on a row with a sequence that is longer than `max_length`; all in token ids."""
    if prompt and min(common_prefix_length(prompt, sequence) for sequence in sequences) >= max_length:
        return "unusable"
    cut = {tuple(sequence[:max_length]) for sequence in sequences}
    return "unusable" if len(cut) < len(set(map(tuple, sequences))) else "truncated"


class _TokenCounter:
    """Tokenises as TRL's trainers do, and bounds the number of tokens without tokenising."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._end = tokenizer.eos_token or ""
        self._special = tokenizer.num_special_tokens_to_add() + 1  # some tokenizers put a space in front
        self._template: tuple[int, int] | None = None

    def bound(self, sequence: Any) -> float:
        """At least the number of tokens: a token stands for one byte or more."""
        if isinstance(sequence, str):
            return len(sequence.encode()) + len(self._end) + self._special
        self._template = self._template or self._measure_template()
        if any(message["role"] == "tool" for message in sequence):  # not measured: templates differ too much
            return math.inf
        once, each = self._template
        return once + sum(each + len(message["content"].encode()) for message in sequence)

    def _measure_template(self) -> tuple[int, int]:
        """How many bytes the chat template adds to a conversation, and to each message."""
        if not self._tokenizer.chat_template:
            raise RecipeError("The data are conversations, but the tokenizer has no chat template: set `chat_template_path`.")
        user, assistant, system = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))
        once = self._rendered_bytes([user])
        conversations = ([user, assistant], [user, assistant, user], [system, user], [user, assistant, user, assistant])
        sizes = (self._rendered_bytes(conversation) - once for conversation in conversations)
        return once + self._special, max(0, *sizes)

    def _rendered_bytes(self, conversation: list[dict[str, str]]) -> int:
        try:
            return len(self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True).encode())
        except TemplateError:  # some templates refuse a system turn
            return 0

    def encode(self, sequences: list[Any], prompts: bool = False) -> list[list[int]]:
        """Token ids of texts or conversations; prompts without an end-of-text token, and with a generation prompt."""
        if not sequences:
            return []
        quiet = {"verbose": False}  # no warning of "indexing errors": what is too long for the model is found here
        if not isinstance(sequences[0], str):
            options = {"tokenize": True, "return_dict": True, "add_generation_prompt": prompts, "tokenizer_kwargs": quiet}
            return self._tokenizer.apply_chat_template(sequences, **options)["input_ids"]
        end = "" if prompts else self._end
        return self._tokenizer([text if text.endswith(end) else text + end for text in sequences], **quiet)["input_ids"]
