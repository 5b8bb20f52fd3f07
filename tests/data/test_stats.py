import random
from datetime import UTC, datetime, timedelta

import pytest
from sqlite_utils import Database

from data import audit, comparisons, completions, duels, gold, learning, runs, stats, trusted
from data.database import transaction
from data.learning import RewardModelRow
from data.types import BASE_POLICY, Choice, ComparisonKind, DuelKind, DuelStatus, Role, RunStatus, timestamp
from service import trial
from tests.conftest import AddPair, AddPolicy, MakeKey

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def vote(
    db: Database, comparison: str, key_id: str, choice: str, *, role: Role = Role.USER, now: datetime | None = None
) -> None:
    with transaction(db):
        comparisons.vote(
            db, comparison, key_id=key_id, role=role, choice=Choice(choice), comment=None, window_s=600.0, now=now
        )


def vote_as_rater(db: Database, comparison: str, rater: str, choice: str) -> None:
    """The vote of somebody whom the queue gave the pair, after its owner had voted."""
    with transaction(db):
        db.execute("INSERT INTO holds VALUES (?, ?, ?, ?, NULL)", (comparison, rater, timestamp(), timestamp(plus_s=9)))
    vote(db, comparison, rater, choice, role=Role.RATER)


def test_an_empty_record_has_no_share(db: Database) -> None:
    figures = stats.summary(db)
    assert figures["completions"] == figures["comparisons"] == figures["votes"] == {}
    assert figures["first_share"] is None
    assert figures["serving"] is None
    nothing = {"count": 0, "total": 0, "share": None, "low": 0.0, "high": 1.0}
    assert stats.agreement(db) == stats.first_share(stats.choices(db)) == stats.gold_answers(db) == nothing
    assert stats.votes_since_last_run(db) == 0
    assert stats.reward_reports(db, limit=5) == []
    assert stats.thinned_curve(db, "duel_none", points=5) == []


def test_the_share_of_the_first_is_of_the_decisive_votes(db: Database, add_pair: AddPair, make_key: MakeKey) -> None:
    key_id = make_key()[0].id
    for choice in ("a", "a", "a", "b", "tie", "both_bad"):
        vote(db, add_pair(key_id), key_id, choice)
    figures = stats.summary(db)
    assert figures["completions"] == {"complete": 12}
    assert figures["comparisons"] == {"same_policy": 6}
    assert figures["votes"] == {"a": 3, "b": 1, "tie": 1, "both_bad": 1}
    assert figures["first_share"] == 0.75
    share = stats.first_share(stats.choices(db))
    assert (share["count"], share["total"], share["share"]) == (3, 4, 0.75)
    assert share["low"] < 0.5 < share["high"]


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # R: prop.test(count, total, correct = FALSE)
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (550, 1000, 0.5190, 0.5806)],
)
def test_the_interval_is_wilsons(count: int, total: int, low: float, high: float) -> None:
    assert stats.wilson(count, total) == pytest.approx((low, high), abs=1e-4)


def test_votes_are_counted_by_day_and_a_day_without_any_is_there(
    db: Database, add_pair: AddPair, make_key: MakeKey
) -> None:
    key_id = make_key()[0].id
    for days_ago, choice in ((0, "a"), (0, "tie"), (2, "b"), (9, "a")):
        at = NOON - timedelta(days=days_ago)
        age_s = (datetime.now(UTC) - at).total_seconds()
        vote(db, add_pair(key_id, age_s=age_s, expires_after_s=60.0), key_id, choice, now=at)
    assert stats.votes_by_day(db, days=3, now=NOON) == [
        {"day": "2026-11-20", "votes": 1, "decisive": 1},
        {"day": "2026-11-21", "votes": 0, "decisive": 0},
        {"day": "2026-11-22", "votes": 2, "decisive": 1},
    ]


def test_raters_agree_where_two_prefer_the_same_answer(db: Database, add_pair: AddPair, make_key: MakeKey) -> None:
    owner, rater = make_key()[0].id, make_key(Role.RATER)[0].id
    for first, second in (("a", "a"), ("b", "b"), ("a", "b"), ("tie", "a")):
        comparison = add_pair(owner)
        vote(db, comparison, owner, first)
        vote_as_rater(db, comparison, rater, second)
    vote(db, add_pair(owner), owner, "a")
    figures = stats.agreement(db)
    assert (figures["count"], figures["total"]) == (2, 3)


def test_agreement_leaves_out_pairs_that_were_chosen_for_being_hard(
    db: Database, add_pair: AddPair, make_key: MakeKey
) -> None:
    owner, rater = make_key()[0].id, make_key(Role.RATER)[0].id
    for kind in ComparisonKind:
        comparison = add_pair(owner, kind=kind)
        vote(db, comparison, owner, "a")
        vote_as_rater(db, comparison, rater, "b" if kind is ComparisonKind.ACTIVE else "a")
    figures = stats.agreement(db)
    assert (figures["count"], figures["total"]) == (len(ComparisonKind) - 1, len(ComparisonKind) - 1)


def test_gold_answers_are_counted_once_given(db: Database, make_key: MakeKey) -> None:
    rater = make_key(Role.RATER)[0].id
    with transaction(db):
        for n in range(3):
            db.execute(
                "INSERT INTO trusted_pairs VALUES (?, ?, ?, ?, ?, ?)",
                (f"tp_{n}", str(n), f'[{{"role": "user", "content": "{n}"}}]', "Paris", "Rome", timestamp()),
            )
    assert len(trusted.list_pairs(db)) == 3
    for right in (True, False, None):
        with transaction(db):
            question = gold.ask(db, rater, lease_s=60.0, rng=random.Random(0))
            assert question is not None
            if right is not None:
                choice = Choice.A if (question.answer_a == "Paris") == right else Choice.B
                gold.vote(db, question.id, key_id=rater, choice=choice, comment=None, window_s=60.0)
    figures = stats.gold_answers(db)
    assert (figures["count"], figures["total"]) == (1, 2)


