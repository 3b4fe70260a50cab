"""Labels in one SQLite file: who is to label what, what was said, and nothing lost of what was acknowledged."""

import contextlib
import json
import secrets
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.feedback.labels.groups import Group, group_of

VERSION = 2
LONGEST_DEMONSTRATION, LONGEST_NOTE, LONGEST_NAME = 20_000, 2_000, 60  # characters
LEASE = 3600.0
"""Seconds for which a prompt that one labeller has on the screen is given to no other."""

_APPLICATION = 0x524C4846  # what `file` and others know the format by
_SCHEMA = Path(__file__).with_name("schema.sql")
# Multiples of the golden ratio lie evenly in [0, 1): of any consecutive prompts the right share is below `overlap`.
_SHARED = "(g.number * 0.6180339887498949 - CAST(g.number * 0.6180339887498949 AS INTEGER) < (SELECT overlap FROM settings))"
_NEW = "NOT EXISTS (SELECT 1 FROM labels l WHERE l.group_number = g.number AND l.labeller = :labeller AND l.withdrawn IS NULL)"
_UNRANKED = """
    NOT EXISTS (SELECT 1 FROM labels l WHERE l.group_number = g.number AND l.withdrawn IS NULL AND l.ranks IS NOT NULL)"""
_HELD = "EXISTS (SELECT 1 FROM claims c WHERE c.group_number = g.number AND c.labeller != :labeller AND c.until > :now)"
_OPEN = f"{_NEW} AND g.wanted AND ({_SHARED} OR ({_UNRANKED} AND NOT {_HELD}))"
_ELSEWHERE = f"{_NEW} AND g.wanted AND NOT {_SHARED} AND {_UNRANKED} AND {_HELD}"
_LABEL = """
    SELECT l.number, g.id, p.name, l.ranks, l.demonstration, l.note, l.at, l.submission
    FROM labels l JOIN groups g ON g.number = l.group_number JOIN labellers p ON p.number = l.labeller
"""
_LABELS = f"{_LABEL} WHERE l.withdrawn IS NULL ORDER BY l.number"
_GROUPS = "SELECT content FROM groups ORDER BY number"
_REMEDIES = {
    "SQLITE_FULL": "the disk is full, and this was not saved: free some space and send it again",
    "SQLITE_READONLY": "the database is read-only: let this user write to the file and its folder, or give another --store",
    "SQLITE_BUSY": "another program holds the database, and this was not saved: end it and try again",
    "SQLITE_CANTOPEN": "cannot be opened: does its folder exist, and may this user write to it?",
    "SQLITE_NOTADB": "not a database of labels: give another file as --store",
    "SQLITE_CORRUPT": "the database is damaged: restore a backup, or --import the last export into a fresh one",
}


class BadLabelError(RecipeError):
    """A label, or the name of a labeller, that cannot be kept as it is."""


class AlreadyLabelledError(RecipeError):
    """The labeller has a label on this group already."""


class KnownNameError(RecipeError):
    """Somebody of this name is here already."""


@dataclass(frozen=True)
class Label:
    """What one labeller said of one group.

    Parameters:
        group: id of the group.
        labeller: name of the labeller.
        ranks: for each of the K completions its rank from 1, the best, with ties allowed and no gaps, or None where it is
            unusable; None instead of the list where the labeller skipped the comparison.
        demonstration: what the answer should have been, or None.
        note: free text, or None.
        at: when it was stored, UTC, ISO 8601; empty before that.
    """

    group: str
    labeller: str
    ranks: list[int | None] | None = None
    demonstration: str | None = None
    note: str | None = None
    at: str = ""


