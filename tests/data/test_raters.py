"""Whose votes are left out, and the operator's word on it."""

from collections.abc import Callable

import pytest
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import audit, comparisons, completions, raters, runs
from data.database import transaction
from data.types import Choice, Role
from tests.conftest import AddPair, MakeKey


@pytest.fixture
def run(db: Database) -> str:
    return new_run(db)


def new_run(db: Database) -> str:
    with transaction(db):
        id = runs.request(db, requested_by="test", config={}).id
        runs.cancel(db, id, actor="test")
        return id


def suspect(db: Database, run: str, **suspicions: str | None) -> None:
    with transaction(db):
        raters.keep(db, run, {key: raters.Standing(30, 15, 0.1, reason) for key, reason in suspicions.items()})


def test_a_run_suspects_and_the_next_one_thinks_again(db: Database, run: str, make_key: MakeKey) -> None:
    one, other = make_key()[0].id, make_key()[0].id
    suspect(db, run, **{one: "always left", other: "a coin"})
    assert raters.left_out(db) == {one, other}
    since = {row["key"]: row["since"] for row in raters.standing(db)}
    again = new_run(db)
    suspect(db, again, **{one: "still always left", other: None})
    assert raters.left_out(db) == {one}
    (row,) = raters.standing(db)
    assert (row["key"], row["quarantine"], row["reason"], row["run"]) == (one, "suspected", "still always left", again)
    assert row["reliability"] == 0.1
    assert row["since"] == since[one]


def test_a_run_that_cannot_judge_frees_nobody(db: Database, run: str, make_key: MakeKey) -> None:
    one, other = make_key()[0].id, make_key()[0].id
    suspect(db, run, **{one: "a coin"})
    found = {one: raters.Standing(30, 0, 0.5, None), other: raters.Standing(30, 0, 0.5, "always left")}
    again = new_run(db)
    with transaction(db):
        raters.keep(db, again, found, frees=False)
    assert raters.left_out(db) == {one, other}


def test_an_operators_word_stands(db: Database, run: str, make_key: MakeKey) -> None:
    released, confirmed, unsuspected = (make_key()[0].id for _ in range(3))
    suspect(db, run, **{released: "a coin", confirmed: "a coin"})
    with transaction(db):
        raters.release(db, released, actor="key_op")
        raters.confirm(db, confirmed, actor="key_op")
        raters.confirm(db, unsuspected, actor="cli")
    assert raters.left_out(db) == {confirmed, unsuspected}
    suspect(db, new_run(db), **{released: "a coin again"})
    assert raters.left_out(db) == {confirmed, unsuspected}
    rows = {row["key"]: row for row in raters.standing(db)}
    assert rows[released]["reason"] == "a coin"
    assert (rows[confirmed]["ruled_by"], rows[unsuspected]["ruled_by"]) == ("key_op", "cli")
    acts = [(act["action"], act["subject"]) for act in audit.latest(db, limit=9)]
    assert [act for act in acts if act[0].startswith("rater.")] == [
        ("rater.confirm", unsuspected), ("rater.confirm", confirmed), ("rater.release", released),
    ]  # fmt: skip
    with transaction(db):
        raters.release(db, confirmed, actor="cli")
    assert raters.left_out(db) == {unsuspected}
    assert raters.released(db) == {released, confirmed}


def test_a_word_that_is_taken_back_leaves_the_rater_to_the_runs(db: Database, run: str, make_key: MakeKey) -> None:
    released, confirmed, suspected = (make_key()[0].id for _ in range(3))
    suspect(db, run, **{suspected: "a coin"})
    with transaction(db):
        raters.release(db, released, actor="key_op")
        raters.confirm(db, confirmed, actor="key_op")
        for key in (released, confirmed):
            raters.reconsider(db, key, actor="key_op")
    with pytest.raises(raters.NoRuling), transaction(db):
        raters.reconsider(db, suspected, actor="key_op")
    assert raters.left_out(db) == {suspected}, "that was no operator's word"
    assert raters.released(db) == set()
    assert audit.latest(db, limit=1)[0]["action"] == "rater.reconsider"
    suspect(db, new_run(db), **{released: "a coin again", suspected: "a coin"})
    assert raters.left_out(db) == {released, suspected}


