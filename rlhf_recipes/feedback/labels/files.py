"""Labels as JSONL files: datasets for the recipes, and an export to restore."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.files import write_text
from rlhf_recipes.feedback.groups import Group, GroupRow, read_rows
from rlhf_recipes.feedback.labels.label import Label
from rlhf_recipes.feedback.labels.store import Store

from pydantic import BaseModel, ConfigDict

Rows = list[dict[str, Any]]
Contents = list[tuple[Group, list[Label]]]
"""Groups with their labels, from `Store.contents`."""


def rankings(contents: Contents) -> Rows:
    """Return a row per label that orders two usable completions or more.

    Returns:
        Rows of `prompt`, `completions`, `ranks` (1 is the best), `labeller`, `id`, and `sources` if the group has them.
    """
    rows = []
    for group, label in _flat(contents):
        usable = [k for k, rank in enumerate(label.ranks or ()) if rank is not None]
        if len({label.ranks[k] for k in usable}) > 1:
            columns = {"completions": group.completions, "ranks": label.ranks}
            columns |= {"sources": group.sources} if group.sources else {}
            rows.append(_row(group, label, **{name: [values[k] for k in usable] for name, values in columns.items()}))
    return rows


def pairs(contents: Contents) -> Rows:
    """Return a row per label and two completions of different rank and text.

    Returns:
        Rows of `prompt`, `chosen`, `rejected`, `labeller`, `id`.
    """
    rows = []
    for group, label in _flat(contents):
        ranks = sorted(distinct_ranks(group, label).items(), key=lambda item: item[1])
        for (better, low), (worse, high) in itertools.combinations(ranks, 2):
            if low < high:
                rows.append(_row(group, label, chosen=group.completions[better], rejected=group.completions[worse]))
    return rows


def demonstrations(contents: Contents) -> Rows:
    """Return `prompt`, `completion`, `labeller`, `id` of each written answer."""
    written = [(group, label) for group, label in _flat(contents) if label.demonstration]
    return [_row(group, label, completion=group.completion(label.demonstration)) for group, label in written]


def _flat(contents: Contents) -> Iterator[tuple[Group, Label]]:
    return ((group, label) for group, labels in contents for label in labels)


def _row(group: Group, label: Label, **columns: Any) -> dict[str, Any]:
    return {"prompt": group.prompt, **columns, "labeller": label.labeller, "id": group.id}


def distinct_ranks(group: Group, label: Label) -> dict[int, int]:
    """Return index and rank of usable completions, the first of equal ones."""
    first = {text: index for index, text in reversed(list(enumerate(group.texts())))}
    return {k: label.ranks[k] for k in sorted(first.values()) if label.ranks and label.ranks[k] is not None}


# --- Export and import ------------------------------------------------------------------------------------------------


class _LabelRow(BaseModel):
    model_config = ConfigDict(strict=True)
    labeller: str
    ranks: list[int | None] | None = None
    demonstration: str | None = None
    note: str | None = None
    at: str = ""


class _ExportRow(GroupRow):
    labels: list[_LabelRow]


def export_labels(store: Store, folder: Path) -> dict[str, int]:
    """Write `labels.jsonl` for `import_labels`, and the datasets.

    The datasets are `rankings.jsonl`, `pairs.jsonl` and `demonstrations.jsonl`. All replace the files of an earlier export. A
    dataset without rows is removed.

    Returns:
        The number of rows of each file.

    Raises:
        RecipeError: if a file cannot be written, or would replace one that no export has written.
    """
    contents = store.contents()
    exported = [
        group.row() | {"labels": [{key: value for key, value in asdict(label).items() if key != "group"} for label in labels]}
        for group, labels in contents
    ]
    # `labels` first: if this export is interrupted, the next one recognises the files by it
    files = {"labels.jsonl": exported, "rankings.jsonl": rankings(contents), "pairs.jsonl": pairs(contents)}
    files["demonstrations.jsonl"] = demonstrations(contents)
    existing = [folder / name for name in files if (folder / name).exists()]
    if existing and not _is_export(folder / "labels.jsonl"):
        raise RecipeError(f"{existing[0]}: was not written by --export. Fix: give another folder as --export")
    with error_context(f"--export: {folder}", OSError, fix="free some space, or give another folder; the labels are safe"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            if rows or name == "labels.jsonl":
                write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            else:
                (folder / name).unlink(missing_ok=True)
    return {name: len(rows) for name, rows in files.items()}


def _is_export(path: Path) -> bool:
    try:
        next(read_rows(path, _ExportRow), None)  # the export of an empty store has no rows
    except RecipeError:
        return False
    return True


def import_labels(store: Store, path: Path) -> int:
    """Restore groups and labels from the `labels.jsonl` of an export, all or none.

    Returns:
        The number of new labels.

    Raises:
        RecipeError: if the file is not an export, or contradicts the store.
    """
    rows = [(where, row.group(), row.labels) for where, row in read_rows(path, _ExportRow)]
    if not rows:
        raise RecipeError(f"{path}: the file has no rows. Fix: name a labels.jsonl that --export has written")
    return store.restore(
        (where, group, [Label(group.id, **label.model_dump()) for label in labels]) for where, group, labels in rows
    )
