"""Which group a labeller gets next.

Every labeller gets a share of the groups (`overlap`); each of the others goes to one labeller. A group on somebody's screen is
leased for an hour. A skipped group goes to another labeller.
"""

from typing import NamedTuple

from rlhf_recipes.feedback.labels.database import Database

LEASE = 3600.0
"""Seconds for which a group on one labeller's screen goes to no other."""

# Multiples of the golden ratio lie evenly in [0, 1): of any consecutive groups the right share is below `overlap`.
_SHARED = "(g.number * 0.6180339887498949 - CAST(g.number * 0.6180339887498949 AS INTEGER) < (SELECT overlap FROM settings))"
_NEW = "NOT EXISTS (SELECT 1 FROM labels l WHERE l.group_number = g.number AND l.labeller = :labeller AND l.withdrawn IS NULL)"
_UNRANKED = """
    NOT EXISTS (SELECT 1 FROM labels l WHERE l.group_number = g.number AND l.withdrawn IS NULL AND l.ranks IS NOT NULL)"""
_LEASED = "EXISTS (SELECT 1 FROM claims c WHERE c.group_number = g.number AND c.labeller != :labeller AND c.until > :now)"
_OPEN = f"{_NEW} AND g.wanted AND ({_SHARED} OR ({_UNRANKED} AND NOT {_LEASED}))"
_HELD = f"{_NEW} AND g.wanted AND NOT {_SHARED} AND {_UNRANKED} AND {_LEASED}"


class Progress(NamedTuple):
    """How far a labeller has come.

    Parameters:
        done: groups labelled or skipped.
        left: groups that the labeller can get now.
        held: groups that the labeller cannot get only because they are on others' screens.
    """

    done: int
    left: int
    held: int


def next_group(database: Database, labeller: int, now: float) -> tuple[int, str] | None:
    """Return number and content of the claimed or first open group, or None."""
    return database.one(
        f"SELECT g.number, g.content FROM groups g LEFT JOIN claims m ON m.labeller = :labeller WHERE {_OPEN} "
        "ORDER BY g.number IS NOT m.group_number, g.number LIMIT 1",
        labeller=labeller,
        now=now,
    )


def claim_group(database: Database, labeller: int, group_number: int, now: float) -> None:
    """Lease a group to a labeller, in place of the last one."""
    database.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", labeller, group_number, now + LEASE)


def count_progress(database: Database, labeller: int, now: float) -> Progress:
    """Count what a labeller has done, can get, and cannot get yet."""
    (done,) = database.one("SELECT count(*) FROM labels WHERE labeller = ? AND withdrawn IS NULL", labeller)
    counts = f"SELECT count(*) FILTER (WHERE {_OPEN}), count(*) FILTER (WHERE {_HELD}) FROM groups g"
    return Progress(done, *database.one(counts, labeller=labeller, now=now))
