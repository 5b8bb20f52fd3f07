"""Leases: one holder at a time, whoever asks at once, and a dead one in nobody's way."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from data import leases
from data.database import connect, transaction


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    db = connect(tmp_path / "nightshift.db")
    yield db
    db.close()


def acquired(db: Database, holder: str, *, name: str = "swap", for_s: float = 60) -> bool:
    with transaction(db):
        return leases.acquire(db, name, holder, for_s=for_s)


def test_a_lease_has_one_holder_who_may_renew_it(db: Database) -> None:
    assert leases.holder_of(db, "swap") is None
    assert acquired(db, "one")
    assert not acquired(db, "two")
    assert acquired(db, "one")
    assert leases.holder_of(db, "swap") == "one"
    assert acquired(db, "two", name="clock"), "another name is another lease"


def test_a_lease_that_ran_out_is_anybodys(db: Database) -> None:
    assert acquired(db, "one", for_s=-1)
    assert leases.holder_of(db, "swap") is None
    assert acquired(db, "two")
    assert not acquired(db, "one"), "who was only slow has lost it"


def test_a_lease_from_a_clock_that_was_ahead_is_anybodys(db: Database) -> None:
    assert acquired(db, "one", for_s=3600)
    assert leases.holder_of(db, "swap") is None
    assert acquired(db, "two", for_s=6)
    assert not acquired(db, "one", for_s=6)


def test_a_renewal_lasts_from_its_own_moment(db: Database) -> None:
    assert acquired(db, "one", for_s=-1)
    assert acquired(db, "one")
    assert not acquired(db, "two")


def test_only_the_holder_can_release(db: Database) -> None:
    assert acquired(db, "one")
    with transaction(db):
        leases.release(db, "swap", "two")
    assert leases.holder_of(db, "swap") == "one"
    with transaction(db):
        leases.release(db, "swap", "one")
    assert leases.holder_of(db, "swap") is None
    assert acquired(db, "two")


def test_of_many_who_ask_at_once_one_gets_it(tmp_path: Path, db: Database) -> None:
    won: list[str] = []
    at_once = threading.Barrier(8)

    def ask(holder: str) -> None:
        own = connect(tmp_path / "nightshift.db")
        at_once.wait()
        if acquired(own, holder):
            won.append(holder)
        own.close()

    threads = [threading.Thread(target=ask, args=(f"holder-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert leases.holder_of(db, "swap") == won[0]
