"""Who did what to what: every act of an operator leaves a row."""

from typing import Any

from sqlite_utils import Database

from data.types import timestamp


def record(db: Database, *, actor: str, action: str, subject: str) -> None:
    """`actor` is a key's id, or `cli`. Call inside the transaction of the act itself."""
    db.execute(
        "INSERT INTO audit (at, actor, action, subject) VALUES (?, ?, ?, ?)",
        (timestamp(), actor, action, subject),
    )


def latest(db: Database, *, limit: int) -> list[dict[str, Any]]:
    """Acts, the latest first."""
    return list(db.query("SELECT id, at, actor, action, subject FROM audit ORDER BY id DESC LIMIT ?", (limit,)))
