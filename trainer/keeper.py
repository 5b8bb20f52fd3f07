"""Keeps a running run's row alive: a heartbeat from a thread of its own, figures, and the wish to cancel."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from pysqlite3 import dbapi2 as sqlite3

from data import runs
from data.database import connect, transaction
from data.types import RunStatus

BEAT_S = 5.0
LOOK_S = 0.5
"""How often to look whether what is waited for is over."""
WORK_S = 2.0
"""Work between two waits: after short steps, a wait each would make hours of waiting out of minutes of work."""
ROOM_BYTES = 2**20
"""Set aside on the disk while a run is under way, so that on a full one its end can still be written down."""


@contextmanager
def _unless_busy() -> Iterator[None]:
    """Hours of training are worth more than one line of how they go on."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise


class Cancelled(Exception):
    """Somebody asked for the run to stop."""


class Keeper:
    """Beats while it is open. `stage`, `figures`, `sleep` and `wait_while` raise Cancelled once somebody has asked the
    run to stop, and RunLost once it has been given up for dead."""

    def __init__(self, database: Path, run_id: str) -> None:
        self._db = connect(database)
        self._room = database.with_name("run.room")
        self._run_id = run_id
        self._stage = "starting"
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._over = threading.Event()
        self._reason: Exception | None = None
        self._working_since = time.monotonic()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> "Keeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join()
        self._room.unlink(missing_ok=True)
        self._db.close()

    def set_room_aside(self) -> None:
        """Take ROOM_BYTES of the disk until the run ends. Raises OSError where it has not even that."""
        with self._room.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, ROOM_BYTES)

    def stage(self, name: str) -> None:
        self._stage = name
        with _unless_busy():
            self._beat()
        self._raise_if_over()

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Keep the figures of a step, under the stage's name; where another writes for long, go on without them."""
        prefix = self._stage.replace(" ", "_")
        with _unless_busy(), self._lock, transaction(self._db):
            runs.add_metrics(self._db, self._run_id, step, {f"{prefix}/{k}": v for k, v in figures.items()})
        self._raise_if_over()

    def sleep(self, seconds: float) -> None:
        self._over.wait(seconds)
        self._raise_if_over()

    def wait_while(self, busy: Callable[[], bool], *, limit_s: float, waiting: Callable[[float], None]) -> bool:
        """Wait until `busy()` is false, but at most `limit_s` seconds, and never within WORK_S seconds of work after
        the last wait; whether it had to wait.

        `waiting` is told again and again how many seconds it has been."""
        began = time.monotonic()
        if began - self._working_since < WORK_S:
            return False
        waited_s = 0.0
        while waited_s < limit_s and busy():
            waiting(waited_s)
            self.sleep(min(LOOK_S, limit_s - waited_s))
            waited_s = time.monotonic() - began
        self._working_since = time.monotonic()  # an engine that hangs takes a second to ask, too
        return waited_s > 0

    def finish(self, status: RunStatus, *, error: str | None = None) -> None:
        """End the run, unless it has ended already."""
        self._room.unlink(missing_ok=True)
        with suppress(runs.RunLost), self._lock, transaction(self._db):
            runs.finish(self._db, self._run_id, status, error=error)

    def _raise_if_over(self) -> None:
        if self._reason is not None:
            raise self._reason

    def _beat_on(self) -> None:
        while not self._closed.wait(BEAT_S):
            # The disk is full, or another writer took long: the next beat may succeed before the run counts as dead.
            with suppress(sqlite3.OperationalError):
                self._beat()

    def _beat(self) -> None:
        try:
            with self._lock, transaction(self._db):
                if runs.beat(self._db, self._run_id, stage=self._stage):
                    self._reason = Cancelled()
        except runs.RunLost as lost:
            self._reason = lost
        if self._reason is not None:
            self._over.set()
