"""The hot swap: new policies come into service under running traffic, or do not, and nothing is ever half."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from data import duels, leases, registry, runs, swaps
from data.database import transaction
from data.leases import LONGEST_S
from data.settings import Settings
from data.types import BASE_POLICY, PolicyStatus, Role, Swap, timestamp
from tests.conftest import (
    AddPolicy,
    Answer,
    FakeEngine,
    House,
    OpenHouse,
    Refusal,
    database_locked,
    eventually,
    has_drained,
    has_looked,
    rounds,
    say,
)


def status(db: Database, name: str) -> PolicyStatus:
    return registry.get(db, name).status


async def serves(house: House, name: str) -> None:
    """Wait until new requests take this policy."""
    await eventually(lambda: house.state.engines.serving == name)


async def promote(house: House, name: str) -> Answer:
    answer = await house.call("POST", f"/v1/policies/{name}/promote", role=Role.OPERATOR)
    assert answer.status == 202, answer.body
    return answer


async def roll_back(house: House, **body: str) -> Answer:
    return await house.call("POST", "/v1/policies/rollback", role=Role.OPERATOR, json=body)


async def fingerprint(house: House) -> str:
    answer = await house.chat()
    assert answer.status == 200, answer.body
    name: str = answer.json["system_fingerprint"]
    return name


def latest(db: Database) -> Swap:
    return swaps.list_swaps(db)[0]


MANUAL = {"mode": "manual"}
"""No candidate goes on trial by itself."""
NO_WATCH = {"mode": "manual", "watch_share": 0.0}


@pytest.fixture
async def house(open_house: OpenHouse, engine: FakeEngine) -> House:
    return await open_house(engine, gate=MANUAL)


# Load, flip, drain


async def test_a_promoted_policy_is_loaded_and_warmed_beside_traffic_and_then_serves(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    assert await fingerprint(house) == "policy-0000"
    name = add_policy(PolicyStatus.PROMOTED)
    await serves(house, name)
    assert await fingerprint(house) == name
    assert engine.events == [
        "load policy-0000", "warm policy-0000", "chat policy-0000",
        "load policy-0001", "warm policy-0001", "chat policy-0001",
    ]  # fmt: skip
    assert (status(db, BASE_POLICY), status(db, name)) == (PolicyStatus.RETIRED, PolicyStatus.SERVING)
    swap = latest(db)
    assert (swap.policy, swap.replaced, swap.actor, swap.problem) == (name, BASE_POLICY, "start", None)
    assert swap.flipped_at is not None


async def test_streams_that_run_end_on_the_old_policy_and_new_ones_take_the_new(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, gate=NO_WATCH)
    engine.answer = lambda body: say(body["model"], " says", " this", hold_after=1)
    streams = [asyncio.create_task(house.chat(stream=True)) for _ in range(8)]
    await eventually(lambda: len(engine.chats) == 8)
    await promote(house, add_policy())
    await serves(house, "policy-0001")
    engine.answer = lambda body: say(body["model"], " says")
    assert (await house.chat()).text == "policy-0001 says"
    await has_drained(house)
    assert "unload policy-0000" not in engine.events, "a policy left an engine that still answered with it"
    assert latest(db).drained_at is None
    engine.go_on.set()
    for answer in await asyncio.gather(*streams):
        assert answer.status == 200
        assert answer.streamed() == "policy-0000 says this"
        assert {chunk["system_fingerprint"] for chunk in answer.chunks} == {"policy-0000"}
    await eventually(lambda: "unload policy-0000" in engine.events)
    await eventually(lambda: latest(db).drained_at is not None)
    assert engine.adapters.keys() == {"policy-0001"}
    rows = {row["answer"]: row["policy"] for row in await house.rows("completions")}
    assert rows == {"policy-0000 says this": "policy-0000", "policy-0001 says": "policy-0001"}


async def test_a_policy_has_left_an_engine_that_restarted_too(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, gate=NO_WATCH)
    engine._run("policy-0000", 1)
    await promote(house, add_policy())
    await serves(house, "policy-0001")
    await has_drained(house)
    assert latest(db).drained_at is None
    await engine.stop()
    await eventually(lambda: not house.state.engines.ready)
    await engine.start()
    await eventually(lambda: latest(db).drained_at is not None)
    assert "unload policy-0000" not in engine.events


async def test_an_engine_that_another_process_still_uses_keeps_the_old_policy(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, gate=NO_WATCH)
    other = await open_house(engine, gate=NO_WATCH)
    engine.answer = lambda body: say("One", " two", hold_after=1)
    leader, follower = (house, other) if house.state.hot_swap._leads else (other, house)
    stream = asyncio.create_task(follower.chat(stream=True))
    await eventually(lambda: len(engine.chats) == 1)
    await promote(leader, add_policy())
    await serves(leader, "policy-0001")
    await has_drained(leader)
    assert "unload policy-0000" not in engine.events
    engine.go_on.set()
    assert (await stream).streamed() == "One two"
    await eventually(lambda: "unload policy-0000" in engine.events)


async def test_a_stream_that_never_ends_does_not_keep_the_old_policy_beyond_the_time_limit(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, gate=NO_WATCH, chat={"timeout_s": 1.0})
    engine._run("policy-0000", 1)
    await promote(house, add_policy())
    await eventually(lambda: "unload policy-0000" in engine.events)


async def test_what_a_trainer_put_on_the_engine_is_left_alone(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, gate=NO_WATCH)
    engine.adapters["rollout-run_1"] = str(house.settings.state / "rollouts" / "rollout-run_1")
    await promote(house, add_policy())
    await eventually(lambda: "unload policy-0000" in engine.events)
    assert engine.adapters.keys() == {"policy-0001", "rollout-run_1"}


async def test_chats_never_stop_while_ten_policies_come_and_go(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine, add_policy: AddPolicy
) -> None:
    for one in (engine, second_engine):
        one.answer = lambda body: say(body["model"], *(" and" for _ in range(20)))
    house = await open_house(engine, second_engine, gate=NO_WATCH)
    done = asyncio.Event()
    answers: list[Answer] = []

    async def client(stream: bool) -> None:
        while not done.is_set():
            answers.append(await house.chat(stream=stream))
            await asyncio.sleep(0)

    clients = [asyncio.create_task(client(number % 2 == 0)) for number in range(6)]
    for _ in range(10):
        name = add_policy()
        await promote(house, name)
        await serves(house, name)
    answers.append(await house.chat())
    done.set()
    await asyncio.gather(*clients)
    assert {answer.status for answer in answers} == {200}
    said = set()
    for answer in answers:
        if answer.body.startswith(b"data: "):
            (name,) = {chunk["system_fingerprint"] for chunk in answer.chunks}
            text = answer.streamed()
        else:
            name, text = answer.json["system_fingerprint"], answer.text
        assert text == name + 20 * " and"
        said.add(name)
    assert said >= {"policy-0000", "policy-0010"}


# What goes wrong


async def test_an_engine_that_refuses_a_policy_goes_on_with_the_old_one(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuses_load = Refusal(500, "LoRA rank 64 is greater than max_lora_rank 16.")
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: status(db, name) is PolicyStatus.REJECTED)
    policy, swap = registry.get(db, name), latest(db)
    for said in (policy.problem, swap.problem, caplog.text):
        assert said is not None
        assert "LoRA rank 64 is greater" in said
        assert "refused policy-0001" in said
    assert swap.flipped_at is None
    assert await fingerprint(house) == "policy-0000"
    assert house.state.engines.ready


async def test_a_run_says_why_the_engine_refused_what_came_of_it(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    with transaction(db):
        run = runs.request(db, requested_by="test", config={}).id
    engine.refuses_load = Refusal(500, "LoRA rank 64 is greater than max_lora_rank 16.")
    name = add_policy(PolicyStatus.PROMOTED, run_id=run)
    await eventually(lambda: status(db, name) is PolicyStatus.REJECTED)
    shown = (await house.call("GET", f"/v1/runs/{run}", role=Role.OPERATOR)).json
    assert shown["policy"] == name
    assert "LoRA rank 64 is greater" in shown["policy_problem"]


@pytest.mark.parametrize("dead", ["refuses", "dies"])
async def test_where_one_of_two_engines_fails_nothing_flips_and_the_other_gives_it_back(
    open_house: OpenHouse,
    engine: FakeEngine,
    second_engine: FakeEngine,
    db: Database,
    add_policy: AddPolicy,
    dead: str,
) -> None:
    house = await open_house(engine, second_engine, gate=MANUAL)
    if dead == "refuses":
        second_engine.refuses_load = Refusal(500, "no room")
    else:
        second_engine.dies_at_load = True
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: f"unload {name}" in engine.events)
    await eventually(lambda: latest(db).problem is not None)
    assert "engine 2" in str(latest(db).problem)
    assert await fingerprint(house) == "policy-0000"
    assert status(db, name) is (PolicyStatus.REJECTED if dead == "refuses" else PolicyStatus.PROMOTED)
    assert status(db, BASE_POLICY) is PolicyStatus.SERVING
    if dead == "refuses":
        assert engine.adapters.keys() == second_engine.adapters.keys() == {"policy-0000"}


async def test_an_engine_that_died_during_the_load_and_comes_back_gets_the_policy_and_the_swap_is_made(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, second_engine, gate=MANUAL)
    second_engine.dies_at_load = True
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: latest(db).problem is not None)
    second_engine.dies_at_load = False
    await second_engine.start()
    await serves(house, name)
    assert len(swaps.list_swaps(db, policy=name)) == 1
    assert latest(db).problem is None
    assert registry.get(db, name).problem is None
    assert second_engine.events.index("load policy-0000") < second_engine.events.index(f"load {name}")
    assert {engine.adapters.keys() >= {name}, second_engine.adapters.keys() >= {name}} == {True}


async def test_a_new_policy_takes_no_engine_out_of_traffic_while_it_loads(
    house: House, engine: FakeEngine, add_policy: AddPolicy
) -> None:
    engine.load_gate = asyncio.Event()
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: len(engine.loads) == 2)
    for _ in range(5):
        assert await fingerprint(house) == "policy-0000"
        await asyncio.sleep(0.03)  # a look at the engine's health
    engine.load_gate.set()
    await serves(house, name)


async def test_an_engine_that_failed_the_warm_up_is_asked_again(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.refuses_warm_up = Refusal(503, "queue is full")
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: "queue is full" in (registry.get(db, name).problem or ""))
    assert status(db, name) is PolicyStatus.PROMOTED
    engine.refuses_warm_up = None
    await serves(house, name)


async def test_an_engine_that_does_not_see_the_folder_is_no_fault_of_the_policy(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.refuses_load = Refusal(404, "No adapter found for /x")
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: "must see" in (registry.get(db, name).problem or ""))
    assert status(db, name) is PolicyStatus.PROMOTED


def corrupt(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")


def configured(**change: Any) -> Callable[[Path], object]:
    def change_config(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text()) | change
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return change_config


BAD_POLICIES: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "corrupted": ({}, corrupt, "sha256"),
    "of another base": ({"base_model": "0" * 64}, lambda folder: None, "another base model"),
    "outside": ({"path": "../model"}, lambda folder: None, "outside"),
    "a pickle": (
        {"change": lambda f: (f / "adapter_model.bin").write_bytes(b"x")},
        lambda folder: None,
        "nothing else",
    ),
    "only a pickle": (
        {"change": lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin")},
        lambda folder: None,
        "nothing else",
    ),
    "a pickle in a folder": (
        {"change": lambda f: ((f / "more").mkdir(), (f / "more" / "x.pkl").write_bytes(b"x"))},
        lambda folder: None,
        "nothing else",
    ),
    "not LoRA": ({"change": configured(peft_type="IA3")}, lambda folder: None, "IA3"),
    "too large": ({"change": configured(r=64)}, lambda folder: None, "rank 64"),
    "no config": ({"change": lambda f: (f / "adapter_config.json").write_text("[]")}, lambda folder: None, "no rank"),
}


@pytest.mark.parametrize(("fields", "damage", "why"), BAD_POLICIES.values(), ids=BAD_POLICIES.keys())
async def test_a_bad_policy_is_refused_before_any_engine_sees_it(
    house: House,
    engine: FakeEngine,
    db: Database,
    settings: Settings,
    add_policy: AddPolicy,
    fields: dict[str, Any],
    damage: Callable[[Path], object],
    why: str,
) -> None:
    name = add_policy(**fields)
    damage(settings.state / "policies" / name)
    answer = await house.call("POST", f"/v1/policies/{name}/promote", role=Role.OPERATOR)
    assert answer.status == 409
    assert why in answer.json["error"]["message"]
    assert status(db, name) is PolicyStatus.CANDIDATE
    with transaction(db):  # the trainer asks nobody
        registry.set_status(db, name, PolicyStatus.PROMOTED)
    await eventually(lambda: status(db, name) is PolicyStatus.REJECTED)
    assert why in str(registry.get(db, name).problem)
    assert [load["lora_name"] for load in engine.loads] == ["policy-0000"]
    assert await fingerprint(house) == "policy-0000"


# Crashes, and several processes


async def test_a_crash_between_load_and_flip_leaves_a_policy_that_the_next_start_loads_and_flips(
    house: House,
    open_house: OpenHouse,
    engine: FakeEngine,
    db: Database,
    add_policy: AddPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def killed(*_: object) -> None:
        house.state.hot_swap._leads = False
        raise swaps.Superseded

    with monkeypatch.context() as patched:
        patched.setattr(swaps, "flip", killed)
        name = add_policy(PolicyStatus.PROMOTED)
        await eventually(lambda: f"warm {name}" in engine.events and not house.state.hot_swap._leads)
        for task in house.state.hot_swap._loops:
            task.cancel()  # it is gone, and its lease is not
    (begun,) = swaps.list_swaps(db, policy=name)
    assert begun.flipped_at is None
    again = await open_house(engine, gate=MANUAL)
    await serves(again, name)
    (made,) = swaps.list_swaps(db, policy=name)
    assert (made.id, made.requested_at) == (begun.id, begun.requested_at)
    assert made.flipped_at is not None
    assert engine.events.count(f"load {name}") == 1


async def test_of_two_processes_on_one_record_one_swaps_and_both_follow(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    houses = [await open_house(engine, gate=NO_WATCH) for _ in range(2)]
    await eventually(lambda: leases.holder_of(db, "swap") is not None)
    for turn in range(3):
        name = add_policy()
        await promote(houses[turn % 2], name)
        for house in houses:
            await serves(house, name)
            assert await fingerprint(house) == name
        assert engine.events.count(f"load {name}") == 1
    assert [swap.policy for swap in swaps.list_swaps(db)] == [f"policy-000{number}" for number in (3, 2, 1, 0)]
    assert sum(house.state.hot_swap._leads for house in houses) == 1


async def test_who_lost_the_lease_while_an_engine_refused_turns_nothing_away(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    engine.load_gate = asyncio.Event()
    engine.refuses_load = Refusal(500, "no room")
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: len(engine.loads) == 2)
    with transaction(db):
        db.execute("UPDATE leases SET holder = 'another', until = ?", (timestamp(plus_s=LONGEST_S),))
    engine.load_gate.set()
    await eventually(lambda: "no room" in caplog.text)
    await has_looked(house)
    assert status(db, name) is PolicyStatus.PROMOTED
    assert "went wrong" not in caplog.text


async def test_who_lost_the_lease_while_loading_flips_nothing(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.load_gate = asyncio.Event()
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: len(engine.loads) == 2)
    with transaction(db):
        db.execute("UPDATE leases SET holder = 'another', until = ?", (timestamp(plus_s=LONGEST_S),))
    engine.load_gate.set()
    await eventually(lambda: f"warm {name}" in engine.events)
    await has_looked(house)
    assert status(db, name) is PolicyStatus.PROMOTED
    assert await fingerprint(house) == "policy-0000"


async def test_a_process_that_ends_well_leaves_the_lease_to_the_next(house: House, db: Database) -> None:
    await eventually(lambda: leases.holder_of(db, "swap") is not None)
    await house.state.hot_swap.close()
    assert leases.holder_of(db, "swap") is None


# Operators


async def test_an_operator_promotes_and_goes_back_within_two_seconds(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy()
    await promote(house, name)
    await serves(house, name)
    answer = await roll_back(house, reason="it is rude")
    assert answer.status == 202
    assert answer.json["policy"] == BASE_POLICY
    await serves(house, BASE_POLICY)
    back, there, _ = swaps.list_swaps(db)
    key = house.keys[Role.OPERATOR].id
    assert (back.policy, back.replaced, back.actor, back.reason) == (BASE_POLICY, name, key, "it is rude")
    assert (there.policy, there.replaced, there.actor) == (name, BASE_POLICY, key)
    assert status(db, name) is PolicyStatus.ROLLED_BACK
    audited = db.execute("SELECT actor, action, subject FROM audit WHERE action = 'policy.promote'").fetchall()
    assert audited == [(key, "policy.promote", name), (key, "policy.promote", BASE_POLICY)]
    assert duels.running(db) is None, "who has come back is not watched by who was sent away"
    assert await fingerprint(house) == BASE_POLICY


async def test_a_policy_that_was_rolled_back_can_be_promoted_again(
    house: House, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy()
    for _ in range(2):
        await promote(house, name)
        await serves(house, name)
        assert (await roll_back(house)).status == 202
        await serves(house, BASE_POLICY)
    assert len(swaps.list_swaps(db, policy=name)) == 4


async def test_going_back_twice_goes_back_two_policies(house: House, db: Database, add_policy: AddPolicy) -> None:
    for name in (add_policy(), add_policy()):
        await promote(house, name)
        await serves(house, name)
    for name in ("policy-0001", "policy-0000"):
        assert (await roll_back(house)).json["policy"] == name
        await serves(house, name)
    assert (await roll_back(house)).status == 409


async def test_of_two_who_go_back_from_what_they_saw_serve_one_does(
    house: House, db: Database, add_policy: AddPolicy
) -> None:
    for name in (add_policy(), add_policy()):
        await promote(house, name)
        await serves(house, name)
    assert (await roll_back(house, **{"from": "policy-0002"})).json["policy"] == "policy-0001"
    await serves(house, "policy-0001")
    late = await roll_back(house, **{"from": "policy-0002"})
    assert (late.status, late.json["error"]["code"]) == (409, "cannot_promote")
    assert "policy-0002 does not serve any more, policy-0001 does" in late.json["error"]["message"]
    assert swaps.pending(db) is None
    assert (await roll_back(house, **{"from": "policy-0001"})).json["policy"] == BASE_POLICY


async def test_the_way_back_does_not_wait_for_an_engine_that_is_away(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, second_engine, gate=MANUAL)
    name = add_policy()
    await promote(house, name)
    await serves(house, name)
    await second_engine.stop()
    await eventually(lambda: not house.state.engines.engines[1].ready)
    assert (await roll_back(house)).status == 202
    await serves(house, BASE_POLICY)
    second_engine.events.clear()
    await second_engine.start()
    await eventually(lambda: house.state.engines.engines[1].ready)
    assert second_engine.events[:2] == ["load policy-0000", "warm policy-0000"]


@pytest.mark.parametrize("back_s", [0.0, 1.5], ids=["and the other is slow", ""])
async def test_the_way_back_does_not_wait_for_an_engine_that_hangs(
    open_house: OpenHouse,
    engine: FakeEngine,
    second_engine: FakeEngine,
    add_policy: AddPolicy,
    monkeypatch: pytest.MonkeyPatch,
    back_s: float,
) -> None:
    monkeypatch.setattr("service.engine.BACK_S", back_s)
    house = await open_house(engine, second_engine, gate=MANUAL)
    second = house.state.engines.engines[1]
    name = add_policy()
    await promote(house, name)
    await serves(house, name)
    second_engine.hangs = asyncio.Event()
    assert second.ready
    assert (await roll_back(house)).status == 202
    await serves(house, BASE_POLICY)
    assert not second.ready
    assert await fingerprint(house) == BASE_POLICY
    second_engine.hangs.set()
    await eventually(lambda: second.ready)
    last = next(event for event in reversed(second_engine.events) if "load" not in event)
    assert last == "warm policy-0000", "it has what serves before it gets traffic"


async def test_an_engine_that_holds_the_policy_a_little_later_keeps_its_traffic_on_the_way_back(
    open_house: OpenHouse,
    engine: FakeEngine,
    second_engine: FakeEngine,
    add_policy: AddPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.engine.BACK_S", 0.0)
    house = await open_house(engine, second_engine, gate=MANUAL)
    second = house.state.engines.engines[1]
    name = add_policy()
    await promote(house, name)
    await serves(house, name)
    engine.hangs, second_engine.hangs = asyncio.Event(), asyncio.Event()
    assert (await roll_back(house)).status == 202
    await rounds(house, "_set_to_work")  # a house so busy that all engines answer late
    monkeypatch.setattr("service.engine.BACK_S", 60.0)
    engine.hangs.set()
    second_engine.hangs.set()
    await serves(house, BASE_POLICY)
    assert second.ready


async def test_a_way_back_that_no_engine_holds_any_more_takes_the_time_that_it_takes(
    open_house: OpenHouse,
    engine: FakeEngine,
    second_engine: FakeEngine,
    add_policy: AddPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.engine.BACK_S", 0.0)
    house = await open_house(engine, second_engine, gate=NO_WATCH)
    name = add_policy()
    await promote(house, name)
    await serves(house, name)
    for one in (engine, second_engine):
        await eventually(lambda one=one: "unload policy-0000" in one.events)
        one.load_gate = asyncio.Event()
    assert (await roll_back(house)).status == 202
    await eventually(lambda: len(engine.loads) == len(second_engine.loads) == 3)
    assert await fingerprint(house) == name
    for one in (engine, second_engine):
        assert one.load_gate is not None
        one.load_gate.set()
    await serves(house, BASE_POLICY)
    assert all(one.ready for one in house.state.engines.engines)


async def test_a_way_back_is_not_held_up_by_a_swap_that_hangs(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    first, second = add_policy(), add_policy()
    await promote(house, first)
    await serves(house, first)
    engine.load_gate = asyncio.Event()
    await promote(house, second)
    await eventually(lambda: len(engine.loads) == 3)
    assert (await roll_back(house)).json["policy"] == BASE_POLICY
    await serves(house, BASE_POLICY)  # which is still loaded
    assert status(db, second) is PolicyStatus.RETIRED
    assert "promoted after it" in str(registry.get(db, second).problem)
    engine.load_gate.set()
    await eventually(lambda: engine.adapters.keys() == {BASE_POLICY})


async def test_a_policy_that_somebody_goes_back_to_just_before_it_leaves_stays(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await open_house(engine, gate=NO_WATCH)
    asked, answered = asyncio.Event(), asyncio.Event()

    async def at_leisure(name: str) -> bool:
        asked.set()
        await answered.wait()
        return False

    monkeypatch.setattr(house.state.engines, "busy_with", at_leisure)
    await promote(house, add_policy())
    await asked.wait()
    assert (await roll_back(house)).status == 202
    await serves(house, BASE_POLICY)
    answered.set()
    await eventually(lambda: "unload policy-0001" in engine.events)
    assert "unload policy-0000" not in engine.events


async def test_a_policy_that_somebody_goes_back_to_while_it_leaves_is_loaded_anew(
    open_house: OpenHouse, engine: FakeEngine, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, gate=NO_WATCH)
    engine.unload_gate = asyncio.Event()
    await promote(house, add_policy())
    await eventually(lambda: "is to unload policy-0000" in engine.events)
    assert (await roll_back(house)).status == 202
    await rounds(house, "_set_to_work")
    assert await fingerprint(house) == "policy-0001"
    engine.unload_gate.set()
    await serves(house, BASE_POLICY)
    gone = engine.events.index("unload policy-0000")
    assert engine.events[gone + 1 : gone + 3] == ["load policy-0000", "warm policy-0000"]
    assert await fingerprint(house) == BASE_POLICY


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [("policy-0000", 409, "serves already"), ("policy-0007", 404, "no policy"), ("policy-0001", 409, "KL is 3 nats")],
)
async def test_what_cannot_be_promoted_is_answered_with_the_reason(
    house: House, db: Database, add_policy: AddPolicy, name: str, code: int, why: str
) -> None:
    add_policy(PolicyStatus.REJECTED, gate=False)
    answer = await house.call("POST", f"/v1/policies/{name}/promote", role=Role.OPERATOR)
    assert answer.status == code
    assert why in answer.json["error"]["message"]
    answer = await roll_back(house)
    assert answer.status == 409
    assert "nothing to go back to" in answer.json["error"]["message"]
    assert await fingerprint(house) == BASE_POLICY


async def test_a_promotion_that_is_asked_for_twice_is_one_swap(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.load_gate = asyncio.Event()
    name = add_policy()
    first, second = await promote(house, name), await promote(house, name)
    assert first.json["swap"]["id"] == second.json["swap"]["id"]
    engine.load_gate.set()
    await serves(house, name)


async def test_the_last_of_several_promotions_serves(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.load_gate = asyncio.Event()
    older, newer = add_policy(), add_policy()
    await promote(house, newer)
    await asyncio.sleep(0.005)
    await promote(house, older)
    engine.load_gate.set()
    await serves(house, older)
    await has_looked(house)
    assert house.state.engines.serving == older
    assert status(db, newer) is PolicyStatus.RETIRED


async def test_metrics_name_the_policy_that_serves_and_count_the_swaps(house: House, add_policy: AddPolicy) -> None:
    await promote(house, add_policy())
    await serves(house, "policy-0001")
    metrics = (await house.call("GET", "/metrics", role=None)).body.decode()
    assert [line for line in metrics.splitlines() if line.startswith("nightshift_serving_policy{")] == [
        'nightshift_serving_policy{policy="policy-0001"} 1.0'
    ]
    assert "nightshift_swaps_total 2.0" in metrics  # the first start is one


async def test_the_listing_says_what_became_of_every_policy(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.refuses_load = Refusal(500, "not this one")
    add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: status(db, "policy-0001") is PolicyStatus.REJECTED)
    listed = (await house.call("GET", "/v1/policies", role=Role.OPERATOR)).json["data"]
    assert [(p["name"], p["status"], p["gate_passed"]) for p in listed] == [
        ("policy-0000", "serving", None),
        ("policy-0001", "rejected", True),
    ]
    assert "not this one" in listed[1]["problem"]
    one = (await house.call("GET", "/v1/policies/policy-0001", role=Role.OPERATOR)).json
    assert one["gate"]["checks"][0]["sentence"] == "KL is 3 nats."
    assert [swap["problem"] for swap in one["swaps"]] == [listed[1]["problem"]]
    assert (await house.call("GET", "/v1/policies/policy-9", role=Role.OPERATOR)).status == 404


async def test_the_lineage_is_there_over_http(house: House, add_policy: AddPolicy) -> None:
    name = add_policy()
    lineage = await house.call("GET", f"/v1/policies/{name}/lineage", role=Role.OPERATOR)
    assert lineage.json == {"policy": name, "parent": BASE_POLICY, "run": None, "reward_model": None, "votes": []}
    assert (await house.call("GET", "/v1/policies/policy-9/lineage", role=Role.OPERATOR)).status == 404


async def test_a_record_that_cannot_be_written_for_a_while_only_delays_a_swap(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy(PolicyStatus.PROMOTED)
    with database_locked(house, db):
        await asyncio.sleep(0.5)
        assert (await house.chat()).json["system_fingerprint"] == BASE_POLICY
    await serves(house, name)


async def test_warm_ups_go_before_what_waits(house: House, engine: FakeEngine) -> None:
    await house.chat()
    assert engine.warm_ups[0].body["priority"] < engine.chats[0].body["priority"]


# The end


@pytest.mark.parametrize("turns", range(6))
async def test_the_swap_ends_when_it_is_stopped_just_as_it_wakes(house: House, turns: int) -> None:
    house.state.hot_swap.kick()
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await house.state.hot_swap.close()
