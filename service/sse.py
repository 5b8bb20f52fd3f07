"""vLLM's event stream passed on as ours: headers rewritten byte by byte, tokens never re-encoded, the text put
together only after the last one."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

import aiohttp
import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from service.errors import ApiError, engine_failed, rejected_by_engine

_T = TypeVar("_T")


class SendBytes(Protocol):
    """Sends bytes to the client; nothing may follow the `last`."""

    def __call__(self, chunk: bytes, *, last: bool = False) -> Awaitable[None]: ...


DONE = b"data: [DONE]\n\n"
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
"""What is passed on of vLLM's counts."""
_HEAD = re.compile(rb'data: (\{"id":"[^"\\]*","object":"chat\.completion\.chunk","created":(\d+),"model":"[^"\\]*")')


async def read_events(response: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    """The stream's events, without the blank line that ends each, as many at a time as arrived together."""
    rest = b""
    async for data in response.content.iter_any():
        *events, rest = (rest + data).split(b"\n\n")
        if events:
            yield events


class Rewriter:
    """Turns one upstream stream's chunks into ours and remembers them for `transcripts`.

    All chunks of a stream start alike (id, object, created, model), so that head is read once and cut off the rest."""

    def __init__(self, *, id: str, model: str, fingerprint: str | None, index: int | None = None) -> None:
        """`index`: the choice that the upstream's only choice becomes; None keeps the upstream's numbering."""
        self._new_head = {"id": id, "model": model, "system_fingerprint": fingerprint}
        self._index = index
        self._cut = b""
        self._put = b""
        self._choice = b""
        self.events: list[bytes] = []
        self.created = 0
        self.usage: dict[str, int] | None = None
        self.ended = False
        """Whether the upstream said [DONE]: what did not end is not complete."""

    def __call__(self, events: list[bytes]) -> bytes:
        """What to send on for these events; usage and [DONE] are held back. Raises ApiError when the engine says that
        it failed."""
        sent = bytearray()
        for event in events:
            if not event.startswith(b"data: "):
                continue
            if event == b"data: [DONE]":
                self.ended = True
                continue
            if not self._cut:
                self._learn(event)
            if event.startswith(self._cut) and (tail := event[len(self._cut) :]).startswith(self._choice):
                sent += self._put + tail[len(self._choice) :] + b"\n\n"
                self.events.append(event)
                continue
            try:
                sent += self._slowly(event)
            except (ValueError, LookupError, TypeError, AttributeError):
                raise engine_failed("an event of its stream is none of vLLM's") from None
        return bytes(sent)

    def _slowly(self, event: bytes) -> bytes:
        chunk = orjson.loads(event[6:])
        if "error" in chunk:
            message = str(chunk["error"].get("message", "no reason given"))
            if chunk["error"].get("code") == 400:
                raise rejected_by_engine(message)
            raise engine_failed(message[:200])
        if chunk.get("usage"):
            self.usage = {name: int(chunk["usage"][name]) for name in USAGE}
        if not chunk.get("choices"):
            return b""
        # Another version's field order.
        self.events.append(event)
        self.created = chunk["created"]
        chunk |= self._new_head
        if self._index is not None:
            chunk["choices"][0]["index"] = self._index
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _learn(self, event: bytes) -> None:
        match = _HEAD.match(event)
        if match is None:
            self._cut = b"\n"  # starts no event: every chunk takes the slow way
            return
        self.created = int(match[2])
        self._cut = match[0] + b',"choices":[{"index":'
        self._choice = b"" if self._index is None else b"0,"
        head = orjson.dumps(self._new_head)[1:-1]
        self._put = b'data: {"object":"chat.completion.chunk","created":' + match[2] + b"," + head
        self._put += b',"choices":[{"index":' + (b"" if self._index is None else b"%d," % self._index)

    def transcripts(self) -> dict[int, dict[str, Any]]:
        """The finished text of each upstream choice: {index: {"content", "tool_calls", "finish_reason"}}."""
        choices: dict[int, dict[str, Any]] = {}
        for event in self.events:
            for choice in orjson.loads(event[6:])["choices"]:
                said = choices.setdefault(choice["index"], {"content": [], "tool_calls": {}, "finish_reason": None})
                delta = choice["delta"]
                if delta.get("content"):
                    said["content"].append(delta["content"])
                for call in delta.get("tool_calls") or []:
                    whole = said["tool_calls"].setdefault(
                        call["index"], {"type": "function", "function": {"name": "", "arguments": ""}}
                    )
                    whole |= {"id": call["id"]} if call.get("id") else {}
                    for part in ("name", "arguments"):
                        whole["function"][part] += call.get("function", {}).get(part) or ""
                said["finish_reason"] = (
                    end_of(choice.get("finish_reason"), choice.get("stop_reason")) or said["finish_reason"]
                )
        for said in choices.values():
            said["content"] = "".join(said["content"])
            said["tool_calls"] = [call for _, call in sorted(said["tool_calls"].items())] or None
        return choices


def end_of(finish_reason: str | None, stop_reason: int | str | None) -> str | None:
    """Why an answer ended, for the record: to clients one that the request's own `stop` cut off has ended as any other,
    but the model did not end it there, and must not learn to."""
    return "stop_sequence" if finish_reason == "stop" and isinstance(stop_reason, str) else finish_reason


def event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


class ClientGone(Exception):
    """The client closed the connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Do `work`, but stop it, and the generation with it, as soon as the client goes away. Raises ClientGone."""
    working = asyncio.current_task()
    assert working is not None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        working.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work  # in this task: a task of its own would cost every answer two turns of the event loop
    except asyncio.CancelledError:
        if not watcher.done():
            raise  # somebody else stopped us
        working.uncancel()
        raise ClientGone from None
    finally:
        watcher.cancel()


class EventStream(Response):
    """Runs `respond(send)` as a response; what it sends last ends it. An error before the first byte keeps its status;
    a later one becomes an error event, the last of the stream."""

    def __init__(self, respond: Callable[[SendBytes], Coroutine[Any, Any, None]]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        starting = asyncio.Lock()

        async def send_bytes(chunk: bytes, *, last: bool = False) -> None:
            nonlocal started
            if not started:
                # Two answers may begin together, and a client that reads slowly keeps the first one waiting here: the
                # other must not overtake it, and where the first is given up the start is still to be made.
                async with starting:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
            await send({"type": "http.response.body", "body": chunk, "more_body": not last})

        try:
            await unless_gone(receive, self._respond(send_bytes))
        except ClientGone:
            return
        except ApiError as error:
            if not started:
                raise
            await send_bytes(event(error.body), last=True)
