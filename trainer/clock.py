"""`python -m trainer clock`: asks for the runs that are due, and starts every run that was asked for.

What is due is in the record alone (`data.schedules`); APScheduler only keeps the time. Once a second the clock looks
into the record and sets a one-shot alarm for each moment that comes next, so a changed schedule is followed without a
restart, and an alarm that could not be answered (the disk was full) goes off again. Of many clocks only the one that
holds the lease ticks.

A run is a process of its own, in a session of its own: hours of training are worth more than a process that only keeps
the time, so a run goes on where its clock is killed, and the clock that comes next finds it in the record. A clock that
is asked to stop ends its run in order first, and the next asks for that run again.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import leases, runs, schedules
from data.database import connect, transaction
from data.ids import new_id
from data.schedules import BadSchedule, Schedule, ScheduleKind
from data.settings import Settings
from data.types import RunStatus, timestamp

log = logging.getLogger("clock")

LOOK_S = 1.0
WAKE_S = 15.0
"""After the machine has slept, or its time was set, nothing is said to be dead or due for so long: runs beat first."""
LEASE = "clock"
LEASE_S = 5.0
STOP_S = 25.0
"""What a run gets to end in order; the supervisor gives the clock more."""
LARGEST_LOG = 20_000_000
ONCE = (sys.executable, "-P", "-m", "trainer", "once")


@dataclass(slots=True)
class _Started:
    """A run's process, from its start to the moment that its end is in the record."""

    run_id: str
    process: subprocess.Popen[bytes]
    kill_at: float | None = None
    """When it is killed (monotonic), where it was told to end since its run was cancelled."""


