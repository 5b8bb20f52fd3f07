"""Runs over the wire: asked for, watched, cancelled."""

import asyncio
import json
import math
from typing import Any

import aiohttp
import pytest
from sqlite_utils import Database

from data import keys, runs
from data.database import transaction
from data.types import Role, RunStatus
from service import runs as routes
from tests.conftest import Answer, House


async def request(house: House, **body: Any) -> Answer:
    return await house.call("POST", "/v1/runs", role=Role.OPERATOR, json=body)


def work(db: Database, id: str, stage: str, *steps: int) -> None:
    """Begin the run if it waits, and do these steps."""
    with transaction(db):
        runs.claim(db)
        runs.beat(db, id, stage=stage)
        for step in steps:
            runs.add_metrics(db, id, step, {f"{stage}/score": step / 2, f"{stage}/kl": 0.25})


def finish(db: Database, id: str, status: RunStatus = RunStatus.SUCCEEDED) -> None:
    with transaction(db):
        runs.finish(db, id, status)


class Stream:
    """The events of a run as they come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id = ""

    async def next(self) -> tuple[str, dict[str, Any]] | None:
        """The next event; None at the end of the stream."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(30):
            while line := await self.response.content.readline():
                if line.startswith(b":"):
                    continue
                if line != b"\n":
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    fields[name] = value
                elif fields:
                    self.last_id = fields["id"]
                    return fields["event"], json.loads(fields["data"])
        return None

    async def steps(self, n: int) -> list[tuple[str, int]]:
        """The stage and step of the next `n` events, which are all figures."""
        found = []
        for _ in range(n):
            event = await self.next()
            assert event is not None
            assert event[0] == "figures"
            found.append((event[1]["stage"], event[1]["step"]))
        return found


async def watch(house: House, id: str, after: str | None = None) -> Stream:
    headers = house.headers(Role.OPERATOR) | ({"Last-Event-ID": after} if after is not None else {})
    response = await house.http.get(f"{house.url}/v1/runs/{id}/events", headers=headers)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    return Stream(response)


async def test_a_key_that_is_revoked_watches_no_longer(house: House, db: Database) -> None:
    id = (await request(house)).json["id"]
    stream = await watch(house, id)
    assert await stream.next() is not None
    with transaction(db):
        keys.revoke(db, house.keys[Role.OPERATOR].id, actor="test")
    assert b'"code":"invalid_api_key"' in await stream.response.content.read()


async def test_a_run_is_asked_for_and_there_is_one_at_a_time(house: House) -> None:
    asked = await request(house, seed=7)
    assert asked.status == 201
    run = asked.json
    assert (run["status"], run["config"]) == ("queued", {"seed": 7})
    assert run["requested_by"] == house.keys[Role.OPERATOR].id
    second = await request(house)
    assert second.status == 409
    assert (second.json["error"]["code"], second.json["error"]["run"]) == ("run_active", run["id"])
    assert f"/v1/runs/{run['id']}/cancel" in second.json["error"]["message"]
    listed = await house.call("GET", "/v1/runs", role=Role.OPERATOR)
    assert listed.json["data"] == [run]


async def test_a_run_can_be_asked_for_without_a_body(house: House) -> None:
    asked = await house.call("POST", "/v1/runs", role=Role.OPERATOR)
    assert (asked.status, asked.json["config"]) == (201, {})


@pytest.mark.parametrize("body", [{"seed": -1}, {"seed": "x"}, {"seed": 2**40}, {"steps": 5}])
async def test_what_is_no_run_is_refused(house: House, body: dict[str, Any]) -> None:
    answer = await request(house, **body)
    assert answer.status == 400
    assert answer.json["error"]["param"] == next(iter(body))
    assert await house.rows("runs") == []


async def test_a_run_is_shown_with_its_curves_and_the_policy_that_came_of_it(house: House, db: Database) -> None:
    id = (await request(house)).json["id"]
    work(db, id, "ppo", 0, 1)
    with transaction(db):
        runs.add_metrics(db, id, 2, {"ppo/score": math.inf, "ppo/kl": math.nan})
    finish(db, id)
    await house.state.write(lambda db: db.execute("UPDATE policies SET run_id = ?", (id,)))
    shown = (await house.call("GET", f"/v1/runs/{id}", role=Role.OPERATOR)).json
    assert shown["status"] == "succeeded"
    assert shown["policy"] == "policy-0000"
    assert shown["metrics"] == {
        "ppo/kl": [[0, 0.25], [1, 0.25], [2, None]],
        "ppo/score": [[0, 0.0], [1, 0.5], [2, None]],
    }


