"""The SQLite file of labels: durable transactions, the schema, clear errors."""

import contextlib
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line

VERSION = 2
_APPLICATION_ID = 0x524C4846  # identifies the format, for `file` too
DAMAGED, RESTORE = "the database is damaged", "restore a backup, or --import the last export into a fresh --store"
_REMEDIES = {
    "SQLITE_FULL": "the disk is full, and this was not saved. Fix: free some space and send it again",
    "SQLITE_READONLY": "the database is read-only. Fix: allow this user to write to the file and its folder",
    "SQLITE_BUSY": "another program holds the database, and this was not saved. Fix: end it and try again",
    "SQLITE_CANTOPEN": "cannot be opened. Fix: create its folder, and allow this user to write to it",
    "SQLITE_NOTADB": "not a database of labels. Fix: name another file as --store",
    "SQLITE_CORRUPT": f"{DAMAGED}. Fix: {RESTORE}",
}


class Database:
    """A connection to the file, created if it does not exist; threads may share it.

    A transaction is on the disk when it returns. The journal is SQLite's rollback journal, not a write-ahead log, so that the
    one file holds all labels at any moment and can be copied. People label too slowly for a log to matter. `synchronous` is
    EXTRA: FULL, and the folder is synced after each commit, or a power cut could bring the journal back.

    Raises:
        RecipeError: from every method, if the file is not such a database, the disk is full, or the like.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._recipe_errors():
            self._connection = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            self.execute("PRAGMA synchronous = EXTRA")
            self.execute("PRAGMA fullfsync = ON")  # macOS: a plain fsync leaves data in the cache of the drive
            self.execute("PRAGMA foreign_keys = ON")
            self._create_tables()
            self._check_format()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def execute(self, statement: str, *values: Any, **named: Any) -> list[tuple]:
        """Execute a statement and return all its rows."""
        with self._lock, self._recipe_errors():
            return self._connection.execute(statement, named or values).fetchall()

    def one(self, statement: str, *values: Any, **named: Any) -> tuple | None:
        """Execute a statement and return its first row, or None."""
        return next(iter(self.execute(statement, *values, **named)), None)

    @contextlib.contextmanager
    def transaction(self, mode: str = "IMMEDIATE") -> Iterator[None]:
        """Commit all statements within, or none. Committed, they are on the disk."""
        with self._lock:
            self.execute(f"BEGIN {mode}")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite rolls back by itself after some errors, such as a full disk
                    self._connection.execute("ROLLBACK")
                raise

    def _format(self) -> list[int]:
        statements = ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        return [self.one(statement)[0] for statement in statements]

    def _create_tables(self) -> None:
        if any(self._format()):
            return
        with self.transaction():
            if any(self._format()):  # another process has created them
                return
            for statement in Path(__file__).with_name("schema.sql").read_text(encoding="utf-8").split(";"):
                self.execute(statement)
            self.execute("INSERT INTO settings (seed) VALUES (?)", secrets.token_hex(16))
            self.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self.execute(f"PRAGMA user_version = {VERSION}")

    def _check_format(self) -> None:
        application, version, _ = self._format()
        if application != _APPLICATION_ID:
            raise RecipeError(f"{self.path}: {_REMEDIES['SQLITE_NOTADB']}")
        if version != VERSION:
            raise RecipeError(
                f"{self.path}: has version {version} of the format, not {VERSION}. Fix: --export it with the rlhf-recipes that "
                "wrote it, and --import the export into a fresh --store"
            )

    @contextlib.contextmanager
    def _recipe_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # a mistake of this program
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "SQLITE_CORRUPT")  # without a name: text that is not UTF-8
            remedy = next((text for key, text in _REMEDIES.items() if name.startswith(key)), None)
            raise RecipeError(f"{self.path}: {remedy or f'not saved: {first_line(error)}'}") from error
