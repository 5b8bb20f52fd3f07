"""The rewriting of vLLM's events, whatever way the network cuts them."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import sse
from service.errors import ApiError, engine_failed
from tests.conftest import Reply, eventually, say, stream_chunks

DONE = b"data: [DONE]\n\n"
REPLY = Reply(choices=[["One", " é", "\n\n"], ["Two", " 🌙"]])
STREAM = b"".join(event for part in stream_chunks("policy-0000", REPLY) for event in part) + DONE


class Upstream:
    """As much of aiohttp's response as is read: bytes, cut where the network cut them."""

    def __init__(self, parts: list[bytes]) -> None:
        self.content = self
        self._parts = parts

    async def iter_any(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part


def rewriter(index: int | None = None) -> sse.Rewriter:
    return sse.Rewriter(id="cpl_1", model="nightshift", fingerprint=None, index=index)


def rewrite(parts: list[bytes], rewriter: sse.Rewriter) -> bytes:
    async def all_of_it() -> bytes:
        response: Any = Upstream(parts)
        return b"".join([rewriter(events) async for events in sse.read_events(response)])

    return asyncio.run(all_of_it())


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12))
def test_where_the_network_cuts_a_stream_makes_no_difference(cuts: list[int]) -> None:
    places = [0, *sorted(set(cuts)), len(STREAM)]
    parts = [STREAM[start:end] for start, end in pairwise(places)]
    whole, cut = rewriter(), rewriter()
    assert rewrite(parts, cut) == rewrite([STREAM], whole)
    assert cut.transcripts() == whole.transcripts()
    assert cut.ended


def test_a_transcript_is_the_whole_of_each_choice() -> None:
    done = rewriter()
    rewrite([STREAM], done)
    nothing_called = {"tool_calls": None, "finish_reason": "stop"}
    assert done.transcripts() == {
        0: {"content": "One é\n\n"} | nothing_called,
        1: {"content": "Two 🌙"} | nothing_called,
    }


def test_done_is_held_back_and_remembered() -> None:
    unended = rewriter()
    rewrite([STREAM.removesuffix(DONE)], unended)
    assert not unended.ended
    ended = rewriter()
    assert DONE not in rewrite([STREAM], ended)
    assert ended.ended


@pytest.mark.parametrize("model_first", [False, True])
def test_the_only_choice_can_become_another(model_first: bool) -> None:
    reply = say("One", ' {"index":0}', model_first=model_first)
    stream = b"".join(event for part in stream_chunks("policy-0000", reply) for event in part)
    second = rewriter(index=1)
    sent = rewrite([stream], second)
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in sent.split(b"\n\n")[:-1]]
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {1}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == 'One {"index":0}'
    assert second.transcripts()[0]["content"] == 'One {"index":0}'


def test_both_field_orders_are_rewritten_to_the_same() -> None:
    both = []
    for model_first in (False, True):
        reply = say("One", " two", model_first=model_first)
        stream = b"".join(event for part in stream_chunks("policy-0000", reply) for event in part)
        sent = rewrite([stream], rewriter(index=1))
        both.append([json.loads(event.removeprefix(b"data: ")) for event in sent.split(b"\n\n")[:-1]])
    assert both[0] == both[1]


def test_comments_and_blank_events_are_left_out() -> None:
    assert rewrite([b": ping\n\n", b"\n\n", STREAM], rewriter()) == rewrite([STREAM], rewriter())


# The response


class Server:
    """As much of uvicorn as a response sees: `send` waits while the client reads nothing, and a body before the start
    is an error."""

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.left = asyncio.Event()
        self.waiting = 0
        self.status: int | None = None
        self.body = b""
        self.ended = False

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.waiting += 1
        await self.reading.wait()
        self.waiting -= 1
        if message["type"] == "http.response.start":
            assert self.status is None, "started twice"
            self.status = message["status"]
            return
        assert self.status is not None, "a body before the start"
        assert not self.ended, "a body after the end"
        self.body += message["body"]
        self.ended = not message["more_body"]


def answering(server: Server, respond: Any) -> asyncio.Task[None]:
    return asyncio.create_task(sse.EventStream(respond)({"type": "http"}, server.receive, server.send))


