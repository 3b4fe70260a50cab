"""Labels as files: rankings, pairs and demonstrations for the recipes, and one file from which all is restored."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.labels.groups import Group, group_of, read_rows
from rlhf_recipes.labels.store import Label, Store

Rows = list[dict[str, Any]]
_TEXTS = str | None
_TYPES = {"labeller": str, "ranks": list | None, "demonstration": _TEXTS, "note": _TEXTS, "at": str}


def rankings(store: Store) -> Rows:
    """One row for each label that orders at least two completions; unusable ones are left out.

    Returns:
        Rows of `prompt`, `completions`, `ranks` (1 is the best), `labeller`, `id`, and `sources` where the group has them.
    """
    rows = []
    for group, label in ranked(store):
        kept = [k for k, rank in enumerate(label.ranks) if rank is not None]
        if len({label.ranks[k] for k in kept}) < 2:
            continue
        row = {
            "prompt": group.prompt,
            "completions": [group.completions[k] for k in kept],
            "ranks": [label.ranks[k] for k in kept],
        }
        sources = {"sources": [group.sources[k] for k in kept]} if group.sources else {}
        rows.append(row | sources | _origin(label))
    return rows


def pairs(store: Store) -> Rows:
    """One row for each two completions of which a labeller holds one better, equal texts counting as one.

    Returns:
        Rows of `prompt`, `chosen`, `rejected`, `labeller`, `id`.
    """
    rows = []
    for group, label in ranked(store):
        ranks = sorted(different(group, label).items(), key=lambda item: item[1])
        for (better, low), (worse, high) in itertools.combinations(ranks, 2):
            if low < high:
                answers = {"chosen": group.completions[better], "rejected": group.completions[worse]}
                rows.append({"prompt": group.prompt} | answers | _origin(label))
    return rows


def demonstrations(store: Store) -> Rows:
    """One row for each answer that a labeller wrote.

    Returns:
        Rows of `prompt`, `completion`, `labeller`, `id`.
    """
    return [
        {"prompt": group.prompt, "completion": group.answer(label.demonstration)} | _origin(label)
        for group, label in _labelled(store)
        if label.demonstration
    ]


def ranked(store: Store) -> Iterator[tuple[Group, Label]]:
    """Each label that is more than a skip, with its group."""
    return ((group, label) for group, label in _labelled(store) if label.ranks is not None)


def different(group: Group, label: Label) -> dict[int, int]:
    """Place and rank of each usable completion, only the first of those that are equal."""
    first = {text: place for place, text in reversed(list(enumerate(group.texts())))}
    return {place: label.ranks[place] for place in sorted(first.values()) if label.ranks[place] is not None}


def export_labels(store: Store, folder: Path) -> dict[str, int]:
    """Writes `rankings.jsonl`, `pairs.jsonl` and `demonstrations.jsonl`, and `labels.jsonl`, which `import_labels` reads.

    Each replaces what was there; one of the first three that would have no rows is removed.

    Returns:
        The number of rows of each file.

    Raises:
        RecipeError: if a file cannot be written.
    """
    with store.snapshot():
        files = {"rankings": rankings(store), "pairs": pairs(store), "demonstrations": demonstrations(store)}
        files["labels"] = _everything(store)
    with _written_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            _write_rows(folder / f"{name}.jsonl", rows)
    return {f"{name}.jsonl": len(rows) for name, rows in files.items()}


def import_labels(store: Store, path: Path) -> int:
    """Restores groups and labels from a `labels.jsonl` that `export_labels` wrote, all of it or nothing.

    Returns:
        How many labels are new.

    Raises:
        RecipeError: if the file is not one, or contradicts what is in the store.
    """
    rows = []
    for number, row in read_rows(path):
        where = f"{path}: row {number}"
        group = group_of(row, where)
        rows.append((where, group, _read_labels(row, group.id, where)))
    if not rows:
        raise RecipeError(f"{path}: the file has no rows")
    return store.restore(rows)


def _labelled(store: Store) -> Iterator[tuple[Group, Label]]:
    with store.snapshot():
        labels, groups = store.labels(), {group.id: group for group in store.groups()}
    return ((groups[label.group], label) for label in labels)


def _everything(store: Store) -> Rows:
    rows = {group.id: group.row() | {"labels": []} for group in store.groups()}
    for label in store.labels():
        rows[label.group]["labels"].append({name: getattr(label, name) for name in _TYPES})
    return list(rows.values())


def _origin(label: Label) -> dict[str, str]:
    return {"labeller": label.labeller, "id": label.group}


def _read_labels(row: dict[str, Any], group: str, where: str) -> list[Label]:
    labels = row.get("labels")
    if not isinstance(labels, list):
        raise RecipeError(
            f"{where}: there is no list `labels`: --import reads the labels.jsonl that --export wrote; groups that are to be "
            "labelled are given as --data"
        )
    return [_read_label(label, group, where) for label in labels]


def _read_label(label: Any, group: str, where: str) -> Label:
    if not isinstance(label, dict) or set(label) - set(_TYPES) or "labeller" not in label:
        raise RecipeError(f"{where}: a label is a mapping of {', '.join(_TYPES)}, and this is {json.dumps(label)[:100]}")
    for name, value in label.items():
        if not isinstance(value, _TYPES[name]):
            raise RecipeError(f"{where}: labels: `{name}` is {json.dumps(value)[:100]}, which no label has")
    return Label(group, **label)


def _write_rows(path: Path, rows: Rows) -> None:
    """Writes a file so that `path` holds either all of it or what it held before."""
    if not rows and path.stem != "labels":
        path.unlink(missing_ok=True)
        return
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecipeError(
            f"{error.filename or folder}: cannot be written ({error.strerror}): free space or give another folder as --export; "
            "the labels themselves are safe in the database"
        ) from error
