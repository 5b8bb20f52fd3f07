"""Schedules over the wire."""

from typing import Any

import pytest
from sqlite_utils import Database

from data import schedules
from data.types import Role
from tests.conftest import Answer, FakeEngine, House, say


async def add(house: House, **body: Any) -> Answer:
    return await house.call("POST", "/v1/schedules", role=Role.OPERATOR, json=body)


async def listed(house: House) -> list[dict[str, Any]]:
    answer = await house.call("GET", "/v1/schedules", role=Role.OPERATOR)
    assert answer.status == 200
    found: list[dict[str, Any]] = answer.json["data"]
    return found


async def change(house: House, id: str, **body: Any) -> Answer:
    return await house.call("PATCH", f"/v1/schedules/{id}", role=Role.OPERATOR, json=body)


async def test_a_nightly_schedule_says_when_it_is_due_next(house: House) -> None:
    added = await add(house, cron="0 3 * * 0", timezone="Asia/Kathmandu")
    assert added.status == 201
    schedule = added.json
    assert schedule["id"].startswith("sched_")
    assert (schedule["cron"], schedule["timezone"], schedule["paused"]) == ("0 3 * * 0", "Asia/Kathmandu", False)
    assert (schedule["every"], schedule["votes"]) == (None, None)
    assert schedule["created_by"] == house.keys[Role.OPERATOR].id
    assert schedule["next_due_at"].endswith("T21:15:00.000Z"), "a quarter to six behind"
    assert await listed(house) == [schedule]


async def test_a_schedule_by_votes_counts_those_cast_since(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(str(body.get("seed")))
    early = (await house.chat(feedback="always")).json["comparison"]["id"]
    await house.vote(early, "a")
    added = (await add(house, votes=2)).json
    assert (added["votes"], added["new_votes"], added["next_due_at"]) == (2, 0, None)
    late = (await house.chat(feedback="always")).json["comparison"]["id"]
    await house.vote(late, "b")
    (schedule,) = await listed(house)
    assert schedule["new_votes"] == 1


async def test_a_schedule_is_changed_paused_and_removed(house: House) -> None:
    id = (await add(house, every="6h")).json["id"]
    paused = (await change(house, id, paused=True)).json
    assert (paused["paused"], paused["next_due_at"]) == (True, None)
    edited = (await change(house, id, paused=False, cron="30 4 * * *", timezone="UTC")).json
    assert (edited["paused"], edited["cron"], edited["every"]) == (False, "30 4 * * *", None)
    assert edited["next_due_at"].endswith("T04:30:00.000Z")
    moved = (await change(house, id, timezone="Asia/Tokyo")).json
    assert moved["next_due_at"].endswith("T19:30:00.000Z")
    assert await listed(house) == [moved]
    removed = await house.call("DELETE", f"/v1/schedules/{id}", role=Role.OPERATOR)
    assert (removed.status, removed.json) == (200, {"id": id, "deleted": True})
    assert await listed(house) == []


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"cron": "0 3 * *"}, "'0 3 * *' has 4 fields, and a cron expression has five"),
        ({"cron": "0 25 * * *"}, "'25' is no hour"),
        ({"cron": "0 3 * * *", "timezone": "Mars/Phobos"}, "'Mars/Phobos' is no time zone: name one as the IANA does"),
        ({"every": "0s"}, "'0s' is no interval"),
        ({"every": "soon"}, "'soon' is no interval: write a number above 0 and s, m, h or d"),
        ({"every": "6h", "timezone": "UTC"}, "Only a cron expression has a time zone"),
        ({"votes": 0}, "'0' is no number of votes"),
        ({"cron": "0 3 * * *", "votes": 5}, "Both cron and votes given: a schedule has one of"),
        ({}, "Nothing given: a schedule has one of cron"),
        ({"votes": "many"}, "votes"),
        ({"votes": True}, "votes"),
        ({"hourly": True}, "hourly"),
    ],
)
async def test_what_is_no_schedule_is_refused_and_changes_nothing(
    house: House, body: dict[str, Any], sentence: str
) -> None:
    answer = await add(house, **body)
    assert answer.status == 400
    assert sentence in answer.json["error"]["message"]
    assert await listed(house) == []
    kept = (await add(house, every="6h")).json
    if body:
        answer = await change(house, kept["id"], paused=True, **body)
        assert answer.status == 400
        assert sentence in answer.json["error"]["message"]
    assert await listed(house) == [kept]


async def test_a_change_of_nothing_and_of_an_unknown_schedule_are_refused(house: House) -> None:
    id = (await add(house, every="6h")).json["id"]
    assert "Nothing to change" in (await change(house, id)).json["error"]["message"]
    unknown = [
        await change(house, "sched_x", paused=True),
        await change(house, "sched_x", every="1h"),
        await house.call("DELETE", "/v1/schedules/sched_x", role=Role.OPERATOR),
    ]
    for answer in unknown:
        assert answer.status == 404
        assert answer.json["error"]["code"] == "unknown_schedule"
        assert "There is no schedule 'sched_x'" in answer.json["error"]["message"]


async def test_every_act_is_audited_under_the_operators_key(house: House) -> None:
    id = (await add(house, every="6h")).json["id"]
    await change(house, id, paused=True)
    await change(house, id, every="1h", paused=False)
    await house.call("DELETE", f"/v1/schedules/{id}", role=Role.OPERATOR)
    acts = [(row["actor"], row["action"]) for row in await house.rows("audit") if row["subject"] == id]
    names = ["create", "pause", "edit", "resume", "remove"]
    assert acts == [(house.keys[Role.OPERATOR].id, f"schedule.{name}") for name in names]


async def test_only_operators_see_and_change_schedules(house: House) -> None:
    for role in (Role.USER, Role.RATER):
        answer = await house.call("POST", "/v1/schedules", role=role, json={"every": "6h"})
        assert answer.status == 403
        assert (await house.call("GET", "/v1/schedules", role=role)).status == 403
    assert await listed(house) == []


async def test_a_schedule_that_cannot_be_understood_any_more_is_listed_with_its_problem(
    house: House, db: Database
) -> None:
    id = (await add(house, cron="0 3 * * *")).json["id"]
    await house.state.write(lambda db: db.execute("UPDATE schedules SET timezone = 'Mars/Phobos' WHERE id = ?", (id,)))
    (schedule,) = await listed(house)
    assert schedule["next_due_at"] is None
    assert "'Mars/Phobos' is no time zone" in schedule["problem"]
    assert schedules.get(db, id).problem is None
