"""Which stages a data file serves."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.data.conversion import Kind
from rlhf_recipes.data.rows import Converted, convert, find_shape
from rlhf_recipes.data.shapes import Form
from rlhf_recipes.data.sources import Part, open_source
from rlhf_recipes.inputs import is_function
from rlhf_recipes.pipeline.init.model import Model

ROLES: dict[Form, str] = {
    "preference": "pairs",
    "ranking": "rankings",
    "completion": "demonstrations",
    "messages": "demonstrations",
    "prompt": "prompts",
    "text": "plain text",
}
_KINDS: tuple[Kind, ...] = ("preference", "sft", "prompt")
_NAMES = {"question": "prompt", "query": "prompt", "answer": "completion", "response": "completion", "answers": "reference"}
"""Common names of columns -> those that are read. Tried where no shape fits."""
_AS_CHAT = {"prompt": "instruction", "completion": "output"}
"""Columns of plain text -> those that the chat template is put around."""
_FEWEST = 10
_SAMPLE = 500  # rows whose tokens are counted


@dataclass
class DataFile:
    """A file, and what it holds.

    Parameters:
        path: as the user wrote it.
        mapping: its `column_mapping`.
        role: a value of `ROLES`.
        rows: how many it has.
        usable: of them, in all kinds that it serves.
        bad: reason -> number of unusable rows.
        conversational: whether it has messages.
        prompts: how many differ.
        held_out: rows at its end that no stage trains on.
        leaked: prompts of these that are trained on too.
        references: accepted answers, where it has any.
        lengths: tokens of "prompt", "answer" and "whole" row, of a sample.
    """

    path: str
    mapping: dict[str, str]
    role: str
    rows: int
    usable: int
    bad: Counter[str]
    conversational: bool
    prompts: int
    held_out: int
    leaked: int
    references: list[Any]
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def source(self, held_out: bool = False) -> dict[str, Any]:
        """Return the entry of `datasets`, or of `eval_datasets`."""
        cut = self.rows - self.held_out
        mapping = {"column_mapping": self.mapping} if self.mapping else {}
        return {"path": self.path, "split": f"train[{cut}:]" if held_out else f"train[:{cut}]"} | mapping

    def finding(self) -> str:
        """Return what it is, in a sentence."""
        kind = "messages" if self.conversational else "plain texts"
        text = f"{self.rows:,} rows of {self.role}, as {kind}"
        if self.prompts:
            text += f"; {self.prompts:,} different prompts"
        if self.role == "prompts":
            text += ", with references" if self.references else ", without references"
        if self.mapping:
            text += f"; read as {', '.join(f'{old} -> {new}' for old, new in self.mapping.items())}"
        for reason, count in self.bad.most_common(3):
            text += f"; {count} unusable: {reason}"
        if self.leaked:
            text += f"; {self.leaked} of the {self.held_out} held-out prompts are trained on too: put rows of a prompt together"
        return text


def inspect_data(path: str, model: Model) -> DataFile:
    """Read a file, and find what it serves.

    Raises:
        RecipeError: if it cannot be read, or serves no stage.
    """
    if is_function(path):
        raise RecipeError(f"{path}: is a function. Fix: name a file, folder or Hub dataset")
    parts, mapping, forms = _open(path, model)
    kind, form = next(iter(forms.items()))
    converted = {one: [convert(part, one) for part in parts] for one in forms}
    rows = sum(part.read for part in converted[kind])
    bad = Counter(reason for part in converted[kind] for _, reason in part.bad)
    file = DataFile(
        path=path,
        mapping=mapping,
        role=ROLES[form],
        rows=rows,
        usable=rows - bad.total(),
        bad=bad,
        conversational=converted[kind][0].conversational,
        prompts=0,
        held_out=min(max(8, min(100, rows // 10)), rows // 3) if form != "text" else 0,
        leaked=0,
        references=[],
    )
    if rows < _FEWEST:
        raise RecipeError(f"{path}: {rows} rows are too few to train on and to hold some out. Fix: at least {_FEWEST}")
    if not file.usable:
        raise RecipeError(f"{path}: none of its {rows} rows can be used: {bad.most_common(1)[0][0]}")
    _read_prompts(file, converted, model)
    return file


def _open(path: str, model: Model) -> tuple[list[Part], dict[str, str], dict[Kind, Form]]:
    """Return a file's parts, its `column_mapping`, and what it serves.

    Columns of other names are mapped where no shape fits, and plain prompts to those that a chat template is put around where
    the model has one.
    """
    parts = open_source(DatasetSource(path))
    columns = parts[0].dataset.column_names
    guesses: list[dict[str, str]] = [{}, {old: new for old, new in _NAMES.items() if old in columns and new not in columns}]
    for mapping in guesses:
        renamed = open_source(DatasetSource(path, column_mapping=mapping)) if _is_one_to_one(mapping) else parts
        if forms := _forms(renamed):
            break
    else:
        find_shape(parts[0], "sft")  # raises the message about columns
    if model.has_template and not convert(renamed[0], next(iter(forms))).conversational:
        names = {name: mapping.get(name, name) for name in columns}
        chat = mapping | {old: _AS_CHAT[new] for old, new in names.items() if new in _AS_CHAT and _AS_CHAT[new] not in columns}
        asked = open_source(DatasetSource(path, column_mapping=chat))
        if "instruction" in chat.values() and _forms(asked) == forms:  # rankings have no such columns
            return asked, chat, forms
    return renamed, mapping, forms


def _is_one_to_one(mapping: dict[str, str]) -> bool:
    return len({*mapping.values()}) == len(mapping)


def _forms(parts: list[Part]) -> dict[Kind, Form]:
    """Return kind -> form, for each kind that a file serves."""
    forms = {}
    for kind in _KINDS:
        try:
            forms[kind] = find_shape(parts[0], kind).form
        except RecipeError:
            continue
    return forms


def _hold_out(prompts: list[str], wanted: int) -> tuple[int, int]:
    """Return the rows to hold out at the end, and how many prompts leak.

    These are trained on too. More rows than `wanted`, up to a third of all, if that keeps the rows of each prompt together.
    """
    before, torn, leaked = Counter(prompts), set(), 0
    for held_out, prompt in enumerate(reversed(prompts), start=1):
        before[prompt] -= 1
        (torn.add if before[prompt] else torn.discard)(prompt)
        if held_out == wanted:
            leaked = len(torn)
        if held_out >= wanted and (not torn or held_out >= len(prompts) // 3):
            break
    return (wanted, leaked) if torn else (held_out, 0)


def _read_prompts(file: DataFile, converted: dict[str, list[Converted]], model: Model) -> None:
    """Fill in prompts, references and lengths."""
    prompts = [part.dataset for part in converted.get("prompt", ())]
    texts = [repr(prompt) for dataset in prompts for prompt in dataset["prompt"]]
    file.prompts = len({*texts})
    if len(texts) == file.rows:
        file.held_out, file.leaked = _hold_out(texts, file.held_out)
    else:  # unusable rows, or several prompts in one
        cut = max(0, len(texts) - file.held_out)
        file.leaked = len({*texts[:cut]} & {*texts[cut:]})
    references = [one for dataset in prompts if "reference" in dataset.column_names for one in dataset["reference"]]
    if any(references[-file.held_out :]):  # to evaluate by
        file.references = [one for one in references if one]
    lengths: dict[str, list[int]] = {"prompt": [], "answer": [], "whole": []}
    for row in itertools.islice(itertools.chain.from_iterable(prompts), _SAMPLE):
        lengths["prompt"].append(model.count_tokens(row["prompt"]))
        if isinstance(row.get("reference"), str):
            lengths["answer"].append(model.count_tokens(row["reference"]))
    for part in converted.get("preference", converted.get("sft", ())):
        for row in part.dataset.take(min(_SAMPLE, len(part.dataset))):
            if "prompt" not in row:
                lengths["whole"].append(model.count_tokens(row.get("messages") or row["text"]))
                continue
            answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
            lengths["whole"].append(max(model.count_tokens(row["prompt"] + answer) for answer in answers))
            if "completion" not in row:
                texts = (answer if isinstance(answer, str) else answer[-1]["content"] for answer in answers)
                lengths["answer"] += map(model.count_tokens, texts)
    file.lengths = lengths
