"""Questions with a known answer: like any other pair to the rater, and no vote to anybody else."""

import json
import random
from datetime import UTC, datetime, timedelta

import pytest
from sqlite_utils import Database

from data import comparisons, completions, gold, raters, trusted
from data.database import transaction
from data.stats import summary
from data.types import Choice, Role
from tests.conftest import AddPair, MakeKey


@pytest.fixture
def rater(db: Database, make_key: MakeKey) -> str:
    """A rater's key, in a record with three trusted pairs."""
    lines = [json.dumps({"prompt": f"{n} + 1?", "chosen": f"{n + 1}", "rejected": f"{n + 2}"}) for n in range(3)]
    with transaction(db):
        trusted.import_lines(db, lines, actor="test")
    return make_key(Role.RATER)[0].id


def ask(db: Database, rater: str, *, seed: int = 0, lease_s: float = 60.0) -> comparisons.QueuedPair | None:
    with transaction(db):
        return gold.ask(db, rater, lease_s=lease_s, rng=random.Random(seed))


def vote(db: Database, rater: str, id: str, choice: str, *, after_s: float = 0.0, **more: str) -> comparisons.CastVote:
    now = datetime.now(UTC) + timedelta(seconds=after_s)
    with transaction(db):
        return gold.vote(
            db, id, key_id=rater, choice=Choice(choice), comment=more.get("comment"), window_s=600.0, now=now
        )


def right_side(pair: comparisons.QueuedPair) -> str:
    first_is_right = int(pair.answer_a) == int(pair.messages[0]["content"].split()[0]) + 1
    return "a" if first_is_right else "b"


def test_each_trusted_pair_is_asked_once_on_either_side(db: Database, rater: str, make_key: MakeKey) -> None:
    asked = [ask(db, rater, seed=seed) for seed in range(4)]
    assert asked[3] is None
    assert {pair.messages[0]["content"] for pair in asked if pair} == {"0 + 1?", "1 + 1?", "2 + 1?"}
    sides = set()
    for seed in range(10):
        pair = ask(db, make_key(Role.RATER)[0].id, seed=seed)
        assert pair is not None
        sides.add(right_side(pair))
    assert sides == {"a", "b"}


def test_a_question_stays_open_until_it_is_answered_passed_or_its_hold_is_over(db: Database, rater: str) -> None:
    pair = ask(db, rater)
    assert pair is not None
    assert gold.open_question(db, rater) == pair
    vote(db, rater, pair.id, "a")
    assert gold.open_question(db, rater) is None
    second = ask(db, rater)
    assert second is not None
    with transaction(db):
        comparisons.pass_over(db, second.id, key_id=rater)
    assert gold.open_question(db, rater) is None
    late = ask(db, rater, lease_s=0.0)
    assert late is not None
    assert gold.open_question(db, rater) is None
    with pytest.raises(comparisons.ComparisonExpired):
        vote(db, rater, late.id, "a", after_s=1.0)


def test_a_vote_on_it_can_be_repeated_and_changed_within_the_window(db: Database, rater: str) -> None:
    pair = ask(db, rater)
    assert pair is not None
    first = vote(db, rater, pair.id, "a", comment="clear").vote
    assert vote(db, rater, pair.id, "a").vote == first
    changed = vote(db, rater, pair.id, "tie", after_s=10.0).vote
    assert (changed.id, changed.choice, changed.decided_ms, changed.created_at) == (
        *(first.id, "tie", first.decided_ms, first.created_at),
    )
    assert vote(db, rater, pair.id, "tie", after_s=700.0).vote == changed
    with pytest.raises(comparisons.VoteIsFinal):
        vote(db, rater, pair.id, "b", after_s=700.0)


def test_nobody_else_can_vote_on_it(db: Database, rater: str, make_key: MakeKey) -> None:
    pair = ask(db, rater)
    assert pair is not None
    with pytest.raises(comparisons.UnknownComparison):
        vote(db, make_key(Role.OPERATOR)[0].id, pair.id, "a")


def test_it_measures_the_rater_and_is_no_vote(db: Database, rater: str, add_pair: AddPair) -> None:
    for seed, right in enumerate([True, False, None]):
        pair = ask(db, rater, seed=seed)
        assert pair is not None
        side = right_side(pair)
        vote(db, rater, pair.id, side if right else "tie" if right is None else {"a": "b", "b": "a"}[side])
    (row,) = raters.standing(db)
    assert (row["key"], row["votes"], row["gold"], row["gold_right"]) == (rater, 0, 3, 1)
    assert raters.gold_answers(db) == {rater: (2, 1)}, "a tie says nothing of a rater"
    assert comparisons.count_votes(db, rater, since="2020") == 3
    assert comparisons.count_votes(db, rater, since="2999") == 0
    assert list(comparisons.export_preferences(db)) == []
    assert summary(db)["votes"] == {}


def test_its_comment_is_forgotten_with_the_rater(db: Database, rater: str) -> None:
    pair = ask(db, rater)
    assert pair is not None
    vote(db, rater, pair.id, "a", comment="I live in Rome")
    with transaction(db):
        assert completions.forget_user(db, rater, actor="test") == 1
    assert db.execute("SELECT comment FROM gold_questions").fetchall() == [(None,)]


# Passing over an ordinary pair


def test_a_pair_that_was_passed_goes_to_others_and_not_to_the_same_rater(
    db: Database, add_pair: AddPair, make_key: MakeKey
) -> None:
    pair = add_pair(make_key()[0].id)
    one, other = make_key(Role.RATER)[0].id, make_key(Role.RATER)[0].id

    def drawn(rater: str) -> str | None:
        with transaction(db):
            queued = comparisons.next_for_rater(db, key_id=rater, lease_s=60.0)
        return None if queued is None else queued.id

    assert drawn(one) == pair
    assert comparisons.holds_one(db, one)
    with transaction(db):
        comparisons.pass_over(db, pair, key_id=one)
    assert not comparisons.holds_one(db, one)
    assert drawn(one) is None
    assert drawn(other) == pair
    stranger = make_key()[0].id
    with pytest.raises(comparisons.UnknownComparison), transaction(db):
        comparisons.pass_over(db, pair, key_id=stranger)
