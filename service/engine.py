"""The vLLM servers behind one interface: which are ready, who answers next, and their policies given back to them.

vLLM is spoken to over HTTP only. Nothing of it is reachable through us but what `Engines.chat` sends."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
from pysqlite3 import dbapi2 as sqlite3

from data.settings import EngineSettings
from data.types import Policy
from service.errors import ApiError, engine_failed, not_ready

log = logging.getLogger("nightshift.engine")

HEALTH_TIMEOUT = aiohttp.ClientTimeout(total=10)
LOAD_TIMEOUT = aiohttp.ClientTimeout(total=300)
CHAT_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
MISSED_CHECKS = 3
"""Health checks in a row that a busy engine may let time out before it counts as gone."""


class EngineProblem(Exception):
    """Why an engine cannot answer yet, in words for anybody; `raw`, the engine's own or a path, is for the operator."""

    def __init__(self, message: str, raw: str) -> None:
        super().__init__(message)
        self.raw = raw


UNREADABLE = (RuntimeError, LookupError, ValueError, OSError, sqlite3.Error)
"""What a policy's folder or the record can do wrong: logged, then tried again."""


@dataclass(slots=True)
class Engine:
    """One vLLM server as we last saw it."""

    url: str
    ready: bool = False
    problem: str = "not looked at yet"
    """What it waits for or lacks. /readyz shows it to anybody: no path, no address, no word of vLLM's own."""
    logged: str = ""
    """What the operator was told of it last."""
    in_flight: int = 0
    context_length: int | None = None
    """Tokens of prompt and answer together."""
    missed: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def lost(self, problem: str, raw: str = "") -> None:
        """Take it out of traffic and look at it again at once; `raw` is logged beside `problem`, and no one else's."""
        why = f"{problem}: {raw}" if raw else problem
        if self.ready or why != self.logged:
            log.warning("%s gets no traffic: %s", self.url, why)
        self.logged = why
        self.ready, self.problem = False, f"{problem}; the log says why" if raw else problem
        self.wake.set()


