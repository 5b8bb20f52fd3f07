"""The API as a process of its own, killed in the middle of a swap; and a disk that is full just then."""

import asyncio
import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from data import registry, swaps
from data.settings import Settings
from data.types import BASE_POLICY, PolicyStatus
from service.supervisor import free_port
from tests.conftest import AddPolicy, FakeEngine, OpenHouse, eventually

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def api_process(settings: Settings, engine: FakeEngine) -> AsyncIterator[asyncio.subprocess.Process]:
    """The API on `settings`' record, which nobody watches: killed at the end, and no sooner ended."""
    environment = os.environ | {
        "NIGHTSHIFT_STATE": str(settings.state),
        "NIGHTSHIFT_SERVER__PORT": str(free_port()),
        "NIGHTSHIFT_ENGINE__URLS": f'["{engine.url}"]',
        "NIGHTSHIFT_ENGINE__POLL_S": "0.05",
        "NIGHTSHIFT_GATE__WATCH_SHARE": "0",
        "PYTHONPATH": str(ROOT),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service.app", env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield process
        assert process.returncode is None, "it ended by itself"
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


async def test_a_swap_goes_on_wherever_the_api_was_killed(
    settings: Settings, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    def serving() -> str | None:
        policy = registry.serving(db)
        return policy.name if policy and policy.status is PolicyStatus.SERVING else None

    async with api_process(settings, engine):
        await eventually(lambda: serving() == BASE_POLICY)
        engine.warm_up_gate = asyncio.Event()
        name = add_policy(PolicyStatus.PROMOTED)
        await eventually(lambda: f"warm {name}" in engine.events)
    engine.warm_up_gate.set()
    (begun,) = swaps.list_swaps(db, policy=name)
    assert (serving(), begun.flipped_at) == (BASE_POLICY, None)
    engine._run(BASE_POLICY, 1)  # and somebody's answer goes on in the engine
    async with api_process(settings, engine):
        await eventually(lambda: serving() == name)
    (made,) = swaps.list_swaps(db, policy=name)
    assert (made.id, made.replaced, made.drained_at) == (begun.id, BASE_POLICY, None)
    engine._run(BASE_POLICY, -1)
    async with api_process(settings, engine):
        await eventually(lambda: swaps.list_swaps(db)[0].drained_at is not None)
    assert engine.adapters.keys() == {name}
    assert engine.events.count(f"load {name}") == 1
    assert serving() == name


@pytest.mark.parametrize("where", ["begin", "flip"])
async def test_a_swap_that_cannot_be_written_down_is_made_when_it_can(
    open_house: OpenHouse,
    engine: FakeEngine,
    db: Database,
    add_policy: AddPolicy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    house = await open_house(engine)
    await eventually(lambda: registry.get(db, BASE_POLICY).status is PolicyStatus.SERVING)
    tries: list[str] = []

    def full(*_: Any) -> None:
        tries.append(where)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        for function in (where, "note_problem"):  # not even this can be written
            patched.setattr(swaps, function, full)
        name = add_policy(PolicyStatus.PROMOTED)
        await eventually(lambda: len(tries) >= 4)
        answer = await house.chat()
        assert (answer.status, answer.json["system_fingerprint"]) == (200, BASE_POLICY)
    await eventually(lambda: house.state.engines.serving == name)
    assert registry.get(db, name).status is PolicyStatus.SERVING
    assert "disk is full" in caplog.text


async def test_a_swap_waits_no_longer_than_for_the_engine_that_was_away(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    house = await open_house(engine, second_engine)
    await eventually(lambda: all(one.ready for one in house.state.engines.engines))
    await second_engine.stop()
    await eventually(lambda: not all(one.ready for one in house.state.engines.engines))
    name = add_policy(PolicyStatus.PROMOTED)
    await eventually(lambda: "engine 2" in (registry.get(db, name).problem or ""))
    for pause in house.state.hot_swap._pauses.values():
        pause.until = math.inf  # as after many tries, but longer
    await second_engine.start()
    await eventually(lambda: house.state.engines.serving == name)
