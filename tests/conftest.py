"""A fake vLLM server that speaks the real one's HTTP, and a whole API served in front of it, both on real sockets."""

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import hypothesis
import pytest
import uvicorn
from aiohttp import web
from fastapi import FastAPI
from sqlite_utils import Database
from xdist.scheduler import LoadScopeScheduling

from data import comparisons, completions, keys, registry
from data.database import connect, transaction
from data.ids import new_id
from data.learning import scorer_address
from data.settings import EngineSettings, Settings
from data.types import (
    BASE_POLICY,
    Comparison,
    ComparisonKind,
    Completion,
    CompletionStatus,
    Feedback,
    Key,
    Policy,
    PolicyStatus,
    Role,
    timestamp,
)
from service import scoring
from service.app import create_app
from service.state import State
from trainer.scorer import Server

CREATED = 1795347272
Scores = list[list[float]]


# Three tests at a time


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # before torch: threads of several workers would stand in each other's way
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    hypothesis.settings.load_profile("ci")  # no deadline, here as there
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and what we start inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a test lets them do ends with it: its loop does not."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def denormals() -> Iterator[None]:
    """Who flushes them to zero does it for the whole process: the next file's tests count on them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids without chance. A hash of a key's id decides which votes a run learns from, and what is made within one
    millisecond sorts by chance: a test that trains would else be another one each time."""
    count = itertools.count(1)
    monkeypatch.setattr("data.ids.secrets", SimpleNamespace(randbits=lambda bits: next(count)))
    monkeypatch.setattr("data.keys.new_id", lambda prefix: f"{prefix}_{next(count):026d}")


