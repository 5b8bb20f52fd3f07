"""Duels: two policies side by side, judged by the votes on their pairs.

A challenger's trial decides whether it may serve; the watch after that decides whether its predecessor must come back.
At most one runs; a unique index of the database sees to it. Who wins is for the caller to say (`Judge`): here the votes
are counted and the verdict is kept. What follows from a verdict is in `data.swaps`."""

from collections.abc import Callable
from typing import Any, Protocol

from sqlite_utils import Database

from data.ids import new_id
from data.types import Duel, DuelKind, DuelStatus, timestamp

_COLUMNS = (
    "id, kind, challenger, incumbent, threshold, budget, status, wins, losses, ties, e_value, e_mirrored, rate_low,"
    " rate_high, reason, started_at, ended_at"
)


class Standing(Protocol):
    """What the votes so far say."""

    @property
    def e_value(self) -> float: ...
    @property
    def e_mirrored(self) -> float: ...
    @property
    def rate_low(self) -> float: ...
    @property
    def rate_high(self) -> float: ...


Judge = Callable[[Duel, int, int, int], tuple[Standing, DuelStatus]]
"""(duel, wins, losses, ties) to what they say, and how the duel stands with that."""


def _duel(row: tuple[Any, ...]) -> Duel:
    id_, kind, challenger, incumbent, threshold, budget, status, *standing = row
    return Duel(id_, DuelKind(kind), challenger, incumbent, threshold, budget, DuelStatus(status), *standing)


def begin(db: Database, kind: DuelKind, *, challenger: str, incumbent: str, threshold: float, budget: int) -> Duel:
    """Call inside a transaction, when every engine holds both and no duel runs."""
    id_ = new_id("duel")
    db.execute(
        "INSERT INTO duels (id, kind, challenger, incumbent, threshold, budget, status, started_at)"
        " VALUES (?, ?, ?, ?, ?, ?, 'running', ?)",
        (id_, kind, challenger, incumbent, threshold, budget, timestamp()),
    )
    duel = running(db)
    assert duel is not None
    return duel


def running(db: Database) -> Duel | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM duels WHERE status = 'running'").fetchone()
    return _duel(row) if row else None


def end_running(db: Database, *, reason: str) -> Duel | None:
    """Break off the duel that runs, if one does; it as it was. Call inside a transaction."""
    duel = running(db)
    if duel is not None:
        _end(db, duel.id, DuelStatus.ENDED, reason)
    return duel


def _end(db: Database, id: str, status: DuelStatus, reason: str) -> None:
    db.execute("UPDATE duels SET status = ?, reason = ?, ended_at = ? WHERE id = ?", (status, reason, timestamp(), id))


def record_vote(db: Database, comparison_id: str, judge: Judge) -> Duel | None:
    """Count the votes of the duel that a comparison belongs to anew, and keep how it stands now.

    Returns the duel, which this vote may have ended; None where the comparison belongs to no duel, or to one that has
    ended: then nothing changes. Call inside the vote's own transaction."""
    columns = ", ".join(f"duels.{name}" for name in _COLUMNS.split(", "))
    row = db.execute(
        f"SELECT {columns} FROM comparisons JOIN duels ON duels.id = duel_id"
        " WHERE comparisons.id = ? AND duels.status = 'running'",
        (comparison_id,),
    ).fetchone()
    if row is None:
        return None
    duel = _duel(row)
    wins, losses, ties = _count(db, duel)
    if (wins, losses, ties) == (duel.wins, duel.losses, duel.ties):
        return duel
    standing, status = judge(duel, wins, losses, ties)
    figures = (standing.e_value, standing.e_mirrored, standing.rate_low, standing.rate_high)
    db.execute(
        "UPDATE duels SET wins = ?, losses = ?, ties = ?, e_value = ?, e_mirrored = ?, rate_low = ?, rate_high = ?"
        " WHERE id = ?",
        (wins, losses, ties, *figures, duel.id),
    )
    if (wins, losses) != (duel.wins, duel.losses):
        # There may be less to count than before: with a clock that was ahead, a quarantine begins before earlier votes.
        db.execute("DELETE FROM duel_curve WHERE duel_id = ? AND votes >= ?", (duel.id, wins + losses))
        db.execute(
            "INSERT INTO duel_curve (duel_id, votes, e_value, e_mirrored, rate_low, rate_high, at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (duel.id, wins + losses, *figures, timestamp()),
        )
    if status is not DuelStatus.RUNNING:
        _end(db, duel.id, status, f"{wins} wins, {losses} losses, {ties} ties: E = {standing.e_value:.3g}, mirrored"
             f" {standing.e_mirrored:.3g}")  # fmt: skip
    return get(db, duel.id)


