"""The clock, with real processes: what is due is started once, and no end of a run or of a clock goes unseen."""

import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import leases, runs, schedules
from data.database import connect, transaction
from data.schedules import Schedule, ScheduleKind
from data.settings import Settings
from data.types import Run, RunStatus, timestamp
from trainer import clock
from trainer.clock import Clock

ROOT = Path(__file__).parents[2]

STAND_IN = f"""
import os, signal, sys, time
sys.path.append({sysconfig.get_path("purelib")!r})
from pysqlite3 import dbapi2 as sqlite3
database, manner, _, run_id = sys.argv[1:]
if manner == "stillborn":
    sys.exit(3)
if manner == "asleep":
    time.sleep(600)
if manner == "slow":
    time.sleep(1)
db = sqlite3.connect(database, isolation_level=None)
db.execute("PRAGMA busy_timeout = 60000")

def now():
    return db.execute("SELECT strftime('%Y-%m-%dT%H:%M:%fZ')").fetchone()[0]

def end(status):
    db.execute("UPDATE runs SET status = ?, ended_at = ? WHERE pid = ? AND status = 'running'",
               (status, now(), os.getpid()))
    sys.exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if manner == "deaf" else lambda *_: end("cancelled"))
db.execute("UPDATE runs SET status = 'running', pid = ?, started_at = ?, heartbeat_at = ?"
           " WHERE status = 'queued' AND id = ?", (os.getpid(), now(), now(), run_id))
print("at work", flush=True)
if manner == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
while manner in ("long", "deaf"):
    time.sleep(0.05)
    db.execute("UPDATE runs SET heartbeat_at = ? WHERE pid = ? AND status = 'running'", (now(), os.getpid()))
    asked = db.execute("SELECT cancel_requested_at FROM runs WHERE pid = ?", (os.getpid(),)).fetchone()
    if manner == "long" and asked[0]:
        end("cancelled")
end("succeeded")
"""
"""What the clock starts instead of a training run: quick to start, and it ends in the manner asked for."""

CLOCK = """
import sys
from data.settings import load_settings
from trainer import clock
clock.LEASE_S = 2.0
sys.exit(clock.keep_time(load_settings(), once=tuple(sys.argv[1:])))
"""


@pytest.fixture
def settings(tmp_path: Path, plain_environment: None) -> Settings:
    return Settings(state=tmp_path / "state")


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    db = connect(settings.database)
    yield db
    for run in runs.list_runs(db):
        if run.status is RunStatus.RUNNING and run.pid not in (None, os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGKILL)
    db.close()


def stand_in(settings: Settings, manner: str) -> tuple[str, ...]:
    script = settings.state / "stand_in.py"
    script.write_text(STAND_IN)
    return (sys.executable, "-I", "-S", str(script), str(settings.database), manner)


@contextmanager
def ticking(settings: Settings, manner: str = "quick") -> Iterator[None]:
    """A clock in this process."""
    one = Clock(settings, once=stand_in(settings, manner))
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        yield
    finally:
        one.stop()
        thread.join()