class Store:
    """A database of groups and labels; threads may share one.

    A label is on the disk when `save` returns. The journal is SQLite's rollback journal, not a write-ahead log: then all labels
    are in the one file at any moment, which may be copied, and people label too slowly for a log to matter. `synchronous` is
    EXTRA, which is FULL and syncs the folder after each commit, without which a power cut could bring the journal back.

    Args:
        path: the file; made where there is none.
        overlap: share in [0, 1] of the groups that every labeller is given; of the others each is given to one. The file
            keeps it: None is what it has, or 0.1 in a new one.
        create: whether to make it where there is none.
        clock: seconds since some moment.

    Raises:
        RecipeError: from every method, where the file is no database of labels of this version, the disk is full, and so on.
    """

    def __init__(
        self, path: Path | str, overlap: float | None = None, create: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        if overlap is not None and not 0 <= overlap <= 1:
            raise RecipeError(f"overlap: {overlap}: must be a share from 0 to 1")
        self.path, self._clock = Path(path), clock
        self._lock = threading.RLock()
        if not create and not self.path.exists():
            raise RecipeError(f"{self.path}: there is no such database of labels (looked in {self.path.absolute().parent})")
        with self._explained():
            self._connection = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
            if overlap is not None and overlap != self.overlap:
                self._run("UPDATE settings SET overlap = ?", overlap)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    @property
    def seed(self) -> str:
        """Random text of this database, from which the orders in which labellers see completions are drawn."""
        return self._one("SELECT seed FROM settings")[0]

    @property
    def overlap(self) -> float:
        """Share of the groups that every labeller is given."""
        return self._one("SELECT overlap FROM settings")[0]

    def add(self, groups: Iterable[Group], alone: bool = False) -> int:
        """Adds groups to be labelled, all or none of them.

        Groups that are here already stay as they are; those without two different answers that are not empty have nothing to
        compare, and are not added.

        Args:
            groups: to be given to labellers from now on.
            alone: whether all others are given to nobody any more, until they are added again. Their labels stay.

        Returns:
            How many are new.

        Raises:
            RecipeError: if a group has the id of another that is here, or is text where the others are messages.
        """
        with self._transaction():
            before = self._one("SELECT count(*) FROM groups")[0]
            if alone:
                self._run("UPDATE groups SET wanted = 0")
            for group in groups:
                if group.comparable():
                    self._add(group)
                    self._run("UPDATE groups SET wanted = 1 WHERE id = ?", group.id)
            return self._one("SELECT count(*) FROM groups")[0] - before

    def groups(self) -> list[Group]:
        """All groups, in the order in which they came."""
        return [self._group(content) for (content,) in self._all(_GROUPS)]

    def group(self, identity: str) -> Group:
        """The group of this id.

        Raises:
            BadLabelError: if there is none.
        """
        found = self._one("SELECT content FROM groups WHERE id = ?", identity)
        if not found:
            raise BadLabelError(f"{self.path}: there is no group '{identity}'")
        return self._group(found[0])

    def labels(self) -> list[Label]:
        """Every label that was not undone, in the order in which they came."""
        return [self._read_label(row) for row in self._all(_LABELS)]

    def contents(self) -> tuple[list[Group], list[Label]]:
        """`groups` and `labels` of one moment, whatever others write."""
        with self._lock:
            self._run("BEGIN")
            try:
                groups, labels = self._all(_GROUPS), self._all(_LABELS)
            finally:
                self._run("ROLLBACK")
        # Parsed when others may write again: of many groups this takes longer than they wait
        return [self._group(content) for (content,) in groups], [self._read_label(row) for row in labels]

    def sign_in(self, name: str, session: str, known: bool = False) -> str:
        """Lets a session label under a name.

        Args:
            name: of the labeller; upper and lower case and spaces make no difference.
            session: a secret of the session.
            known: whether the labeller has said to be the one who has labelled under this name before.

        Returns:
            The name as it is kept.

        Raises:
            KnownNameError: if the name is here already and `known` is false, so that two people do not share one by accident.
            BadLabelError: if it is no name.
        """
        folded = _clean_name(name).casefold()
        with self._transaction():
            if not known and self._one("SELECT 1 FROM labellers WHERE folded = ?", folded):
                raise KnownNameError(f"'{_clean_name(name)}' labels here already")
            labeller = self._labeller(name)
            self._run("INSERT INTO sessions VALUES (?, ?)", session, labeller)
            return self._one("SELECT name FROM labellers WHERE number = ?", labeller)[0]

    def signed_in(self, session: str) -> str | None:
        """The name under which a session labels."""
        found = self._one(
            "SELECT name FROM sessions JOIN labellers ON labellers.number = sessions.labeller WHERE session = ?", session
        )
        return found and found[0]

    def claim(self, name: str) -> Group | None:
        """The group that a labeller is to label now, which no other is given for an hour unless everybody is; None at the end.

        The same one until it is labelled.
        """
        with self._transaction():
            values = self._values(self._labeller(name))
            found = self._one(
                f"SELECT g.number, g.content FROM groups g LEFT JOIN claims m ON m.labeller = :labeller WHERE {_OPEN} "
                "ORDER BY g.number IS NOT m.group_number, g.number LIMIT 1",
                **values,
            )
            if not found:
                return None
            self._claim(values["labeller"], found[0])
            return self._group(found[1])

    def progress(self, name: str) -> tuple[int, int]:
        """How many groups a labeller has labelled or skipped, and how many are left that the labeller could be given."""
        with self._transaction():
            values = self._values(self._labeller(name))
            mine = "SELECT count(*) FROM labels WHERE labeller = :labeller AND withdrawn IS NULL"
            left = f"SELECT count(*) FROM groups g WHERE {_OPEN}"
            return self._one(mine, **values)[0], self._one(left, **values)[0]

    def held(self, name: str) -> int:
        """How many groups a labeller is not given only because others have them on their screens."""
        with self._transaction():
            values = self._values(self._labeller(name))
            return self._one(f"SELECT count(*) FROM groups g WHERE {_ELSEWHERE}", **values)[0]

    def save(self, label: Label, submission: str | None = None) -> None:
        """Stores a label, durably when this returns.

        Args:
            label: ranks need not be without gaps, and are stored so. `at` is set where it is empty.
            submission: what names this attempt. Sent again under the same name, because the answer was lost, a label replaces
                the one that was stored after all.

        Raises:
            BadLabelError: if the ranks do not fit the group, or a text is too long.
            AlreadyLabelledError: if the labeller has labelled the group, under another submission.
        """
        with self._transaction():
            label = _checked(label, self.group(label.group))
            self._save(label, submission or secrets.token_hex(16))

    def newest(self, name: str) -> int | None:
        """The number of the newest label of a labeller that was not undone."""
        return self._one(
            "SELECT max(l.number) FROM labels l JOIN labellers p ON p.number = l.labeller "
            "WHERE p.folded = ? AND l.withdrawn IS NULL",
            _clean_name(name).casefold(),
        )[0]

    def undo(self, name: str, number: int | None = None) -> Label | None:
        """Withdraws a label of a labeller, who is given its group again.

        Args:
            name: of the labeller.
            number: of the label, as `newest` has said it; None: the newest. One that was undone already stays so: what is
                asked again, because the answer was lost, does not undo the label before.

        Returns:
            The label; None where there is none.
        """
        with self._transaction():
            labeller = self._labeller(name)
            found = self._one(f"{_LABEL} WHERE l.number = ? AND l.labeller = ?", number or self.newest(name), labeller)
            if not found:
                return None
            self._withdraw(found[0])
            self._claim(labeller, self._one("SELECT group_number FROM labels WHERE number = ?", found[0])[0])
            return self._read_label(found)

    def withdrawn(self, name: str, group: str) -> Label | None:
        """What a labeller last said of a group and undid."""
        found = self._one(
            f"{_LABEL} WHERE p.folded = ? AND g.id = ? AND l.withdrawn IS NOT NULL ORDER BY l.number DESC LIMIT 1",
            _clean_name(name).casefold(),
            group,
        )
        return self._read_label(found) if found else None

    def restore(self, rows: Iterable[tuple[str, Group, list[Label]]]) -> int:
        """Adds groups with their labels, all or none of them; labels that are here already stay.

        Args:
            rows: for each group where it stands, for messages, the group, and its labels.

        Returns:
            How many labels are new.

        Raises:
            RecipeError: if a group or label contradicts one that is here.
        """
        with self._transaction():
            before = self._one("SELECT count(*) FROM labels")[0]
            restored = []
            for where, group, labels in rows:
                with _located(where):
                    self._add(group)
                    restored += [(where, _checked(label, group)) for label in labels]
            for where, label in sorted(restored, key=lambda one: one[1].at):  # undo goes back in the order in which they came
                with _located(where):
                    self._restore(label)
            return self._one("SELECT count(*) FROM labels")[0] - before

    def _prepare(self) -> None:
        self._run("PRAGMA synchronous = EXTRA")
        self._run("PRAGMA fullfsync = ON")  # macOS, whose fsync leaves data in the cache of the drive
        self._run("PRAGMA foreign_keys = ON")
        if self._state() == (0, 0, 0):
            with self._transaction():
                if self._state() == (0, 0, 0):  # no other process was faster
                    self._create()
        application, version, _ = self._state()
        if application != _APPLICATION:
            raise RecipeError(f"{self.path}: {_REMEDIES['SQLITE_NOTADB']}")
        if version != VERSION:
            raise RecipeError(
                f"{self.path}: a database of version {version}, and this is rlhf-recipes for version {VERSION}: export it with "
                "the rlhf-recipes that wrote it, and --import the export into a fresh --store"
            )

    def _state(self) -> tuple[int, int, int]:
        tables = self._one("SELECT count(*) FROM sqlite_master")[0]
        return self._one("PRAGMA application_id")[0], self._one("PRAGMA user_version")[0], tables

    def _create(self) -> None:
        for statement in _SCHEMA.read_text(encoding="utf-8").split(";"):
            self._run(statement)
        self._run("INSERT INTO settings (seed) VALUES (?)", secrets.token_hex(16))
        self._run(f"PRAGMA application_id = {_APPLICATION}")
        self._run(f"PRAGMA user_version = {VERSION}")

    def _add(self, group: Group) -> None:
        content = json.dumps(group.row(), ensure_ascii=False)
        known = self._one("SELECT content FROM groups WHERE id = ?", group.id)
        if known and known[0] != content:
            raise RecipeError(
                f"the id '{group.id}' is in {self.path} already, with other content: give other ids, or another --store"
            )
        other = self._one("SELECT content FROM groups LIMIT 1")
        if other and self._group(other[0]).conversational != group.conversational:
            raise RecipeError(f"{self.path}: holds groups of texts or of messages, not both: give another --store")
        if not known:
            self._run("INSERT INTO groups (id, content) VALUES (?, ?)", group.id, content)

    def _labeller(self, name: str) -> int:
        """The number of a labeller, who is new where nobody has the name."""
        name = _clean_name(name)
        found = self._one("SELECT number FROM labellers WHERE folded = ?", name.casefold())
        if found:
            return found[0]
        return self._run("INSERT INTO labellers (name, folded) VALUES (?, ?)", name, name.casefold()).lastrowid

    def _values(self, labeller: int) -> dict[str, Any]:
        return {"labeller": labeller, "now": self._clock()}

    def _claim(self, labeller: int, group_number: int) -> None:
        self._run("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", labeller, group_number, self._clock() + LEASE)

    def _current(self, label: Label) -> tuple | None:
        return self._one(
            f"{_LABEL} WHERE g.id = ? AND l.labeller = ? AND l.withdrawn IS NULL", label.group, self._labeller(label.labeller)
        )

    def _save(self, label: Label, submission: str) -> None:
        current = self._current(label)
        if current and current[-1] != submission:
            raise AlreadyLabelledError(
                f"{label.labeller} has labelled the group '{label.group}' already: undo that label first"
            )
        if current:
            self._withdraw(current[0])
        self._run(
            "INSERT INTO labels (group_number, labeller, submission, ranks, demonstration, note, at) "
            "VALUES ((SELECT number FROM groups WHERE id = ?), ?, ?, ?, ?, ?, ?)",
            label.group,
            self._labeller(label.labeller),
            submission,
            label.ranks and json.dumps(label.ranks),
            label.demonstration,
            label.note,
            label.at or _now(),
        )

    def _restore(self, label: Label) -> None:
        current = self._current(label)
        if not current:
            self._save(label, secrets.token_hex(16))
        elif replace(self._read_label(current), at="") != replace(label, at="", labeller=self._read_label(current).labeller):
            raise RecipeError(
                f"{label.labeller} has another label on the group '{label.group}' in {self.path}: import into a fresh --store"
            )

    def _withdraw(self, number: int) -> None:
        self._run("UPDATE labels SET withdrawn = ? WHERE number = ? AND withdrawn IS NULL", _now(), number)

    def _group(self, content: Any) -> Group:
        with self._undamaged():
            return group_of(json.loads(content), "a group")

    def _read_label(self, row: tuple) -> Label:
        with self._undamaged():
            return _label(row)

    @contextlib.contextmanager
    def _undamaged(self) -> Iterator[None]:
        """Refuses what this program has not written."""
        try:
            yield
        except (ValueError, TypeError, RecursionError, RecipeError) as error:
            raise RecipeError(f"{self.path}: {_REMEDIES['SQLITE_CORRUPT']} ({first_line(error)})") from error

    def _run(self, statement: str, *values: Any, **named: Any) -> sqlite3.Cursor:
        with self._lock, self._explained():
            return self._connection.execute(statement, named or values)

    def _one(self, statement: str, *values: Any, **named: Any) -> tuple | None:
        with self._lock, self._explained():
            return self._connection.execute(statement, named or values).fetchone()

    def _all(self, statement: str) -> list[tuple]:
        with self._lock, self._explained():
            return self._connection.execute(statement).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of what is done within, or none of it; and on the disk at the end."""
        with self._lock:
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # some errors, a full disk among them, roll back themselves
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what SQLite says into a message with a remedy."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            remedy = next((text for key, text in _REMEDIES.items() if name.startswith(key)), None)
            if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError) or not name:
                raise  # ours to mend
            raise RecipeError(
                f"{self.path}: {remedy or f'SQLite failed, and this was not saved: {first_line(error)}'}"
            ) from error


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}. Nothing was imported") from error


def _label(row: tuple) -> Label:
    _, group, labeller, ranks, demonstration, note, at, _ = row
    ranks = None if ranks is None else json.loads(ranks)
    texts = all(isinstance(text, str | None) for text in (labeller, demonstration, note, at))
    if not texts or not (ranks is None or (isinstance(ranks, list) and all(type(rank) in (int, type(None)) for rank in ranks))):
        raise ValueError(f"the label of {labeller!r} on the group '{group}'")
    return Label(group, labeller, ranks, demonstration, note, at)


def _checked(label: Label, group: Group) -> Label:
    """The label with ranks that have no gaps and texts that are not empty."""
    demonstration = _checked_text(label.demonstration, "the answer that should have been", LONGEST_DEMONSTRATION)
    note = _checked_text(label.note, "the note", LONGEST_NOTE)
    ranks = None if label.ranks is None else _checked_ranks(label.ranks, group)
    return replace(label, labeller=_clean_name(label.labeller), ranks=ranks, demonstration=demonstration, note=note)


def _checked_ranks(ranks: list[int | None], group: Group) -> list[int | None]:
    texts = group.texts()
    if not isinstance(ranks, list) or len(ranks) != len(texts):
        raise BadLabelError(f"group '{group.id}': ranks are needed for {len(texts)} completions, one each")
    if any(rank is not None and (type(rank) is not int or rank < 1) for rank in ranks):
        raise BadLabelError(f"group '{group.id}': a rank is a whole number from 1, or null for an unusable completion")
    said: dict[str, int | None] = {"": None}
    for text, rank in zip(texts, ranks, strict=True):
        if said.setdefault(text, rank) != rank:
            raise BadLabelError(f"group '{group.id}': an empty completion can only be unusable, and equal ones have one rank")
    order = sorted({rank for rank in ranks if rank is not None})
    return [None if rank is None else order.index(rank) + 1 for rank in ranks]


def _checked_text(text: str | None, name: str, longest: int) -> str | None:
    text = (text or "").strip()
    if len(text) > longest:
        raise BadLabelError(f"{name} has {len(text)} characters, and may have {longest}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadLabelError(f"{name} is not text that UTF-8 can hold")
    return text or None


def _clean_name(name: str) -> str:
    clean = " ".join(unicodedata.normalize("NFKC", name).split())
    if not clean or len(clean) > LONGEST_NAME or not clean.isprintable():
        raise BadLabelError(f"{name[:LONGEST_NAME]!r} is no name: a labeller has one of 1 to {LONGEST_NAME} letters")
    return clean


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
