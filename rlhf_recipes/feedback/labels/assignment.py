"""Which group a labeller gets next.

Every labeller gets a share of the groups (`overlap`); each of the others goes to one labeller. A group on somebody's screen is
leased for an hour. A skipped group goes to another labeller.
"""

from typing import NamedTuple

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

NEXT = f"""
    SELECT g.number, g.content FROM groups g LEFT JOIN claims m ON m.labeller = :labeller WHERE {_OPEN}
    ORDER BY g.number IS NOT m.group_number, g.number LIMIT 1
"""
"""Query: the group that a labeller has claimed, or the first open one."""
CLAIM = "INSERT OR REPLACE INTO claims VALUES (?, ?, ?)"
"""Statement: lease a group to a labeller, in place of the last one."""
PROGRESS = f"""
    SELECT (SELECT count(*) FROM labels WHERE labeller = :labeller AND withdrawn IS NULL),
        count(*) FILTER (WHERE {_OPEN}), count(*) FILTER (WHERE {_HELD}) FROM groups g
"""
"""Query: a labeller's `Progress`."""


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