@contextmanager
def clock_process(settings: Settings, manner: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A clock of its own process, ended with the test."""
    environment = os.environ | {"NIGHTSHIFT_STATE": str(settings.state), "PYTHONPATH": str(ROOT)}
    with (settings.state / "clock.log").open("ab") as output:
        command = [sys.executable, "-c", CLOCK, *stand_in(settings, manner)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(holds: Callable[[], Any], *, within_s: float = 60.0) -> Any:
    give_up = time.monotonic() + within_s
    while not (found := holds()):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return found


def add(db: Database, kind: ScheduleKind, spec: str, *, since: str | None = None) -> Schedule:
    with transaction(db):
        schedule = schedules.add(db, kind, spec, actor="cli")
        if since:
            db.execute("UPDATE schedules SET since = ? WHERE id = ?", (since, schedule.id))
    return schedules.get(db, schedule.id)


def request(db: Database, by: str = "key_1") -> str:
    with transaction(db):
        return runs.request(db, requested_by=by, config={}).id


def ended(db: Database, id: str) -> Run | None:
    run = runs.get(db, id)
    return run if run.ended_at else None


def running(db: Database) -> Run | None:
    run = runs.active(db)
    return run if run and run.status is RunStatus.RUNNING else None


def clock_log(settings: Settings) -> str:
    return (settings.state / "clock.log").read_text()


# The whole of it


def test_the_real_command_starts_a_real_run_that_was_queued(settings: Settings, db: Database) -> None:
    id = request(db)
    environment = os.environ | {"NIGHTSHIFT_STATE": str(settings.state), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "trainer", "clock"], env=environment, stderr=subprocess.PIPE)
    try:
        run = until(lambda: ended(db, id), within_s=300)
    finally:
        process.terminate()
        _, said = process.communicate()
    assert (run.status, process.returncode) == (RunStatus.FAILED, 0)
    assert "0 votes to train on" in run.error
    assert id in (settings.state / "logs" / "train.log").read_text()
    assert "0 votes to train on" in said.decode()
    assert leases.holder_of(db, "clock") is None


def test_the_clock_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "peft", "accelerate", "fastapi"]
    look = f"import trainer.__main__, trainer.clock, sys; print([name for name in {heavy} if name in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=ROOT)
    assert seen.stdout.strip() == "[]"


# What is due


def test_schedules_are_followed_without_a_restart(settings: Settings, db: Database) -> None:
    with ticking(settings):
        schedule = add(db, ScheduleKind.EVERY, "1s")
        until(lambda: len(runs.list_runs(db)) >= 2)
        with transaction(db):
            schedules.pause(db, schedule.id, actor="cli")
        before = len(runs.list_runs(db))
        other = add(db, ScheduleKind.EVERY, "1s")  # the clock has looked once this one has come due twice
        until(lambda: len(runs.list_runs(db)) >= before + 2)
        assert {run.requested_by for run in runs.list_runs(db)[:-before]} == {other.id}
        with transaction(db):
            schedules.edit(db, other.id, ScheduleKind.EVERY, "1d", actor="cli")
            schedules.resume(db, schedule.id, actor="cli")
        until(lambda: schedules.get(db, schedule.id).last_run == runs.list_runs(db)[0].id)
        with transaction(db):
            schedules.remove(db, schedule.id, actor="cli")
        last = add(db, ScheduleKind.EVERY, "1s")
        until(lambda: runs.list_runs(db)[0].requested_by == last.id)
        until(lambda: runs.list_runs(db)[1].requested_by == last.id)
    assert RunStatus.FAILED not in {run.status for run in runs.list_runs(db)}


def test_a_run_that_was_due_while_no_clock_ran_happens_once_at_the_next_start(settings: Settings, db: Database) -> None:
    three_days_ago = timestamp(plus_s=-3 * 86_400)
    nightly = add(db, ScheduleKind.CRON, "0 3 * * *", since=three_days_ago)
    with ticking(settings):
        run = until(lambda: schedules.get(db, nightly.id).last_run)
        until(lambda: ended(db, run))
    with ticking(settings):
        proof = request(db)
        until(lambda: ended(db, proof))
    assert [run.requested_by for run in runs.list_runs(db)] == ["key_1", nightly.id]


def test_a_schedule_that_came_due_while_the_clock_was_ahead_goes_on_from_now(settings: Settings, db: Database) -> None:
    schedule = add(db, ScheduleKind.EVERY, "1s", since=timestamp(plus_s=30 * 86_400))
    with ticking(settings):
        until(lambda: schedules.get(db, schedule.id).last_run)


def test_enough_new_votes_start_a_run_as_soon_as_none_is_under_way(settings: Settings, db: Database) -> None:
    with ticking(settings, "long"):
        first = request(db)
        until(lambda: running(db))
        schedule = add(db, ScheduleKind.VOTES, "2", since="2026-01-01T00:00:00.000Z")
        db.execute("PRAGMA foreign_keys = OFF")
        for number in range(2):
            db.execute(
                "INSERT INTO votes (id, comparison_id, key_id, choice, decided_ms, created_at, updated_at)"
                " VALUES (?, ?, 'key', 'a', 1, ?, ?)",
                (f"vote_{number}", f"cmp_{number}", timestamp(), timestamp()),
            )
        alarmed = add(db, ScheduleKind.EVERY, "1s")
        until(lambda: schedules.get(db, alarmed.id).last_run == first)
        assert schedules.get(db, schedule.id).last_run is None
        with transaction(db):
            schedules.remove(db, alarmed.id, actor="cli")
            runs.cancel(db, first, actor="cli")
        second = until(lambda: schedules.get(db, schedule.id).last_run)
        assert second != first
        until(lambda: running(db))
    assert runs.get(db, second).status is RunStatus.CANCELLED


def test_a_due_run_that_cannot_be_written_down_happens_when_it_can(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[str] = []
    come_due = schedules.come_due

    def full(db: Database, schedule: Schedule) -> str | None:
        if len(failures) < 2:
            failures.append(schedule.id)
            raise sqlite3.OperationalError("database or disk is full")
        return come_due(db, schedule)

    monkeypatch.setattr(schedules, "come_due", full)
    schedule = add(db, ScheduleKind.CRON, "0 3 * * *", since=timestamp(plus_s=-86_400))
    with ticking(settings):
        run = until(lambda: schedules.get(db, schedule.id).last_run)
        until(lambda: ended(db, run))
    assert failures == [schedule.id] * 2
    assert len(runs.list_runs(db)) == 1


def test_a_schedule_that_cannot_be_understood_says_so_and_stands_in_nobodys_way(
    settings: Settings, db: Database
) -> None:
    broken = add(db, ScheduleKind.CRON, "0 3 * * *")
    db.execute("UPDATE schedules SET timezone = 'Mars/Phobos' WHERE id = ?", (broken.id,))
    well = add(db, ScheduleKind.EVERY, "1s")
    with ticking(settings):
        until(lambda: schedules.get(db, well.id).last_run)
        assert "'Mars/Phobos' is no time zone" in (schedules.get(db, broken.id).problem or "")
        db.execute("UPDATE schedules SET timezone = 'UTC' WHERE id = ?", (broken.id,))
        until(lambda: schedules.get(db, broken.id).problem is None)


def test_four_clocks_started_by_mistake_answer_each_of_200_ticks_once(settings: Settings, db: Database) -> None:
    """Two of them are killed on the way, each while it holds the lease."""
    schedule = add(db, ScheduleKind.EVERY, "1s")
    db.execute("CREATE TABLE ticks (before TEXT, after TEXT)")
    db.execute(
        "CREATE TRIGGER each_tick AFTER UPDATE OF since ON schedules"
        " BEGIN INSERT INTO ticks VALUES (old.since, new.since); END"
    )
    db.execute("UPDATE schedules SET spec = '0.1s' WHERE id = ?", (schedule.id,))

    def asked() -> list[str]:
        return [run.id for run in runs.list_runs(db, limit=1000)]

    with ExitStack() as stack:
        clocks = [stack.enter_context(clock_process(settings, "quick")) for _ in range(4)]
        for kill_at in (70, 140):
            until(lambda at=kill_at: len(asked()) >= at, within_s=300)
            holder = until(lambda: leases.holder_of(db, "clock"))
            (holding,) = [one for one in clocks if holder.endswith(f":{one.pid}")]
            holding.kill()
        until(lambda: len(asked()) >= 200, within_s=300)
        for one in clocks:
            one.terminate()
            one.wait(60)

    assert {run.requested_by for run in runs.list_runs(db, limit=1000)} == {schedule.id}
    requested = db.execute("SELECT count(*) FROM audit WHERE action = 'run.request'").fetchone()[0]
    joined = db.execute("SELECT count(*) FROM audit WHERE action = 'schedule.join'").fetchone()[0]
    ticks = db.execute("SELECT before, after FROM ticks ORDER BY rowid").fetchall()
    resumed = db.execute("SELECT count(*) FROM audit WHERE action = 'run.resume'").fetchone()[0]
    assert requested == len(asked()) >= 200
    assert requested - resumed + joined == len(ticks), "each tick has one answer"
    assert [before for before, _ in ticks] == [schedule.since, *(after for _, after in ticks[:-1])], "none is left out"
    for before, after in ticks:
        beats = (datetime.fromisoformat(after) - datetime.fromisoformat(before)) / timedelta(seconds=0.1)
        assert beats >= 1
        assert beats == round(beats), "a tick at a time when none was due"


# The ends of runs


@pytest.mark.parametrize(
    ("manner", "sentence"),
    [("killed", "was killed (SIGKILL), as the system does where memory runs out"), ("stillborn", "with status 3")],
)
def test_the_death_of_a_run_is_seen_at_once_and_makes_room(
    settings: Settings, db: Database, manner: str, sentence: str
) -> None:
    id = request(db)
    with ticking(settings, manner):
        run = until(lambda: ended(db, id), within_s=runs.HEARTBEAT_STALE_S / 2)
        assert run.status is RunStatus.FAILED
        assert run.error is not None
        assert sentence in run.error
        assert "train.log has its last words. Start another run" in run.error
        again = request(db)
        until(lambda: ended(db, again))
    assert len(runs.list_runs(db)) == 2, "it was not started again by itself"


def test_a_cancelled_run_that_does_not_hear_it_is_killed(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "STOP_S", 0.5)
    id = request(db)
    with ticking(settings, "deaf"):
        until(lambda: running(db))
        with transaction(db):
            runs.cancel(db, id, actor="test")
        run = until(lambda: ended(db, id))
    assert run.status is RunStatus.CANCELLED
    assert "its process was ended" in str(run.error)


def test_what_a_run_says_is_in_the_log_after_its_name(settings: Settings, db: Database) -> None:
    id = request(db)
    with ticking(settings):
        until(lambda: ended(db, id))
    name, said = (settings.state / "logs" / "train.log").read_text().splitlines()
    assert name.endswith(id)
    assert said == "at work"


def test_a_run_that_somebody_else_carries_out_is_left_alone(settings: Settings, db: Database) -> None:
    """`nightshift train`, beside the clock: the clock neither starts it nor ends it."""
    with transaction(db):
        id = runs.request(db, requested_by="cli", config={}).id
        runs.claim(db)
    with ticking(settings):
        alarmed = add(db, ScheduleKind.EVERY, "1s")
        until(lambda: schedules.get(db, alarmed.id).last_run == id)
    run = runs.get(db, id)
    assert (run.status, run.cancel_requested_at) == (RunStatus.RUNNING, None)
    with transaction(db):
        runs.finish(db, id, RunStatus.SUCCEEDED)


@pytest.mark.parametrize("slept_s", [3 * 3600, -3 * 3600], ids=["slept", "set back"])
def test_a_run_outlives_the_sleep_of_the_machine(settings: Settings, db: Database, slept_s: int) -> None:
    """Nobody's heart beats in it, and on waking the clock looks before the run beats. As where its time is set back."""
    id = request(db)
    one = Clock(settings, once=stand_in(settings, "long"))
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        run = until(lambda: running(db))
        assert run.pid is not None
        with transaction(db):  # it must not stop while it writes
            os.kill(run.pid, signal.SIGSTOP)
        one._looked = time.time() - slept_s, one._looked[1]
        db.execute("UPDATE runs SET heartbeat_at = ?", (timestamp(plus_s=-slept_s),))
        schedule = add(db, ScheduleKind.EVERY, "1s")
        time.sleep(3 * clock.LOOK_S)
        os.kill(run.pid, signal.SIGCONT)
        until(lambda: timestamp(plus_s=-60.0) < runs.get(db, id).heartbeat_at < timestamp(plus_s=60.0))
        assert runs.get(db, id).status is RunStatus.RUNNING
        assert schedules.get(db, schedule.id).last_run is None
    finally:
        one.stop()
        thread.join()
    assert runs.get(db, id).status is RunStatus.CANCELLED


# The ends of clocks


def test_a_clock_that_is_asked_to_stop_ends_its_run_in_order_and_the_next_asks_again(
    settings: Settings, db: Database
) -> None:
    with transaction(db):
        id = runs.request(db, requested_by="key_1", config={"seed": 5}).id
    with clock_process(settings, "long") as process:
        run = until(lambda: running(db))
        process.terminate()
        assert process.wait(60) == 0, clock_log(settings)
    assert runs.get(db, id).status is RunStatus.CANCELLED
    with pytest.raises(ProcessLookupError):
        os.kill(run.pid, 0)
    assert leases.holder_of(db, "clock") is None, "another clock need not wait"
    with ticking(settings):
        again = until(lambda: ended(db, runs.list_runs(db)[0].id) if len(runs.list_runs(db)) > 1 else None)
    assert (again.status, again.requested_by, again.config) == (RunStatus.SUCCEEDED, "key_1", {"seed": 5})
    assert [run.error for run in runs.list_runs(db)] == [None, runs.INTERRUPTED]


def test_where_the_machine_tells_run_and_clock_to_end_the_next_clock_asks_again(
    settings: Settings, db: Database
) -> None:
    id = request(db)
    with clock_process(settings, "long") as process:
        run = until(lambda: running(db))
        with transaction(db):  # it must not stop while it writes
            process.send_signal(signal.SIGSTOP)
        os.kill(run.pid, signal.SIGTERM)
        assert until(lambda: ended(db, id)).status is RunStatus.CANCELLED
        process.terminate()
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0, clock_log(settings)
    with ticking(settings):
        until(lambda: len(runs.list_runs(db)) == 2)


def test_a_run_that_somebody_cancelled_does_not_begin_again(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "STOP_S", 0.2)
    id = request(db)
    with ticking(settings, "deaf"):
        until(lambda: running(db))
        with transaction(db):
            runs.cancel(db, id, actor="test")
    assert runs.get(db, id).status is RunStatus.CANCELLED
    with ticking(settings):
        last = add(db, ScheduleKind.EVERY, "1s")
        until(lambda: schedules.get(db, last.id).last_run)
    assert {run.requested_by for run in runs.list_runs(db)} == {"key_1", last.id}


def test_a_run_goes_on_where_its_clock_is_killed_and_the_next_clock_ends_it(settings: Settings, db: Database) -> None:
    id = request(db)
    with clock_process(settings, "long") as process:
        pid = until(lambda: running(db)).pid
        process.kill()
        process.wait()
    beat = runs.get(db, id).heartbeat_at
    until(lambda: runs.get(db, id).heartbeat_at != beat)
    schedule = add(db, ScheduleKind.EVERY, "1s")
    with clock_process(settings, "long") as process:
        until(lambda: schedules.get(db, schedule.id).last_run == id)
        active = runs.active(db)
        assert active is not None
        assert (active.id, active.pid) == (id, pid)
        process.terminate()
        assert process.wait(60) == 0, clock_log(settings)
    assert runs.get(db, id).status is RunStatus.CANCELLED
    assert len(runs.list_runs(db)) == 1
    with ticking(settings):
        until(lambda: len(runs.list_runs(db)) == 2)


def test_a_run_that_had_not_begun_when_the_clock_stopped_waits_for_the_next(settings: Settings, db: Database) -> None:
    id = request(db)
    with ticking(settings, "asleep"):  # it still imports torch, say
        until(lambda: (settings.state / "logs" / "train.log").exists())
    assert runs.get(db, id).status is RunStatus.QUEUED
    with ticking(settings):
        assert until(lambda: ended(db, id)).status is RunStatus.SUCCEEDED


def test_a_process_that_outlives_its_run_is_ended_and_the_next_run_starts(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped, or swapped out, where somebody cancels the run that seems to have lost its process."""
    monkeypatch.setattr(clock, "STOP_S", 0.5)
    first = request(db)
    with ticking(settings, "long"):
        pid = until(lambda: running(db)).pid
        with transaction(db):  # it must not stop while it writes
            os.kill(pid, signal.SIGSTOP)
        with transaction(db):
            db.execute("UPDATE runs SET heartbeat_at = ?", (timestamp(plus_s=-70.0),))
            assert runs.cancel(db, first, actor="cli").status is RunStatus.CANCELLED
        second = request(db)
        assert until(lambda: running(db)).id == second
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_was_started_for_a_cancelled_run_takes_no_other(settings: Settings, db: Database) -> None:
    first = request(db)
    with ticking(settings, "slow"):
        until(lambda: (settings.state / "logs" / "train.log").exists())
        with transaction(db):
            runs.cancel(db, first, actor="cli")
        second = request(db)
        assert until(lambda: ended(db, second)).status is RunStatus.SUCCEEDED
    log = (settings.state / "logs" / "train.log").read_text()
    assert log.index(first) < log.index(second), "the second has a process of its own"


def test_a_run_that_does_not_end_is_killed(settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "STOP_S", 0.2)
    id = request(db)
    with ticking(settings, "deaf"):
        until(lambda: running(db))
    run = runs.get(db, id)
    assert (run.status, run.error) == (RunStatus.CANCELLED, runs.INTERRUPTED)
    with ticking(settings):
        until(lambda: len(runs.list_runs(db)) == 2)