class Engines:
    """All engines. An engine gets traffic only while it holds every wanted policy and has answered a warm-up."""

    def __init__(
        self,
        settings: EngineSettings,
        wanted: Callable[[], list[Policy]],
        folder_of: Callable[[Policy], Path],
        confirmed: Callable[[], Awaitable[None]],
    ) -> None:
        """`wanted()` is asked at every look for the policies that every engine must hold, the serving one first, and
        `folder_of(policy)`, in another thread, for the checked folder of one that is to be loaded; both may raise
        RuntimeError with a message for the operator. `confirmed()` is called when every engine has loaded and
        warmed all of them."""
        self.engines = [Engine(url.rstrip("/")) for url in settings.urls]
        self.serving = ""
        """The policy that new requests take, by name: the first of those wanted, once an engine that is ready holds it.
        Asking the record at every request is dear: each answer written makes a reader read its pages anew."""
        self._settings = settings
        self._wanted = wanted
        self._folder_of = folder_of
        self._confirmed = confirmed
        self._watchers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        key = self._settings.api_key
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),  # vLLM closes after 5 idle seconds
            json_serialize=lambda value: orjson.dumps(value).decode(),
        )
        self._watchers = [asyncio.create_task(self._watch(engine)) for engine in self.engines]

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self._http.close()

    @property
    def ready(self) -> bool:
        return any(engine.ready for engine in self.engines)

    @property
    def problems(self) -> list[str]:
        """What keeps each engine that is not ready, in words for anybody."""
        return [f"engine {number}: {e.problem}" for number, e in enumerate(self.engines, 1) if not e.ready]

    @property
    def context_length(self) -> int | None:
        """The shortest context of the engines that are ready, tokens."""
        return min((e.context_length for e in self.engines if e.ready and e.context_length), default=None)

    @asynccontextmanager
    async def chat(self, request: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one chat request, a body of JSON, to the least busy engine; its response, not yet read, has status 200.

        Closing early stops the generation. Raises ApiError."""
        while True:
            engine = min((e for e in self.engines if e.ready), key=lambda e: e.in_flight, default=None)
            if engine is None:
                raise not_ready()
            engine.in_flight += 1
            try:
                try:
                    response = await self._http.post(
                        f"{engine.url}/v1/chat/completions",
                        data=request,
                        headers={"Content-Type": "application/json"},
                        timeout=CHAT_TIMEOUT,
                    )
                except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                    engine.lost("it cannot be reached", str(error))  # nothing was sent: another engine may take it
                    continue
                except aiohttp.ClientError as error:
                    engine.wake.set()
                    raise engine_failed(type(error).__name__) from error
                try:
                    if response.status == 404:
                        engine.lost("it lost a policy", (await response.text())[:500])
                        continue
                    if response.status != 200:
                        engine.wake.set()  # look at it soon, whatever it was
                        raise await _refusal(response)
                    yield response
                except aiohttp.ClientError as error:
                    engine.wake.set()
                    raise engine_failed(type(error).__name__) from error
                finally:
                    response.release()  # one not read to its end closes the connection, which stops the generation
                return
            finally:
                engine.in_flight -= 1

    async def _watch(self, engine: Engine) -> None:
        while True:
            engine.wake.clear()
            try:
                await self._bring_up(engine)
            except TimeoutError:
                engine.missed += 1
                if engine.missed >= MISSED_CHECKS or not engine.ready:
                    engine.lost("it does not answer health checks")
            except aiohttp.ClientConnectorError:
                engine.lost("it does not listen yet: vLLM starts, or is down")
                engine.wake.clear()
            except EngineProblem as error:
                engine.lost(str(error), error.raw)
                engine.wake.clear()
            except aiohttp.ClientError as error:
                engine.lost("it gives no answer", str(error) or type(error).__name__)
                engine.wake.clear()
            except UNREADABLE as error:
                engine.lost("its policy cannot be read", str(error) or type(error).__name__)
                engine.wake.clear()
            else:
                engine.missed = 0
            with suppress(TimeoutError):
                await asyncio.wait_for(engine.wake.wait(), self._settings.poll_s)

    async def _bring_up(self, engine: Engine) -> None:
        """Check health; load what is missing; warm up; only then let traffic in."""
        async with self._http.get(f"{engine.url}/health", timeout=HEALTH_TIMEOUT) as response:
            if response.status != 200:
                raise EngineProblem("it is not healthy", f"/health answers {response.status}")
        async with self._http.get(f"{engine.url}/v1/models", timeout=HEALTH_TIMEOUT) as response:
            if response.status != 200:
                raw = f"/v1/models answers {response.status}. Is engine.api_key right?"
                raise EngineProblem("it does not say what it holds", raw)
            try:
                held = {model["id"]: model for model in (await response.json())["data"]}
            except (aiohttp.ContentTypeError, ValueError, LookupError, TypeError):
                raise EngineProblem("it does not answer as vLLM does", "/v1/models. Is this URL right?") from None
        wanted = self._wanted()
        if engine.ready and all(policy.name in held for policy in wanted):
            self.serving = wanted[0].name
            return
        engine.ready = False
        for policy in wanted:
            folder = await asyncio.to_thread(self._folder_of, policy)
            if policy.name not in held:
                await self._load(engine, policy.name, folder)
            elif (root := held[policy.name].get("root")) != str(folder):
                raise EngineProblem(f"it holds another {policy.name}", f"it is from {root}. Restart that server")
            await self._warm(engine, policy.name)
        lengths = (model.get("max_model_len") for model in held.values())
        engine.context_length = min((length for length in lengths if length), default=None)
        engine.ready, engine.problem, engine.logged = True, "", ""
        self.serving = wanted[0].name
        if all(other.ready for other in self.engines):
            await self._confirmed()
        log.info("%s is ready with %s", engine.url, ", ".join(policy.name for policy in wanted))

    async def _load(self, engine: Engine, name: str, folder: Path) -> None:
        engine.problem = f"loading {name}"
        request = {"lora_name": name, "lora_path": str(folder)}
        url = f"{engine.url}/v1/load_lora_adapter"
        async with self._http.post(url, json=request, timeout=LOAD_TIMEOUT) as response:
            if response.status != 200:
                raise EngineProblem(f"it refused {name}", (await response.text())[:500])

    async def _warm(self, engine: Engine, name: str) -> None:
        # The first request after a start can take half a minute; nobody should wait for it.
        engine.problem = f"warming up {name}"
        request = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        url = f"{engine.url}/v1/chat/completions"
        async with self._http.post(url, json=request, timeout=LOAD_TIMEOUT) as response:
            if response.status != 200:
                raise EngineProblem(f"the warm-up of {name} failed", (await response.text())[:500])


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    """What a status other than 200 from vLLM means to the client."""
    text = await response.text()
    try:
        error = orjson.loads(text)["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = text[:500], None
    if response.status in (400, 422):
        return ApiError(400, message, code="rejected_by_engine", param=param)
    if response.status in (429, 503):
        return ApiError(
            503,
            "All places are taken: too many requests wait for the model. Try again in a moment.",
            type="service_unavailable_error",
            code="engine_overloaded",
            retry_after_s=2,
        )
    return engine_failed(f"it answered {response.status}")
