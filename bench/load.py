"""The load: many HTTP/1.1 connections on one event loop, each request timed. Nothing here knows what is asked."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools
import orjson


@dataclass(slots=True)
class Exchange:
    """One request and its response; times are `time.perf_counter()`, seconds."""

    sent: float
    first_byte: float = 0.0
    """Of the body; the head says nothing yet."""
    last_byte: float = 0.0
    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    pieces: list[float] = field(default_factory=list)
    """When each piece of the body came."""

    @property
    def first_byte_s(self) -> float:
        return self.first_byte - self.sent

    @property
    def total_s(self) -> float:
        return self.last_byte - self.sent


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[Exchange] | None = None
        self.open = True

    def request(self, data: bytes) -> asyncio.Future[Exchange]:
        self._done = asyncio.get_running_loop().create_future()
        self._exchange = Exchange(time.perf_counter())
        self._transport.write(data)
        return self._done

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._arrived = time.perf_counter()
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._done and not self._done.done():
            self._done.set_exception(error or ConnectionResetError("the server closed the connection"))

    def close(self) -> None:
        self._transport.close()

    # What the parser calls

    def on_headers_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._exchange.first_byte:
            self._exchange.first_byte = self._arrived
        self._exchange.body += body
        self._exchange.pieces.append(self._arrived)

    def on_message_complete(self) -> None:
        assert self._done is not None
        self._exchange.last_byte = self._arrived
        self.open = self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        self._done.set_result(self._exchange)


class Target:
    """A server to send requests to. Idle connections are used again, the warmest first, as clients do."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self.key = url, key
        netloc = urlsplit(url).netloc
        self._host, _, port = netloc.partition(":")
        self._port = int(port)
        self._headers = f"Host: {netloc}\r\nContent-Type: application/json\r\n"
        self._headers += f"Authorization: Bearer {key}\r\n" if key else ""
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Exchange:
        return await self._exchange(f"GET {path} HTTP/1.1\r\n{self._headers}\r\n".encode())

    async def post(self, path: str, body: object) -> Exchange:
        data = orjson.dumps(body)
        head = f"POST {path} HTTP/1.1\r\n{self._headers}Content-Length: {len(data)}\r\n\r\n"
        return await self._exchange(head.encode() + data)

    async def _exchange(self, request: bytes) -> Exchange:
        connection = None
        while self._idle and connection is None:
            candidate = self._idle.pop()
            connection = candidate if candidate.open else None
        if connection is None:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
        try:
            exchange = await connection.request(request)
        except asyncio.CancelledError:
            connection.close()
            raise
        if connection.open:
            self._idle.append(connection)
        return exchange

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


@dataclass(slots=True)
class Run:
    """What came of one load."""

    exchanges: list[Exchange]
    failed: int
    """Requests without an answer of status 200."""
    late_s: float
    """99th percentile of how late requests left, seconds: the generator's own delay."""
    wall_s: float


async def open_loop(arrivals: Sequence[float], ask: Callable[[int], Awaitable[Exchange]], *, patience_s: float) -> Run:
    """Send request i `arrivals[i]` seconds from now, whether or not earlier ones were answered. What has no answer
    `patience_s` after the last arrival counts as failed."""
    began = time.perf_counter()
    lateness, tasks = [], []
    for i, due in enumerate(arrivals):
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        lateness.append(time.perf_counter() - began - due)
        tasks.append(asyncio.ensure_future(ask(i)))
    _, unanswered = await asyncio.wait(tasks, timeout=patience_s)
    for task in unanswered:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return _run(results, lateness, time.perf_counter() - began)


async def closed_loop(requests: int, ask: Callable[[int], Awaitable[Exchange]], *, at_once: int) -> Run:
    """Keep `at_once` requests running until `requests` have been answered."""
    results: list[Exchange | BaseException] = []
    numbers = iter(range(requests))

    async def worker() -> None:
        for i in numbers:
            try:
                results.append(await ask(i))
            except OSError as error:
                results.append(error)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return _run(results, [0.0], time.perf_counter() - began)


def _run(results: Sequence[Exchange | BaseException], lateness: list[float], wall_s: float) -> Run:
    good = [r for r in results if isinstance(r, Exchange) and r.status == 200]
    return Run(good, len(results) - len(good), quantile(lateness, 0.99), wall_s)


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest of `values` that at least a share `q` of them does not exceed; NaN for none."""
    ordered = sorted(values)
    return ordered[math.ceil(q * len(ordered)) - 1] if ordered else float("nan")


async def until_ready(target: Target, path: str, process: asyncio.subprocess.Process, *, seconds: float) -> None:
    """Return once `path` answers 200. Raises RuntimeError where it does not."""
    give_up, said = time.monotonic() + seconds, b"nothing"
    while time.monotonic() < give_up and process.returncode is None:
        with suppress(OSError):
            exchange = await target.get(path)
            if exchange.status == 200:
                return
            said = bytes(exchange.body)
        await asyncio.sleep(0.1)
    raise RuntimeError(f"{target.url}{path} did not answer 200 within {seconds:g} s, but {said.decode()}")
