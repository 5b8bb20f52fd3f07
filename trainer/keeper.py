"""Keeps a running run's row alive: a heartbeat from a thread of its own, figures, and the wish to cancel."""

import threading
from pathlib import Path
from types import TracebackType

from data import runs
from data.database import connect, transaction
from data.types import RunStatus

BEAT_S = 5.0


class Cancelled(Exception):
    """Somebody asked for the run to stop."""


class Keeper:
    """Beats while it is open. `stage` and `figures` raise Cancelled once somebody has asked the run to stop."""

    def __init__(self, database: Path, run_id: str) -> None:
        self._db = connect(database)
        self._run_id = run_id
        self._stage = "starting"
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._cancelled = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> "Keeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._db.close()

    def stage(self, name: str) -> None:
        self._stage = name
        self._beat()
        self._raise_if_over()

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Keep the figures of a step, under the stage's name."""
        prefix = self._stage.replace(" ", "_")
        with self._lock, transaction(self._db):
            runs.add_metrics(self._db, self._run_id, step, {f"{prefix}/{k}": v for k, v in figures.items()})
        self._raise_if_over()

    def finish(self, status: RunStatus, *, error: str | None = None) -> None:
        with self._lock, transaction(self._db):
            runs.finish(self._db, self._run_id, status, error=error)

    def _raise_if_over(self) -> None:
        if self._lost.is_set():
            raise runs.RunLost(self._run_id)
        if self._cancelled.is_set():
            raise Cancelled

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beat()

    def _beat(self) -> None:
        try:
            with self._lock, transaction(self._db):
                if runs.beat(self._db, self._run_id, stage=self._stage):
                    self._cancelled.set()
        except runs.RunLost:
            self._lost.set()
