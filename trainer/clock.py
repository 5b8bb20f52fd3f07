"""`python -m trainer clock`: asks for the runs that are due, and starts every run that was asked for.

What is due is in the record alone (`data.schedules`); APScheduler only keeps the time. Once a second the clock looks
into the record and sets a one-shot alarm for each moment that comes next, so a changed schedule is followed without a
restart, and an alarm that could not be answered (the disk was full) goes off again. Of many clocks only the one that
holds the lease ticks.

A run is a process of its own, in a session of its own: hours of training are worth more than a process that only keeps
the time, so a run goes on where its clock is killed, and the clock that comes next finds it in the record. A clock that
is asked to stop ends its run in order first.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import leases, runs, schedules
from data.database import connect, transaction
from data.ids import new_id
from data.schedules import BadSchedule, Schedule
from data.settings import Settings
from data.types import RunStatus, timestamp

log = logging.getLogger("clock")

LOOK_S = 1.0
LEASE = "clock"
LEASE_S = 5.0
STOP_S = 25.0
"""What a run gets to end in order; the supervisor gives the clock more."""
LARGEST_LOG = 20_000_000
ONCE = (sys.executable, "-P", "-m", "trainer", "once")


@dataclass(frozen=True, slots=True)
class _Started:
    """A run's process, from its start to the moment that its end is in the record."""

    run_id: str
    process: subprocess.Popen[bytes]


