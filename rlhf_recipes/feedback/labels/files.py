"""Labels as files: rankings, pairs and demonstrations for the recipes, and one file from which all is restored."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import write_text
from rlhf_recipes.feedback.labels.groups import Group, group_of, read_rows
from rlhf_recipes.feedback.labels.store import Label, Store

Rows = list[dict[str, Any]]
Ranked = list[tuple[Group, Label]]
_TEXTS = str | None
_TYPES = {"labeller": str, "ranks": list | None, "demonstration": _TEXTS, "note": _TEXTS, "at": str}


def rankings(store: Store) -> Rows:
    """One row for each label that orders at least two completions; unusable ones are left out.

    Returns:
        Rows of `prompt`, `completions`, `ranks` (1 is the best), `labeller`, `id`, and `sources` where the group has them.
    """
    return _rankings(ranked(store))


def _rankings(ranked: Ranked) -> Rows:
    rows = []
    for group, label in ranked:
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
    return _pairs(ranked(store))


def _pairs(ranked: Ranked) -> Rows:
    rows = []
    for group, label in ranked:
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
    return _demonstrations(_labelled(*store.contents()))


def _demonstrations(labelled: Ranked) -> Rows:
    return [
        {"prompt": group.prompt, "completion": group.answer(label.demonstration)} | _origin(label)
        for group, label in labelled
        if label.demonstration
    ]


def ranked(store: Store) -> Ranked:
    """Each label that is more than a skip, with its group."""
    return _ranked(_labelled(*store.contents()))


def different(group: Group, label: Label) -> dict[int, int]:
    """Place and rank of each usable completion, only the first of those that are equal."""
    first = {text: place for place, text in reversed(list(enumerate(group.texts())))}
    return {place: label.ranks[place] for place in sorted(first.values()) if label.ranks[place] is not None}


def export_labels(store: Store, folder: Path) -> dict[str, int | None]:
    """Writes `rankings.jsonl`, `pairs.jsonl` and `demonstrations.jsonl`, and `labels.jsonl`, which `import_labels` reads.

    Each replaces what another export left there; one of the first three that would have no rows is removed.

    Returns:
        The number of rows of each file; None of one that was removed.

    Raises:
        RecipeError: if a file cannot be written, or there is one of its name that no export wrote.
    """
    groups, labels = store.contents()
    labelled = _labelled(groups, labels)
    ranked = _ranked(labelled)
    # `labels` first: by it the next export knows the others for its own, were this one broken off
    files = {"labels": _everything(groups, labels), "rankings": _rankings(ranked), "pairs": _pairs(ranked)}
    files["demonstrations"] = _demonstrations(labelled)
    _refuse_other_files(folder, files)
    with _written_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return {f"{name}.jsonl": _write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}


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


def _labelled(groups: list[Group], labels: list[Label]) -> Ranked:
    by_id = {group.id: group for group in groups}
    return [(by_id[label.group], label) for label in labels]


def _ranked(labelled: Ranked) -> Ranked:
    return [(group, label) for group, label in labelled if label.ranks is not None]


def _everything(groups: list[Group], labels: list[Label]) -> Rows:
    rows = {group.id: group.row() | {"labels": []} for group in groups}
    for label in labels:
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


def _refuse_other_files(folder: Path, names: Iterable[str]) -> None:
    """An export's files have its `labels.jsonl` beside them."""
    there = [path for name in names if (path := folder / f"{name}.jsonl").exists()]
    if there and not _is_export(folder / "labels.jsonl"):
        raise RecipeError(f"{there[0]}: was not written by --export, which would replace it: give another folder as --export")


def _is_export(path: Path) -> bool:
    try:
        _, row = next(read_rows(path), (0, {"labels": []}))  # that of an empty store has no rows
    except RecipeError:
        return False
    return isinstance(row, dict) and isinstance(row.get("labels"), list)


def _write_rows(path: Path, rows: Rows) -> int | None:
    """Writes a file of rows; how many they are, None for a file removed."""
    if not rows and path.stem != "labels":
        existed = path.exists()
        path.unlink(missing_ok=True)
        return None if existed else 0
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


@contextlib.contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecipeError(
            f"{error.filename or folder}: cannot be written ({error.strerror}): free space or give another folder as --export; "
            "the labels themselves are safe in the database"
        ) from error