def _count(db: Database, duel: Duel) -> tuple[int, int, int]:
    """(wins, losses, ties) of the challenger; both bad is a tie. Of a pair the first vote counts: two people agree more
    often than chance, and the evidence is that of votes without anything in common. A vote counts as it was first cast:
    its answer says who wrote which, so a change after it is not blind. Votes that a rater casts in quarantine do not
    count; earlier ones do, or whoever flags raters could turn a duel round after the fact."""
    for_challenger = "(blind = 'a') = (first.policy = :challenger)"
    row = db.execute(
        f"SELECT coalesce(sum(blind IN ('a', 'b') AND {for_challenger}), 0),"
        f" coalesce(sum(blind IN ('a', 'b') AND NOT {for_challenger}), 0),"
        " coalesce(sum(blind IN ('tie', 'both_bad')), 0)"
        " FROM (SELECT comparisons.a, min(votes.rowid), coalesce((SELECT vote_history.choice FROM vote_history"
        " WHERE vote_id = votes.id ORDER BY vote_history.rowid LIMIT 1), choice) AS blind"
        " FROM comparisons JOIN votes ON comparison_id = comparisons.id WHERE duel_id = :duel"
        " AND NOT EXISTS (SELECT 1 FROM quarantines WHERE quarantines.key_id = votes.key_id AND status <> 'released'"
        " AND since <= votes.created_at) GROUP BY comparisons.id)"  # with min(), the rest is of the same vote
        " JOIN completions AS first ON first.id = a",
        {"challenger": duel.challenger, "duel": duel.id},
    ).fetchone()
    return row[0], row[1], row[2]


def get(db: Database, id: str) -> Duel:
    """Raises LookupError."""
    row = db.execute(f"SELECT {_COLUMNS} FROM duels WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise LookupError(id)
    return _duel(row)


def list_duels(db: Database, *, policy: str | None = None, limit: int = 50) -> list[Duel]:
    """The latest first; with `policy`, those that it fought."""
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM duels WHERE :policy IS NULL OR :policy IN (challenger, incumbent)"
        " ORDER BY rowid DESC LIMIT :limit",
        {"policy": policy, "limit": limit},
    )
    return [_duel(row) for row in rows]


def curve(db: Database, id: str) -> list[dict[str, Any]]:
    """How the evidence went, a point for every decisive vote, the first first."""
    return list(
        db.query(
            "SELECT votes, e_value, e_mirrored, rate_low, rate_high, at FROM duel_curve WHERE duel_id = ?"
            " ORDER BY votes",
            (id,),
        )
    )


def trials_under_incumbent(db: Database) -> int:
    """How many trials, votes and all, the policy that serves has stood since the last duel under another. The order of
    the rows tells, not their times: a clock that was ahead may have been set right."""
    row = db.execute(
        "SELECT count(*) FROM duels WHERE kind = 'trial' AND wins + losses > 0"
        " AND rowid > (SELECT coalesce(max(rowid), 0) FROM duels"
        " WHERE incumbent NOT IN (SELECT name FROM policies WHERE status = 'serving'))"
    ).fetchone()
    return int(row[0])
