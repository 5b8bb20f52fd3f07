"""Whose votes a run leaves out, and why. No vote is deleted: a run suspects, an operator rules, and that stands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from data import audit, comparisons
from data.types import timestamp


class UnknownRater(LookupError):
    """No key of that id."""


class NoRuling(LookupError):
    """No operator ruled on this rater."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a run found of a rater."""

    votes: int
    """Decisive ones."""
    agreed: int
    """Of them, those that the other raters would have cast too, by their own reward model."""
    reliability: float
    """1: votes as the others do; 0: as a coin."""
    suspicion: str | None
    """Why the votes are to be left out: a sentence."""


def keep(db: Database, run_id: str, standings: Mapping[str, Standing], *, frees: bool = True) -> None:
    """Keep what a run found of everybody; where an operator has ruled nothing changes. Call inside a transaction.

    Args:
        frees: whether those whom it does not suspect, as an earlier run did, are free again. A run that had too few
            trusted votes to judge by frees nobody.
    """
    now = timestamp()
    suspicions = {key_id: found.suspicion for key_id, found in standings.items() if found.suspicion}
    for key_id, found in standings.items():
        db.execute(
            "INSERT INTO run_raters (run_id, key_id, votes, agreed, reliability) VALUES (?, ?, ?, ?, ?)",
            (run_id, key_id, found.votes, found.agreed, found.reliability),
        )
    for (key_id,) in db.execute("SELECT key_id FROM quarantines WHERE status = 'suspected'").fetchall():
        if frees and key_id not in suspicions:
            db.execute("DELETE FROM quarantines WHERE key_id = ?", (key_id,))
    for key_id, reason in suspicions.items():
        db.execute(
            "INSERT INTO quarantines (key_id, status, reason, run_id, since) VALUES (?, 'suspected', ?, ?, ?)"
            " ON CONFLICT (key_id) DO UPDATE SET reason = excluded.reason, run_id = excluded.run_id"
            " WHERE status = 'suspected'",
            (key_id, reason, run_id, now),
        )


def confirm(db: Database, key_id: str, *, actor: str) -> None:
    """Leave the rater's votes out for good, whether or not a run suspects them: what nobody else voted on waits for
    other raters again. Call inside a transaction. Raises UnknownRater."""
    _rule(db, key_id, "confirmed", actor, "rater.confirm")


def release(db: Database, key_id: str, *, actor: str) -> None:
    """Let the rater's votes count, whatever a run makes of them. Call inside a transaction. Raises UnknownRater."""
    _rule(db, key_id, "released", actor, "rater.release")


def reconsider(db: Database, key_id: str, *, actor: str) -> None:
    """Take an operator's word back: the next run judges the rater as any other, and until then the votes count. Call
    inside a transaction. Raises UnknownRater; NoRuling where there is no such word."""
    _known(db, key_id)
    if not db.execute("DELETE FROM quarantines WHERE key_id = ? AND status <> 'suspected'", (key_id,)).rowcount:
        raise NoRuling(key_id)
    comparisons.requeue(db, key_id)
    audit.record(db, actor=actor, action="rater.reconsider", subject=key_id)


def _known(db: Database, key_id: str) -> None:
    if db.execute("SELECT 1 FROM keys WHERE id = ?", (key_id,)).fetchone() is None:
        raise UnknownRater(key_id)


def _rule(db: Database, key_id: str, status: str, actor: str, action: str) -> None:
    _known(db, key_id)
    now = timestamp()
    db.execute(
        "INSERT INTO quarantines (key_id, status, reason, since, ruled_by, ruled_at)"
        " VALUES (:key, :status, 'No run found anything.', :now, :actor, :now)"
        # What a released rater said in a duel stays said: leaving them out anew begins anew.
        " ON CONFLICT (key_id) DO UPDATE SET status = :status, ruled_by = :actor, ruled_at = :now,"
        " since = iif(status = 'released' AND :status = 'confirmed', :now, since)",
        {"key": key_id, "status": status, "now": now, "actor": actor},
    )
    comparisons.requeue(db, key_id)
    audit.record(db, actor=actor, action=action, subject=key_id)


def left_out(db: Database) -> set[str]:
    """Whose votes do not train."""
    return {key_id for (key_id,) in db.execute("SELECT key_id FROM quarantines WHERE status <> 'released'")}


def released(db: Database) -> set[str]:
    """Whose votes count on an operator's word."""
    return {key_id for (key_id,) in db.execute("SELECT key_id FROM quarantines WHERE status = 'released'")}


def gold_answers(db: Database) -> dict[str, tuple[int, int]]:
    """How many gold questions each rater decided, and how many of them rightly. A tie says as little of a rater as in
    a vote."""
    return {
        key_id: (asked, right)
        for key_id, asked, right in db.execute(
            "SELECT key_id, count(*), sum(choice = chosen_side) FROM gold_questions WHERE choice IN ('a', 'b')"
            " GROUP BY key_id"
        )
    }


def standing(db: Database) -> list[dict[str, Any]]:
    """Of everybody who voted: votes, those for the answer shown first and for the second, gold questions answered and
    how many of them rightly (a tie is not), reliability as the latest run found it, and the quarantine if there is one.
    Those come first."""
    return list(
        db.query(
            "WITH voted AS (SELECT key_id, count(*) AS votes, sum(choice = 'a') AS first, sum(choice = 'b') AS second"
            " FROM votes GROUP BY key_id),"
            " asked AS (SELECT key_id, count(choice) AS gold, coalesce(sum(choice = chosen_side), 0) AS gold_right"
            " FROM gold_questions GROUP BY key_id),"
            " found AS (SELECT key_id, reliability FROM run_raters WHERE run_id ="
            " (SELECT run_id FROM run_raters JOIN runs ON runs.id = run_id ORDER BY runs.rowid DESC LIMIT 1))"
            " SELECT keys.id AS key, label, coalesce(votes, 0) AS votes, coalesce(first, 0) AS first,"
            " coalesce(second, 0) AS second, coalesce(gold, 0) AS gold, coalesce(gold_right, 0) AS gold_right,"
            " reliability, status AS quarantine, reason, since, run_id AS run, ruled_by, ruled_at"
            " FROM keys LEFT JOIN voted ON voted.key_id = keys.id LEFT JOIN asked ON asked.key_id = keys.id"
            " LEFT JOIN found ON found.key_id = keys.id LEFT JOIN quarantines ON quarantines.key_id = keys.id"
            " WHERE votes > 0 OR gold > 0 OR status IS NOT NULL"
            " ORDER BY status IS NULL, status = 'released', status = 'confirmed', votes DESC, keys.id"
        )
    )
