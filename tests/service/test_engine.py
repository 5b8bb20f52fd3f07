"""The engines: what one must do before it gets traffic, and what becomes of it when it fails."""

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from data import registry
from data.types import PolicyStatus
from tests.conftest import FakeEngine, House, OpenHouse, Refusal, eventually, say


async def reasons(house: House) -> list[str]:
    """Why the service is not ready, an engine a line; empty when it is."""
    answer = await house.call("GET", "/readyz", role=None)
    if answer.status == 200:
        return []
    assert answer.status == 503
    assert answer.headers["Retry-After"]
    for private in ("http", "/", "sha256", "CUDA", "LoRA rank"):
        assert private not in answer.body.decode(), "an address, a path or the engine's own words are shown to anybody"
    engines: list[str] = answer.json["error"]["engines"]
    return engines


async def says(house: House, *words: str) -> None:
    """Wait until /readyz gives a reason with all of these words."""

    async def said() -> bool:
        return any(all(word in reason for word in words) for reason in await reasons(house))

    await eventually(said)


def told(caplog: pytest.LogCaptureFixture, *words: str) -> int:
    """How many lines the operator was given with all of these words."""
    return sum(all(word in record.getMessage() for word in words) for record in caplog.records)


async def test_an_engine_is_ready_after_it_loaded_and_answered_a_warm_up(
    open_house: OpenHouse, engine: FakeEngine
) -> None:
    engine.warm_up_gate = asyncio.Event()
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: warming up policy-0000")
    assert (await house.chat()).status == 503
    assert registry.serving(house.state.reader).status is PolicyStatus.PROMOTED  # type: ignore[union-attr]
    engine.warm_up_gate.set()
    await eventually(house.is_ready)
    assert engine.events == ["load policy-0000", "warm policy-0000"]
    assert (await house.call("GET", "/readyz", role=None)).json == {"status": "ready", "policy": "policy-0000"}
    await eventually(lambda: registry.serving(house.state.reader).status is PolicyStatus.SERVING)  # type: ignore[union-attr]


async def test_a_policy_is_loaded_from_its_checked_folder(house: House, engine: FakeEngine) -> None:
    folder = (house.settings.state / "policies" / "policy-0000").resolve()
    assert engine.loads == [{"lora_name": "policy-0000", "lora_path": str(folder)}]
    assert engine.warm_ups[0].body["model"] == "policy-0000"


