"""Votes and the raters' queue, at moments of the test's choosing; and what is exported."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlite_utils import Database

from data import comparisons, completions
from data.comparisons import CastVote, ComparisonExpired, UnknownComparison, VoteIsFinal
from data.database import transaction
from data.types import Choice, ComparisonKind, Role, timestamp
from tests.conftest import AddPair, MakeKey, Work

Cast = Callable[..., CastVote]


@pytest.fixture
def owner(make_key: MakeKey) -> str:
    return make_key()[0].id


@pytest.fixture
def cast(db: Database, owner: str) -> Cast:
    """Vote, `after_s` seconds from now."""

    def vote(comparison: str, choice: str, *, after_s: float = 0.0, **more: Any) -> CastVote:
        parameters = {"key_id": owner, "role": Role.USER, "comment": None, "window_s": 600.0} | more
        now = datetime.now(UTC) + timedelta(seconds=after_s)
        with transaction(db):
            return comparisons.vote(db, comparison, choice=Choice(choice), now=now, **parameters)

    return vote


def test_a_vote_can_be_changed_within_the_window_and_no_later(cast: Cast, add_pair: AddPair, owner: str) -> None:
    comparison = add_pair(owner)
    cast(comparison, "a")
    assert cast(comparison, "b", after_s=590).vote.choice is Choice.B
    with pytest.raises(VoteIsFinal, match="b"):
        cast(comparison, "a", after_s=610)
    assert cast(comparison, "b", after_s=10_000).vote.choice is Choice.B


def test_the_window_runs_from_the_first_vote_and_not_from_the_last_change(
    cast: Cast, add_pair: AddPair, owner: str
) -> None:
    comparison = add_pair(owner)
    cast(comparison, "a")
    cast(comparison, "b", after_s=500)
    with pytest.raises(VoteIsFinal):
        cast(comparison, "a", after_s=1000)


def test_every_change_is_in_the_history(db: Database, cast: Cast, add_pair: AddPair, owner: str) -> None:
    comparison = add_pair(owner)
    for second, (choice, comment) in enumerate([("a", "one"), ("b", None), ("tie", "three"), ("tie", "four")]):
        cast(comparison, choice, after_s=second, comment=comment)
    rows = db.query("SELECT choice, comment, cast_at, replaced_at FROM vote_history ORDER BY rowid")
    history = [(row["choice"], row["comment"]) for row in rows]
    assert history == [("a", "one"), ("b", None), ("tie", "three")]
    (vote,) = db.query("SELECT choice, comment FROM votes")
    assert vote == {"choice": "tie", "comment": "four"}


def test_another_comment_alone_replaces_the_earlier_one_within_the_window(
    db: Database, cast: Cast, add_pair: AddPair, owner: str
) -> None:
    comparison = add_pair(owner)
    first = cast(comparison, "a", comment="one").vote
    for comment in (None, "one"):
        assert cast(comparison, "a", after_s=1, comment=comment).vote == first
    later = cast(comparison, "a", after_s=2, comment="two").vote
    assert (later.id, later.choice, later.comment) == (first.id, Choice.A, "two")
    assert later.updated_at > first.updated_at
    with pytest.raises(VoteIsFinal, match="a"):
        cast(comparison, "a", after_s=610, comment="three")
    assert cast(comparison, "a", after_s=610).vote == later
    (history,) = db.query("SELECT choice, comment, cast_at, replaced_at FROM vote_history")
    assert list(history.values()) == ["a", "one", first.updated_at, later.updated_at]


def test_a_change_that_fails_leaves_the_vote_as_it_was(db: Database, cast: Cast, add_pair: AddPair, owner: str) -> None:
    comparison = add_pair(owner)
    before = cast(comparison, "a").vote
    with pytest.raises(VoteIsFinal):
        cast(comparison, "b", after_s=5000)
    assert db.execute("SELECT choice, updated_at FROM votes").fetchall() == [("a", before.updated_at)]
    assert db.execute("SELECT count(*) FROM vote_history").fetchone() == (0,)


def test_the_time_to_decide_is_counted_to_the_first_vote(
    db: Database, cast: Cast, add_pair: AddPair, owner: str
) -> None:
    comparison = add_pair(owner, age_s=10.0)
    (shown_at,) = db.execute("SELECT created_at FROM comparisons").fetchone()
    first = cast(comparison, "a", after_s=2.0).vote
    decided = datetime.fromisoformat(first.created_at) - datetime.fromisoformat(shown_at)
    assert first.decided_ms == pytest.approx(decided / timedelta(milliseconds=1), abs=2)
    assert first.decided_ms >= 12_000
    assert cast(comparison, "b", after_s=60.0).vote.decided_ms == first.decided_ms


def test_a_clock_set_back_makes_no_negative_time_to_decide(cast: Cast, add_pair: AddPair, owner: str) -> None:
    assert cast(add_pair(owner), "a", after_s=-60.0).vote.decided_ms == 0


def test_a_comparison_can_be_voted_on_until_it_expires(cast: Cast, add_pair: AddPair, owner: str) -> None:
    comparison = add_pair(owner, expires_after_s=1000.0)
    with pytest.raises(ComparisonExpired):
        cast(comparison, "a", after_s=1001.0)
    assert cast(comparison, "a", after_s=900.0).vote.choice is Choice.A
    assert cast(comparison, "b", after_s=1001.0).vote.choice is Choice.B  # a change has its own window


def test_a_user_who_once_held_a_pair_as_a_rater_cannot_vote_as_less(
    db: Database, cast: Cast, add_pair: AddPair, owner: str, make_key: MakeKey
) -> None:
    comparison = add_pair(owner)
    rater = make_key(Role.RATER)[0].id
    with transaction(db):
        assert comparisons.next_for_rater(db, key_id=rater, lease_s=60.0) is not None
    with pytest.raises(UnknownComparison):
        cast(comparison, "a", key_id=rater, role=Role.USER)
    assert cast(comparison, "a", key_id=rater, role=Role.RATER).vote.key_id == rater


def test_the_vote_reveals_who_wrote_which(db: Database, cast: Cast, add_pair: AddPair, owner: str) -> None:
    db.execute(
        "INSERT INTO policies (name, path, sha256, base_model, status, created_at)"
        " VALUES ('policy-0001', 'policies/policy-0001', '', '', 'trial', '')"
    )
    comparison = add_pair(owner, policies=("policy-0001", "policy-0000"), kind=ComparisonKind.TRIAL)
    for choice in ("b", "a", "a"):
        revealed = cast(comparison, choice)
        assert (revealed.policy_a, revealed.policy_b) == ("policy-0001", "policy-0000")


# The queue


def give(db: Database, rater: str, *, lease_s: float = 60.0) -> str | None:
    with transaction(db):
        pair = comparisons.next_for_rater(db, key_id=rater, lease_s=lease_s)
    return pair.id if pair else None


def test_the_queue_is_oldest_first_whatever_the_order_of_insertion(
    db: Database, add_pair: AddPair, owner: str, make_key: MakeKey
) -> None:
    ages = [10.0, 30.0, 20.0]
    pairs = {age: add_pair(owner, age_s=age) for age in ages}
    raters = [make_key(Role.RATER)[0].id for _ in range(4)]
    assert [give(db, rater) for rater in raters] == [pairs[30.0], pairs[20.0], pairs[10.0], None]


def test_a_pair_whose_hold_is_over_goes_to_whoever_asks_next(
    db: Database, add_pair: AddPair, owner: str, make_key: MakeKey
) -> None:
    comparison = add_pair(owner)
    one, other = (make_key(Role.RATER)[0].id for _ in range(2))
    assert give(db, one, lease_s=-1.0) == comparison
    assert give(db, other) == comparison
    assert give(db, one) is None


def test_a_rater_holds_one_pair_at_a_time(db: Database, add_pair: AddPair, owner: str, make_key: MakeKey) -> None:
    for _ in range(3):
        add_pair(owner)
    rater = make_key(Role.RATER)[0].id
    assert len({give(db, rater) for _ in range(3)}) == 1
    assert db.execute("SELECT count(*) FROM holds").fetchone() == (1,)


def test_a_hold_that_is_over_stays_expired_whoever_holds_the_pair_now(
    db: Database, cast: Cast, add_pair: AddPair, owner: str, make_key: MakeKey
) -> None:
    comparison = add_pair(owner)
    late, other, never = (make_key(Role.RATER)[0].id for _ in range(3))
    assert give(db, late, lease_s=-1.0) == comparison
    with pytest.raises(ComparisonExpired):
        cast(comparison, "a", key_id=late, role=Role.RATER)
    assert give(db, other) == comparison
    with pytest.raises(ComparisonExpired):
        cast(comparison, "a", key_id=late, role=Role.RATER)
    with pytest.raises(UnknownComparison):
        cast(comparison, "a", key_id=never, role=Role.RATER)
    assert cast(comparison, "b", key_id=other, role=Role.RATER).vote.key_id == other
    with pytest.raises(ComparisonExpired):
        cast(comparison, "a", key_id=late, role=Role.RATER)


def test_a_rater_who_asks_again_after_their_hold_gets_a_new_one(
    db: Database, cast: Cast, add_pair: AddPair, owner: str, make_key: MakeKey
) -> None:
    comparison = add_pair(owner)
    rater = make_key(Role.RATER)[0].id
    assert give(db, rater, lease_s=-1.0) == comparison
    assert give(db, rater) == comparison
    assert cast(comparison, "a", key_id=rater, role=Role.RATER).vote.choice is Choice.A


def test_what_was_voted_on_or_forgotten_makes_the_queue_no_slower(
    db: Database, cast: Cast, add_pair: AddPair, make_key: MakeKey, owner: str, work: Work
) -> None:
    gone, rater = make_key()[0].id, make_key(Role.RATER)[0].id

    def draw() -> int:
        add_pair(owner)
        fresh = work(lambda: give(db, rater, lease_s=-1.0))
        db.execute("UPDATE holds SET until = '9999'")
        again = work(lambda: give(db, rater))
        db.execute("DELETE FROM holds")
        return fresh + again

    before = draw()
    for _ in range(100):
        cast(add_pair(owner, age_s=100.0), "a")
        add_pair(gone, age_s=50.0)
    with transaction(db):
        completions.forget_user(db, gone, actor="test")
    assert draw() < 2 * before


# What was shown lately


def test_a_user_who_was_shown_nothing_has_no_last_time(db: Database, owner: str) -> None:
    assert comparisons.shown_lately(db, owner, cap=20, cooldown=3) == (0, None)


def test_only_the_last_24_hours_count_as_today(db: Database, add_pair: AddPair, owner: str) -> None:
    for age_s in (60.0, 86_000.0, 87_000.0):
        add_pair(owner, age_s=age_s)
    counted = [comparisons.shown_lately(db, owner, cap=cap, cooldown=3)[0] for cap in (0, 1, 2, 3)]
    assert counted == [0, 1, 2, 2]


def test_turns_are_counted_up_to_the_cool_down(db: Database, add_pair: AddPair, owner: str) -> None:
    add_pair(owner, age_s=1000.0)
    turns = []
    for i in range(4):
        turns.append(comparisons.shown_lately(db, owner, cap=20, cooldown=2)[1])
        _answer(db, owner, f"cpl_{i}", status="complete")
        _answer(db, owner, f"cpl_{i}x", status="aborted")
    assert turns == [0, 1, 2, 2]


def test_what_a_clock_that_was_ahead_dated_holds_nothing_up(
    db: Database, add_pair: AddPair, owner: str, make_key: MakeKey
) -> None:
    ahead = add_pair(owner, age_s=-86_000.0)
    assert comparisons.shown_lately(db, owner, cap=20, cooldown=3) == (0, None)
    one, two = (make_key(Role.RATER)[0].id for _ in range(2))
    with transaction(db):
        assert comparisons.next_for_rater(db, key_id=one, lease_s=600.0) is not None
        assert comparisons.next_for_rater(db, key_id=two, lease_s=600.0) is None
        db.execute("UPDATE holds SET since = ?, until = ?", (timestamp(plus_s=86_000), timestamp(plus_s=86_600)))
        given = comparisons.next_for_rater(db, key_id=two, lease_s=600.0)
    assert given is not None
    assert given.id == ahead


def _answer(db: Database, key_id: str, id: str, *, status: str) -> None:
    db.execute(
        "INSERT INTO completions (id, key_id, user, conversation, messages, answer, policy, sampling, status, total_ms,"
        " created_at) VALUES (?, ?, ?, 'c', '[]', '', 'policy-0000', '{}', ?, 1.0, ?)",
        (id, key_id, key_id, status, timestamp()),
    )


def test_end_users_of_one_key_are_counted_apart(db: Database, add_pair: AddPair, owner: str) -> None:
    add_pair(owner, user=f"{owner}/ada")
    assert comparisons.shown_lately(db, f"{owner}/ada", cap=20, cooldown=3)[0] == 1
    assert comparisons.shown_lately(db, f"{owner}/bob", cap=20, cooldown=3) == (0, None)
    assert comparisons.shown_lately(db, owner, cap=20, cooldown=3) == (0, None)


def test_a_user_s_long_day_is_not_searched(db: Database, add_pair: AddPair, owner: str, work: Work) -> None:
    def look(user: str) -> int:
        return work(lambda: comparisons.shown_lately(db, user, cap=2, cooldown=3))

    def go_on(turns: range) -> list[int]:
        with transaction(db):
            for n in turns:
                _answer(db, owner, f"cpl_{n}", status="complete")
        return [look(user) for user in (owner, f"{owner}/ada", f"{owner}/eve")]

    add_pair(owner, user=f"{owner}/ada")
    for _ in range(3):
        add_pair(owner)
    before = go_on(range(10))
    for _ in range(50):
        add_pair(owner)
        add_pair(owner, user=f"{owner}/bob")
    assert max(go_on(range(10, 300))) < 2 * max(before)


# Lists and exports


def test_an_export_is_trl_s_conversational_preference_format(
    db: Database, cast: Cast, add_pair: AddPair, owner: str
) -> None:
    question = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße?"}]
    comparison = add_pair(owner, answers=("Left", "Right"), messages=question, user=f"{owner}/ada")
    vote = cast(comparison, "b").vote
    (record,) = comparisons.export_preferences(db)
    (conversation,) = {row["conversation"] for row in db.query("SELECT conversation FROM completions")}
    assert record == {
        "prompt": question,
        "chosen": [{"role": "assistant", "content": "Right"}],
        "rejected": [{"role": "assistant", "content": "Left"}],
        "choice": "b",
        "kind": "same_policy",
        "chosen_policy": "policy-0000",
        "rejected_policy": "policy-0000",
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
        "user": f"{owner}/ada",
        "conversation": conversation,
        "voter": owner,
        "vote": vote.id,
        "comparison": comparison,
        "voted_at": vote.updated_at,
    }


@pytest.mark.parametrize(
    ("choice", "chosen", "rejected"),
    [("a", "Left", "Right"), ("b", "Right", "Left"), ("tie", "Left", "Right"), ("both_bad", "Left", "Right")],
)
def test_the_chosen_answer_is_the_one_that_won(
    db: Database, cast: Cast, add_pair: AddPair, owner: str, choice: str, chosen: str, rejected: str
) -> None:
    cast(add_pair(owner, answers=("Left", "Right")), choice)
    (record,) = comparisons.export_preferences(db)
    assert record["choice"] == choice
    assert (record["chosen"][0]["content"], record["rejected"][0]["content"]) == (chosen, rejected)


def test_votes_are_exported_the_oldest_first_and_listed_the_latest_first(
    db: Database, cast: Cast, add_pair: AddPair, owner: str
) -> None:
    votes = []
    for _ in range(3):
        votes.append(cast(add_pair(owner), "a").vote.id)
        time.sleep(0.002)
    assert [record["vote"] for record in comparisons.export_preferences(db)] == votes
    assert [row["id"] for row in comparisons.list_votes(db)] == votes[::-1]
    assert [row["id"] for row in comparisons.list_votes(db, limit=1)] == votes[-1:]


def test_without_votes_nothing_is_exported(db: Database, add_pair: AddPair, owner: str) -> None:
    add_pair(owner)
    assert list(comparisons.export_preferences(db)) == []
    assert comparisons.list_votes(db) == []
