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
from service.errors import ApiError
from tests.conftest import Reply, say, stream_chunks

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


def test_an_error_event_is_an_error_in_the_engine_s_words() -> None:
    event = b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n'
    with pytest.raises(ApiError) as caught:
        rewrite([STREAM.removesuffix(DONE), event], rewriter())
    assert caught.value.status_code == 502
    assert "EngineCore died" in caught.value.body["error"]["message"]


def test_an_error_that_runs_on_is_cut_short() -> None:
    event = b'data: {"error": {"message": "' + b"x" * 5000 + b'"}}\n\n'
    with pytest.raises(ApiError) as caught:
        rewrite([event], rewriter())
    assert len(caught.value.body["error"]["message"]) < 400