LONG_FIRST = ("tests/e2e/test_whole_loop.py", "tests/browser/", "tests/e2e/", "tests/trainer/")
"""Or one worker would end with them alone. Browsers leave the processor to the whole loop's vLLM while that starts."""
OWN_HOUSE = ("test_whole_loop.py", "test_published_adapters.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[int, bool]:
        first = next((i for i, start in enumerate(LONG_FIRST) if item.nodeid.startswith(start)), len(LONG_FIRST))
        return first, item.nodeid.startswith("tests/e2e/test_scoring.py")

    items.sort(key=place)


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """A worker takes a file at a time, and one of them all that use the house of the end-to-end tests."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "house" if file.startswith("tests/e2e/") and not file.endswith(OWN_HOUSE) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


# vLLM


@dataclass
class Reply:
    """What the fake engine answers: for each choice the pieces of its text, and what goes wrong on the way."""

    choices: list[list[str]] = field(default_factory=lambda: [["Hi", " there", "."]])
    finish_reason: str = "stop"
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    """Deltas of tool calls, each a chunk of its own, instead of text."""
    reasoning: str | None = None
    hold_after: int | None = None
    """Stop after so many pieces until `FakeEngine.go_on` is set."""
    die_after: int | None = None
    """Close the socket after so many pieces (without streaming: after so many bytes of the body)."""
    error_after: int | None = None
    """Send an error event after so many pieces, as vLLM does when its engine dies, then [DONE]."""
    silent_end_after: int | None = None
    """End the response in good order after so many pieces, without a word of [DONE]."""
    model_first: bool = False
    """Another field order than vLLM 0.32's."""


def say(*pieces: str, **more: Any) -> Reply:
    return Reply(choices=[list(pieces)], **more)


@dataclass
class Refusal:
    """An answer other than 200."""

    status: int
    message: str = "no"
    param: str | None = None
    text: str | None = None
    """The whole body, where it is not JSON."""


@dataclass
class Received:
    """A chat request that the engine got, and whether the client stayed to the end."""

    body: dict[str, Any]
    headers: dict[str, str]
    cut_off: bool = False
    finished: bool = False


class FakeEngine:
    """vLLM 0.32's OpenAI server, as far as the service speaks to it."""

    def __init__(self) -> None:
        self.port = 0
        self.adapters: dict[str, str] = {}
        self.chats: list[Received] = []
        self.warm_ups: list[Received] = []
        self.loads: list[dict[str, Any]] = []
        self.events: list[str] = []
        """What happened, in order: "load policy-0000", "warm policy-0000", "chat policy-0000", "unload policy-0000"."""
        self.answer: Callable[[dict[str, Any]], Reply | Refusal] = lambda body: Reply()
        self.go_on = asyncio.Event()
        self.health = 200
        self.hangs: asyncio.Event | None = None
        """What is asked of its state, by health checks say, waits for it."""
        self.models: Callable[[], web.Response] | None = None
        self.refuses_load: Refusal | None = None
        self.refuses_only: str | None = None
        """The one policy that `refuses_load` is about."""
        self.load_gate: asyncio.Event | None = None
        """Loads wait for it."""
        self.unload_gate: asyncio.Event | None = None
        self.dies_at_load = False
        self.refuses_warm_up: Refusal | None = None
        self.warm_up_gate: asyncio.Event | None = None
        self.max_model_len = 4096
        self._runner: web.AppRunner | None = None
        self._running: Counter[str] = Counter()
        self._mixes: dict[str, float] = {}
        """The mixes of adapters that ever ran together, each with the time when it last did."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen: on a free port the first time, on the same one ever after."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuse connections, break open ones, and forget the adapters, as a server that died."""
        self.go_on.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.adapters.clear()

    async def _health(self, request: web.Request) -> web.Response:
        if self.hangs is not None:
            await self.hangs.wait()
        return web.Response(status=self.health)

    async def _models(self, request: web.Request) -> web.Response:
        if self.hangs is not None:
            await self.hangs.wait()
        if self.models is not None:
            return self.models()
        base = {"id": "base", "object": "model", "root": "/models/base", "max_model_len": self.max_model_len}
        adapters = [
            {"id": name, "object": "model", "root": path, "parent": "base", "max_model_len": None}
            for name, path in self.adapters.items()
        ]
        return web.json_response({"object": "list", "data": [base, *adapters]})

    async def _load(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        name = wanted["lora_name"]
        self.loads.append(wanted)
        if self.load_gate is not None:
            await self.load_gate.wait()
        if self.dies_at_load:
            _break(request)
            asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self.stop()))
            return web.Response()
        if self.refuses_load is not None and self.refuses_only in (None, name):
            return _error(self.refuses_load, "InvalidUserInput")
        if name in self.adapters:
            return _error(Refusal(400, f"The lora adapter '{name}' has already been loaded."), "InvalidUserInput")
        self.events.append(f"load {name}")
        self.adapters[name] = wanted["lora_path"]
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if self.unload_gate is not None:
            self.events.append(f"is to unload {name}")
            await self.unload_gate.wait()
        if self.adapters.pop(name, None) is None:
            return _error(Refusal(404, f"The lora adapter '{name}' cannot be found."), "NotFoundError")
        self.events.append(f"unload {name}")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    def _run(self, name: str, requests: int) -> None:
        self._running[name] += requests
        self._mixes[",".join(sorted(+self._running))] = time.time()

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [
            f'vllm:lora_requests_info{{max_lora="3",running_lora_adapters="{mix}",waiting_lora_adapters=""}} {at!r}'
            for mix, at in self._mixes.items()
        ]
        return web.Response(text="\n".join(["# TYPE vllm:lora_requests_info gauge", *lines, ""]))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        received = Received(body, {name.lower(): value for name, value in request.headers.items()})
        warm_up = body["priority"] < 0
        (self.warm_ups if warm_up else self.chats).append(received)
        if body["model"] not in self.adapters and body["model"] != "base":
            return _error(Refusal(404, f"The model `{body['model']}` does not exist.", "model"), "NotFoundError")
        self.events.append(f"{'warm' if warm_up else 'chat'} {body['model']}")
        if warm_up and self.warm_up_gate is not None:
            await self.warm_up_gate.wait()
        reply = (self.refuses_warm_up or Reply()) if warm_up else self.answer(body)
        if isinstance(reply, Refusal):
            return _error(reply, "BadRequestError")
        self._run(body["model"], 1)
        try:
            return await (self._stream if body.get("stream") else self._whole)(request, body, reply)
        except (asyncio.CancelledError, ConnectionError):
            received.cut_off = True
            raise
        finally:
            self._run(body["model"], -1)
            received.finished = not received.cut_off

    async def _whole(self, request: web.Request, body: dict[str, Any], reply: Reply) -> web.StreamResponse:
        if reply.hold_after is not None:
            await self.go_on.wait()
        encoded = json.dumps(whole_body(body["model"], reply), ensure_ascii=False).encode()
        if reply.die_after is None:
            return web.Response(body=encoded, content_type="application/json")
        if reply.die_after == 0:
            _break(request)
            return web.Response()
        response = web.StreamResponse(headers={"Content-Length": str(len(encoded))})
        await response.prepare(request)
        await response.write(encoded[: reply.die_after])
        _break(request)
        return response

    async def _stream(self, request: web.Request, body: dict[str, Any], reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        if reply.die_after == 0:
            _break(request)
            return response
        await response.prepare(request)
        first, deltas, last = stream_chunks(body["model"], reply)
        for chunk in first:
            await response.write(chunk)
        for sent, delta in enumerate(deltas):
            if sent == reply.hold_after:
                await self.go_on.wait()
            if sent == reply.die_after:
                await asyncio.sleep(0.02)
                _break(request)
                return response
            if sent == reply.silent_end_after:
                await response.write_eof()
                return response
            if sent == reply.error_after:
                await asyncio.sleep(0.02)
                error = {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "param": None}
                await response.write(b"data: " + json.dumps({"error": error | {"code": 500}}).encode() + b"\n\n")
                await response.write(b"data: [DONE]\n\n")
                return response
            await response.write(delta)
        for chunk in last:
            await response.write(chunk)
        if body.get("stream_options", {}).get("include_usage"):
            await response.write(_usage_chunk(body["model"], reply))
        await response.write(b"data: [DONE]\n\n")
        return response


def _break(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()


def _error(refusal: Refusal, type: str) -> web.Response:
    if refusal.text is not None:
        return web.Response(status=refusal.status, text=refusal.text)
    error = {"message": refusal.message, "type": type, "param": refusal.param, "code": refusal.status}
    return web.json_response({"error": error}, status=refusal.status)


def _usage(reply: Reply) -> dict[str, Any]:
    completion = sum(len(pieces) for pieces in reply.choices)
    return {"prompt_tokens": 5, "total_tokens": 5 + completion, "completion_tokens": completion}


def _event(fields: dict[str, Any], model: str, reply: Reply) -> bytes:
    head = {"id": "chatcmpl-91e9627698378354", "object": "chat.completion.chunk", "created": CREATED, "model": model}
    if reply.model_first:
        head = {"model": model} | head
    return b"data: " + json.dumps(head | fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _usage_chunk(model: str, reply: Reply) -> bytes:
    more = {"choices": [], "usage": _usage(reply), "system_fingerprint": "vllm-0.32.0-e33e29d0"}
    return _event(more, model, reply)


def stream_chunks(model: str, reply: Reply) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The events of a stream as vLLM 0.32 writes them: the roles, the pieces by turns of the choices, the ends."""

    def choice(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": delta, "logprobs": reply.logprobs, "finish_reason": None} | more]}

    indices = range(len(reply.choices))
    prompt = {"prompt_token_ids": None, "prompt_text": None}
    first = [choice(i, {"role": "assistant", "content": ""}, logprobs=None) | prompt for i in indices]
    if reply.tool_calls is not None:
        deltas = [choice(0, {"tool_calls": [call]}, token_ids=None) for call in reply.tool_calls]
    else:
        longest = max(len(pieces) for pieces in reply.choices)
        deltas = [
            choice(i, {"content": reply.choices[i][turn]}, token_ids=None)
            for turn in range(longest)
            for i in indices
            if turn < len(reply.choices[i])
        ]
    last = [
        choice(i, {"content": ""}, finish_reason=reply.finish_reason, stop_reason=reply.stop_reason, token_ids=None)
        for i in indices
    ]
    return tuple([_event(fields, model, reply) for fields in part] for part in (first, deltas, last))  # type: ignore[return-value]


def whole_body(model: str, reply: Reply) -> dict[str, Any]:
    """The body of an answer that does not stream, with all that vLLM adds to OpenAI's schema."""
    choices = []
    for index, pieces in enumerate(reply.choices):
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None, "annotations": None, "audio": None}
        message |= {"function_call": None, "tool_calls": [], "reasoning": reply.reasoning}
        if reply.tool_calls is not None:
            message |= {"content": None, "tool_calls": reply.tool_calls}
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": reply.logprobs,
                "finish_reason": reply.finish_reason,
                "stop_reason": reply.stop_reason,
                "token_ids": None,
                "routed_experts": None,
            }
        )
    return {
        "id": "chatcmpl-91e9627698378354",
        "object": "chat.completion",
        "created": CREATED,
        "model": model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-e33e29d0",
        "usage": _usage(reply) | {"prompt_tokens_details": None},
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    fake = FakeEngine()
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
async def second_engine() -> AsyncIterator[FakeEngine]:
    fake = FakeEngine()
    await fake.start()
    yield fake
    await fake.stop()


# The record


def write_tensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float32 zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(offset))


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting comes from outside the test."""
    for name in list(os.environ):
        if name.startswith("NIGHTSHIFT_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write_model(folder: Path) -> Path:
    """The smallest folder that passes for a model: one attention projection of 6 x 4."""
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer_config.json").write_text("{}")
    shapes = {"model.embed_tokens.weight": [8, 4], "model.layers.0.self_attn.q_proj.weight": [6, 4]}
    write_tensors(folder / "model.safetensors", shapes)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


ROLE_KEYS: dict[Role, tuple[Key, str]] = {}
"""A key of each role, (key, token): every record of a test begins with them."""


@pytest.fixture(scope="session")
def new_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder as `nightshift up` makes it, to be copied: making one takes many fsyncs."""
    folder = tmp_path_factory.mktemp("new")
    db = connect(folder / "state" / "nightshift.db")
    registry.ensure_base_policy(db, folder / "state", write_model(folder / "model"))
    with transaction(db):
        for role in Role:
            ROLE_KEYS[role] = keys.create(db, role=role, feedback=Feedback.OFF, label=role, actor="test")
    db.close()
    return folder / "state"


