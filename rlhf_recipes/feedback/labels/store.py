"""The store of groups, labellers and labels."""

import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.feedback.groups import Group, GroupRow
from rlhf_recipes.feedback.labels.assignment import CLAIM, LEASE, NEXT, PROGRESS, Progress
from rlhf_recipes.feedback.labels.database import DAMAGED, RESTORE, Database
from rlhf_recipes.feedback.labels.label import (
    AlreadyLabelledError,
    InvalidLabelError,
    Label,
    NameTakenError,
    clean_name,
    normalize,
)

_LABEL = """
    SELECT l.number, g.id, p.name, l.ranks, l.demonstration, l.note, l.at, l.submission
    FROM labels l JOIN groups g ON g.number = l.group_number JOIN labellers p ON p.number = l.labeller
"""
_LABELS = f"{_LABEL} WHERE l.withdrawn IS NULL ORDER BY l.number"


class Store:
    """Groups and labels in one SQLite file, for several threads and processes.

    Args:
        path: the file.
        overlap: share in [0, 1] of the groups that every labeller gets; each of the others goes to one. The file keeps it:
            None leaves it as it is, 0.1 in a new file.
        create: whether to create the file if it does not exist.

    Raises:
        RecipeError: from every method, if the file is not a database of labels of this version, the disk is full, or the like.
    """

    def __init__(self, path: Path | str, overlap: float | None = None, create: bool = True) -> None:
        if overlap is not None and not 0 <= overlap <= 1:
            raise RecipeError(f"overlap: {overlap}: must be a share from 0 to 1")
        self.path = Path(path)
        if not create and not self.path.exists():
            raise RecipeError(f"{self.path}: no such database of labels. Fix: create it with --data")
        self._database = Database(self.path)
        if overlap is not None and overlap != self.overlap:
            self._database.execute("UPDATE settings SET overlap = ?", overlap)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @property
    def seed(self) -> str:
        """Random text of this file, which seeds the order of completions."""
        return self._database.one("SELECT seed FROM settings")[0]

    @property
    def overlap(self) -> float:
        """Share of the groups that every labeller gets."""
        return self._database.one("SELECT overlap FROM settings")[0]

    # --- Labellers ----------------------------------------------------------------------------------------------------

    def start_session(self, name: str, session: str, known: bool = False) -> str:
        """Start a session, identified by a secret, and return the name as stored.

        Raises:
            NameTakenError: if the name exists (in any case) and the labeller does not confirm it (`known`).
            InvalidLabelError: if it is not a name.
        """
        with self._database.transaction():
            if not known and self._database.one("SELECT 1 FROM labellers WHERE folded = ?", _folded(name)):
                raise NameTakenError(f"'{clean_name(name)}' labels here already")
            self._database.execute("INSERT INTO sessions VALUES (?, ?)", session, self._labeller(name))
            return self.labeller_in(session)

    def labeller_in(self, session: str) -> str | None:
        """Return the name of the labeller of a session, or None."""
        query = "SELECT name FROM sessions s JOIN labellers p ON p.number = s.labeller WHERE session = ?"
        return (self._database.one(query, session) or [None])[0]

    def _labeller(self, name: str) -> int:
        """Return the number of a labeller, who is added if needed."""
        add = "INSERT INTO labellers (name, folded) VALUES (?, ?) ON CONFLICT DO NOTHING"
        self._database.execute(add, clean_name(name), _folded(name))
        return self._database.one("SELECT number FROM labellers WHERE folded = ?", _folded(name))[0]

    # --- Groups -------------------------------------------------------------------------------------------------------

    def add(self, groups: Iterable[Group], exclusive: bool = False) -> int:
        """Add groups to be labelled, all or none, and return the number of new ones.

        Groups that are not comparable are left out. With `exclusive` labellers get no others until those are added again.

        Raises:
            RecipeError: if an id is taken by another group, or texts and messages would mix.
        """
        with self._database.transaction():
            before = self._count("groups")
            if exclusive:
                self._database.execute("UPDATE groups SET wanted = 0")
            for group in groups:
                if group.comparable():
                    self._add(group)
                    self._database.execute("UPDATE groups SET wanted = 1 WHERE id = ?", group.id)
            return self._count("groups") - before

    def group(self, identity: str) -> Group:
        """Return the group with this id; an `InvalidLabelError` if there is none."""
        row = self._database.one("SELECT content FROM groups WHERE id = ?", identity)
        if not row:
            raise InvalidLabelError(f"id: there is no group '{identity}'")
        return self._parse_group(row[0])

    def claim(self, name: str) -> Group | None:
        """Return the group to label, the same until it is labelled; None at the end.

        For an hour no other labeller gets it, unless every labeller does.
        """
        with self._database.transaction():
            labeller = self._labeller(name)
            row = self._database.one(NEXT, labeller=labeller, now=time.time())
            if not row:
                return None
            self._database.execute(CLAIM, labeller, row[0], time.time() + LEASE)
            return self._parse_group(row[1])

    def progress(self, name: str) -> Progress:
        """Return how far a labeller has come."""
        with self._database.transaction():
            return Progress(*self._database.one(PROGRESS, labeller=self._labeller(name), now=time.time()))

    # --- Labels -------------------------------------------------------------------------------------------------------

    def contents(self) -> list[tuple[Group, list[Label]]]:
        """Return every group with its labels, as of one moment and without undone ones."""
        with self._database.transaction("DEFERRED"):
            groups = self._database.execute("SELECT content FROM groups ORDER BY number")
            rows = self._database.execute(_LABELS)
        # Parsed after the transaction: for many groups this takes longer than other processes wait
        labels = defaultdict(list)
        for row in rows:
            labels[row[1]].append(self._parse_label(row))
        return [(group, labels[group.id]) for group in (self._parse_group(content) for (content,) in groups)]

    def labels(self) -> list[Label]:
        """Return all labels that were not undone, in the order of storing."""
        return [self._parse_label(row) for row in self._database.execute(_LABELS)]

    def save(self, label: Label, submission: str | None = None) -> None:
        """Store a label. When this returns, it is on the disk.

        Args:
            label: its ranks may have gaps, which are closed. `at` is set if it is empty.
            submission: identifies the attempt. Sent again, because the reply was lost, a label replaces the stored one.

        Raises:
            InvalidLabelError: if the ranks do not fit the group, or a text is too long.
            AlreadyLabelledError: if the labeller has labelled the group in another submission.
        """
        with self._database.transaction():
            self._save(normalize(label, self.group(label.group)), submission or secrets.token_hex(16))

    def newest(self, name: str) -> int | None:
        """Return the number of a labeller's newest label that was not undone."""
        labeller = "(SELECT number FROM labellers WHERE folded = ?)"
        query = f"SELECT max(number) FROM labels WHERE withdrawn IS NULL AND labeller = {labeller}"
        return self._database.one(query, _folded(name))[0]

    def undo(self, name: str, number: int | None = None) -> Label | None:
        """Withdraw and return a label, and claim its group again; None without a label.

        `number` is from `newest`, None for the newest: repeated, because the reply was lost, a request undoes no other label.
        """
        with self._database.transaction():
            labeller = self._labeller(name)
            row = self._database.one(f"{_LABEL} WHERE l.number = ? AND l.labeller = ?", number or self.newest(name), labeller)
            if not row:
                return None
            self._withdraw(row[0])
            (group_number,) = self._database.one("SELECT group_number FROM labels WHERE number = ?", row[0])
            self._database.execute(CLAIM, labeller, group_number, time.time() + LEASE)
            return self._parse_label(row)

    def withdrawn(self, name: str, group: str) -> Label | None:
        """Return the last label on a group that a labeller has undone, or None."""
        query = f"{_LABEL} WHERE p.folded = ? AND g.id = ? AND l.withdrawn IS NOT NULL ORDER BY l.number DESC LIMIT 1"
        row = self._database.one(query, _folded(name), group)
        return self._parse_label(row) if row else None

    def restore(self, rows: Iterable[tuple[str, Group, list[Label]]]) -> int:
        """Add groups with their labels, all or none, and return the number of new labels.

        Args:
            rows: per group its place for messages, the group, and its labels.

        Raises:
            RecipeError: if a group or label contradicts a stored one.
        """
        with self._database.transaction():
            before = self._count("labels")
            labels = []
            for where, group, group_labels in rows:
                with error_context(where):
                    self._add(group)
                    labels += [(where, normalize(label, group)) for label in group_labels]
            for where, label in sorted(labels, key=lambda one: one[1].at):  # undo needs the order of storing
                with error_context(where):
                    self._restore(label)
            return self._count("labels") - before

    # --- Rows ---------------------------------------------------------------------------------------------------------

    def _count(self, table: str) -> int:
        return self._database.one(f"SELECT count(*) FROM {table}")[0]

    def _add(self, group: Group) -> None:
        content = json.dumps(group.row(), ensure_ascii=False)
        known = self._database.one("SELECT content FROM groups WHERE id = ?", group.id)
        if known == (content,):
            return
        if known:
            raise RecipeError(f"id: '{group.id}' is in {self.path}, with other content. Fix: rename it, or use another --store")
        other = self._database.one("SELECT content FROM groups LIMIT 1")
        if other and self._parse_group(other[0]).conversational != group.conversational:
            raise RecipeError(f"{self.path}: holds either texts or messages, not both. Fix: use another --store")
        self._database.execute("INSERT INTO groups (id, content) VALUES (?, ?)", group.id, content)

    def _current(self, label: Label) -> tuple | None:
        query = f"{_LABEL} WHERE g.id = ? AND l.labeller = ? AND l.withdrawn IS NULL"
        return self._database.one(query, label.group, self._labeller(label.labeller))

    def _save(self, label: Label, submission: str) -> None:
        current = self._current(label)
        if current and current[-1] != submission:
            problem = f"{label.labeller} has already labelled group '{label.group}'. Fix: undo that label first"
            raise AlreadyLabelledError(problem)
        if current:
            self._withdraw(current[0])
        ranks = label.ranks and json.dumps(label.ranks)
        self._database.execute(
            "INSERT INTO labels (group_number, labeller, submission, ranks, demonstration, note, at) "
            "VALUES ((SELECT number FROM groups WHERE id = ?), ?, ?, ?, ?, ?, ?)",
            *(label.group, self._labeller(label.labeller), submission),
            *(ranks, label.demonstration, label.note, label.at or _now()),
        )

    def _restore(self, label: Label) -> None:
        current = self._current(label)
        if not current:
            self._save(label, secrets.token_hex(16))
            return
        stored = self._parse_label(current)
        if replace(stored, at="") != replace(label, at="", labeller=stored.labeller):
            problem = f"{label.labeller} has another label on group '{label.group}' in {self.path}. Fix: use a fresh --store"
            raise RecipeError(f"labels: {problem}")

    def _withdraw(self, number: int) -> None:
        self._database.execute("UPDATE labels SET withdrawn = ? WHERE number = ? AND withdrawn IS NULL", _now(), number)

    def _parse_group(self, content: str) -> Group:
        with self._damage_errors():
            return GroupRow.model_validate_json(content).group()

    def _parse_label(self, row: tuple) -> Label:
        _, group, labeller, ranks, *texts, _ = row
        with self._damage_errors():
            return Label(group, labeller, None if ranks is None else json.loads(ranks), *texts)

    def _damage_errors(self) -> contextlib.AbstractContextManager[None]:
        return error_context(f"{self.path}: {DAMAGED}", ValueError, TypeError, fix=RESTORE)


def _folded(name: str) -> str:
    return clean_name(name).casefold()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
