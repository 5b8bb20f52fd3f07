"""Training runs: asked for, claimed by one process, kept alive by its heartbeat, ended exactly once.

At most one run is queued or running; a unique index of the database sees to it, whoever asks."""

import json
import os
from typing import Any

from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import audit
from data.ids import new_id
from data.types import Run, RunStatus, timestamp

HEARTBEAT_STALE_S = 60.0
"""A running run whose heartbeat is older than this, or further ahead, has no process any more."""
INTERRUPTED = "The service stopped before it was done: a fresh run begins in its place when the service starts again."
"""The error of a run that ended since the service stopped."""
_STALE = "heartbeat_at NOT BETWEEN ? AND ?"

_COLUMNS = (
    "id, status, requested_by, config, stage, pid, heartbeat_at, cancel_requested_at, error, created_at, started_at,"
    " ended_at"
)


class RunActive(Exception):
    """Another run is queued or running; the message is its id."""


class UnknownRun(LookupError):
    """No run of that id."""


class RunLost(Exception):
    """The run is no longer this process's: it was cancelled, or given up for dead."""


def _run(row: tuple[Any, ...]) -> Run:
    return Run(row[0], RunStatus(row[1]), row[2], json.loads(row[3]), *row[4:])


def request(db: Database, *, requested_by: str, config: dict[str, Any]) -> Run:
    """Queue a run. Raises RunActive. Call inside a transaction."""
    give_up_the_dead(db, but_living=True)
    id_ = new_id("run")
    try:
        db.execute(
            "INSERT INTO runs (id, status, requested_by, config, created_at) VALUES (?, 'queued', ?, ?, ?)",
            (id_, requested_by, json.dumps(config), timestamp()),
        )
    except sqlite3.IntegrityError:
        active = db.execute("SELECT id FROM runs WHERE status IN ('queued', 'running')").fetchone()
        raise RunActive(active[0]) from None
    audit.record(db, actor=requested_by, action="run.request", subject=id_)
    return get(db, id_)


def claim(db: Database, id: str | None = None) -> Run | None:
    """Take the queued run for this process, or this one alone; None where it is not queued. Call inside a
    transaction."""
    now = timestamp()
    row = db.execute(
        "UPDATE runs SET status = 'running', pid = :pid, started_at = :now, heartbeat_at = :now WHERE status = 'queued'"
        f" AND (:id IS NULL OR id = :id) RETURNING {_COLUMNS}",
        {"pid": os.getpid(), "now": now, "id": id},
    ).fetchone()
    return _run(row) if row else None


def beat(db: Database, id: str, *, stage: str) -> bool:
    """Say that the run lives and what it does; whether somebody asked to cancel it. Raises RunLost. Call inside a
    transaction."""
    row = db.execute(
        "UPDATE runs SET heartbeat_at = ?, stage = ? WHERE id = ? AND status = 'running' AND pid = ?"
        " RETURNING cancel_requested_at",
        (timestamp(), stage, id, os.getpid()),
    ).fetchone()
    if row is None:
        raise RunLost(id)
    return row[0] is not None


def cancel(db: Database, id: str, *, actor: str) -> Run:
    """Cancel a queued run, or one that lost its process; ask a running one to stop. One that has ended stays as it is.
    Raises UnknownRun. Call inside a transaction."""
    now = timestamp()
    # Where the service stops just now, it does not begin again either.
    db.execute("UPDATE runs SET cancel_requested_at = ?, error = NULL WHERE id = ? AND status = 'running'", (now, id))
    db.execute(
        "UPDATE runs SET status = 'cancelled', ended_at = ? WHERE id = ?"
        f" AND (status = 'queued' OR (status = 'running' AND {_STALE}))",
        (now, id, *_fresh()),
    )
    run = get(db, id)
    audit.record(db, actor=actor, action="run.cancel", subject=id)
    return run


def interrupt(db: Database, id: str) -> None:
    """Ask a running run to stop since the service does, and have `resume` ask for another in its place, also where it
    has stopped by itself: a machine that goes down tells all processes. Nothing where somebody asked it to stop. Call
    inside a transaction."""
    db.execute(
        "UPDATE runs SET cancel_requested_at = ?, error = ? WHERE id = ? AND cancel_requested_at IS NULL"
        " AND (status = 'running' OR (status = 'cancelled' AND started_at IS NOT NULL))",
        (timestamp(), INTERRUPTED, id),
    )


def resume(db: Database) -> Run | None:
    """Where the latest run was interrupted and has ended, queue a fresh one like it. Call inside a transaction."""
    latest = next(iter(list_runs(db, limit=1)), None)
    if latest is None or latest.error != INTERRUPTED or latest.ended_at is None:
        return None
    run = request(db, requested_by=latest.requested_by, config=latest.config)
    audit.record(db, actor="clock", action="run.resume", subject=run.id)
    return run