@pytest.fixture
def settings(tmp_path: Path, model: Path, new_state: Path, plain_environment: None) -> Settings:
    """Settings whose record holds policy-0000 and a key of each role; no engine is named."""
    shutil.copytree(new_state, tmp_path / "state")
    return Settings(state=tmp_path / "state", model=str(model), engine=EngineSettings(poll_s=0.02))


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    """A connection of the test's own."""
    connection = connect(settings.database)
    yield connection
    connection.close()


MakeKey = Callable[..., tuple[Key, str]]


@pytest.fixture
def make_key(db: Database) -> MakeKey:
    """Make another key: (key, token)."""

    def make(role: Role = Role.USER, feedback: Feedback = Feedback.OFF) -> tuple[Key, str]:
        with transaction(db):
            return keys.create(db, role=role, feedback=feedback, label="", actor="test")

    return make


AddPolicy = Callable[..., str]


@pytest.fixture
def add_policy(db: Database, settings: Settings) -> AddPolicy:
    """Publish the next policy, an adapter that changes nothing, and make it known; its name.

    `change(folder)` alters what is published; `run_id` and `metrics` are those of its row."""

    def add(
        status: PolicyStatus = PolicyStatus.CANDIDATE,
        *,
        gate: bool | None = True,
        change: Callable[[Path], object] = lambda folder: None,
        **fields: Any,
    ) -> str:
        def write(folder: Path) -> None:
            registry.write_identity_adapter(Path(settings.model), folder)
            change(folder)

        name = registry.next_name(db)
        base = registry.get(db, BASE_POLICY)
        path, sha256 = registry.publish_folder(settings.state, name, write)
        check = {"name": "kl", "figure": 3.0, "threshold": 15.0, "passed": gate, "sentence": "KL is 3 nats."}
        metrics = {} if gate is None else {"gate": {"passed": gate, "checks": [check]}}
        policy = Policy(name, BASE_POLICY, path, sha256, base.base_model, status, timestamp(), metrics=metrics)
        with transaction(db):
            registry.insert(db, replace(policy, **fields))
        return name

    return add