class Clock:
    def __init__(self, settings: Settings, *, once: tuple[str, ...]) -> None:
        """`once`: the command that carries out a run of the queue; `--run` and its id are put behind it."""
        self._once = once
        self._log = settings.state / "logs" / "train.log"
        self._db: Database = connect(settings.database)
        self._holder = f"{new_id('clock')}:{os.getpid()}"
        self._holds = False
        self._renewed = -LEASE_S
        self._looked = time.time(), time.monotonic()
        self._wakes_until = 0.0
        self._started: _Started | None = None
        self._due: dict[str, datetime] = {}
        """When each alarm goes off."""
        self._news = threading.Event()
        """An alarm has gone off, or a run has ended: look at once."""
        self._trouble = ""
        self._stopping = False
        self._alarms = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(1)},
            # However late an alarm goes off, it goes off, and once.
            job_defaults={"misfire_grace_time": None, "coalesce": True},
        )

    def run(self) -> None:
        """Look and start what is due until `stop` was called; then end the run under way in order."""
        self._alarms.start()
        while not self._stopping:
            self._news.clear()
            self._look()
            self._news.wait(LOOK_S)
        self._alarms.shutdown()
        give_up = time.monotonic() + STOP_S
        if self._started is not None:
            self._end_ours(self._started, give_up)
        if self._holds:
            self._end_adopted(give_up)
        with transaction(self._db):
            leases.release(self._db, LEASE, self._holder)
        self._db.close()

    def stop(self) -> None:
        """May be called from a signal's handler: it waits for no lock."""
        self._stopping = True

    def _look(self) -> None:
        try:
            self._record_end()
            self._end_the_cancelled()
            awake = self._is_awake()
            self._hold(give_up=awake)
            if self._holds:
                if awake:
                    self._follow()
                self._start_the_queued()
            self._trouble = ""
        except (sqlite3.OperationalError, OSError) as error:
            if str(error) != self._trouble:
                log.error("Nothing can be started: %s. Trying on.", error)
            self._trouble = str(error)

    def _is_awake(self) -> bool:
        """Whether the machine's time has gone on evenly for a while: a sleep stops one of its two clocks, and only the
        other can be set."""
        (wall, steady), self._looked = self._looked, (time.time(), time.monotonic())
        if abs(self._looked[0] - wall - (self._looked[1] - steady)) > WAKE_S:
            self._wakes_until = self._looked[1] + WAKE_S
        return self._looked[1] >= self._wakes_until

    def _hold(self, *, give_up: bool) -> None:
        """Renew the lease, or take it where it is free."""
        if time.monotonic() < self._renewed + LEASE_S / 3:
            return
        held = self._holds
        self._holds = False
        with transaction(self._db):
            self._holds = leases.acquire(self._db, LEASE, self._holder, for_s=LEASE_S)
            if give_up:
                runs.give_up_the_dead(self._db)
                schedules.set_right(self._db)
            resumed = runs.resume(self._db) if self._holds and self._started is None else None
        self._renewed = time.monotonic()
        if self._holds != held:
            log.info("This clock ticks" if self._holds else "Another clock ticks")
        if resumed is not None:
            log.info("%s is in the place of the run that a stop of the service ended", resumed.id)

    def _follow(self) -> None:
        """Answer what is due, and set an alarm for each moment that comes next. Its id changes with the schedule, and
        each time it came due."""
        now = datetime.now(UTC)
        idle = runs.active(self._db) is None
        wanted = set()
        for schedule in schedules.list_all(self._db):
            if schedule.paused:
                continue
            alarm = f"{schedule.id} {' '.join(schedule.version)}"
            wanted.add(alarm)
            try:
                if schedule.kind is not ScheduleKind.VOTES:
                    self._set_alarm(alarm, schedule)
                    due = self._due[alarm] <= now
                else:
                    due = idle and schedules.is_due(self._db, schedule, now)
                problem = None
            except BadSchedule as error:
                due, problem = False, str(error)
            if schedule.problem != problem:
                with transaction(self._db):
                    schedules.record_problem(self._db, schedule.id, problem)
            if due:
                self._answer(schedule)
        for alarm in self._due.keys() - wanted:
            del self._due[alarm]
            with suppress(JobLookupError):  # it has gone off
                self._alarms.remove_job(alarm)

    def _set_alarm(self, alarm: str, schedule: Schedule) -> None:
        """Raises BadSchedule."""
        if alarm not in self._due:
            due_at = schedule.next_due()
            assert due_at is not None
            self._due[alarm] = due_at
            self._alarms.add_job(self._news.set, "date", run_date=due_at, id=alarm)

    def _answer(self, schedule: Schedule) -> None:
        """Ask for its run, where we are still the one to ask."""
        with transaction(self._db):
            self._holds = leases.acquire(self._db, LEASE, self._holder, for_s=LEASE_S)
            run_id = schedules.come_due(self._db, schedule) if self._holds else None
        if run_id is not None:
            log.info("%s (%s %s) came due: %s", schedule.id, schedule.kind, schedule.spec, run_id)

    def _start_the_queued(self) -> None:
        """Give the queued run a process, whoever asked for it."""
        run = runs.active(self._db)
        if self._started is not None or run is None or run.status is not RunStatus.QUEUED:
            return
        with self._open_log(run.id) as output:
            process = subprocess.Popen(
                (*self._once, "--run", run.id),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        log.info("%s starts (process %d, %s)", run.id, process.pid, self._log)
        self._started = _Started(run.id, process)
        threading.Thread(target=self._notice_the_end_of, args=[process], daemon=True).start()

    def _notice_the_end_of(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._news.set()

    def _open_log(self, run_id: str) -> IO[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LARGEST_LOG:
            self._log.replace(self._log.with_suffix(".1.log"))
        output = self._log.open("ab")
        output.write(f"--- {timestamp()} {run_id}\n".encode())
        output.flush()
        return output

    def _record_end(self) -> None:
        """Where the process ended and its run did not, say in the record that it died."""
        if self._started is None or (status := self._started.process.poll()) is None:
            return
        run_id, pid = self._started.run_id, self._started.process.pid
        if self._started.kill_at is None:
            how = _how_it_died(status, self._log)
        else:
            how = "It was cancelled, and its process was ended where it did not end by itself: nothing of it is in use."
        with transaction(self._db):
            died = runs.record_death(self._db, run_id, pid=pid, error=how)
        run = runs.get(self._db, run_id)
        (log.error if died else log.info)("%s %s%s", run_id, run.status, f": {run.error}" if run.error else "")
        self._started = None

    def _end_the_cancelled(self) -> None:
        """By itself a run hears between its steps that it was cancelled. A step may be long, or hang. And whose run has
        ended in the record, its process has some time to end as well: it may be stopped, or swapped out."""
        started = self._started
        if started is None:
            return
        run = runs.get(self._db, started.run_id)
        cancelled = run.cancel_requested_at is not None or run.status is RunStatus.CANCELLED
        if not cancelled and run.status in (RunStatus.QUEUED, RunStatus.RUNNING):
            return
        if started.kill_at is None:
            started.kill_at = time.monotonic() + STOP_S
            if cancelled:
                started.process.terminate()
        elif time.monotonic() >= started.kill_at:
            log.warning("%s does not end; killing it", started.run_id)
            started.process.kill()

    def _end_ours(self, started: _Started, give_up: float) -> None:
        try:
            with transaction(self._db):  # so that none that has not begun begins in between
                runs.interrupt(self._db, started.run_id)
                started.process.terminate()
        except sqlite3.OperationalError:  # it ends as cancelled, then
            started.process.terminate()
        try:
            started.process.wait(max(give_up - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            log.warning("%s does not end; killing it", started.run_id)
            started.process.kill()
            started.process.wait()
        if runs.get(self._db, started.run_id).status is not RunStatus.QUEUED:  # not begun: it waits for the next clock
            self._record_end()

    def _end_adopted(self, give_up: float) -> None:
        """Interrupt the run under way that an earlier clock started. One of `nightshift train` is not ours."""
        run = runs.active(self._db)
        if run is None or run.status is not RunStatus.RUNNING or run.requested_by == "cli":
            return
        with transaction(self._db):
            runs.interrupt(self._db, run.id)
        while time.monotonic() < give_up and runs.get(self._db, run.id).status is RunStatus.RUNNING:
            time.sleep(0.2)


def _how_it_died(status: int, output: Path) -> str:
    if status == -signal.SIGKILL:
        how = "Its process was killed (SIGKILL), as the system does where memory runs out"
    elif status < 0:
        how = f"Its process was ended by a signal ({signal.strsignal(-status) or -status})"
    else:
        how = f"Its process ended with status {status} before its time"
    return f"{how}; {output} has its last words. Start another run: nothing of this one is in use."


def keep_time(settings: Settings, *, once: tuple[str, ...] = ONCE) -> int:
    """Run until SIGTERM, SIGINT or SIGHUP."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    clock = Clock(settings, once=once)
    for wish in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(wish) is not signal.SIG_IGN:  # nohup, say
            signal.signal(wish, lambda number, frame: clock.stop())
    clock.run()
    return 0
