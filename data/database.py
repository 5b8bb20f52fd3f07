"""Opening the record, and writing to it.

Readers open a connection of their own with `connect`. A process that writes now and then uses `transaction`; one that
writes all the time (the API) hands its work to a `Writer`, which commits many writes with one fsync."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlite_utils
from pysqlite3 import dbapi2 as sqlite3

from data.schema import migrations

T = TypeVar("T")

SAFE_SQLITE = (3, 51, 3)
"""Before this version SQLite can lose committed writes when several connections checkpoint a WAL."""

BUSY_TIMEOUT_MS = 10_000
WAL_PATIENCE_MS = 1_000
"""How long `empty_wal` waits for readers: writers wait with it."""


def connect(path: Path) -> sqlite_utils.Database:
    """A connection with our pragmas, the schema brought up to date. Raises RuntimeError on an unsafe SQLite."""
    if sqlite3.sqlite_version_info < SAFE_SQLITE:
        raise RuntimeError(
            f"SQLite {sqlite3.sqlite_version} can lose committed votes; install pysqlite3 0.6.1 or newer."
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    connection = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what is deleted must not stay in the file's free places
    db = sqlite_utils.Database(connection)
    if migrations.pending(db):
        with transaction(db):  # two processes that start together must not both migrate
            migrations.apply(db)
    return db


def _use_wal(connection: sqlite3.Connection) -> None:
    # While another process makes the same file WAL, SQLite says "locked" at once, whatever the timeout.
    give_up = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def empty_wal(db: sqlite_utils.Database) -> bool:
    """Bring the write-ahead log into the database file and cut it off: until then it holds pages as they were before
    what was deleted was deleted. False where somebody reads or writes for longer than WAL_PATIENCE_MS.

    Call outside a transaction."""
    db.execute(f"PRAGMA busy_timeout = {WAL_PATIENCE_MS}")
    busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    return not busy


@contextmanager
def transaction(db: sqlite_utils.Database) -> Iterator[sqlite_utils.Database]:
    """Take the write lock at once: a deferred BEGIN that reads and then writes fails beside another writer."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.conn.in_transaction:  # a full disk may have rolled back already
            db.execute("ROLLBACK")
        raise


class Writer:
    """One thread with one connection that does all of a process's writes, as many as wait in one transaction.

    Each piece of work runs in a savepoint, so one that raises undoes only itself. A future resolves after the COMMIT,
    which with synchronous=FULL means: on disk."""

    LARGEST_GROUP = 256
    PATIENCE_S = 0.02
    """How long a write that nobody waits for may wait for others, to share their fsync."""

    def __init__(self, path: Path) -> None:
        self._db = connect(path)
        self._waiting: queue.SimpleQueue[tuple[Callable[[sqlite_utils.Database], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[sqlite_utils.Database], T], *, patient: bool = False) -> Future[T]:
        """Run `work(db)` inside the next transaction; the future holds what it returned or raised. `patient` work may
        be kept for PATIENCE_S, though never beyond what is submitted after it."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # a caller that goes away does not undo its write
        self._waiting.put((work, future))
        if not patient:
            self._hurry.set()
        return future

    def close(self) -> None:
        """Finish what waits, then close."""
        self._waiting.put(None)
        self._hurry.set()
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            item = self._waiting.get()
            self._hurry.wait(self.PATIENCE_S)
            self._hurry.clear()
            group = []
            while item is not None:
                group.append(item)
                if len(group) == self.LARGEST_GROUP or self._waiting.empty():
                    break
                item = self._waiting.get()
            closing = item is None
            if group:
                self._commit(group)
        self._db.close()

    def _commit(self, group: list[tuple[Callable[[sqlite_utils.Database], Any], Future[Any]]]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        try:
            with transaction(self._db):
                for work, future in group:
                    self._db.execute("SAVEPOINT work")
                    try:
                        result = work(self._db)
                    except Exception as error:
                        if not self._db.conn.in_transaction:
                            raise  # the whole group is lost, not only this work
                        self._db.execute("ROLLBACK TO work")
                        future.set_exception(error)
                    else:
                        done.append((future, result))
                    self._db.execute("RELEASE work")
        except Exception as error:
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
        else:
            for future, result in done:
                future.set_result(result)