async def test_an_engine_that_was_started_without_adapters_is_told_how_it_takes_them(
    open_house: OpenHouse, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuses_load = Refusal(404, text='{"detail":"Not Found"}')  # of no such route
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: it takes no adapters")
    assert told(caplog, "--enable-lora", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")
    engine.refuses_load = Refusal(404, "No adapter found for policy-0000")
    await says(house, "engine 1: it does not find policy-0000")


async def test_an_engine_that_holds_the_policy_already_is_warmed_but_not_loaded_again(
    open_house: OpenHouse, engine: FakeEngine
) -> None:
    await open_house(engine)
    again = await open_house(engine)
    assert (await again.chat()).status == 200
    assert engine.events == ["load policy-0000", "warm policy-0000", "warm policy-0000", "chat policy-0000"]


async def test_a_restarted_engine_gets_its_policies_back_before_it_gets_traffic(
    house: House, engine: FakeEngine
) -> None:
    assert (await house.chat()).status == 200
    await engine.stop()
    await says(house, "engine 1", "does not listen")
    engine.events.clear()
    await engine.start()
    await eventually(house.is_ready)
    assert (await house.chat()).status == 200
    assert engine.events == ["load policy-0000", "warm policy-0000", "chat policy-0000"]


async def test_an_engine_that_lost_its_policy_between_two_looks_gets_it_back(house: House, engine: FakeEngine) -> None:
    engine.adapters.clear()
    await eventually(lambda: engine.events.count("load policy-0000") == 2)
    await eventually(house.is_ready)
    assert (await house.chat()).status == 200


async def test_an_engine_gets_no_traffic_while_its_policy_is_given_back(house: House, engine: FakeEngine) -> None:
    engine.warm_up_gate = asyncio.Event()
    engine.adapters.clear()
    await eventually(lambda: engine.events.count("warm policy-0000") == 2)
    assert (await house.chat()).status == 503
    assert engine.chats == []
    engine.warm_up_gate.set()
    await eventually(house.is_ready)


async def test_an_engine_that_refuses_the_policy_stays_out_and_says_why(
    open_house: OpenHouse, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuses_load = Refusal(400, "LoRA rank 64 is greater than max_lora_rank 16.")
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: it refused policy-0000", "the log says why")
    assert told(caplog, engine.url, "it refused policy-0000", "LoRA rank 64 is greater")
    assert (await house.chat()).status == 503
    assert engine.chats == []
    engine.refuses_load = None
    await eventually(house.is_ready)


async def test_an_engine_that_fails_the_warm_up_stays_out_and_says_why(
    open_house: OpenHouse, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuses_warm_up = Refusal(500, "CUDA out of memory")
    house = await open_house(engine, ready=False)
    await says(house, "warm-up of policy-0000 failed", "the log says why")
    assert told(caplog, engine.url, "warm-up of policy-0000 failed", "CUDA out of memory")
    engine.refuses_warm_up = None
    await eventually(house.is_ready)


async def test_an_engine_that_holds_another_folder_under_the_name_is_a_problem(
    open_house: OpenHouse, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.adapters["policy-0000"] = "/somewhere/else"
    house = await open_house(engine, ready=False)
    await says(house, "it holds another policy-0000")
    assert told(caplog, engine.url, "another policy-0000", "/somewhere/else", "Restart that server")
    assert engine.loads == []
    assert (await house.chat()).status == 503


async def test_an_engine_that_is_not_healthy_stays_out(house: House, engine: FakeEngine) -> None:
    engine.health = 503
    await eventually(lambda: not house.state.engines.ready)
    await says(house, "engine 1: it is not healthy")
    engine.health = 200
    await eventually(house.is_ready)


STRANGE_ANSWERS: dict[str, Any] = {
    "another status": lambda: web.Response(status=401),
    "not JSON": lambda: web.Response(text="<html>", content_type="application/json"),
    "not declared as JSON": lambda: web.Response(text="hello"),
    "another shape": lambda: web.json_response({"models": []}),
    "a list": lambda: web.json_response([]),
}


@pytest.mark.parametrize("answer", STRANGE_ANSWERS.values(), ids=STRANGE_ANSWERS.keys())
async def test_a_server_that_does_not_answer_as_vllm_does_stays_out_until_it_does(
    open_house: OpenHouse, engine: FakeEngine, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine.models = answer
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: it does not", "the log says why")
    assert told(caplog, engine.url, "/v1/models")
    engine.models = None
    await eventually(house.is_ready)


async def test_a_corrupted_policy_is_never_loaded(
    open_house: OpenHouse, engine: FakeEngine, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    weights = settings.state / "policies" / "policy-0000" / "adapter_model.safetensors"
    published = weights.read_bytes()
    weights.write_bytes(published[:-1] + b"\x01")
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: its policy cannot be read", "the log says why")
    assert told(caplog, engine.url, "policy-0000", "sha256", "Restore")
    assert engine.loads == []
    weights.write_bytes(published)
    await eventually(house.is_ready)


async def test_a_policy_outside_the_state_folder_is_never_loaded(
    open_house: OpenHouse, engine: FakeEngine, db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db.execute("UPDATE policies SET path = '../model'")
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: its policy cannot be read", "the log says why")
    assert told(caplog, engine.url, "policy-0000", "outside")
    assert engine.loads == []


async def test_a_policy_whose_folder_is_gone_is_a_problem_and_not_a_crash(
    open_house: OpenHouse, engine: FakeEngine, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = settings.state / "policies" / "policy-0000"
    folder.rename(folder.with_name("elsewhere"))
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: its policy cannot be read", "the log says why")
    assert told(caplog, engine.url, "policy-0000", "missing")
    folder.with_name("elsewhere").rename(folder)
    await eventually(house.is_ready)


async def test_a_record_without_a_policy_says_how_to_start(
    open_house: OpenHouse, engine: FakeEngine, db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db.execute("DELETE FROM policies")
    house = await open_house(engine, ready=False)
    await says(house, "engine 1: its policy cannot be read", "the log says why")
    assert told(caplog, engine.url, "no policy to serve", "nightshift up")


async def test_a_policy_that_cannot_be_read_is_a_problem_and_not_a_crash(
    open_house: OpenHouse, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "adapter_model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(registry, "folder_digest", unreadable)
        house = await open_house(engine, ready=False)
        await says(house, "its policy cannot be read", "the log says why")
        assert told(caplog, engine.url, "Permission denied")
    await eventually(house.is_ready)


async def test_a_policy_that_is_held_is_not_read_again_at_every_look(
    house: House, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(registry, "folder_digest", read.append)
    looks = 0

    def counted() -> web.Response:
        nonlocal looks
        looks += 1
        data = [{"id": name, "root": path, "max_model_len": None} for name, path in engine.adapters.items()]
        return web.json_response({"data": data})

    engine.models = counted
    await eventually(lambda: looks >= 3)
    assert read == []


async def test_a_record_that_cannot_be_read_for_a_while_does_not_end_the_watch(
    house: House, engine: FakeEngine, db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    db.execute("ALTER TABLE policies RENAME TO hidden")
    await eventually(lambda: "its policy cannot be read" in "".join(house.state.engines.problems))
    assert told(caplog, "no such table")
    assert b"no such table" not in (await house.call("GET", "/readyz", role=None)).body
    db.execute("ALTER TABLE hidden RENAME TO policies")
    await eventually(house.is_ready)


async def test_the_operator_is_told_once_of_what_goes_on_and_again_of_what_comes_back(
    house: House, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    for times in (1, 2):
        looks = len(engine.events)
        engine.refuses_warm_up = Refusal(500, "CUDA out of memory")
        engine.adapters.clear()
        await eventually(lambda looks=looks: engine.events[looks:].count("warm policy-0000") >= 3)
        engine.refuses_warm_up = None
        await eventually(house.is_ready)
        assert told(caplog, "CUDA out of memory") == times


async def test_an_engine_that_turns_out_to_lack_the_policy_passes_the_request_on(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    house = await open_house(engine, second_engine, engine={"poll_s": 60.0})
    await eventually(lambda: all(e.ready for e in house.state.engines.engines))
    second_engine.adapters.clear()
    assert {(await house.chat()).status for _ in range(4)} == {200}
    assert "chat policy-0000" not in second_engine.events


# Two engines


async def test_two_engines_share_the_traffic(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    engines = [engine, second_engine]
    house = await open_house(*engines)
    await eventually(lambda: all(e.ready for e in house.state.engines.engines))
    for one in engines:
        one.answer = lambda body: say("One", " two", hold_after=1)
    asking = [asyncio.create_task(house.chat(stream=True)) for _ in range(10)]
    await eventually(lambda: sum(len(one.chats) for one in engines) == 10)
    assert [len(one.chats) for one in engines] == [5, 5]
    for one in engines:
        one.go_on.set()
    assert {answer.streamed() for answer in await asyncio.gather(*asking)} == {"One two"}


async def test_a_refused_connection_moves_the_request_to_the_other_engine(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    house = await open_house(engine, second_engine, engine={"poll_s": 60.0})
    await eventually(lambda: all(e.ready for e in house.state.engines.engines))
    await engine.stop()
    answers = [await house.chat() for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4
    assert len(second_engine.chats) == 4
    assert (await house.call("GET", "/readyz", role=None)).status == 200


async def test_an_engine_out_of_traffic_gets_none(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    engine.refuses_load = Refusal(400, "no")
    house = await open_house(engine, second_engine, ready=False)
    await eventually(house.is_ready)
    assert {(await house.chat()).status for _ in range(5)} == {200}
    assert engine.chats == []
    metrics = (await house.call("GET", "/metrics", role=None)).body.decode()
    assert 'nightshift_engine_ready{engine="1"} 0.0' in metrics
    assert 'nightshift_engine_ready{engine="2"} 1.0' in metrics
    assert engine.url not in metrics, "anybody may read them, and an address may hold a password"


async def test_an_answer_is_bounded_by_the_shortest_context(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    engine.max_model_len, second_engine.max_model_len = 300, 200
    house = await open_house(engine, second_engine)
    await eventually(lambda: all(e.ready for e in house.state.engines.engines))
    await house.chat()
    (chat,) = engine.chats + second_engine.chats
    assert chat.body["max_tokens"] == 200


async def test_a_request_that_ran_on_an_engine_that_died_is_not_sent_again(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine
) -> None:
    house = await open_house(engine, second_engine)
    await eventually(lambda: all(e.ready for e in house.state.engines.engines))
    for one in (engine, second_engine):
        one.answer = lambda body: say("One", die_after=0)
    assert (await house.chat()).status == 502
    assert len(engine.chats) + len(second_engine.chats) == 1


async def test_a_slash_after_the_url_does_no_harm(open_house: OpenHouse, engine: FakeEngine) -> None:
    house = await open_house(engine={"urls": [engine.url + "/"]})
    assert (await house.chat()).status == 200


async def test_readiness_is_a_503_in_openai_s_shape_with_the_engines_beside(open_house: OpenHouse) -> None:
    house = await open_house(ready=False)
    answer = await house.call("GET", "/readyz", role=None)
    assert answer.status == 503
    assert answer.json["error"]["code"] == "engine_not_ready"
    assert answer.json["error"]["engines"] == []
    assert json.loads((await house.call("GET", "/healthz", role=None)).body) == {"status": "ok"}
    assert (await house.call("HEAD", "/healthz", role=None)).status == 200
    assert (await house.call("HEAD", "/readyz", role=None)).status == 503