async def two(send: Any, *, second_fails: asyncio.Event | None = None) -> None:
    """Two candidates that have their first words at once; as in a pair, one that fails stops the other."""

    async def fail() -> None:
        assert second_fails is not None
        await second_fails.wait()
        raise engine_failed("it died")

    tasks = [asyncio.create_task(send(b"one")), asyncio.create_task(fail() if second_fails else send(b"two"))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await send(b"end", last=True)


async def test_of_two_that_begin_together_neither_overtakes_the_start() -> None:
    server = Server()
    answer = answering(server, two)
    await eventually(lambda: server.waiting)
    await asyncio.sleep(0.01)  # the other is there by now too
    server.reading.set()
    await answer
    assert server.status == 200
    assert server.body in (b"onetwoend", b"twooneend")
    assert server.ended


async def test_a_start_that_was_given_up_is_made_by_who_comes_next() -> None:
    server = Server()

    async def respond(send: Any) -> None:
        first = asyncio.create_task(send(b"one"))
        await eventually(lambda: server.waiting)
        second = asyncio.create_task(send(b"two"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        server.reading.set()
        await second
        await send(b"end", last=True)

    await asyncio.wait_for(answering(server, respond), 5)
    assert (server.status, server.body, server.ended) == (200, b"twoend", True)


async def test_an_error_before_the_start_went_out_keeps_its_status() -> None:
    server, fails = Server(), asyncio.Event()
    answer = answering(server, lambda send: two(send, second_fails=fails))
    await eventually(lambda: server.waiting)
    fails.set()
    with pytest.raises(ApiError, match="broke off"):
        await answer
    assert server.status is None


async def test_an_error_after_the_start_is_the_last_event() -> None:
    server, fails = Server(), asyncio.Event()
    server.reading.set()
    answer = answering(server, lambda send: two(send, second_fails=fails))
    await eventually(lambda: server.body)
    fails.set()
    await answer
    assert server.status == 200
    assert server.body.startswith(b'onedata: {"error":{"message":"The engine broke off')
    assert server.ended


async def test_a_client_that_leaves_while_two_wait_to_start_ends_both() -> None:
    before = asyncio.all_tasks()
    server = Server()
    answer = answering(server, two)
    await eventually(lambda: server.waiting)
    server.left.set()
    await asyncio.wait_for(answer, 5)
    assert server.status is None
    assert asyncio.all_tasks() <= before


# What goes wrong


@pytest.mark.parametrize(
    "event",
    [
        b"data: {",
        b"data: []",
        b"data: 7",
        b'data: {"error": "died"}',
        b'data: {"choices": [7], "created": 1}',
        b'data: {"choices": [{"index": 0}]}',
        b'data: {"choices": [], "usage": {"prompt_tokens": 1}}',
        b'data: {"choices": [], "usage": 7}',
    ],
)
def test_an_event_that_is_none_of_vllm_s_is_a_failure_of_the_engine(event: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        rewrite([event + b"\n\n"], rewriter(index=1))
    assert caught.value.status_code == 502


def test_an_error_event_is_an_error_in_the_engine_s_words() -> None:
    event = b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n'
    with pytest.raises(ApiError) as caught:
        rewrite([STREAM.removesuffix(DONE), event], rewriter())
    assert caught.value.status_code == 502
    assert "EngineCore died" in caught.value.body["error"]["message"]


def test_an_error_event_that_is_the_client_s_fault_is_400() -> None:
    event = b'data: {"error": {"message": "logit_bias is out of the vocabulary", "code": 400}}\n\n'
    with pytest.raises(ApiError) as caught:
        rewrite([event], rewriter())
    assert caught.value.status_code == 400
    assert caught.value.body["error"]["message"] == "logit_bias is out of the vocabulary"


def test_an_error_that_runs_on_is_cut_short() -> None:
    event = b'data: {"error": {"message": "' + b"x" * 5000 + b'"}}\n\n'
    with pytest.raises(ApiError) as caught:
        rewrite([event], rewriter())
    assert len(caught.value.body["error"]["message"]) < 400
