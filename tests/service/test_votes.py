"""POST /v1/comparisons/{id}/vote, and the raters' queue, over the wire."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest
from sqlite_utils import Database

from data import trusted
from data.database import transaction
from data.types import Role
from tests.conftest import FakeEngine, House, MakeKey, OpenHouse, say


@pytest.fixture
async def house(open_house: OpenHouse, engine: FakeEngine) -> House:
    engine.answer = lambda body: say("seed ", str(body.get("seed")))
    return await open_house(engine)


async def pair(house: House, *, role: Role = Role.USER, **parameters: Any) -> str:
    answer = await house.chat(role=role, feedback="always", **parameters)
    comparison: str = answer.json["comparison"]["id"]
    return comparison


@pytest.mark.parametrize("choice", ["a", "b", "tie", "both_bad"])
async def test_a_vote_is_kept_and_reveals_who_wrote_which(house: House, choice: str) -> None:
    comparison = await pair(house)
    answer = await house.vote(comparison, choice, comment="shorter")
    assert answer.status == 200
    (row,) = await house.rows("votes")
    assert answer.json == {
        "id": row["id"],
        "comparison": comparison,
        "choice": choice,
        "comment": "shorter",
        "policies": {"a": "policy-0000", "b": "policy-0000"},
        "created_at": row["created_at"],
        "updated_at": row["updated_at"],
    }
    assert row["id"].startswith("vote_")
    assert (row["comparison_id"], row["key_id"]) == (comparison, house.keys[Role.USER].id)
    assert (row["choice"], row["comment"]) == (choice, "shorter")
    assert 0 <= row["decided_ms"] < 60_000


async def test_when_a_vote_is_acknowledged_another_process_sees_it(house: House) -> None:
    comparison = await pair(house)
    await house.vote(comparison, "b")
    look = (
        "import sys; from pathlib import Path; from data.database import connect\n"
        "print(connect(Path(sys.argv[1])).execute('SELECT comparison_id, choice FROM votes').fetchall())"
    )
    seen = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", look, str(house.settings.database)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert seen.stdout.strip() == str([(comparison, "b")])


async def test_the_same_vote_again_changes_nothing(house: House) -> None:
    comparison = await pair(house)
    first = await house.vote(comparison, "a", comment="nice")
    again = await house.vote(comparison, "a")
    assert again.status == 200
    assert again.json == first.json
    assert len(await house.rows("votes")) == 1
    assert await house.rows("vote_history") == []


async def test_the_same_choice_with_another_comment_keeps_the_new_one(house: House) -> None:
    comparison = await pair(house)
    first = (await house.vote(comparison, "a", comment="nice")).json
    again = await house.vote(comparison, "a", comment="nice, and shorter")
    assert (again.status, again.json["id"], again.json["comment"]) == (200, first["id"], "nice, and shorter")
    (row,) = await house.rows("votes")
    assert (row["choice"], row["comment"]) == ("a", "nice, and shorter")
    (history,) = await house.rows("vote_history")
    assert (history["choice"], history["comment"]) == ("a", "nice")


async def test_a_vote_can_be_changed_and_the_earlier_stays_in_the_history(house: House) -> None:
    comparison = await pair(house)
    first = (await house.vote(comparison, "a", comment="nice")).json
    await asyncio.sleep(0.002)
    changed = await house.vote(comparison, "tie")
    assert changed.status == 200
    assert (changed.json["id"], changed.json["choice"], changed.json["comment"]) == (first["id"], "tie", None)
    assert changed.json["created_at"] == first["created_at"]
    assert changed.json["updated_at"] > first["updated_at"]
    (row,) = await house.rows("votes")
    assert row["choice"] == "tie"
    (history,) = await house.rows("vote_history")
    assert (history["vote_id"], history["choice"], history["comment"]) == (first["id"], "a", "nice")
    assert (history["cast_at"], history["replaced_at"]) == (first["updated_at"], changed.json["updated_at"])


async def test_another_user_s_comparison_is_404_whatever_their_role(house: House, make_key: MakeKey) -> None:
    comparison = await pair(house)
    _, other = make_key()
    body = {"choice": "a"}
    answers = [
        await house.call("POST", f"/v1/comparisons/{comparison}/vote", json=body, token=other),
        await house.vote(comparison, "a", role=Role.RATER),
        await house.vote(comparison, "a", role=Role.OPERATOR),
        await house.vote("cmp_unknown", "a"),
    ]
    for answer in answers:
        assert answer.status == 404
        assert answer.json["error"]["code"] == "unknown_comparison"
    assert await house.rows("votes") == []


async def test_a_repeated_vote_is_still_acknowledged_after_the_window_and_the_expiry(
    open_house: OpenHouse, engine: FakeEngine
) -> None:
    engine.answer = lambda body: say(str(body["seed"]))
    house = await open_house(engine, comparisons={"vote_window_s": 0.0})
    comparison = await pair(house)
    await house.vote(comparison, "a")
    await house.state.write(lambda db: db.execute("UPDATE comparisons SET expires_at = created_at"))
    await asyncio.sleep(0.003)
    assert (await house.vote(comparison, "a")).status == 200
    assert (await house.vote(comparison, "b")).status == 409


async def test_votes_of_many_clients_at_once_all_land(house: House, make_key: MakeKey) -> None:
    tokens = [make_key()[1] for _ in range(8)]
    choices = ["a", "b", "tie", "both_bad"]

    async def one(i: int) -> None:
        token = tokens[i % len(tokens)]
        answer = await house.chat(feedback="always", token=token)
        url = f"/v1/comparisons/{answer.json['comparison']['id']}/vote"
        vote = await house.call("POST", url, token=token, json={"choice": choices[i % 4]})
        assert vote.status == 200

    await asyncio.gather(*(one(i) for i in range(60)))
    rows = await house.rows("votes")
    assert {choice: sum(row["choice"] == choice for row in rows) for choice in choices} == dict.fromkeys(choices, 15)


async def test_one_vote_sent_many_times_at_once_is_one_vote(house: House) -> None:
    comparison = await pair(house)
    answers = await asyncio.gather(*(house.vote(comparison, "a") for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert len(await house.rows("votes")) == 1


async def test_votes_are_counted_in_the_metrics(house: House) -> None:
    await house.vote(await pair(house), "a")
    metrics = (await house.call("GET", "/metrics", role=None)).body.decode()
    assert 'nightshift_votes_total{choice="a"} 1.0' in metrics
    assert "nightshift_comparisons_total 1.0" in metrics


# The queue


async def next_pair(house: House, token: str | None = None, role: Role = Role.RATER) -> Any:
    """What the queue gives; None where it is empty."""
    answer = await house.call("GET", "/v1/comparisons/next", role=role, token=token)
    if answer.status == 204:
        assert answer.body == b""
        return None
    assert answer.status == 200
    return answer.json


async def test_an_empty_queue_is_204(house: House) -> None:
    assert await next_pair(house) is None
    await house.chat()
    assert await next_pair(house) is None


async def test_the_queue_gives_a_pair_without_a_word_of_who_wrote_it(house: House) -> None:
    question = [{"role": "user", "content": "Which way?"}]
    comparison = await pair(house, messages=question)
    given = await next_pair(house)
    (row,) = await house.rows("comparisons")
    answers = {completion["id"]: completion["answer"] for completion in await house.rows("completions")}
    (hold,) = await house.rows("holds")
    assert given == {
        "id": comparison,
        "messages": question,
        "answers": {"a": answers[row["a"]], "b": answers[row["b"]]},
        "expires_at": hold["until"],
    }


async def test_the_oldest_pair_comes_first_and_is_held_for_one_rater(house: House, make_key: MakeKey) -> None:
    first = await pair(house)
    await asyncio.sleep(0.002)
    second = await pair(house)
    _, other = make_key(Role.RATER)
    _, third = make_key(Role.RATER)
    assert (await next_pair(house))["id"] == first
    assert (await next_pair(house))["id"] == first
    assert (await next_pair(house, other))["id"] == second
    assert await next_pair(house, third) is None


async def test_a_rater_never_gets_a_pair_of_their_own(house: House) -> None:
    await pair(house, role=Role.RATER)
    assert await next_pair(house) is None
    theirs = await pair(house)
    assert (await next_pair(house))["id"] == theirs


async def test_a_gold_question_comes_before_a_pair_and_holds_none(
    open_house: OpenHouse, engine: FakeEngine, db: Database, make_key: MakeKey
) -> None:
    engine.answer = lambda body: say("seed ", str(body.get("seed")))
    house = await open_house(engine, comparisons={"gold_rate": 1.0})
    with transaction(db):
        trusted.import_lines(db, [json.dumps({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"})], actor="test")
    assert await next_pair(house) is None, "a question without a pair behind it would tell what it is"
    comparison = await pair(house)
    question = await next_pair(house)
    assert {question["answers"]["a"], question["answers"]["b"]} == {"2", "3"}
    assert await next_pair(house) == question
    assert await house.rows("holds") == [], "the pair is not the rater's yet"
    answered = (await house.vote(question["id"], "a", role=Role.RATER)).json["created_at"]
    assert (await next_pair(house))["id"] == comparison
    with transaction(db):
        trusted.import_lines(db, [json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})], actor="test")
    assert (await next_pair(house))["id"] == comparison, "nothing comes between a rater and the pair that they hold"
    (hold,) = await house.rows("holds")
    assert hold["since"] >= answered


async def test_an_operator_may_rate_too(house: House) -> None:
    comparison = await pair(house)
    assert (await next_pair(house, role=Role.OPERATOR))["id"] == comparison
    assert (await house.vote(comparison, "a", role=Role.OPERATOR)).status == 200


async def test_a_rater_s_vote_counts_and_moves_the_queue_on(house: House, db: Database) -> None:
    first = await pair(house)
    await asyncio.sleep(0.002)
    second = await pair(house)
    assert (await next_pair(house))["id"] == first
    vote = await house.vote(first, "b", role=Role.RATER)
    assert vote.status == 200
    assert vote.json["policies"] == {"a": "policy-0000", "b": "policy-0000"}
    assert (await next_pair(house))["id"] == second
    (row,) = db.query("SELECT key_id, choice, decided_ms FROM votes")
    assert (row["key_id"], row["choice"]) == (house.keys[Role.RATER].id, "b")


async def test_a_rater_decides_from_when_the_queue_gave_the_pair(house: House) -> None:
    comparison = await pair(house)
    an_hour_ago = "UPDATE comparisons SET created_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 hour')"
    await house.state.write(lambda db: db.execute(an_hour_ago))
    await next_pair(house)
    await house.vote(comparison, "a", role=Role.RATER)
    await house.vote(comparison, "a")
    rater, owner = (row["decided_ms"] for row in await house.rows("votes"))
    assert rater < 60_000
    assert owner >= 3_600_000


async def test_owner_and_rater_may_both_vote(house: House) -> None:
    comparison = await pair(house)
    await next_pair(house)
    assert (await house.vote(comparison, "a", role=Role.RATER)).status == 200
    assert (await house.vote(comparison, "b")).status == 200
    assert {row["choice"] for row in await house.rows("votes")} == {"a", "b"}


async def test_what_its_owner_voted_on_is_not_in_the_queue(house: House) -> None:
    await house.vote(await pair(house), "a")
    assert await next_pair(house) is None


async def test_a_rater_votes_on_what_expired_for_its_owner(house: House) -> None:
    comparison = await pair(house)
    await house.state.write(lambda db: db.execute("UPDATE comparisons SET expires_at = created_at"))
    await next_pair(house)
    assert (await house.vote(comparison, "a")).status == 410
    assert (await house.vote(comparison, "a", role=Role.RATER)).status == 200


async def test_a_pair_goes_back_to_the_queue_when_its_time_is_over(
    open_house: OpenHouse, engine: FakeEngine, make_key: MakeKey
) -> None:
    engine.answer = lambda body: say(str(body["seed"]))
    house = await open_house(engine, comparisons={"rater_lease_s": 0.001})
    comparison = await pair(house)
    _, other = make_key(Role.RATER)
    assert (await next_pair(house))["id"] == comparison
    await asyncio.sleep(0.003)
    late = await house.vote(comparison, "a", role=Role.RATER)
    assert (late.status, late.json["error"]["code"]) == (410, "comparison_expired")
    assert (await next_pair(house, other))["id"] == comparison
    assert (await house.vote(comparison, "a", role=Role.RATER)).status == 410
    assert (await house.vote(comparison, "a", role=Role.OPERATOR)).status == 404


async def test_raters_at_once_never_get_the_same_pair(house: House, make_key: MakeKey) -> None:
    for _ in range(6):
        await pair(house)
    tokens = [make_key(Role.RATER)[1] for _ in range(8)]
    given = await asyncio.gather(*(next_pair(house, token) for token in tokens))
    ids = [one["id"] for one in given if one is not None]
    assert len(ids) == len(set(ids)) == 6


async def test_a_forgotten_user_s_pairs_leave_the_queue(house: House) -> None:
    comparison = await pair(house)
    await house.call("DELETE", f"/v1/users/{house.keys[Role.USER].id}", role=Role.OPERATOR)
    assert await next_pair(house) is None
    assert (await house.vote(comparison, "a")).status == 410
