"""Runs: one at a time, ended once, and no dead one in the way."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from data import runs
from data.database import connect, transaction
from data.types import Run, RunStatus


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    db = connect(tmp_path / "nightshift.db")
    yield db
    db.close()


def requested(db: Database) -> str:
    with transaction(db):
        return runs.request(db, requested_by="cli", config={"seed": 1}).id


def test_a_run_goes_from_queued_to_succeeded(db: Database) -> None:
    id = requested(db)
    with transaction(db):
        claimed = runs.claim(db)
        assert claimed is not None
        assert (claimed.id, claimed.status, claimed.config) == (id, RunStatus.RUNNING, {"seed": 1})
        assert runs.claim(db) is None
        assert runs.beat(db, id, stage="reward model") is False
        runs.add_metrics(db, id, 1, {"kl": 0.5, "reward": 1.0})
        runs.add_metrics(db, id, 2, {"kl": 0.7})
        runs.finish(db, id, RunStatus.SUCCEEDED)
    assert runs.get(db, id).status is RunStatus.SUCCEEDED
    assert runs.get(db, id).stage == "reward model"
    assert runs.metrics(db, id) == {"kl": [(1, 0.5), (2, 0.7)], "reward": [(1, 1.0)]}


def test_a_second_run_has_to_wait_for_the_first(db: Database) -> None:
    first = requested(db)
    with pytest.raises(runs.RunActive, match=first):
        requested(db)
    with transaction(db):
        runs.claim(db)
    with pytest.raises(runs.RunActive, match=first):
        requested(db)
    with transaction(db):
        runs.finish(db, first, RunStatus.FAILED, error="too few votes")
    assert requested(db) != first
    assert [run.status for run in runs.list_runs(db)] == [RunStatus.QUEUED, RunStatus.FAILED]


def test_a_queued_run_is_cancelled_at_once_and_a_running_one_is_asked(db: Database) -> None:
    queued = requested(db)
    with transaction(db):
        assert runs.cancel(db, queued, actor="cli").status is RunStatus.CANCELLED
    running = requested(db)
    with transaction(db):
        runs.claim(db)
        assert runs.cancel(db, running, actor="cli").status is RunStatus.RUNNING
        assert runs.beat(db, running, stage="ppo") is True
        runs.finish(db, running, RunStatus.CANCELLED)
        with pytest.raises(runs.RunLost):
            runs.finish(db, running, RunStatus.SUCCEEDED)
    with pytest.raises(runs.UnknownRun), transaction(db):
        runs.cancel(db, "run_nothing", actor="cli")


@pytest.mark.parametrize("heartbeat", ["2020-01-01T00:00:00.000Z", "2920-01-01T00:00:00.000Z"])
def test_a_run_whose_process_died_makes_room_for_the_next(db: Database, heartbeat: str) -> None:
    """Also where the clock was ahead when it did."""
    dead = requested(db)
    with transaction(db):
        runs.claim(db)
        process = subprocess.Popen(["true"])
        process.wait()
        db.execute("UPDATE runs SET heartbeat_at = ?, pid = ?", (heartbeat, process.pid))
    assert requested(db) != dead
    assert runs.get(db, dead).status is RunStatus.FAILED
    assert "process died" in (runs.get(db, dead).error or "")
    with pytest.raises(runs.RunLost), transaction(db):
        runs.beat(db, dead, stage="ppo")


def test_a_run_that_was_asleep_is_not_dead_because_somebody_wants_another(db: Database) -> None:
    asleep = requested(db)
    with transaction(db):
        runs.claim(db)
        db.execute("UPDATE runs SET heartbeat_at = '2020-01-01T00:00:00.000Z', pid = ?", (os.getppid(),))
    with pytest.raises(runs.RunActive):
        requested(db)
    with transaction(db):
        assert runs.give_up_the_dead(db) == [asleep], "the clock has waited: another process may have its number by now"


def test_a_run_without_a_heartbeat_ends_by_an_operators_word(db: Database) -> None:
    """Its process number may be taken, and where no clock runs nobody else ends it."""
    id = requested(db)
    with transaction(db):
        runs.claim(db)
        assert runs.cancel(db, id, actor="cli").status is RunStatus.RUNNING, "it lives, and is asked to stop"
        db.execute("UPDATE runs SET heartbeat_at = '2020-01-01T00:00:00.000Z'")
        assert runs.cancel(db, id, actor="cli").status is RunStatus.CANCELLED
        with pytest.raises(runs.RunLost):
            runs.beat(db, id, stage="ppo")


def interrupted(db: Database) -> str:
    id = requested(db)
    with transaction(db):
        runs.claim(db)
        runs.interrupt(db, id)
        assert runs.beat(db, id, stage="ppo") is True
        assert runs.resume(db) is None, "it has not ended"
    return id


def resumed(db: Database) -> Run | None:
    with transaction(db):
        return runs.resume(db)


@pytest.mark.parametrize("end", ["in order", "failed on the way", "killed", "died with its clock"])
def test_however_an_interrupted_run_ends_one_like_it_is_asked_for_once(
    db: Database, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = interrupted(db)
    monkeypatch.setattr(runs, "HEARTBEAT_STALE_S", -1.0)
    with transaction(db):
        if end == "killed":
            assert runs.record_death(db, id, pid=os.getpid(), error="SIGKILL")
        elif end == "died with its clock":
            assert runs.give_up_the_dead(db) == [id]
        else:
            status = RunStatus.CANCELLED if end == "in order" else RunStatus.FAILED
            runs.finish(db, id, status, error=None if end == "in order" else "the engine has gone")
    assert runs.get(db, id).error == runs.INTERRUPTED
    again = resumed(db)
    assert again is not None
    assert (again.status, again.requested_by, again.config) == (RunStatus.QUEUED, "cli", {"seed": 1})
    assert resumed(db) is None


@pytest.mark.parametrize("end", ["succeeded", "cancelled before", "cancelled after", "another came"])
def test_what_needs_no_other_run_gets_none(db: Database, end: str) -> None:
    if end == "cancelled before":
        id = requested(db)
        with transaction(db):
            runs.claim(db)
            runs.cancel(db, id, actor="cli")
            runs.interrupt(db, id)
    else:
        id = interrupted(db)
    with transaction(db):
        if end == "cancelled after":
            runs.cancel(db, id, actor="cli")
        runs.finish(db, id, RunStatus.SUCCEEDED if end == "succeeded" else RunStatus.CANCELLED)
    assert (runs.get(db, id).error == runs.INTERRUPTED) == (end == "another came")
    if end == "another came":
        requested(db)
    assert resumed(db) is None
