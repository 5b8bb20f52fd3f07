"""Two answers side by side: how they are drawn, what the client sees, what the vote reveals, what goes wrong."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from openai.lib.streaming.chat import AsyncChatCompletionStream

from data.types import Feedback, Role
from service import pairing
from tests.conftest import LIMIT_S, Answer, FakeEngine, House, MakeKey, OpenHouse, Refusal, Reply, eventually, say


def by_seed(body: dict[str, Any]) -> Reply:
    """An answer that tells which seed it was drawn from."""
    return say("seed ", str(body.get("seed")))


FIRST, SECOND = pairing.plan_pair("policy-0000", seed=7, rng=random.Random(0)).seeds
"""The seeds of the answers shown as index 0 and 1 when the first request to `house` brings seed 7."""


def seeds_of(answer: Answer) -> list[int]:
    """The seeds that the two answers of a pair, streamed or not, were drawn from."""
    texts = (
        [answer.streamed(0), answer.streamed(1)]
        if answer.body.startswith(b"data: ")
        else [choice["message"]["content"] for choice in answer.json["choices"]]
    )
    return [int(text.removeprefix("seed ")) for text in texts]


def comparison_of(answer: Answer) -> dict[str, str] | None:
    body = answer.chunks[-1] if answer.body.startswith(b"data: ") else answer.json
    comparison: dict[str, str] | None = body.get("comparison")
    return comparison


# What the client sees


async def test_a_pair_has_two_choices_and_a_comparison(house: House, engine: FakeEngine) -> None:
    engine.answer = by_seed
    answer = await house.chat(feedback="always", seed=7)
    assert answer.status == 200
    body = answer.json
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert seeds_of(answer) == [FIRST, SECOND]
    assert body["system_fingerprint"] is None
    assert body["model"] == "nightshift"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    assert body["comparison"].keys() == {"id", "expires_at"}
    assert body["comparison"]["id"].startswith("cmp_")


@pytest.mark.parametrize("model_first", [False, True])
async def test_a_streamed_pair_ends_with_its_comparison(house: House, engine: FakeEngine, model_first: bool) -> None:
    engine.answer = lambda body: say("seed ", str(body["seed"]), model_first=model_first)
    answer = await house.chat(feedback="always", seed=7, stream=True)
    assert answer.status == 200
    assert seeds_of(answer) == [FIRST, SECOND]
    assert answer.events[-1] == "[DONE]"
    *before, last = answer.chunks
    assert last["choices"] == []
    assert "usage" not in last
    assert last["comparison"].keys() == {"id", "expires_at"}
    assert all("comparison" not in chunk for chunk in before)
    assert {chunk["choices"][0]["index"] for chunk in before} == {0, 1}
    heads = {(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in answer.chunks}
    ((_, kind, created, model, fingerprint),) = heads
    assert (kind, model, fingerprint) == ("chat.completion.chunk", "nightshift", None)
    assert created > 0


async def test_a_streamed_pair_sums_its_usage_when_asked(house: House, engine: FakeEngine) -> None:
    engine.answer = by_seed
    answer = await house.chat(feedback="always", stream=True, stream_options={"include_usage": True})
    last = answer.chunks[-1]
    assert last["usage"] == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
    assert "comparison" in last
    assert all("usage" not in chunk for chunk in answer.chunks[:-1])


async def test_both_answers_of_a_pair_stream_together(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("A1", "A2", hold_after=1) if body["seed"] == FIRST else say("B1", "B2")
    async with house.open_chat(stream=True, feedback="always", seed=7) as response:
        seen = b""
        while not (b"A1" in seen and b"B2" in seen):
            seen += await response.content.readany()
        assert b"A2" not in seen
        engine.go_on.set()
        seen += await response.content.read()
    answer = Answer(200, {}, seen)
    assert (answer.streamed(0), answer.streamed(1)) == ("A1A2", "B1B2")
    assert comparison_of(answer) is not None


@pytest.mark.parametrize("stream", [False, True])
async def test_the_policies_are_hidden_until_the_vote(house: House, engine: FakeEngine, stream: bool) -> None:
    engine.answer = by_seed
    answer = await house.chat(feedback="always", stream=stream)
    assert b"policy-" not in answer.body
    comparison = comparison_of(answer)
    assert comparison is not None
    vote = await house.vote(comparison["id"], "b")
    assert vote.status == 200
    assert vote.json["policies"] == {"a": "policy-0000", "b": "policy-0000"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_pair_is_on_disk_when_the_client_hears_of_it(house: House, engine: FakeEngine, stream: bool) -> None:
    engine.answer = by_seed
    answer = await house.chat(feedback="always", seed=7, stream=stream, user="ada")
    (row,) = house.state.reader.query("SELECT * FROM comparisons")
    assert comparison_of(answer) == {"id": row["id"], "expires_at": row["expires_at"]}
    key = house.keys[Role.USER].id
    assert (row["key_id"], row["kind"]) == (key, "same_policy")
    answers = {completion["id"]: completion for completion in house.state.reader.query("SELECT * FROM completions")}
    assert [answers[row[side]]["answer"] for side in "ab"] == [f"seed {FIRST}", f"seed {SECOND}"]
    assert [json.loads(answers[row[side]]["sampling"])["seed"] for side in "ab"] == [FIRST, SECOND]
    assert {completion["user"] for completion in answers.values()} == {f"{key}/ada"}
    plan = pairing.plan_pair("policy-0000", seed=7, rng=random.Random(0))
    assert row["swapped"] == plan.swapped


async def test_the_two_answers_are_drawn_from_independent_seeds(house: House, engine: FakeEngine) -> None:
    engine.answer = by_seed
    drawn = [seed for _ in range(20) for seed in seeds_of(await house.chat(feedback="always"))]
    assert len(set(drawn)) == 40


async def test_the_user_s_own_seed_repeats_the_same_two_answers(house: House, engine: FakeEngine) -> None:
    engine.answer = by_seed
    drawn = [seeds_of(await house.chat(feedback="always", seed=7, stream=i % 2 == 1)) for i in range(10)]
    assert {frozenset(pair) for pair in drawn} == {frozenset({FIRST, SECOND})}
    assert len({tuple(pair) for pair in drawn}) == 2  # but not always on the same sides
    assert set(seeds_of(await house.chat(feedback="always", seed=8))).isdisjoint({FIRST, SECOND})


async def test_both_answers_are_asked_for_with_the_same_parameters(house: House, engine: FakeEngine) -> None:
    engine.answer = by_seed
    await house.chat(feedback="always", temperature=0.9, logprobs=True)
    first, second = (chat.body for chat in engine.chats)
    assert first.pop("seed") != second.pop("seed")
    assert first == second
    assert first["temperature"] == 0.9


# No comparison


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("texts", [("Same.", "Same."), ("Same old. ", " Same  old.")])
async def test_two_answers_that_read_the_same_are_no_comparison(
    house: House, engine: FakeEngine, stream: bool, texts: tuple[str, str]
) -> None:
    engine.answer = lambda body: say(texts[body["seed"] == FIRST])
    answer = await house.chat(feedback="always", seed=7, stream=stream)
    assert answer.status == 200
    assert comparison_of(answer) is None
    if stream:
        assert answer.streamed(0) == texts[1]
        assert answer.events[-1] == "[DONE]"
    else:
        assert answer.text == texts[1]
        assert answer.json["system_fingerprint"] == "policy-0000"
        assert answer.json["usage"]["prompt_tokens"] == 5
    assert await house.rows("comparisons") == []
    assert [row["status"] for row in await house.rows("completions")] == ["complete"] * 2


async def test_a_stream_without_a_comparison_still_ends_with_the_usage_that_was_asked_for(
    house: House, engine: FakeEngine
) -> None:
    answer = await house.chat(feedback="always", stream=True, stream_options={"include_usage": True})
    assert comparison_of(answer) is None
    assert answer.chunks[-1]["usage"] == {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}
    assert answer.events[-1] == "[DONE]"


SECOND_FAILS = {
    "is refused": Refusal(500, "Internal Server Error"),
    "finds no place": Refusal(503, "The request queue is full."),
    "dies before its first word": Reply(die_after=0),
    "dies on the way": Reply(choices=[["broken", " off"]], die_after=1),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", SECOND_FAILS.values(), ids=SECOND_FAILS.keys())
async def test_a_pair_whose_second_answer_fails_becomes_a_plain_answer(
    house: House, engine: FakeEngine, stream: bool, failure: Reply | Refusal
) -> None:
    engine.answer = lambda body: say("One", " two") if body["seed"] == FIRST else failure
    answer = await house.chat(feedback="always", seed=7, stream=stream)
    assert answer.status == 200
    assert comparison_of(answer) is None
    if stream:
        assert answer.streamed(0) == "One two"
        assert answer.events[-1] == "[DONE]"
        assert all("error" not in chunk for chunk in answer.chunks)
    else:
        assert answer.text == "One two"
        assert answer.json["choices"][0]["index"] == 0
        assert answer.json["system_fingerprint"] == "policy-0000"
        assert answer.json["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    rows = {json.loads(row["sampling"])["seed"]: row for row in await house.rows("completions")}
    assert rows[FIRST]["status"] == "complete"
    if failure == SECOND_FAILS["finds no place"]:
        assert SECOND not in rows, "no answer was begun"
    else:
        assert rows[SECOND]["status"] == "failed"
    if not stream:
        assert answer.json["id"] == rows[FIRST]["id"]
    assert await house.rows("comparisons") == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_pair_whose_second_answer_takes_too_long_becomes_a_plain_answer(
    open_house: OpenHouse, engine: FakeEngine, time_is_up: Callable[[], None], stream: bool
) -> None:
    house = await open_house(engine, chat={"timeout_s": LIMIT_S})
    engine.answer = lambda body: say("One", " two") if body["seed"] == FIRST else say("Too", " slow", hold_after=1)
    asking = asyncio.create_task(house.chat(feedback="always", seed=7, stream=stream))
    await eventually(lambda: len(engine.chats) == 2 and house.state.engines.engines[0].in_flight == 1)
    time_is_up()
    answer = await asking
    assert answer.status == 200
    assert comparison_of(answer) is None
    assert (answer.streamed(0) if stream else answer.text) == "One two"
    rows = {json.loads(row["sampling"])["seed"]: row["status"] for row in await house.rows("completions")}
    assert rows == {FIRST: "complete", SECOND: "aborted"}


async def test_without_streaming_whichever_answer_is_whole_is_given(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: Refusal(500) if body["seed"] == FIRST else say("Two")
    answer = await house.chat(feedback="always", seed=7)
    assert answer.text == "Two"
    assert answer.json["choices"][0]["index"] == 0
    assert comparison_of(answer) is None


@asynccontextmanager
async def openai_s_stream(house: House) -> AsyncIterator[AsyncChatCompletionStream[None]]:
    """The pair that a request with seed 7 brings, by the stream helper of OpenAI's own client."""
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=house.tokens[Role.USER], max_retries=0) as client:
        async with client.chat.completions.stream(
            model="nightshift",
            messages=[{"role": "user", "content": "Hello"}],
            seed=7,
            extra_body={"feedback": "always"},
        ) as stream:
            yield stream


