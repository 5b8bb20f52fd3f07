"""Which turns belong together, and the right to be forgotten."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlite_utils import Database

from data import comparisons, completions
from data.database import empty_wal, transaction
from data.settings import Settings
from data.types import Choice, Role, timestamp
from tests.conftest import AddPair, AddPolicy, MakeKey, Work

TEXT = st.text("abc é\n", max_size=5)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT})


@given(st.lists(TURN, max_size=3), TEXT, st.lists(TURN, max_size=4))
def test_a_conversation_is_the_same_on_every_turn(
    system: list[dict[str, Any]], question: str, later: list[dict[str, Any]]
) -> None:
    opening = [*system, {"role": "user", "content": question}]
    digest = completions.conversation_of("key_1", opening)
    assert completions.conversation_of("key_1", opening + later) == digest
    assert completions.conversation_of("key_2", opening) != digest
    assert completions.conversation_of("key_1", [{"role": "system", "content": "x"}, *opening]) != digest


def test_content_in_parts_is_told_apart(settings: Settings) -> None:
    def digest(text: str) -> str:
        return completions.conversation_of("k", [{"role": "user", "content": [{"type": "text", "text": text}]}])

    assert digest("one") == digest("one")
    assert digest("one") != digest("two")


# How answers ended


def test_only_the_answers_that_are_counted_are_read(
    db: Database, add_pair: AddPair, add_policy: AddPolicy, make_key: MakeKey, work: Work
) -> None:
    owner, new = make_key()[0].id, add_policy()

    def look() -> int:
        now = timestamp(plus_s=1.0)
        return work(lambda: completions.outcomes(db, "policy-0000", most_tokens=512, until=now, limit=4)) + work(
            lambda: completions.outcomes(db, new, most_tokens=512, since=timestamp(plus_s=-3600.0), limit=4)
        )

    for policy in ("policy-0000", new):
        for _ in range(3):
            add_pair(owner, policies=(policy, policy))
    before = look()
    for policy in (new, "policy-0000", new):
        for _ in range(30):
            add_pair(owner, policies=(policy, policy))
    for _ in range(30):
        add_pair(owner, policies=(new, new))
    assert look() < 1.5 * before


# Forgetting


@pytest.fixture
def everything(db: Database) -> Any:
    """All text that the record holds."""

    def dump() -> str:
        tables = ("completions", "comparisons", "votes", "vote_history", "audit")
        return json.dumps([list(db.query(f"SELECT * FROM {table}")) for table in tables])

    return dump


def vote(db: Database, comparison: str, key_id: str, choice: str, comment: str, role: Role = Role.USER) -> None:
    with transaction(db):
        comparisons.vote(
            db, comparison, key_id=key_id, role=role, choice=Choice(choice), comment=comment, window_s=600.0
        )


def forget(db: Database, user: str) -> int:
    with transaction(db):
        return completions.forget_user(db, user, actor="cli")


def test_a_forgotten_user_s_words_are_nowhere_in_the_record(
    db: Database, add_pair: AddPair, make_key: MakeKey, everything: Any
) -> None:
    mine = make_key()[0].id
    rater = make_key(Role.RATER)[0].id
    comparison = add_pair(mine, answers=("SECRET one", "SECRET two"), messages=[{"role": "user", "content": "SECRET"}])
    vote(db, comparison, mine, "a", "SECRET because")
    vote(db, comparison, mine, "b", "SECRET after all")
    with transaction(db):
        comparisons.next_for_rater(db, key_id=rater, lease_s=60.0)
    assert "SECRET" in everything()
    assert forget(db, mine) == 4
    assert "SECRET" not in everything()


def test_a_forgotten_end_user_s_name_is_nowhere_in_the_record(
    db: Database, add_pair: AddPair, make_key: MakeKey, everything: Any
) -> None:
    key = make_key()[0].id
    question = [{"role": "user", "content": "I am Ada"}]
    for name in ("Ada", "Bob"):
        add_pair(key, user=f"{key}/{name}", messages=question)
    guess = completions.conversation_of(f"{key}/Ada", question)
    assert guess in everything()
    forget(db, f"{key}/Ada")
    assert "Ada" not in everything().replace("I am Ada", "", 2), "Bob's two answers still begin with it"
    assert guess not in everything()
    assert completions.conversation_of(f"{key}/Bob", question) in everything()
    forget(db, key)
    assert not any(word in everything() for word in ("Ada", "Bob"))


def test_a_rater_s_hold_on_a_forgotten_pair_ends(db: Database, add_pair: AddPair, make_key: MakeKey) -> None:
    mine, rater = make_key()[0].id, make_key(Role.RATER)[0].id
    comparison = add_pair(mine)
    with transaction(db):
        comparisons.next_for_rater(db, key_id=rater, lease_s=60.0)
    forget(db, mine)
    with pytest.raises(comparisons.ComparisonExpired):
        vote(db, comparison, rater, "a", "quotes SECRET", Role.RATER)


def test_a_forgotten_user_s_words_are_in_no_file_of_the_record(
    db: Database, settings: Settings, add_pair: AddPair, make_key: MakeKey
) -> None:
    mine, other = make_key()[0].id, make_key()[0].id
    for size in (1, 100, 1000):
        for key_id, word in ((mine, "SECRET "), (other, "public ")):
            question = [{"role": "user", "content": word * size}]
            comparison = add_pair(key_id, answers=(word * size, word * (size + 1)), messages=question)
            vote(db, comparison, key_id, "a", word)
            vote(db, comparison, key_id, "b", word)
    forget(db, mine)
    assert empty_wal(db)
    files = [path.read_bytes() for path in settings.state.glob("nightshift.db*")]
    assert not any(b"SECRET" in content for content in files)
    assert any(b"public" in content for content in files)


def test_a_rater_s_comment_on_a_forgotten_user_s_pair_is_forgotten_too(
    db: Database, add_pair: AddPair, make_key: MakeKey, everything: Any
) -> None:
    mine, rater = make_key()[0].id, make_key(Role.RATER)[0].id
    comparison = add_pair(mine)
    with transaction(db):
        comparisons.next_for_rater(db, key_id=rater, lease_s=60.0)
    vote(db, comparison, rater, "a", "quotes SECRET", Role.RATER)
    forget(db, mine)
    assert "SECRET" not in everything()


def test_a_forgotten_rater_s_comments_are_forgotten_and_the_votes_stay(
    db: Database, add_pair: AddPair, make_key: MakeKey, everything: Any
) -> None:
    owner, rater = make_key()[0].id, make_key(Role.RATER)[0].id
    comparison = add_pair(owner, answers=("One", "Two"))
    with transaction(db):
        comparisons.next_for_rater(db, key_id=rater, lease_s=60.0)
    vote(db, comparison, rater, "a", "SECRET", Role.RATER)
    vote(db, comparison, rater, "b", "SECRET too", Role.RATER)
    forget(db, rater)
    assert "SECRET" not in everything()
    assert [row["choice"] for row in db.query("SELECT choice FROM votes")] == ["b"]
    assert {row["answer"] for row in db.query("SELECT answer FROM completions")} == {"One", "Two"}


def test_what_is_forgotten_keeps_its_rows_and_is_never_exported(
    db: Database, add_pair: AddPair, make_key: MakeKey
) -> None:
    mine, other = make_key()[0].id, make_key()[0].id
    for key_id in (mine, other):
        vote(db, add_pair(key_id), key_id, "a", "")
    forget(db, mine)
    assert db.execute("SELECT count(*) FROM completions").fetchone() == (4,)
    assert db.execute("SELECT count(*) FROM votes").fetchone() == (2,)
    assert [record["user"] for record in comparisons.export_preferences(db)] == [other]


def test_a_key_takes_its_end_users_along_and_no_one_else(db: Database, add_pair: AddPair, make_key: MakeKey) -> None:
    mine, other = make_key()[0].id, make_key()[0].id
    for user in (mine, f"{mine}/ada", f"{mine}/bob", other, f"{other}/{mine}"):
        add_pair(user.partition("/")[0], user=user)
    assert forget(db, f"{mine}/ada") == 2
    assert forget(db, mine) == 4
    kept = {row["user"] for row in db.query("SELECT user FROM completions WHERE messages <> '[]'")}
    assert kept == {other, f"{other}/{mine}"}


@pytest.mark.parametrize("user", ["%", "_", "key_%", "", "'; DROP TABLE votes; --"])
def test_a_pattern_is_no_user(db: Database, add_pair: AddPair, make_key: MakeKey, user: str) -> None:
    add_pair(make_key()[0].id)
    assert forget(db, user) == 0


def test_forgetting_twice_empties_nothing_more(db: Database, add_pair: AddPair, make_key: MakeKey) -> None:
    mine = make_key()[0].id
    add_pair(mine)
    assert forget(db, mine) == 2
    assert forget(db, mine) == 0


def test_forgetting_is_audited(db: Database, add_pair: AddPair, make_key: MakeKey) -> None:
    mine = make_key()[0].id
    add_pair(mine)
    forget(db, mine)
    (last,) = db.query("SELECT actor, action, subject FROM audit ORDER BY id DESC LIMIT 1")
    assert last == {"actor": "cli", "action": "user.forget", "subject": mine}
