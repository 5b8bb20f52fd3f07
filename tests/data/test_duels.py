"""Duels: votes counted, verdicts kept, and what follows from them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import comparisons, duels, raters, registry, swaps
from data.database import transaction
from data.types import BASE_POLICY, Choice, ComparisonKind, Duel, DuelKind, DuelStatus, PolicyStatus, Role, timestamp
from tests.conftest import AddPair, AddPolicy, MakeKey

NEW = "policy-0001"


@dataclass(frozen=True)
class Stands:
    e_value: float
    e_mirrored: float
    rate_low: float = 0.1
    rate_high: float = 0.9


def by_difference(duel: Duel, wins: int, losses: int, ties: int) -> tuple[duels.Standing, DuelStatus]:
    """A judge that needs no statistics: three wins more, or three losses more, or the budget."""
    status = DuelStatus.RUNNING
    if wins - losses >= 3:
        status = DuelStatus.WON
    elif losses - wins >= 3:
        status = DuelStatus.LOST
    elif wins + losses + ties >= duel.budget:
        status = DuelStatus.UNDECIDED
    return Stands(float(wins), float(losses)), status


@pytest.fixture
def duel(db: Database, add_policy: AddPolicy) -> Duel:
    """The trial of policy-0001 against policy-0000, which serves."""
    with transaction(db):
        registry.set_serving(db, BASE_POLICY)
    name = add_policy(PolicyStatus.TRIAL)
    with transaction(db):
        return duels.begin(db, DuelKind.TRIAL, challenger=name, incumbent=BASE_POLICY, threshold=20.0, budget=6)


Cast = Callable[..., Duel | None]


@pytest.fixture
def cast(db: Database, add_pair: AddPair, make_key: MakeKey) -> Cast:
    """Vote for one of the policies, or "tie" or "both_bad", on a pair of the duel that runs, as the API does."""
    owner = make_key()[0].id
    sides = iter(range(10_000))

    def one(what: str, *, on: str | None = None, key_id: str = owner, duel: Duel | None = None) -> Duel | None:
        if on is None:
            against = duel or duels.running(db)
            assert against is not None
            pair = (against.challenger, against.incumbent)
            policies = pair if next(sides) % 2 else (pair[1], pair[0])
            on = add_pair(owner, policies=policies, kind=ComparisonKind.TRIAL, duel_id=against.id)
        one.comparison = on  # type: ignore[attr-defined]
        row = db.execute(
            "SELECT first.policy FROM comparisons JOIN completions AS first ON first.id = a WHERE comparisons.id = ?",
            (on,),
        ).fetchone()
        choice = Choice(what) if what in ("tie", "both_bad") else Choice.A if row[0] == what else Choice.B
        with transaction(db):
            comparisons.vote(db, on, key_id=key_id, role=Role.RATER, choice=choice, comment=None, window_s=600.0)
            after = duels.record_vote(db, on, by_difference)
            if after is not None:
                swaps.settle(db, after)
        return after

    return one


def test_votes_are_counted_for_the_policy_whichever_side_it_was_on(duel: Duel, cast: Cast) -> None:
    for what in (NEW, BASE_POLICY, "tie", "both_bad", NEW):
        after = cast(what)
    assert after is not None
    assert (after.wins, after.losses, after.ties) == (2, 1, 2)
    assert (after.e_value, after.e_mirrored, after.rate_low) == (2.0, 1.0, 0.1)
    assert after.status is DuelStatus.RUNNING


def test_the_curve_has_a_point_for_every_decisive_vote(duel: Duel, cast: Cast, db: Database) -> None:
    for what in (NEW, "tie", BASE_POLICY, "both_bad", NEW):
        cast(what)
    curve = duels.curve(db, duel.id)
    assert [(point["votes"], point["e_value"], point["e_mirrored"]) for point in curve] == [
        (1, 1.0, 0.0), (2, 1.0, 1.0), (3, 2.0, 1.0),
    ]  # fmt: skip


def test_a_vote_counts_as_it_was_cast_before_its_answer_said_who_wrote_which(
    duel: Duel, cast: Cast, db: Database
) -> None:
    cast("tie")
    changed = cast.comparison  # type: ignore[attr-defined]
    for what in (NEW, BASE_POLICY, NEW):
        after = cast(what, on=changed)
        assert after is not None
        assert (after.wins, after.losses, after.ties) == (0, 0, 1)
    after = cast(BASE_POLICY)
    cast(NEW, on=cast.comparison)  # type: ignore[attr-defined]
    assert after is not None
    assert (after.wins, after.losses, after.ties) == (0, 1, 1)
    assert [(point["votes"], point["e_value"]) for point in duels.curve(db, duel.id)] == [(1, 0.0)]


def test_the_same_vote_again_changes_nothing(duel: Duel, cast: Cast, db: Database) -> None:
    cast(NEW)
    before = db.execute("SELECT * FROM duel_curve").fetchall()
    after = cast(NEW, on=cast.comparison)  # type: ignore[attr-defined]
    assert after is not None
    assert after.wins == 1
    assert db.execute("SELECT * FROM duel_curve").fetchall() == before


def test_of_several_votes_on_a_pair_the_first_counts(duel: Duel, cast: Cast, db: Database, make_key: MakeKey) -> None:
    """Two that agree, as people do, are no evidence twice."""
    cast(NEW)
    pair = cast.comparison  # type: ignore[attr-defined]
    rater = make_key(Role.RATER)[0].id
    db.execute("INSERT INTO holds (comparison_id, key_id, since, until) VALUES (?, ?, '2020', '9999')", (pair, rater))
    db.execute("UPDATE holds SET since = (SELECT created_at FROM comparisons WHERE id = ?)", (pair,))
    after = cast(BASE_POLICY, on=pair, key_id=rater)
    assert after is not None
    assert (after.wins, after.losses) == (1, 0)
    (owner,) = {row["key_id"] for row in db.query("SELECT key_id FROM votes WHERE key_id <> ?", (rater,))}
    with transaction(db):
        raters.confirm(db, owner, actor="test")
        db.execute("UPDATE quarantines SET since = '2020'")
    after = duels.record_vote(db, pair, by_difference)
    assert after is not None
    assert (after.wins, after.losses) == (0, 1), "of those that count"


def test_what_a_rater_says_in_quarantine_does_not_count_and_what_they_said_before_does(
    duel: Duel, cast: Cast, db: Database, make_key: MakeKey
) -> None:
    cast(NEW)
    (owner,) = {row["key_id"] for row in db.query("SELECT key_id FROM votes")}
    with transaction(db):
        raters.confirm(db, owner, actor="test")
        db.execute("UPDATE quarantines SET since = ?", (timestamp(plus_s=1),))
    cast(NEW)
    with transaction(db):
        db.execute("UPDATE quarantines SET since = ?", (timestamp(plus_s=-1),))
        db.execute("UPDATE votes SET created_at = '2020'")
    after = cast(NEW)
    assert after is not None
    assert (after.wins, after.losses) == (2, 0)
    with transaction(db):
        raters.release(db, owner, actor="test")
    after = cast("tie")
    assert after is not None
    assert (after.wins, after.ties) == (3, 1)


def test_who_is_left_out_after_a_release_has_said_what_was_said_before(duel: Duel, cast: Cast, db: Database) -> None:
    cast("tie")
    (owner,) = {row["key_id"] for row in db.query("SELECT key_id FROM votes")}
    for rule in (raters.confirm, raters.release):
        with transaction(db):
            rule(db, owner, actor="test")
    time.sleep(0.002)
    cast(NEW)
    time.sleep(0.002)
    with transaction(db):
        raters.confirm(db, owner, actor="test")
    time.sleep(0.002)
    after = cast(NEW)
    assert after is not None
    assert (after.wins, after.ties) == (1, 1)


def test_votes_on_other_pairs_do_not_count(duel: Duel, cast: Cast, db: Database, add_pair: AddPair) -> None:
    owner = db.execute("SELECT id FROM keys ORDER BY id DESC").fetchone()[0]
    pair = add_pair(owner, policies=(NEW, BASE_POLICY))
    assert cast(NEW, on=pair, key_id=owner) is None
    running = duels.running(db)
    assert running is not None
    assert running.wins == 0


def test_a_trial_that_is_won_promotes_its_candidate(duel: Duel, cast: Cast, db: Database) -> None:
    for _ in range(3):
        after = cast(NEW)
    assert after is not None
    assert (after.status, after.ended_at is not None) == (DuelStatus.WON, True)
    assert duels.running(db) is None
    assert registry.get(db, NEW).status is PolicyStatus.PROMOTED
    assert swaps.pending(db) == NEW
    (swap,) = swaps.list_swaps(db)
    assert (swap.policy, swap.actor, swap.flipped_at) == (NEW, "trial", None)
    assert "3 wins, 0 losses" in swap.reason


@pytest.mark.parametrize(
    ("votes", "status", "how"),
    [
        ([BASE_POLICY] * 3, DuelStatus.LOST, "lost its trial"),
        ([NEW, BASE_POLICY, "tie"] * 2, DuelStatus.UNDECIDED, "did not win its trial"),
        (["both_bad"] * 6, DuelStatus.UNDECIDED, "did not win its trial"),
    ],
)
def test_a_trial_that_is_not_won_turns_its_candidate_away(
    duel: Duel, cast: Cast, db: Database, votes: list[str], status: DuelStatus, how: str
) -> None:
    for what in votes:
        after = cast(what)
    assert after is not None
    assert after.status is status
    policy = registry.get(db, NEW)
    assert policy.status is PolicyStatus.REJECTED
    assert how in str(policy.problem)
    assert swaps.pending(db) is None


def test_votes_on_a_duel_that_is_over_change_nothing_of_it(duel: Duel, cast: Cast, db: Database) -> None:
    for _ in range(3):
        cast(NEW)
    before = (duels.get(db, duel.id), duels.curve(db, duel.id))
    assert cast(BASE_POLICY, duel=duel) is None
    assert cast(BASE_POLICY, on=cast.comparison) is None  # type: ignore[attr-defined]
    assert (duels.get(db, duel.id), duels.curve(db, duel.id)) == before
    assert registry.get(db, NEW).status is PolicyStatus.PROMOTED


@pytest.mark.parametrize(
    ("winner", "pending", "status"), [(BASE_POLICY, BASE_POLICY, DuelStatus.WON), (NEW, None, DuelStatus.LOST)]
)
def test_a_watch_brings_the_predecessor_back_only_when_it_wins(
    db: Database, cast: Cast, add_policy: AddPolicy, winner: str, pending: str | None, status: DuelStatus
) -> None:
    for name in (BASE_POLICY, add_policy(PolicyStatus.PROMOTED)):
        with transaction(db):
            swaps.flip(db, swaps.begin(db, name))
    with transaction(db):
        duels.begin(db, DuelKind.WATCH, challenger=BASE_POLICY, incumbent=NEW, threshold=20.0, budget=6)
    for _ in range(3):
        after = cast(winner)
    assert after is not None
    assert after.status is status
    assert swaps.pending(db) == pending
    assert registry.get(db, NEW).status is PolicyStatus.SERVING, "the service has not swapped yet"


def test_one_duel_runs_at_a_time(duel: Duel, db: Database) -> None:
    with pytest.raises(sqlite3.IntegrityError), transaction(db):
        duels.begin(db, DuelKind.WATCH, challenger=BASE_POLICY, incumbent=NEW, threshold=20.0, budget=6)


def test_promoting_something_else_sends_the_candidate_on_trial_back_to_wait(
    duel: Duel, db: Database, add_policy: AddPolicy
) -> None:
    other = add_policy()
    with transaction(db):
        swaps.promote(db, other, actor="key_1", reason="because")
    assert registry.get(db, NEW).status is PolicyStatus.CANDIDATE
    ended = duels.get(db, duel.id)
    assert ended.status is DuelStatus.ENDED
    assert other in str(ended.reason)


def test_trials_are_counted_since_the_last_swap(duel: Duel, cast: Cast, db: Database, add_policy: AddPolicy) -> None:
    assert duels.trials_under_incumbent(db) == 0  # nobody has voted on it
    cast(BASE_POLICY)
    assert duels.trials_under_incumbent(db) == 1
    name, newer = add_policy(PolicyStatus.PROMOTED), add_policy()
    with transaction(db):
        swaps.flip(db, swaps.begin(db, name))
    assert duels.trials_under_incumbent(db) == 0
    db.execute("UPDATE swaps SET flipped_at = '9999'")  # by a clock that was ahead
    with transaction(db):
        duels.begin(db, DuelKind.TRIAL, challenger=newer, incumbent=name, threshold=20.0, budget=6)
    cast(name)
    assert duels.trials_under_incumbent(db) == 1