Work = Callable[[Callable[[], object]], int]


@pytest.fixture
def work(db: Database) -> Work:
    """How many instructions the database carries out while something is called, to a few: whatever the machine."""

    def count(call: Callable[[], object]) -> int:
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1

        db.conn.set_progress_handler(step, 1)
        try:
            call()
        finally:
            db.conn.set_progress_handler(None, 1)
        return steps

    return count


AddPair = Callable[..., str]


@pytest.fixture
def add_pair(db: Database) -> AddPair:
    """Put two answers and their comparison into the record; the comparison's id."""

    def add(
        key_id: str,
        *,
        user: str | None = None,
        answers: tuple[str, str] = ("One", "Two"),
        policies: tuple[str, str] = (BASE_POLICY, BASE_POLICY),
        messages: list[dict[str, Any]] | None = None,
        kind: ComparisonKind = ComparisonKind.SAME_POLICY,
        age_s: float = 0.0,
        expires_after_s: float = 3600.0,
        duel_id: str | None = None,
    ) -> str:
        messages = messages or [{"role": "user", "content": "Hello"}]
        user = user or key_id
        at = timestamp(plus_s=-age_s)
        ids = []
        with transaction(db):
            for answer, policy in zip(answers, policies, strict=True):
                row = Completion(
                    id=new_id("cpl"),
                    key_id=key_id,
                    user=user,
                    conversation=completions.conversation_of(user, messages),
                    messages=messages,
                    answer=answer,
                    policy=policy,
                    sampling={"seed": 1},
                    status=CompletionStatus.COMPLETE,
                    finish_reason="stop",
                    prompt_tokens=5,
                    completion_tokens=1,
                    first_token_ms=None,
                    total_ms=1.0,
                    created_at=at,
                )
                completions.insert(db, row)
                ids.append(row.id)
            expires_at = timestamp(plus_s=expires_after_s - age_s)
            comparison = Comparison(new_id("cmp"), key_id, ids[0], ids[1], kind, False, at, expires_at, duel_id)
            comparisons.insert(db, comparison)
        return comparison.id

    return add


