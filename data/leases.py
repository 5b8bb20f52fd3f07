"""Leases: what only one process at a time may do (tick the clock, swap policies) belongs to whoever holds its row.

A holder renews well before its time is over. One that died is followed by another as soon as its lease has run out; one
that was only slow finds out at its next renewal, so what must not happen twice is done in the transaction that renews.
"""

from sqlite_utils import Database

from data.types import timestamp

LONGEST_S = 60.0
"""One that would last longer is from a clock that was ahead, and nobody's."""


def acquire(db: Database, name: str, holder: str, *, for_s: float) -> bool:
    """Take the lease, or renew it where `holder` has it already, until `for_s` seconds from now, at most LONGEST_S;
    False while it is another's. Call inside a transaction."""
    now = timestamp()
    row = db.execute(
        "INSERT INTO leases (name, holder, until) VALUES (:name, :holder, :until)"
        " ON CONFLICT (name) DO UPDATE SET holder = :holder, until = :until"
        " WHERE leases.holder = :holder OR leases.until <= :now OR leases.until > :ahead RETURNING name",
        {
            "name": name,
            "holder": holder,
            "until": timestamp(plus_s=for_s),
            "now": now,
            "ahead": timestamp(plus_s=LONGEST_S),
        },
    ).fetchone()
    return row is not None


def release(db: Database, name: str, holder: str) -> None:
    """Give the lease up, so that another need not wait for its end; nothing where it is not `holder`'s. Call inside a
    transaction."""
    db.execute("DELETE FROM leases WHERE name = ? AND holder = ?", (name, holder))


def holder_of(db: Database, name: str) -> str | None:
    """Who has the lease now."""
    row = db.execute(
        "SELECT holder FROM leases WHERE name = ? AND until > ? AND until <= ?",
        (name, timestamp(), timestamp(plus_s=LONGEST_S)),
    ).fetchone()
    return row[0] if row else None
