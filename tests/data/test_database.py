"""Opening the record, and the writer that all of a process's writes go through."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import database
from data.database import Writer, connect, transaction


@pytest.fixture
def path(tmp_path: Path) -> Path:
    db = connect(tmp_path / "state" / "nightshift.db")
    db.execute("CREATE TABLE notes (text TEXT UNIQUE)")
    db.close()
    return tmp_path / "state" / "nightshift.db"


@pytest.fixture
def writer(path: Path) -> Iterator[Writer]:
    writer = Writer(path)
    yield writer
    writer.close()


@pytest.fixture
def reader(path: Path) -> Iterator[Database]:
    db = connect(path)
    yield db
    db.close()


def note(text: str) -> Any:
    def work(db: Database) -> str:
        db.execute("INSERT INTO notes VALUES (?)", (text,))
        return text

    return work


def notes(db: Database) -> list[str]:
    return [text for (text,) in db.execute("SELECT text FROM notes ORDER BY rowid")]


# Connections


def test_every_connection_has_our_pragmas(reader: Database) -> None:
    pragmas = {
        name: reader.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "secure_delete")
    }
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
        "secure_delete": 1,
    }


def test_a_file_that_another_process_is_just_making_is_waited_for(tmp_path: Path) -> None:
    first = sqlite3.connect(str(tmp_path / "fresh.db"), isolation_level=None)
    first.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(connect, tmp_path / "fresh.db")
        with pytest.raises(TimeoutError):
            second.result(timeout=0.05)
        first.execute("COMMIT")
        opened = second.result()
    assert opened.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    opened.close()
    first.close()


def test_a_file_that_stays_locked_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 20)
    first = sqlite3.connect(str(tmp_path / "fresh.db"), isolation_level=None)
    first.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        connect(tmp_path / "fresh.db")
    first.close()


def test_sqlite_is_one_that_loses_no_votes(reader: Database, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(map(int, reader.execute("SELECT sqlite_version()").fetchone()[0].split("."))) >= (3, 51, 3)
    monkeypatch.setattr(database, "SAFE_SQLITE", (99, 0, 0))
    with pytest.raises(RuntimeError, match="can lose committed votes; install pysqlite3"):
        connect(path)


def test_a_transaction_is_whole_or_not_at_all(reader: Database) -> None:
    def interrupted() -> None:
        with transaction(reader):
            note("half")(reader)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert notes(reader) == []
    with transaction(reader):
        note("whole")(reader)
    assert notes(reader) == ["whole"]


def test_a_transaction_that_reads_first_may_write_beside_another_writer(path: Path) -> None:
    def add_one(i: int) -> None:
        db = connect(path)
        try:
            for _ in range(10):
                with transaction(db):
                    count = db.execute("SELECT count(*) FROM notes").fetchone()[0]
                    note(f"{count}")(db)
        finally:
            db.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_one, range(4)))
    db = connect(path)
    assert notes(db) == [str(i) for i in range(40)]
    db.close()


def test_what_was_deleted_is_in_neither_file_once_the_log_is_emptied(path: Path, reader: Database) -> None:
    def stands(text: str) -> bool:
        return any(text.encode() in file.read_bytes() for file in path.parent.glob("nightshift.db*"))

    for size in (10, 1000, 50_000):  # within a page, and over many
        note(f"SECRET {'x' * size}")(reader)
        note(f"public {'x' * size}")(reader)
    reader.execute("DELETE FROM notes WHERE text LIKE 'SECRET%'")
    assert stands("SECRET")
    assert database.empty_wal(reader)
    assert not stands("SECRET")
    assert stands("public")


def test_a_long_reader_keeps_the_log_from_being_emptied_and_is_told_of(
    path: Path, reader: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "WAL_PATIENCE_MS", 1)
    other = connect(path)
    note("one")(other)
    with transaction(reader):
        assert not database.empty_wal(other)
    reader.execute("BEGIN")
    notes(reader)
    note("two")(other)
    assert not database.empty_wal(other)
    reader.execute("COMMIT")
    assert database.empty_wal(other)
    assert other.execute("PRAGMA busy_timeout").fetchone() == (10_000,)
    other.close()


# The writer


def test_work_gives_back_what_it_returned(writer: Writer, reader: Database) -> None:
    assert writer.submit(note("one")).result() == "one"
    assert notes(reader) == ["one"]


def test_when_a_write_is_acknowledged_another_process_sees_it(writer: Writer, path: Path) -> None:
    writer.submit(note("one")).result()
    look = "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute('SELECT text FROM notes').fetchall())"
    seen = subprocess.run([sys.executable, "-c", look, str(path)], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[('one',)]"


def test_before_its_commit_a_write_is_not_acknowledged(writer: Writer, reader: Database) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def waits(db: Database) -> None:
        inside.set()
        assert go_on.wait(5)

    first = writer.submit(note("one"))
    first.result()
    held = writer.submit(waits)
    assert inside.wait(5)
    later = writer.submit(note("two"))
    assert not held.done()
    assert not later.done()
    assert notes(reader) == ["one"]
    go_on.set()
    later.result()
    assert notes(reader) == ["one", "two"]


class Stuck:
    """Holds the writer, so that what is submitted meanwhile is one group."""

    def __init__(self, writer: Writer) -> None:
        self._go_on = threading.Event()
        inside = threading.Event()

        def wait(db: Database) -> None:
            inside.set()
            assert self._go_on.wait(5)

        self._held = writer.submit(wait)
        assert inside.wait(5)

    def release(self) -> None:
        self._go_on.set()


def test_work_that_fails_undoes_only_itself(writer: Writer, reader: Database) -> None:
    def fails(db: Database) -> None:
        note("undone")(db)
        raise ValueError("no")

    stuck = Stuck(writer)
    before, failing, clashing, after = map(writer.submit, (note("one"), fails, note("one"), note("two")))
    stuck.release()
    assert before.result() == "one"
    assert after.result() == "two"
    with pytest.raises(ValueError, match="no"):
        failing.result()
    with pytest.raises(sqlite3.IntegrityError):
        clashing.result()
    assert notes(reader) == ["one", "two"]


def test_what_waits_together_is_committed_together(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[int] = []
    real = writer._commit

    def counted(group: list[Any]) -> None:
        commits.append(len(group))
        real(group)

    monkeypatch.setattr(writer, "_commit", counted)
    stuck = Stuck(writer)
    futures = [writer.submit(note(str(i))) for i in range(600)]
    stuck.release()
    assert [future.result() for future in futures] == [str(i) for i in range(600)]
    assert commits == [1, 256, 256, 88]  # what held the writer, then all the rest


@pytest.mark.timeout(20)
def test_patient_work_goes_to_disk_with_whatever_is_submitted_after_it(
    writer: Writer, reader: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "PATIENCE_S", 3600.0)
    patient = writer.submit(lambda db: db.execute("INSERT INTO notes VALUES ('patient')"), patient=True)
    writer.submit(lambda db: db.execute("INSERT INTO notes VALUES ('urgent')")).result()
    assert patient.done()
    assert [row["text"] for row in reader.query("SELECT text FROM notes ORDER BY rowid")] == ["patient", "urgent"]


@pytest.mark.timeout(20)
def test_closing_does_not_wait_for_patience(path: Path, reader: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "PATIENCE_S", 3600.0)
    writer = Writer(path)
    writer.submit(lambda db: db.execute("INSERT INTO notes VALUES ('patient')"), patient=True)
    writer.close()
    assert reader.execute("SELECT count(*) FROM notes").fetchone()[0] == 1


def test_patient_work_is_done_though_nothing_follows_it(writer: Writer, reader: Database) -> None:
    writer.submit(lambda db: db.execute("INSERT INTO notes VALUES ('patient')"), patient=True).result(timeout=20)
    assert reader.execute("SELECT count(*) FROM notes").fetchone()[0] == 1


def test_when_the_disk_is_full_nothing_of_the_group_is_acknowledged(writer: Writer, reader: Database) -> None:
    writer.submit(lambda db: db.execute("PRAGMA max_page_count = 1")).result()
    stuck = Stuck(writer)
    futures = [writer.submit(note("small")), writer.submit(note("x" * 1_000_000))]
    stuck.release()
    outcomes = [future.exception() for future in futures]
    assert isinstance(outcomes[1], sqlite3.OperationalError)
    assert notes(reader) == (["small"] if outcomes[0] is None else [])
    writer.submit(lambda db: db.execute("PRAGMA max_page_count = 1000000")).result()
    assert writer.submit(note("again")).result() == "again"


def test_work_that_ends_the_transaction_fails_the_group_and_not_the_writer(writer: Writer, reader: Database) -> None:
    def rolls_back(db: Database) -> None:
        db.execute("ROLLBACK")
        raise ValueError("rolled back")

    stuck = Stuck(writer)
    futures = [writer.submit(note("lost")), writer.submit(rolls_back), writer.submit(note("lost too"))]
    stuck.release()
    assert [type(future.exception()) for future in futures] == [ValueError] * 3
    assert notes(reader) == []
    assert writer.submit(note("later")).result() == "later"


def test_while_another_process_holds_the_lock_a_write_waits(writer: Writer, reader: Database) -> None:
    reader.execute("BEGIN IMMEDIATE")
    future = writer.submit(note("one"))
    with pytest.raises(TimeoutError):
        future.result(timeout=0.05)
    reader.execute("COMMIT")
    assert future.result() == "one"


def test_a_lock_held_for_too_long_is_an_error_and_the_next_write_works(writer: Writer, reader: Database) -> None:
    writer.submit(lambda db: db.execute("PRAGMA busy_timeout = 1")).result()
    reader.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        writer.submit(note("one")).result()
    reader.execute("COMMIT")
    assert writer.submit(note("two")).result() == "two"
    assert notes(reader) == ["two"]


def test_writes_of_many_threads_all_land(writer: Writer, reader: Database) -> None:
    def one(i: int) -> list[str]:
        return [writer.submit(note(f"{i}.{j}")).result() for j in range(20)]

    with ThreadPoolExecutor(8) as pool:
        acknowledged = [text for part in pool.map(one, range(8)) for text in part]
    assert sorted(notes(reader)) == sorted(acknowledged)
    assert len(acknowledged) == 160


def test_a_caller_that_goes_away_does_not_undo_its_write(writer: Writer, reader: Database) -> None:
    stuck = Stuck(writer)
    future = writer.submit(note("one"))
    assert not future.cancel()
    stuck.release()
    assert future.result() == "one"


def test_closing_finishes_what_waits(path: Path, reader: Database) -> None:
    writer = Writer(path)
    futures = [writer.submit(note(str(i))) for i in range(300)]
    writer.close()
    assert all(future.done() for future in futures)
    assert notes(reader) == [str(i) for i in range(300)]
