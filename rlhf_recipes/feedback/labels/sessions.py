"""Labellers and the sessions in which they label."""

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels.database import Database
from rlhf_recipes.feedback.labels.label import clean_name


class NameTakenError(RecipeError):
    """A labeller of this name already exists."""


def labeller_number(database: Database, name: str) -> int:
    """Return the number of a labeller, created if needed. Case makes no difference."""
    name = clean_name(name)
    folded = name.casefold()
    database.execute("INSERT INTO labellers (name, folded) VALUES (?, ?) ON CONFLICT DO NOTHING", name, folded)
    return database.one("SELECT number FROM labellers WHERE folded = ?", folded)[0]


class Sessions:
    """The sessions of a store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def start(self, name: str, session: str, known: bool = False) -> str:
        """Start a session for a labeller and return the name as stored.

        Args:
            name: of the labeller.
            session: a secret of the session.
            known: whether the labeller confirms having labelled under this name before.

        Raises:
            NameTakenError: if the name exists and `known` is false: two people could share it by accident.
            InvalidLabelError: if it is not a name.
        """
        folded = clean_name(name).casefold()
        with self._database.transaction():
            if not known and self._database.one("SELECT 1 FROM labellers WHERE folded = ?", folded):
                raise NameTakenError(f"'{clean_name(name)}' labels here already")
            self._database.execute("INSERT INTO sessions VALUES (?, ?)", session, labeller_number(self._database, name))
            return self._database.one("SELECT name FROM labellers WHERE folded = ?", folded)[0]

    def labeller(self, session: str) -> str | None:
        """Return the name of the labeller of a session, or None."""
        query = "SELECT name FROM sessions s JOIN labellers p ON p.number = s.labeller WHERE session = ?"
        return (self._database.one(query, session) or [None])[0]
