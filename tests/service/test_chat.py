"""Plain answers: what the client gets, what the engine was asked, what the record keeps."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from data.types import Role
from service import sse
from tests.conftest import CREATED, Answer, FakeEngine, House, OpenHouse, Reply, eventually, say, stream_chunks

LOGPROBS = {"content": [{"token": "Hi", "logprob": -0.25, "bytes": [72, 105], "top_logprobs": []}]}

ANSWERS = {
    "words": say("Hi", " there"),
    "other scripts": say("Grüße", " 你好", " 🌙", "\u2028"),
    "what JSON escapes": say('"quoted"', "\\n\n\t", "\x00", "</script>"),
    "events within the text": say('data: {"choices":[{"index":0', "\n\n", "data: [DONE]\n\n"),
    "log probabilities": say("Hi", logprobs=LOGPROBS),
    "two choices": Reply(choices=[["One", " and"], ["Two"]]),
    "cut at the limit": say("Hi", finish_reason="length"),
    "nothing at all": say(""),
    "another field order": say("Hi", " there", model_first=True),
    "two choices in another field order": Reply(choices=[["One", " and"], ["Two"]], model_first=True),
}


def without_head(chunk: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chunk.items() if name not in ("id", "model", "system_fingerprint")}


# What the client gets


async def test_an_answer_has_openai_s_shape_and_nothing_of_vllm_s(house: House) -> None:
    answer = await house.chat()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    body = answer.json
    assert body.pop("id").startswith("cpl_")
    assert body == {
        "object": "chat.completion",
        "created": CREATED,
        "model": "nightshift",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi there.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
        "system_fingerprint": "policy-0000",
    }


@pytest.mark.parametrize("reply", ANSWERS.values(), ids=ANSWERS.keys())
async def test_an_answer_is_what_the_engine_said(house: House, engine: FakeEngine, reply: Reply) -> None:
    engine.answer = lambda body: reply
    body = (await house.chat(n=len(reply.choices))).json
    assert [choice["message"]["content"] for choice in body["choices"]] == ["".join(p) for p in reply.choices]
    assert [choice["index"] for choice in body["choices"]] == list(range(len(reply.choices)))
    assert {choice["finish_reason"] for choice in body["choices"]} == {reply.finish_reason}
    assert all(choice["logprobs"] == reply.logprobs for choice in body["choices"])


@pytest.mark.parametrize("reply", ANSWERS.values(), ids=ANSWERS.keys())
async def test_a_stream_is_what_the_engine_said_under_our_names(house: House, engine: FakeEngine, reply: Reply) -> None:
    engine.answer = lambda body: reply
    answer = await house.chat(stream=True, n=len(reply.choices))
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.events[-1] == "[DONE]"
    upstream = [json.loads(event[6:]) for part in stream_chunks("policy-0000", reply) for event in part]
    assert [without_head(chunk) for chunk in answer.chunks] == [without_head(chunk) for chunk in upstream]
    heads = {(chunk["id"], chunk["model"], chunk["system_fingerprint"]) for chunk in answer.chunks}
    ((id, model, fingerprint),) = heads
    assert id.startswith("cpl_")
    assert (model, fingerprint) == ("nightshift", "policy-0000")


async def test_a_stream_s_tokens_are_not_encoded_anew(house: House, engine: FakeEngine) -> None:
    reply = say("Grüße", " \u2028", "\x7f", logprobs=LOGPROBS)
    engine.answer = lambda body: reply
    answer = await house.chat(stream=True)
    upstream = [event.decode() for part in stream_chunks("policy-0000", reply) for event in part]
    tails = [event.partition('"choices":')[2].rstrip("\n") for event in upstream]
    assert [event.partition('"choices":')[2] for event in answer.events[:-1]] == tails


async def test_a_stream_names_neither_the_engine_s_id_nor_its_fingerprint(house: House) -> None:
    answer = await house.chat(stream=True, stream_options={"include_usage": True})
    assert b"chatcmpl-" not in answer.body
    assert b"vllm" not in answer.body


async def test_usage_is_streamed_only_when_asked_for(house: House) -> None:
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        answer = await house.chat(stream=True, **options)
        assert all("usage" not in chunk for chunk in answer.chunks)
    answer = await house.chat(stream=True, stream_options={"include_usage": True})
    assert answer.events[-1] == "[DONE]"
    *before, last = answer.chunks
    assert all("usage" not in chunk for chunk in before)
    assert last == {
        "id": before[0]["id"],
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": "nightshift",
        "system_fingerprint": "policy-0000",
        "choices": [],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


@pytest.mark.parametrize("model_first", [False, True])
async def test_all_chunks_of_a_stream_have_one_time(house: House, engine: FakeEngine, model_first: bool) -> None:
    engine.answer = lambda body: say("Hi", model_first=model_first)
    answer = await house.chat(stream=True, stream_options={"include_usage": True})
    assert {chunk["created"] for chunk in answer.chunks} == {CREATED}


async def test_a_stream_arrives_token_by_token(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("One", " two", hold_after=1)
    async with house.open_chat(stream=True) as response:
        seen = b""
        while b"One" not in seen:
            seen += await response.content.readany()
        assert b" two" not in seen
        assert response.headers["X-Accel-Buffering"] == "no"
        engine.go_on.set()
        seen += await response.content.read()
    assert b" two" in seen
    assert seen.endswith(b"data: [DONE]\n\n")


async def test_tool_calls_are_passed_on_in_both_modes(house: House, engine: FakeEngine) -> None:
    whole = [{"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}]
    engine.answer = lambda body: Reply(tool_calls=whole, finish_reason="tool_calls")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    (choice,) = (await house.chat(tools=tools, tool_choice="auto")).json["choices"]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": whole}
    assert choice["finish_reason"] == "tool_calls"
    deltas = [{"index": 0, **whole[0]}]
    engine.answer = lambda body: Reply(tool_calls=deltas, finish_reason="tool_calls")
    answer = await house.chat(tools=tools, stream=True)
    assert answer.chunks[1]["choices"][0]["delta"] == {"tool_calls": deltas}


async def test_reasoning_is_passed_on_where_there_is_any(house: House, engine: FakeEngine) -> None:
    (choice,) = (await house.chat()).json["choices"]
    assert "reasoning" not in choice["message"]
    engine.answer = lambda body: say("42", reasoning="6 times 7")
    (choice,) = (await house.chat(reasoning_effort="high")).json["choices"]
    assert choice["message"]["reasoning"] == "6 times 7"


async def test_models_lists_the_one_name_that_clients_use(house: House) -> None:
    body = (await house.call("GET", "/v1/models")).json
    assert [model["id"] for model in body["data"]] == ["nightshift"]
    assert (await house.call("GET", "/v1/models/nightshift")).json == body["data"][0]
    unknown = await house.call("GET", "/v1/models/gpt-5")
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")


async def test_what_a_model_that_was_cut_off_while_it_thought_said_may_be_sent_back(
    house: House, engine: FakeEngine
) -> None:
    question = {"role": "user", "content": "Hello"}
    answer = await house.chat(messages=[question, {"role": "assistant", "content": None}, question])
    assert answer.status == 200
    assert engine.chats[-1].body["messages"][1] == {"role": "assistant", "content": ""}


async def test_the_model_s_name_can_be_set(open_house: OpenHouse, engine: FakeEngine) -> None:
    house = await open_house(engine, chat={"model_name": "owl"})
    for stream in (False, True):
        answer = await house.chat(model="owl", stream=stream)
        assert answer.status == 200
        assert (answer.chunks if stream else [answer.json])[0]["model"] == "owl"
    assert (await house.chat(model="nightshift")).status == 404


# What the engine is asked


async def test_every_request_names_the_policy_and_its_priority(house: House, engine: FakeEngine) -> None:
    await house.chat()
    await house.chat(stream=True)
    hello = [{"role": "user", "content": "Hello"}]
    plain = {"model": "policy-0000", "messages": hello, "max_tokens": 512, "priority": 0}
    streamed = plain | {"stream": True, "stream_options": {"include_usage": True}}
    assert [chat.body for chat in engine.chats] == [plain, streamed]


async def test_the_engine_gets_its_own_key_and_not_the_client_s(open_house: OpenHouse, engine: FakeEngine) -> None:
    house = await open_house(engine, engine={"api_key": "engine-secret"})
    await house.chat()
    (chat,) = engine.chats
    assert chat.headers["authorization"] == "Bearer engine-secret"
    assert house.tokens[Role.USER] not in str(chat.headers)


async def test_without_a_length_the_answer_is_bounded_by_the_cap_and_the_context(
    open_house: OpenHouse, engine: FakeEngine
) -> None:
    engine.max_model_len = 100
    house = await open_house(engine)
    await house.chat()
    await house.chat(max_tokens=7)
    await house.chat(max_completion_tokens=8)
    asked = [(chat.body.get("max_tokens"), chat.body.get("max_completion_tokens")) for chat in engine.chats]
    assert asked == [(100, None), (7, None), (None, 8)]


async def test_messages_are_passed_on_without_what_the_schema_does_not_know(house: House, engine: FakeEngine) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Look!"}], "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning": "hm"},
        {"role": "tool", "content": "a star", "tool_call_id": "call_1"},
        {"role": "developer", "content": "Be brief."},
    ]
    assert (await house.chat(messages=messages)).status == 200
    messages[2] = {"role": "assistant", "tool_calls": [call]}
    assert engine.chats[0].body["messages"] == messages


# What the record keeps


async def test_an_answer_is_kept_with_all_there_is_to_know(house: House) -> None:
    answer = await house.chat(temperature=0.5, user="ada")
    (row,) = await house.rows("completions")
    key = house.keys[Role.USER].id
    assert row["id"] == answer.json["id"]
    assert (row["key_id"], row["user"]) == (key, f"{key}/ada")
    assert json.loads(row["messages"]) == [{"role": "user", "content": "Hello"}]
    assert (row["answer"], row["tool_calls"], row["finish_reason"]) == ("Hi there.", None, "stop")
    assert (row["policy"], row["status"]) == ("policy-0000", "complete")
    assert json.loads(row["sampling"]) == {"temperature": 0.5, "max_tokens": 512}
    assert (row["prompt_tokens"], row["completion_tokens"]) == (5, 3)
    assert row["first_token_ms"] is None
    assert row["total_ms"] > 0


async def test_a_streamed_answer_is_kept_as_the_whole_it_adds_up_to(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("Grüße", ",", " 你好", finish_reason="length")
    answer = await house.chat(stream=True, seed=3)
    (row,) = await house.rows("completions")
    assert row["id"] == answer.chunks[0]["id"]
    assert (row["answer"], row["finish_reason"], row["status"]) == ("Grüße, 你好", "length", "complete")
    assert json.loads(row["sampling"]) == {"seed": 3, "max_tokens": 512}
    assert (row["prompt_tokens"], row["completion_tokens"]) == (5, 3)
    assert 0 < row["first_token_ms"] <= row["total_ms"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("reason", "recorded"), [("END", "stop_sequence"), (151645, "stop"), (None, "stop")])
async def test_an_answer_that_the_request_s_stop_cut_off_is_told_apart_on_record(
    house: House, engine: FakeEngine, stream: bool, reason: str | int | None, recorded: str
) -> None:
    engine.answer = lambda body: say("One, two", finish_reason="stop", stop_reason=reason)
    answer = await house.chat(stream=stream, stop=["END"])
    ends = [c["finish_reason"] for chunk in (answer.chunks if stream else [answer.json]) for c in chunk["choices"]]
    assert ends[-1] == "stop"
    (row,) = await house.rows("completions")
    assert row["finish_reason"] == recorded


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model_first", [False, True])
async def test_each_of_two_choices_is_kept(house: House, engine: FakeEngine, stream: bool, model_first: bool) -> None:
    engine.answer = lambda body: Reply(choices=[["One", " and"], ["Two"]], model_first=model_first)
    answer = await house.chat(n=2, stream=stream)
    rows = await house.rows("completions")
    assert [row["answer"] for row in rows] == ["One and", "Two"]
    assert [row["completion_tokens"] for row in rows] == [None, None]
    assert rows[0]["id"] == (answer.chunks[0] if stream else answer.json)["id"]
    assert len({row["id"] for row in rows}) == 2


async def test_tool_calls_are_put_together_from_their_deltas(house: House, engine: FakeEngine) -> None:
    deltas = [
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look"}},
        {"index": 0, "function": {"arguments": '{"at": '}},
        {"index": 1, "id": "call_2", "type": "function", "function": {"name": "wait", "arguments": ""}},
        {"index": 0, "function": {"arguments": '"sky"}'}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]
    engine.answer = lambda body: Reply(tool_calls=deltas, finish_reason="tool_calls")
    await house.chat(stream=True, tools=[{"type": "function", "function": {"name": "look"}}])
    (row,) = await house.rows("completions")
    assert (row["answer"], row["finish_reason"]) == ("", "tool_calls")
    assert json.loads(row["tool_calls"]) == [
        {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "wait", "arguments": "{}"}},
    ]


async def test_the_turns_of_one_conversation_are_kept_together(house: House) -> None:
    def user(content: str) -> dict[str, str]:
        return {"role": "user", "content": content}

    first = [{"role": "system", "content": "Be kind."}, user("Hello")]
    second = [*first, {"role": "assistant", "content": "Hi there."}, user("Tell me more")]
    other = [first[0], user("Good evening")]
    for messages in (first, second, other):
        await house.chat(messages=messages)
    await house.chat(messages=first, user="ada")
    conversations = [row["conversation"] for row in await house.rows("completions")]
    assert conversations[0] == conversations[1]
    assert len(set(conversations)) == 3


async def test_metadata_is_taken_and_passed_on_to_nobody(house: House, engine: FakeEngine) -> None:
    assert (await house.chat(metadata={"page": "7"}, user="ada", feedback="off")).status == 200
    (row,) = await house.rows("completions")
    assert json.loads(row["sampling"]) == {"max_tokens": 512}
    assert engine.chats[0].body.keys() == {"model", "messages", "max_tokens", "priority"}


async def test_what_a_stream_said_is_read_for_the_record_after_the_client_has_it_all(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(self: sse.Rewriter) -> None:
        raise ValueError("no record of this one")

    monkeypatch.setattr(sse.Rewriter, "transcripts", unreadable)
    answer = await house.chat(stream=True, stream_options={"include_usage": True})
    assert answer.streamed() == "Hi there."
    assert answer.chunks[-1]["usage"]["completion_tokens"] == 3
    assert answer.events[-1] == "[DONE]"
    await eventually(lambda: "no record of this one" in caplog.text)


# A client that goes away


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("feedback", ["off", "always"])
async def test_a_client_that_leaves_a_stream_stops_the_generation(
    house: House, engine: FakeEngine, caplog: pytest.LogCaptureFixture, feedback: str
) -> None:
    engine.answer = lambda body: say("One", " two", hold_after=1)
    answers = 2 if feedback == "always" else 1
    async with house.open_chat(stream=True, feedback=feedback) as response:
        seen = b""
        while seen.count(b"One") < answers:
            seen += await response.content.readany()
    await eventually(lambda: [chat.cut_off for chat in engine.chats] == [True] * answers)
    rows = await house.rows("completions")
    assert [(row["status"], row["answer"], row["finish_reason"]) for row in rows] == [
        ("aborted", "One", None)
    ] * answers
    assert await house.rows("comparisons") == []
    assert all(engine.in_flight == 0 for engine in house.state.engines.engines)


@pytest.mark.parametrize("feedback", ["off", "always"])
async def test_a_client_that_leaves_without_streaming_stops_the_generation(
    house: House, engine: FakeEngine, caplog: pytest.LogCaptureFixture, feedback: str
) -> None:
    engine.answer = lambda body: Reply(hold_after=0)
    answers = 2 if feedback == "always" else 1
    asking = asyncio.create_task(house.chat(feedback=feedback))
    await eventually(lambda: len(engine.chats) == answers)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await eventually(lambda: [chat.cut_off for chat in engine.chats] == [True] * answers)
    await eventually(lambda: all(engine.in_flight == 0 for engine in house.state.engines.engines))
    rows = await house.rows("completions")
    assert [(row["status"], row["answer"]) for row in rows] == [("aborted", "")] * answers
    assert await house.rows("comparisons") == []
    assert errors_in(caplog) == []


async def test_a_client_that_leaves_before_the_first_token_stops_the_generation(
    house: House, engine: FakeEngine
) -> None:
    engine.answer = lambda body: say("One", hold_after=0)
    async with house.open_chat(stream=True):
        await eventually(lambda: engine.chats)
    await eventually(lambda: engine.chats[0].cut_off)
    (row,) = await house.rows("completions")
    assert (row["status"], row["answer"]) == ("aborted", "")


async def test_one_client_that_leaves_does_not_disturb_the_others(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("One", " two", hold_after=1)
    others = [asyncio.create_task(house.chat(stream=True)) for _ in range(5)]
    async with house.open_chat(stream=True) as response:
        await response.content.readany()
    await eventually(lambda: sum(chat.cut_off for chat in engine.chats) == 1 and len(engine.chats) == 6)
    engine.go_on.set()
    answers: list[Answer] = await asyncio.gather(*others)
    assert [answer.streamed() for answer in answers] == ["One two"] * 5
    statuses = [row["status"] for row in await house.rows("completions")]
    assert sorted(statuses) == ["aborted"] + ["complete"] * 5


async def test_many_chats_at_once_each_get_their_own_answer(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(*(body["messages"][0]["content"] + str(i) for i in range(20)))

    async def one(name: str) -> bool:
        answer = await house.chat(stream=True, messages=[{"role": "user", "content": name}])
        return answer.streamed() == "".join(f"{name}{i}" for i in range(20))

    assert all(await asyncio.gather(*(one(f"<{i}>") for i in range(30))))
    assert len(await house.rows("completions")) == 30


async def test_an_answer_read_slowly_is_whole(house: House, engine: FakeEngine) -> None:
    pieces = ["x" * 1000] * 500
    engine.answer = lambda body: say(*pieces)
    seen = bytearray()
    async with house.open_chat(stream=True) as response:
        assert isinstance(response, aiohttp.ClientResponse)
        await asyncio.sleep(0.05)
        async for part in response.content.iter_any():
            seen += part
    assert Answer(200, {}, bytes(seen)).streamed() == "".join(pieces)