def finish(db: Database, id: str, status: RunStatus, *, error: str | None = None) -> None:
    """End a running run. Raises RunLost where it is not running any more. Call inside a transaction."""
    row = db.execute(
        "UPDATE runs SET status = :status, error = iif(:status = 'succeeded', NULL, coalesce(error, :error)),"
        " ended_at = :now WHERE id = :id AND status = 'running' RETURNING id",
        {"status": status, "error": error, "now": timestamp(), "id": id},
    ).fetchone()
    if row is None:
        raise RunLost(id)


def record_death(db: Database, id: str, *, pid: int, error: str) -> bool:
    """End a run whose process is known to have died, whether it had claimed the run or not: cancelled where somebody
    asked for that, else failed. False where it had ended the run, or the run is another process's. Call inside a
    transaction."""
    row = db.execute(
        "UPDATE runs SET status = iif(cancel_requested_at IS NULL, 'failed', 'cancelled'),"
        " error = coalesce(error, ?), ended_at = ?"
        " WHERE id = ? AND (status = 'queued' OR (status = 'running' AND pid = ?)) RETURNING id",
        (error, timestamp(), id, pid),
    ).fetchone()
    return row is not None


def give_up_the_dead(db: Database, *, but_living: bool = False) -> list[str]:
    """Mark running runs without a fresh heartbeat as failed; their ids. Call inside a transaction.

    Args:
        but_living: not those whose process number is taken: when the machine wakes up, no heartbeat is fresh. It may be
            another process's by now, and then the clock gives the run up.
    """
    stale = db.execute(f"SELECT id, pid FROM runs WHERE status = 'running' AND {_STALE}", _fresh()).fetchall()
    dead = [id for id, pid in stale if not (but_living and _lives(pid))]
    for id in dead:
        db.execute(
            "UPDATE runs SET status = 'failed', ended_at = ?, error = coalesce(error, 'Its process died. Start another"
            " run: nothing of this one is in use.') WHERE id = ?",
            (timestamp(), id),
        )
    return dead


def _fresh() -> tuple[str, str]:
    """From when to when a living run's heartbeat is."""
    return timestamp(plus_s=-HEARTBEAT_STALE_S), timestamp(plus_s=HEARTBEAT_STALE_S)


def _lives(pid: int) -> bool:
    if pid == os.getpid():
        return False  # in a container every process may have the same: whoever asks does not train
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def get(db: Database, id: str) -> Run:
    """Raises UnknownRun."""
    row = db.execute(f"SELECT {_COLUMNS} FROM runs WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise UnknownRun(id)
    return _run(row)


def active(db: Database) -> Run | None:
    """The run that is queued or running."""
    row = db.execute(f"SELECT {_COLUMNS} FROM runs WHERE status IN ('queued', 'running')").fetchone()
    return _run(row) if row else None


def list_runs(db: Database, *, limit: int = 50) -> list[Run]:
    """The latest first."""
    rows = db.execute(f"SELECT {_COLUMNS} FROM runs ORDER BY rowid DESC LIMIT ?", (limit,))
    return [_run(row) for row in rows]


def add_metrics(db: Database, id: str, step: int, figures: dict[str, float]) -> None:
    """Call inside a transaction. The same step again replaces its figures."""
    for name, value in figures.items():
        db.execute(
            "INSERT OR REPLACE INTO run_metrics (run_id, name, step, value) VALUES (?, ?, ?, ?)",
            (id, name, step, value),
        )


def metrics(db: Database, id: str) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), …]} in order of steps."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in db.execute(
        "SELECT name, step, value FROM run_metrics WHERE run_id = ? ORDER BY name, step", (id,)
    ):
        curves.setdefault(name, []).append((step, value))
    return curves


def figures_after(db: Database, id: str, seen: dict[str, int]) -> list[tuple[str, int, dict[str, float]]]:
    """(stage, step, figures) of each step beyond the one that was `seen` of its stage, in order of stages and steps."""
    rows = db.execute(
        "WITH figures AS (SELECT instr(name, '/') AS slash, name, step, value FROM run_metrics WHERE run_id = ?)"
        " SELECT substr(name, 1, slash - 1) AS stage, step, substr(name, slash + 1), figures.value FROM figures"
        " LEFT JOIN json_each(?) AS seen ON seen.key = stage WHERE step > coalesce(seen.value, -1)"
        " ORDER BY stage, step, name",
        (id, json.dumps(seen)),
    )
    steps: dict[tuple[str, int], dict[str, float]] = {}
    for stage, step, name, value in rows:
        steps.setdefault((stage, step), {})[name] = value
    return [(stage, step, figures) for (stage, step), figures in steps.items()]