def test_nobody_rules_on_a_key_that_does_not_exist(db: Database) -> None:
    for rule in (raters.confirm, raters.release, raters.reconsider):
        with pytest.raises(raters.UnknownRater), transaction(db):
            rule(db, "key_nobody", actor="cli")
    assert raters.standing(db) == []


def test_a_suspicion_is_of_a_key_that_exists(db: Database, run: str) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        suspect(db, run, key_nobody="a coin")


def test_everybody_who_voted_is_listed_and_who_is_left_out_comes_first(
    db: Database, run: str, make_key: MakeKey, add_pair: AddPair
) -> None:
    busy, left_out, silent = (make_key()[0].id for _ in range(3))
    for key, choices in ((busy, "aabt"), (left_out, "a")):
        for choice in choices:
            pair = add_pair(key)
            with transaction(db):
                comparisons.vote(
                    db, pair, key_id=key, role=Role.USER, choice={"t": "tie"}.get(choice, choice), comment=None,
                    window_s=600,
                )  # fmt: skip
    suspect(db, run, **{left_out: "always left"})
    rows = raters.standing(db)
    assert [row["key"] for row in rows] == [left_out, busy], f"{silent} never voted"
    assert (rows[1]["votes"], rows[1]["first"], rows[1]["second"], rows[1]["gold"]) == (4, 2, 1, 0)
    assert rows[1]["quarantine"] is None


@pytest.fixture
def desk(db: Database) -> Callable[[str], str | None]:
    """Rate the next pair of the queue; the pair's id."""

    def rate(key_id: str) -> str | None:
        with transaction(db):
            pair = comparisons.next_for_rater(db, key_id=key_id, lease_s=60.0)
            if pair is None:
                return None
            assert comparisons.holds_one(db, key_id)
            comparisons.vote(db, pair.id, key_id=key_id, role=Role.RATER, choice=Choice.A, comment=None, window_s=0.0)
            db.execute("UPDATE holds SET until = since")
            assert not comparisons.holds_one(db, key_id)
            return pair.id

    return rate


def test_what_only_raters_left_out_for_good_voted_on_waits_for_others_again(
    db: Database, make_key: MakeKey, add_pair: AddPair, desk: Callable[[str], str | None]
) -> None:
    owner = make_key()[0].id
    bad, worse, good, other = (make_key(Role.RATER)[0].id for _ in range(4))
    forgotten = make_key()[0].id
    for user in (owner, owner, owner, forgotten):
        add_pair(user)
    first, second, third, lost = (desk(key) for key in (bad, worse, good, bad))
    with transaction(db):
        completions.forget_user(db, forgotten, actor="cli")
        raters.confirm(db, bad, actor="cli")
    assert [desk(bad), desk(worse), desk(good)] == [None, first, None], "to nobody twice"
    with transaction(db):
        raters.confirm(db, worse, actor="cli")
    assert [desk(key) for key in (bad, worse, good, good, good, other)] == [second, None, first, second, None, None]
    assert lost not in (first, second, third)


def test_whose_votes_are_left_out_for_good_takes_no_pair_from_the_queue(
    db: Database, make_key: MakeKey, add_pair: AddPair, desk: Callable[[str], str | None]
) -> None:
    owner = make_key()[0].id
    bad, good = (make_key(Role.RATER)[0].id for _ in range(2))
    pairs = {add_pair(owner) for _ in range(3)}
    with transaction(db):
        raters.confirm(db, bad, actor="cli")
    assert {desk(bad) for _ in range(3)} == pairs
    assert desk(bad) is None
    one = desk(good)
    with transaction(db):
        raters.release(db, bad, actor="cli")
    assert desk(good) is None, "these votes count now"
    with transaction(db):
        raters.confirm(db, bad, actor="cli")
    assert desk(good) in pairs - {one}
    with transaction(db):
        raters.reconsider(db, bad, actor="cli")
    assert desk(good) is None, "and now again"