def test_votes_count_as_new_from_the_start_of_the_last_run_that_succeeded(
    db: Database, add_pair: AddPair, make_key: MakeKey
) -> None:
    key_id = make_key()[0].id
    for status, later_s in ((RunStatus.SUCCEEDED, -1), (RunStatus.FAILED, 1)):
        vote(db, add_pair(key_id), key_id, "a", now=datetime.now(UTC) + timedelta(seconds=later_s))
        with transaction(db):
            runs.request(db, requested_by="test", config={})
            run = runs.claim(db)
            assert run is not None
            runs.finish(db, run.id, status)
    assert stats.votes_since_last_run(db) == 1


def test_reward_reports_are_the_latest_with_the_earliest_first(db: Database) -> None:
    made = []
    for accuracy in (0.6, 0.7, 0.8):
        with transaction(db):
            runs.request(db, requested_by="test", config={})
            run = runs.claim(db)
            assert run is not None
            runs.finish(db, run.id, RunStatus.SUCCEEDED)
            row = RewardModelRow(f"rm_{accuracy}", run.id, f"reward_models/{accuracy}", "0", {"accuracy": accuracy})
            learning.insert_reward_model(db, row)
            made.append(run.id)
    found = stats.reward_reports(db, limit=2)
    assert [(report["run"], report["accuracy"]) for report in found] == [(made[1], 0.7), (made[2], 0.8)]


def begin_trial(db: Database, challenger: str) -> str:
    with transaction(db):
        return duels.begin(
            db, DuelKind.TRIAL, challenger=challenger, incumbent=BASE_POLICY, threshold=20.0, budget=2000
        ).id


def judge(duel: object, wins: int, losses: int, ties: int) -> tuple[trial.Standing, DuelStatus]:
    return trial.standing(wins, losses, ties, alpha=0.05), DuelStatus.RUNNING


def test_a_curve_is_thinned_and_keeps_its_end(
    db: Database, add_pair: AddPair, add_policy: AddPolicy, make_key: MakeKey
) -> None:
    key_id, name = make_key()[0].id, add_policy()
    duel = begin_trial(db, name)
    for _ in range(11):
        comparison = add_pair(key_id, policies=(name, BASE_POLICY), duel_id=duel)
        vote(db, comparison, key_id, "a")
        with transaction(db):
            duels.record_vote(db, comparison, judge)
    assert [point["votes"] for point in stats.thinned_curve(db, duel, points=100)] == list(range(1, 12))
    thinned = stats.thinned_curve(db, duel, points=5)
    assert [point["votes"] for point in thinned] == [2, 4, 6, 8, 10, 11]
    assert thinned[-1]["e_value"] == duels.get(db, duel).e_value


def test_pairs_of_a_policy_say_who_wrote_what_and_what_people_preferred(
    db: Database, add_pair: AddPair, add_policy: AddPolicy, make_key: MakeKey
) -> None:
    owner, name = make_key()[0].id, add_policy()
    duel = begin_trial(db, name)
    shown_first = add_pair(owner, answers=("new", "old"), policies=(name, BASE_POLICY), duel_id=duel)
    shown_second = add_pair(owner, answers=("old", "new"), policies=(BASE_POLICY, name), duel_id=duel)
    add_pair(owner, answers=("other", "another"))
    vote(db, shown_first, owner, "a")
    vote(db, shown_second, owner, "a")
    vote_as_rater(db, shown_second, make_key(Role.RATER)[0].id, "tie")

    pairs = {pair["comparison"]: pair for pair in stats.duel_pairs(db, name, limit=20)}
    assert pairs.keys() == {shown_first, shown_second}
    for pair in pairs.values():
        assert (pair["answer"], pair["against"], pair["against_answer"]) == ("new", BASE_POLICY, "old")
        assert pair["messages"] == [{"role": "user", "content": "Hello"}]
    assert pairs[shown_first]["votes"] == {"policy": 1, "against": 0, "tie": 0, "both_bad": 0}
    assert pairs[shown_second]["votes"] == {"policy": 0, "against": 1, "tie": 1, "both_bad": 0}

    (of_the_base, _) = stats.duel_pairs(db, BASE_POLICY, limit=20)
    assert (of_the_base["answer"], of_the_base["against"]) == ("old", name)
    assert len(stats.duel_pairs(db, name, limit=1)) == 1


def test_pairs_of_a_forgotten_user_are_not_shown(
    db: Database, add_pair: AddPair, add_policy: AddPolicy, make_key: MakeKey
) -> None:
    owner, name = make_key()[0].id, add_policy()
    add_pair(owner, policies=(name, BASE_POLICY), duel_id=begin_trial(db, name))
    assert len(stats.duel_pairs(db, name, limit=20)) == 1
    with transaction(db):
        completions.forget_user(db, owner, actor="test")
    assert stats.duel_pairs(db, name, limit=20) == []


def test_the_latest_acts_come_first(db: Database) -> None:
    with transaction(db):
        for action in ("run.request", "run.cancel"):
            audit.record(db, actor="cli", action=action, subject="run_1")
    (act,) = audit.latest(db, limit=1)
    assert (act["actor"], act["action"], act["subject"]) == ("cli", "run.cancel", "run_1")