async def test_a_queued_run_is_cancelled_at_once_and_a_running_one_is_asked(house: House, db: Database) -> None:
    queued = (await request(house)).json["id"]
    cancelled = await house.call("POST", f"/v1/runs/{queued}/cancel", role=Role.OPERATOR)
    assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
    running = (await request(house)).json["id"]
    work(db, running, "ppo")
    asked = (await house.call("POST", f"/v1/runs/{running}/cancel", role=Role.OPERATOR)).json
    assert asked["status"] == "running"
    assert asked["cancel_requested_at"] is not None
    finish(db, running, RunStatus.CANCELLED)
    late = await house.call("POST", f"/v1/runs/{running}/cancel", role=Role.OPERATOR)
    assert (late.status, late.json["error"]["code"]) == (409, "run_ended")
    acts = [(row["action"], row["subject"]) for row in await house.rows("audit") if row["action"].startswith("run.")]
    assert acts == [
        ("run.request", queued), ("run.cancel", queued), ("run.request", running), ("run.cancel", running),
    ]  # fmt: skip


async def test_an_unknown_run_is_404(house: House) -> None:
    for method, path in [("GET", ""), ("POST", "/cancel"), ("GET", "/events")]:
        answer = await house.call(method, f"/v1/runs/run_x{path}", role=Role.OPERATOR)
        assert answer.status == 404
        assert answer.json["error"]["code"] == "unknown_run"


async def test_only_operators_have_to_do_with_runs(house: House) -> None:
    for role in (Role.USER, Role.RATER):
        assert (await house.call("POST", "/v1/runs", role=role)).status == 403
        assert (await house.call("GET", "/v1/runs", role=role)).status == 403
    assert await house.rows("runs") == []


# Watching


async def test_a_run_is_watched_from_its_queue_to_its_end(house: House, db: Database) -> None:
    id = (await request(house)).json["id"]
    stream = await watch(house, id)
    assert (await stream.next() or [""])[1]["status"] == "queued"
    work(db, id, "reward", 1, 2)
    events = [await stream.next() for _ in range(3)]
    names = [event[0] for event in events if event]
    assert sorted(names) == ["figures", "figures", "status"]
    figures = [event[1] for event in events if event and event[0] == "figures"]
    assert figures[-1] == {"stage": "reward", "step": 2, "figures": {"score": 1.0, "kl": 0.25}}
    work(db, id, "ppo", 0)
    status = await stream.next()
    assert status is not None
    assert (status[0], status[1]["stage"]) == ("status", "ppo")
    assert await stream.steps(1) == [("ppo", 0)]
    work(db, id, "ppo", 1)
    finish(db, id)
    assert await stream.steps(1) == [("ppo", 1)]
    last = await stream.next()
    assert last is not None
    assert (last[0], last[1]["status"]) == ("status", "succeeded")
    assert await stream.next() is None


async def test_a_watcher_who_comes_late_gets_it_all_and_one_who_comes_back_the_rest(house: House, db: Database) -> None:
    id = (await request(house)).json["id"]
    work(db, id, "reward", 1, 2)
    work(db, id, "ppo", 0, 1)
    stream = await watch(house, id)
    assert (await stream.next() or [""])[0] == "status"
    assert await stream.steps(4) == [("ppo", 0), ("ppo", 1), ("reward", 1), ("reward", 2)]
    seen = stream.last_id
    stream.response.close()
    work(db, id, "ppo", 2)
    finish(db, id)
    stream = await watch(house, id, seen)
    assert await stream.steps(1) == [("ppo", 2)]
    assert (await stream.next() or [""])[1]["status"] == "succeeded"
    assert await stream.next() is None
    answer = await house.call(
        "GET", f"/v1/runs/{id}/events", role=Role.OPERATOR, headers={"Last-Event-ID": stream.last_id}
    )
    assert (answer.status, answer.body) == (204, b""), "there is nothing to come back for"


@pytest.mark.parametrize("after", ["", "nonsense", "ppo:x,:3,,", "ppo:-1"])
async def test_an_event_id_that_is_none_of_ours_begins_at_the_beginning(house: House, db: Database, after: str) -> None:
    id = (await request(house)).json["id"]
    work(db, id, "ppo", 0)
    finish(db, id)
    stream = await watch(house, id, after)
    assert await stream.steps(1) == [("ppo", 0)]


async def test_a_silent_stream_is_kept_open(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "HEARTBEAT_S", 0.0)
    id = (await request(house)).json["id"]
    stream = await watch(house, id)
    await stream.next()
    async with asyncio.timeout(30):
        assert (await stream.response.content.readline()).startswith(b":")
    await house.call("POST", f"/v1/runs/{id}/cancel", role=Role.OPERATOR)
    last = await stream.next()
    assert last is not None
    assert last[1]["status"] == "cancelled"
