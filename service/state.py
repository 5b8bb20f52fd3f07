"""What the routes share: settings, the record, the engines, chance."""

import asyncio
import logging
import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data.database import Writer
from data.settings import Settings
from service.engine import Engines
from service.errors import storage_unavailable
from service.hot_swap import HotSwap
from service.metrics import Metrics
from service.scoring import Scorer

log = logging.getLogger("nightshift")

T = TypeVar("T")


@dataclass(slots=True)
class State:
    """One per app, made by `create_app`."""

    settings: Settings
    reader: Database
    """For the event loop only."""
    writer: Writer
    engines: Engines
    hot_swap: HotSwap
    scorer: Scorer
    metrics: Metrics
    rng: random.Random
    renderer: ThreadPoolExecutor
    """Of Markdown, one text at a time: a long one in the event loop would keep the streams waiting, and each thread
    takes its share of their time."""

    async def write(self, work: Callable[[Database], T]) -> T:
        """Run `work` in a transaction; when this returns, it is on disk. Raises what `work` raises, and ApiError when
        the disk does not take it."""
        try:
            return await asyncio.wrap_future(self.writer.submit(work))
        except sqlite3.OperationalError as error:
            raise storage_unavailable(error) from error

    def write_later(self, work: Callable[[Database], Any]) -> None:
        """Run `work` in a transaction soon, with others; a failure is counted and logged."""
        self.writer.submit(work, patient=True).add_done_callback(self._note_failure)

    def _note_failure(self, done: Future[Any]) -> None:
        if error := done.exception():
            self.metrics.lost_writes.inc()
            log.error("An answer could not be logged: %s", error)


def state_of(request: Request) -> State:
    state: State = request.app.state.nightshift
    return state