class Clock:
    """All its work is done by one thread, APScheduler's only worker; `stop` waits for that before it does the rest."""

    def __init__(self, settings: Settings, *, once: tuple[str, ...]) -> None:
        """`once`: the command that carries out the run in the queue."""
        self._once = once
        self._log = settings.state / "logs" / "train.log"
        self._db: Database = connect(settings.database)
        self._holder = f"{new_id('clock')}:{os.getpid()}"
        self._holds = False
        self._renewed = -LEASE_S
        self._started: _Started | None = None
        self._alarms = BackgroundScheduler(
            timezone=UTC,
            executors={"default": ThreadPoolExecutor(1)},
            # However late an alarm goes off, it goes off, and once.
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )

    def start(self) -> None:
        self._alarms.add_job(self._look, "interval", seconds=LOOK_S, id="look", next_run_time=datetime.now(UTC))
        self._alarms.start()

    def stop(self) -> None:
        """End the run under way in order, and leave the lease to another clock."""
        self._alarms.shutdown(wait=True)
        give_up = time.monotonic() + STOP_S
        if self._started is not None:
            self._end_ours(self._started)
        if self._holds:
            self._end_adopted(give_up)
        with transaction(self._db):
            leases.release(self._db, LEASE, self._holder)
        self._db.close()

    def _look(self) -> None:
        try:
            self._record_end()
            self._hold()
            if self._holds:
                self._set_alarms()
                self._start_the_queued()
        except (sqlite3.OperationalError, OSError) as error:
            log.error("Nothing can be started: %s. Trying again.", error)

    def _hold(self) -> None:
        """Renew the lease, or take it where it is free."""
        if time.monotonic() < self._renewed + LEASE_S / 3:
            return
        held = self._holds
        self._holds = False
        with transaction(self._db):
            self._holds = leases.acquire(self._db, LEASE, self._holder, for_s=LEASE_S)
            runs.give_up_the_dead(self._db)
        self._renewed = time.monotonic()
        if self._holds != held:
            log.info("This clock ticks" if self._holds else "Another clock ticks")

    def _set_alarms(self) -> None:
        """One for each moment that comes next. Its id changes with the schedule and each time it came due."""
        wanted = {"look"}
        idle = runs.active(self._db) is None
        for schedule in schedules.list_all(self._db):
            if schedule.paused:
                continue
            alarm = f"{schedule.id} {' '.join(schedule.version)}"
            wanted.add(alarm)
            try:
                due_at = schedule.next_due()
                if due_at is None and idle:
                    self._answer(schedule)
                elif due_at is not None and self._alarms.get_job(alarm) is None:
                    self._alarms.add_job(self._ring, "date", run_date=due_at, id=alarm, args=[schedule])
                problem = None
            except BadSchedule as error:
                problem = str(error)
            self._note_problem(schedule, problem)
        for job in self._alarms.get_jobs():
            if job.id not in wanted:
                job.remove()
        self._alarms.wakeup()  # it sleeps by a clock that stands still while the machine does

    def _ring(self, schedule: Schedule) -> None:
        try:
            self._answer(schedule)
        except (sqlite3.OperationalError, OSError) as error:
            log.error("%s is due, and its run cannot be started: %s. Trying again.", schedule.id, error)

    def _answer(self, schedule: Schedule) -> None:
        """Ask for the run, if it is due and we are the one to ask."""
        if not schedules.is_due(self._db, schedule, datetime.now(UTC)):
            return
        with transaction(self._db):
            self._holds = leases.acquire(self._db, LEASE, self._holder, for_s=LEASE_S)
            run_id = schedules.come_due(self._db, schedule) if self._holds else None
        if run_id is not None:
            log.info("%s (%s %s) came due: %s", schedule.id, schedule.kind, schedule.spec, run_id)
            self._start_the_queued()

    def _note_problem(self, schedule: Schedule, problem: str | None) -> None:
        if schedule.problem != problem:
            with transaction(self._db):
                schedules.record_problem(self._db, schedule.id, problem)

    def _start_the_queued(self) -> None:
        """Give the queued run a process, whoever asked for it."""
        run = runs.active(self._db)
        if self._started is not None or run is None or run.status is not RunStatus.QUEUED:
            return
        with self._open_log(run.id) as output:
            process = subprocess.Popen(
                self._once, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        log.info("%s starts (process %d, %s)", run.id, process.pid, self._log)
        self._started = _Started(run.id, process)
        threading.Thread(target=self._look_at_its_end, args=[process], daemon=True).start()

    def _open_log(self, run_id: str) -> IO[bytes]:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LARGEST_LOG:
            self._log.replace(self._log.with_suffix(".1.log"))
        output = self._log.open("ab")
        output.write(f"--- {timestamp()} {run_id}\n".encode())
        output.flush()
        return output

    def _look_at_its_end(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if self._alarms.running:
            self._alarms.modify_job("look", next_run_time=datetime.now(UTC))

    def _record_end(self) -> None:
        """Where the process ended and its run did not, say in the record that it died."""
        if self._started is None or (status := self._started.process.poll()) is None:
            return
        run_id, pid = self._started.run_id, self._started.process.pid
        with transaction(self._db):
            died = runs.record_death(self._db, run_id, pid=pid, error=_how_it_died(status, self._log))
        run = runs.get(self._db, run_id)
        (log.error if died else log.info)("%s %s%s", run_id, run.status, f": {run.error}" if run.error else "")
        self._started = None

    def _end_ours(self, started: _Started) -> None:
        started.process.terminate()
        try:
            started.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("%s does not end; killing it", started.run_id)
            started.process.kill()
            started.process.wait()
        if runs.get(self._db, started.run_id).status is not RunStatus.QUEUED:  # not begun: it waits for the next clock
            self._record_end()

    def _end_adopted(self, give_up: float) -> None:
        """Cancel the run that an earlier clock started, if one is under way. One of `nightshift train` is not ours."""
        run = runs.active(self._db)
        if run is None or run.status is not RunStatus.RUNNING or run.requested_by == "cli":
            return
        with transaction(self._db):
            runs.cancel(self._db, run.id, actor="clock")
        while time.monotonic() < give_up and runs.get(self._db, run.id).status is RunStatus.RUNNING:
            time.sleep(0.2)


def _how_it_died(status: int, output: Path) -> str:
    if status == -signal.SIGKILL:
        how = "Its process was killed (SIGKILL), as the system does where memory runs out"
    elif status < 0:
        how = f"Its process was ended by {signal.Signals(-status).name}"
    else:
        how = f"Its process ended with status {status} before its time"
    return f"{how}; {output} has its last words. Start another run: nothing of this one is in use."


def keep_time(settings: Settings, *, once: tuple[str, ...] = ONCE) -> int:
    """Run until SIGTERM, SIGINT or SIGHUP."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a look that takes long is not worth a line
    stop = threading.Event()
    for wish in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(wish) is not signal.SIG_IGN:  # nohup, say
            signal.signal(wish, lambda number, frame: stop.set())
    clock = Clock(settings, once=once)
    clock.start()
    stop.wait()
    clock.stop()
    return 0
