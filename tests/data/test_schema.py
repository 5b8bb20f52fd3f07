"""The tables: how they come to be, and what they refuse."""

import ast
import inspect
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import schema
from data.database import connect, transaction
from data.types import timestamp
from tests.conftest import MakeKey


def tables(db: Database) -> set[str]:
    return {name for name in db.table_names() if not name.startswith(("_", "sqlite_"))}


def test_a_fresh_record_has_every_table(tmp_path: Path) -> None:
    db = connect(tmp_path / "deep" / "down" / "nightshift.db")
    assert tables(db) >= {"keys", "policies", "completions", "comparisons", "votes", "vote_history", "audit"}
    assert schema.migrations.pending(db) == []
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_who_holds_a_pair_is_known_after_the_migration_that_moved_it(tmp_path: Path) -> None:
    old = Database(sqlite3.connect(str(tmp_path / "nightshift.db"), isolation_level=None))
    schema.migrations.apply(old, stop_before="m0004_remember_who_held_a_pair")
    key = {"id": "key_1", "hash": b"", "role": "rater", "feedback": "off", "label": "", "created_at": timestamp()}
    insert(old, "keys", **key)
    insert(old, "policies", **policy(name="policy-0000"))
    for id in ("cpl_1", "cpl_2"):
        insert(old, "completions", **completion("key_1", id=id))
    insert(old, "comparisons", **comparison("key_1", id="cmp_1", rater="key_1", rater_since="then", rater_until="soon"))
    insert(old, "comparisons", **comparison("key_1", id="cmp_2"))
    old.close()
    db = connect(tmp_path / "nightshift.db")
    assert db.execute("SELECT comparison_id, key_id, since, until FROM holds").fetchall() == [
        ("cmp_1", "key_1", "then", "soon")
    ]
    assert db.execute("SELECT id FROM comparisons ORDER BY id").fetchall() == [("cmp_1",), ("cmp_2",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()


def test_what_waits_and_whose_it_is_are_known_after_the_migration_that_wrote_it_down(tmp_path: Path) -> None:
    old = Database(sqlite3.connect(str(tmp_path / "nightshift.db"), isolation_level=None))
    schema.migrations.apply(old, stop_before="m0008_find_without_searching")
    key = {"id": "key_1", "hash": b"", "role": "rater", "feedback": "off", "label": "", "created_at": timestamp()}
    insert(old, "keys", **key)
    insert(old, "policies", **policy(name="policy-0000"))
    for id, words in (("cpl_1", "[1]"), ("cpl_2", "[1]"), ("cpl_3", "[]"), ("cpl_4", "[]")):
        insert(old, "completions", **completion("key_1", id=id, messages=words, user="key_1/ada"))
    for id, a, b in (("waits", "cpl_1", "cpl_2"), ("voted", "cpl_1", "cpl_2"), ("forgotten", "cpl_3", "cpl_4")):
        insert(old, "comparisons", **comparison("key_1", id=id, a=a, b=b))
    insert(old, "votes", **vote("key_1", comparison_id="voted"))
    old.close()
    db = connect(tmp_path / "nightshift.db")
    assert db.execute("SELECT id FROM comparisons WHERE waits = 1").fetchall() == [("waits",)]
    assert {user for (user,) in db.execute("SELECT user FROM comparisons")} == {"key_1/ada"}
    db.close()


def test_every_table_is_strict(db: Database) -> None:
    loose = {row["name"] for row in db.query("PRAGMA table_list") if not row["strict"]}
    assert {name for name in loose if not name.startswith(("_", "sqlite_"))} == set()


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    connect(tmp_path / "nightshift.db").close()
    before = (tmp_path / "nightshift.db").read_bytes()
    connect(tmp_path / "nightshift.db").close()
    assert (tmp_path / "nightshift.db").read_bytes() == before


def test_two_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    start = (
        "import sys; from pathlib import Path; from data.database import connect, transaction\n"
        "print('up', flush=True); sys.stdin.readline()\n"
        "connect(Path(sys.argv[1])).close()"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", start, str(tmp_path / "nightshift.db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    assert [child.communicate(timeout=20)[1] for child in children] == ["", ""]
    db = connect(tmp_path / "nightshift.db")
    names = [migration.name for migration in schema.migrations.applied(db)]
    assert len(names) == len(set(names)) > 0
    db.close()


def test_who_waited_for_another_s_migration_does_not_migrate_again(tmp_path: Path) -> None:
    first = Database(sqlite3.connect(str(tmp_path / "nightshift.db"), isolation_level=None))
    first.execute("PRAGMA journal_mode = WAL")
    with ThreadPoolExecutor(1) as pool:
        with transaction(first):
            second = pool.submit(connect, tmp_path / "nightshift.db")
            time.sleep(0.05)  # by now it has seen that something is pending, and waits for the lock
            assert not second.done()
            schema.migrations.apply(first)
        opened = second.result()
    assert schema.migrations.pending(opened) == []
    opened.close()
    first.close()


def test_migrations_import_nothing_of_ours() -> None:
    tree = ast.parse(inspect.getsource(schema))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert modules == {"sqlite_utils"}


def insert(db: Database, table: str, **row: Any) -> None:
    marks = ", ".join("?" for _ in row)
    db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


def policy(**changes: Any) -> dict[str, Any]:
    name = changes.get("name", "policy-0001")
    whole = {"name": name, "path": f"policies/{name}", "sha256": "", "base_model": "", "status": "candidate"}
    return whole | {"created_at": timestamp()} | changes


def test_exactly_one_policy_serves(db: Database) -> None:
    insert(db, "policies", **policy(status="serving"))
    with pytest.raises(sqlite3.IntegrityError):
        insert(db, "policies", **policy(name="policy-0002", status="serving"))
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("UPDATE policies SET status = 'serving'")


@pytest.mark.parametrize(
    "change",
    [
        {"status": "retried"},
        {"parent": "policy-0099"},
        {"path": "policies/policy-0000"},
        {"sha256": None},
        {"name": "policy-0000"},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(db: Database, change: dict[str, Any]) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        insert(db, "policies", **policy(**change))


def completion(key_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": "cpl_1",
        "key_id": key_id,
        "user": key_id,
        "conversation": "c",
        "messages": "[]",
        "answer": "",
        "policy": "policy-0000",
        "sampling": "{}",
        "status": "complete",
        "total_ms": 1.0,
        "created_at": timestamp(),
    } | changes


@pytest.mark.parametrize(
    "change",
    [
        {"key_id": "key_nobody"},
        {"policy": "policy-0099"},
        {"status": "done"},
        {"prompt_tokens": "many"},
        {"total_ms": "long"},
        {"answer": None},
        {"answer": b"bytes"},
    ],
)
def test_a_completion_that_makes_no_sense_is_refused(db: Database, make_key: MakeKey, change: dict[str, Any]) -> None:
    key, _ = make_key()
    insert(db, "completions", **completion(key.id))
    with pytest.raises(sqlite3.IntegrityError):
        insert(db, "completions", **(completion(key.id, id="cpl_2") | change))


def comparison(key_id: str, **changes: Any) -> dict[str, Any]:
    whole = {"id": "cmp_1", "key_id": key_id, "a": "cpl_1", "b": "cpl_2", "kind": "same_policy", "swapped": 0}
    return whole | {"created_at": timestamp(), "expires_at": timestamp()} | changes


def vote(key_id: str, **changes: Any) -> dict[str, Any]:
    whole = {"id": "vote_1", "comparison_id": "cmp_1", "key_id": key_id, "choice": "a", "decided_ms": 1}
    return whole | {"created_at": timestamp(), "updated_at": timestamp()} | changes


@pytest.fixture
def compared(db: Database, make_key: MakeKey) -> str:
    """The id of a key with two completions, a comparison of them and a vote on it."""
    key, _ = make_key()
    for id in ("cpl_1", "cpl_2"):
        insert(db, "completions", **completion(key.id, id=id))
    insert(db, "comparisons", **comparison(key.id))
    insert(db, "votes", **vote(key.id))
    return key.id


@pytest.mark.parametrize(
    "change", [{"b": "cpl_1"}, {"b": "cpl_9"}, {"kind": "odd"}, {"swapped": 2}, {"key_id": "key_x"}]
)
def test_a_comparison_that_makes_no_sense_is_refused(db: Database, compared: str, change: dict[str, Any]) -> None:
    insert(db, "comparisons", **comparison(compared, id="cmp_2"))
    with pytest.raises(sqlite3.IntegrityError):
        insert(db, "comparisons", **(comparison(compared, id="cmp_3") | change))


@pytest.mark.parametrize("change", [{}, {"choice": "c"}, {"comparison_id": "cmp_9"}, {"decided_ms": None}])
def test_a_second_vote_of_one_key_or_a_senseless_one_is_refused(
    db: Database, compared: str, make_key: MakeKey, change: dict[str, Any]
) -> None:
    other, _ = make_key()
    key_id = other.id if change else compared
    with pytest.raises(sqlite3.IntegrityError):
        insert(db, "votes", **(vote(key_id, id="vote_2") | change))
    insert(db, "votes", **vote(other.id, id="vote_3"))


def test_what_something_refers_to_cannot_be_deleted(db: Database, compared: str) -> None:
    for table in ("keys", "policies", "completions", "comparisons"):
        with pytest.raises(sqlite3.IntegrityError):
            db.execute(f"DELETE FROM {table}")


def test_a_role_and_a_default_that_do_not_exist_are_refused(db: Database) -> None:
    key = {"id": "key_1", "hash": b"", "role": "user", "feedback": "off", "label": "", "created_at": timestamp()}
    for change in ({"role": "king"}, {"feedback": "never"}, {"hash": "text"}):
        with pytest.raises(sqlite3.IntegrityError):
            insert(db, "keys", **(key | change))