async def test_openai_s_stream_helper_takes_a_pair_whose_second_answer_begins_first(
    house: House, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answer = lambda body: say("Late.") if body["seed"] == FIRST else say("Soon", " enough", hold_after=1)
    chat, begun = house.state.engines.chat, asyncio.Event()

    @asynccontextmanager
    async def late(policy: str, request: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        if json.loads(request)["seed"] == FIRST:
            await begun.wait()
        async with chat(policy, request) as response:
            yield response

    monkeypatch.setattr(house.state.engines, "chat", late)
    async with openai_s_stream(house) as stream:
        async for event in stream:
            if event.type == "content.delta" and event.delta == "Soon":
                begun.set()
                engine.go_on.set()
        whole = await stream.get_final_completion()
    assert [choice.message.content for choice in whole.choices] == ["Late.", "Soon enough"]
    assert [choice.message.role for choice in whole.choices] == ["assistant", "assistant"]


async def test_a_stream_whose_first_answer_fails_is_an_error_and_stops_the_second(
    house: House, engine: FakeEngine
) -> None:
    engine.answer = lambda body: (
        say("One", " two", error_after=1) if body["seed"] == FIRST else say("Two", " and", hold_after=1)
    )
    answer = await house.chat(feedback="always", seed=7, stream=True)
    assert answer.status == 200
    assert json.loads(answer.events[-1])["error"]["code"] == "engine_failed"
    await eventually(lambda: [chat.cut_off for chat in engine.chats if chat.body["seed"] == SECOND] == [True])
    rows = {json.loads(row["sampling"])["seed"]: row["status"] for row in await house.rows("completions")}
    assert rows == {FIRST: "failed", SECOND: "aborted"}


async def test_a_client_that_leaves_while_a_failed_pair_is_put_away_takes_nothing_from_the_record(
    house: House, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answer = lambda body: (
        say("One", " two", error_after=1) if body["seed"] == FIRST else say("Two", " and", hold_after=1)
    )
    chat, closing = house.state.engines.chat, asyncio.Event()

    @asynccontextmanager
    async def slow_to_close(policy: str, request: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        async with chat(policy, request) as response:
            try:
                yield response
            finally:
                if json.loads(request)["seed"] == SECOND:
                    closing.set()
                    await asyncio.sleep(60)

    monkeypatch.setattr(house.state.engines, "chat", slow_to_close)
    async with house.open_chat(stream=True, feedback="always", seed=7):
        await closing.wait()

    async def logged() -> bool:
        rows = {json.loads(row["sampling"])["seed"]: row["status"] for row in await house.rows("completions")}
        return rows == {FIRST: "failed", SECOND: "aborted"}

    await eventually(logged)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_pair_whose_two_answers_fail_is_an_error(house: House, engine: FakeEngine, stream: bool) -> None:
    engine.answer = lambda body: Refusal(500)
    answer = await house.chat(feedback="always", stream=stream)
    assert answer.status == 502
    assert answer.json["error"]["code"] == "engine_failed"
    statuses = [row["status"] for row in await house.rows("completions")]
    assert statuses in (["failed", "failed"], ["failed", "aborted"])  # a stream does not wait for the second


async def test_a_pair_that_the_engine_refuses_is_400_in_its_words(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: Refusal(400, "maximum context length is 64")
    for stream in (False, True):
        answer = await house.chat(feedback="always", stream=stream)
        assert answer.status == 400
        assert answer.json["error"]["code"] == "rejected_by_engine"


# Whether to ask


async def asked(house: House, **parameters: Any) -> bool:
    answer = await house.chat(**parameters)
    assert answer.status == 200
    await house.rows("completions")  # what is logged later decides about the next
    return "comparison" in answer.json


EAGER = {"rate": 1.0, "cooldown_turns": 0, "daily_cap": 1000}


async def test_off_never_asks_and_always_always_does(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = by_seed
    never = await open_house(engine, comparisons={"rate": 0.0, "daily_cap": 0, "cooldown_turns": 1000})
    assert [await asked(never, feedback="always") for _ in range(5)] == [True] * 5
    eager = await open_house(engine, comparisons=EAGER)
    assert [await asked(eager, feedback="off") for _ in range(5)] == [False] * 5


@pytest.mark.parametrize("default", list(Feedback))
async def test_without_feedback_the_key_s_default_holds(
    open_house: OpenHouse, engine: FakeEngine, make_key: MakeKey, default: Feedback
) -> None:
    engine.answer = by_seed
    eager = await open_house(engine, comparisons=EAGER)
    never = await open_house(engine, comparisons={"rate": 0.0})
    _, token = make_key(feedback=default)
    assert await asked(eager, token=token) == (default is not Feedback.OFF)
    assert await asked(never, token=token) == (default is Feedback.ALWAYS)
    assert not await asked(eager, token=token, feedback="off")


async def test_auto_asks_at_its_rate(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = by_seed
    house = await open_house(engine, comparisons=EAGER | {"rate": 0.3})
    count = sum([await asked(house, feedback="auto") for _ in range(100)])
    assert 15 <= count <= 45  # chance is seeded; 0.1 % of seeds fall outside


async def test_auto_waits_some_turns_after_a_comparison(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = by_seed
    house = await open_house(engine, comparisons=EAGER | {"cooldown_turns": 3})
    turns = [await asked(house, feedback="auto") for _ in range(9)]
    assert turns == [True, False, False, False, True, False, False, False, True]


async def test_answers_that_broke_off_do_not_count_as_turns(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = by_seed
    house = await open_house(engine, comparisons=EAGER | {"cooldown_turns": 1})
    assert await asked(house, feedback="auto")
    engine.answer = lambda body: Refusal(500)
    assert (await house.chat(feedback="off")).status == 502
    engine.answer = by_seed
    assert [await asked(house, feedback="auto") for _ in range(2)] == [False, True]


async def test_auto_stops_at_the_daily_cap(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = by_seed
    house = await open_house(engine, comparisons=EAGER | {"daily_cap": 2})
    assert [await asked(house, feedback="auto") for _ in range(4)] == [True, True, False, False]
    yesterday = "UPDATE comparisons SET created_at = '2020-01-01T00:00:00.000Z'"
    await house.state.write(lambda db: db.execute(yesterday))
    assert await asked(house, feedback="auto")


async def test_each_end_user_has_a_cap_and_a_cool_down_of_their_own(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = by_seed
    house = await open_house(engine, comparisons=EAGER | {"daily_cap": 1})
    people = ["ada", "bob", "ada", "bob", "ada/bob"]
    assert [await asked(house, feedback="auto", user=name) for name in people] == [True, True, False, False, True]
    assert await asked(house, feedback="auto")
    assert await asked(house, feedback="auto", role=Role.RATER, user="ada")


async def test_auto_never_asks_at_temperature_zero(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = by_seed
    house = await open_house(engine, comparisons=EAGER)
    assert not await asked(house, feedback="auto", temperature=0)
    assert await asked(house, feedback="auto", temperature=0.1)
    assert await asked(house, feedback="always", temperature=0)


@pytest.mark.parametrize(
    "parameters",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
    ],
    ids=["n", "tools", "response_format"],
)
async def test_auto_leaves_alone_what_cannot_be_compared(
    open_house: OpenHouse, engine: FakeEngine, make_key: MakeKey, parameters: dict[str, Any]
) -> None:
    engine.answer = by_seed
    house = await open_house(engine, comparisons=EAGER)
    assert not await asked(house, feedback="auto", **parameters)
    _, token = make_key(feedback=Feedback.ALWAYS)
    assert not await asked(house, token=token, **parameters)
    assert await asked(house, feedback="auto", n=1, tools=[])


async def test_pairs_of_many_users_at_once_do_not_mix(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(body["messages"][0]["content"], f" {body['seed']}")

    async def one(i: int) -> None:
        messages = [{"role": "user", "content": f"<{i}>"}]
        answer = await house.chat(feedback="always", stream=True, user=f"user{i}", messages=messages)
        for index in (0, 1):
            assert answer.streamed(index).startswith(f"<{i}> ")
        comparison = comparison_of(answer)
        assert comparison is not None
        assert (await house.vote(comparison["id"], "a")).status == 200

    await asyncio.gather(*(one(i) for i in range(25)))
    assert len(await house.rows("comparisons")) == 25
    assert len(await house.rows("votes")) == 25