# The API


@dataclass
class House:
    """A running API, and a client for each role."""

    url: str
    app: FastAPI
    settings: Settings
    http: aiohttp.ClientSession

    @property
    def tokens(self) -> dict[Role, str]:
        return {role: token for role, (_, token) in ROLE_KEYS.items()}

    @property
    def keys(self) -> dict[Role, Key]:
        return {role: key for role, (key, _) in ROLE_KEYS.items()}

    @property
    def state(self) -> State:
        state: State = self.app.state.nightshift
        return state

    def headers(self, role: Role = Role.USER) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[role]}"}

    async def call(
        self, method: str, path: str, *, role: Role | None = Role.USER, token: str | None = None, **more: Any
    ) -> "Answer":
        """One request, its whole answer."""
        headers = dict(more.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        elif role is not None:
            headers |= self.headers(role)
        async with self.http.request(method, f"{self.url}{path}", headers=headers, **more) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def chat(self, *, role: Role = Role.USER, token: str | None = None, **parameters: Any) -> "Answer":
        body = {"model": "nightshift", "messages": [{"role": "user", "content": "Hello"}]} | parameters
        return await self.call("POST", "/v1/chat/completions", role=role, token=token, json=body)

    @asynccontextmanager
    async def open_chat(self, **parameters: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """A chat whose answer the test reads, or leaves, itself."""
        body = {"model": "nightshift", "messages": [{"role": "user", "content": "Hello"}]} | parameters
        url = f"{self.url}/v1/chat/completions"
        response = await self.http.post(url, json=body, headers=self.headers())
        try:
            yield response
        finally:
            response.close()

    async def vote(self, comparison: str, choice: str, *, role: Role = Role.USER, **more: Any) -> "Answer":
        body = {"choice": choice} | more
        return await self.call("POST", f"/v1/comparisons/{comparison}/vote", role=role, json=body)

    async def rows(self, table: str) -> list[dict[str, Any]]:
        """A table of the record, after all that waits has been written."""
        return await self.state.write(lambda db: list(db.query(f"SELECT * FROM {table} ORDER BY rowid")))

    async def is_ready(self) -> bool:
        return (await self.call("GET", "/readyz", role=None)).status == 200


@dataclass
class Answer:
    """A whole HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """What the only choice says."""
        (choice,) = self.json["choices"]
        content: str = choice["message"]["content"]
        return content

    @property
    def events(self) -> list[str]:
        """A stream's events, without the `data: ` before each."""
        *events, rest = self.body.decode().split("\n\n")
        assert rest == ""
        assert all(event.startswith("data: ") for event in events)
        return [event.removeprefix("data: ") for event in events]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """A stream's chunks, [DONE] left out."""
        return [json.loads(event) for event in self.events if event != "[DONE]"]

    def streamed(self, index: int = 0) -> str:
        """The text that the chunks of one choice add up to."""
        deltas = (c for chunk in self.chunks for c in chunk.get("choices", []) if c["index"] == index)
        return "".join(c["delta"].get("content") or "" for c in deltas)


@contextmanager
def database_locked(house: House, db: Database) -> Iterator[None]:
    """Another process holds the write lock, and the service's patience is short."""
    house.state.writer.submit(lambda own: own.execute("PRAGMA busy_timeout = 1")).result()
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.execute("ROLLBACK")


async def rounds(house: House, part: str) -> None:
    """Wait until the hot swap has gone through a part of its loops, a method, from beginning to end: what has not
    happened by then is not only late."""
    hot_swap, method, begun = house.state.hot_swap, getattr(house.state.hot_swap, part), 0

    def counted(*arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        return method(*arguments)

    setattr(hot_swap, part, counted)
    try:
        await eventually(lambda: begun >= 2)
    finally:
        delattr(hot_swap, part)


async def has_looked(house: House) -> None:
    """Wait until the hot swap has looked at the record as it is now, and has done what that asks for."""
    await rounds(house, "_set_to_work")
    await eventually(lambda: house.state.hot_swap._work is None)


async def has_drained(house: House) -> None:
    """Let long enough have passed for every process to have followed, and the hot swap look at what is to leave."""
    await rounds(house, "_drain")
    for name in house.state.hot_swap._unwanted:
        house.state.hot_swap._unwanted[name] -= 10.0
    await rounds(house, "_drain")


def strictly(text: str) -> Any:
    """What a line of JSON says, by the standard: Python would also take Infinity and NaN."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


async def eventually(holds: Callable[[], Any] | Callable[[], Awaitable[Any]], *, within_s: float = 60.0) -> None:
    """Wait until `holds()` is true; fail when it has not become so `within_s` seconds later."""
    async with asyncio.timeout(within_s):
        while True:
            result = holds()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.005)


LIMIT_S = 123.0


@pytest.fixture
def time_is_up(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the time of all answers under way be up now, where `chat.timeout_s` is LIMIT_S."""
    limits: list[asyncio.Timeout] = []
    timeout = asyncio.timeout

    def noted(seconds: float | None) -> asyncio.Timeout:
        limit = timeout(seconds)
        if seconds == LIMIT_S:
            limits.append(limit)
        return limit

    def up() -> None:
        for limit in limits:
            with suppress(RuntimeError):  # that answer has ended
                limit.reschedule(0.0)

    monkeypatch.setattr(asyncio, "timeout", noted)
    return up


OpenHouse = Callable[..., Awaitable[House]]


@pytest.fixture
async def open_house(settings: Settings) -> AsyncIterator[OpenHouse]:
    """Serve the API in front of the engines given, on a real socket, until the test ends.

    `server`, `chat`, `comparisons`, `engine` and `gate` change settings of those sections; `seed` makes chance
    repeatable; `ready=False` does not wait for /readyz."""
    async with AsyncExitStack() as stack:

        async def open_(*engines: FakeEngine, ready: bool = True, seed: int = 0, **sections: dict[str, Any]) -> House:
            sections["engine"] = {"urls": [engine.url for engine in engines]} | sections.get("engine", {})
            changed = {name: getattr(settings, name).model_copy(update=fields) for name, fields in sections.items()}
            own = settings.model_copy(update=changed)
            app = create_app(own, rng=random.Random(seed))
            url = await stack.enter_async_context(_served(app))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            house = House(url, app, own, http)
            if ready:
                await eventually(lambda: all(engine.ready for engine in house.state.engines.engines))
                await eventually(lambda: registry.serving(house.state.reader).status is PolicyStatus.SERVING)
            return house

        yield open_


@asynccontextmanager
async def _served(app: FastAPI) -> AsyncIterator[str]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="on")
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    assert server.started
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:  # as Server.shutdown, without its tenth of a second
        for listening in server.servers:
            listening.close()
        for connection in list(server.server_state.connections):
            connection.shutdown()
        await asyncio.gather(*server.server_state.tasks)
        await server.lifespan.shutdown()


@pytest.fixture
async def house(open_house: OpenHouse, engine: FakeEngine) -> House:
    """The API in front of one engine, ready."""
    return await open_house(engine)


# The scorer


class Judge:
    """In the place of the scorer's reward model, behind its real socket: two heads, whose scores a text bears in it."""

    def __init__(self) -> None:
        self.reward_model: str | None = "rm_1"
        self.problem: str | None = None
        self.asked: list[tuple[list[dict[str, Any]], list[str]]] = []
        self.says: Callable[[list[str]], Scores] = lambda answers: [read_scores(text) for text in answers]

    def look(self) -> None:
        pass

    def score(self, messages: list[dict[str, Any]], answers: list[str]) -> Scores:
        self.asked.append((messages, answers))
        return self.says(answers)


def read_scores(text: str) -> list[float]:
    return [float(word) for word in text.split()[-2:]]


@pytest.fixture
def judge(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setattr(scoring, "LOOK_S", 0.05)
    judge = Judge()
    folder = os.open(settings.state, os.O_PATH | os.O_DIRECTORY)
    with Server(judge, scorer_address(folder)) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield judge
        server.shutdown()
        thread.join()
    os.close(folder)
