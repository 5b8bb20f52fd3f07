"""The vLLM servers behind one interface: which are ready, who answers next, and their policies given back to them.

vLLM is spoken to over HTTP only. Nothing of it is reachable through us but what `Engines.chat` sends."""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
from pysqlite3 import dbapi2 as sqlite3

from data.settings import EngineSettings
from data.types import Policy
from service.errors import ApiError, engine_failed, not_ready, rejected_by_engine

log = logging.getLogger("nightshift.engine")

HEALTH_TIMEOUT = aiohttp.ClientTimeout(total=10)
LOAD_TIMEOUT = aiohttp.ClientTimeout(total=300)
CHAT_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)
BACK_S = 1.5
"""What an engine gets to say that it holds the policy that people go back to, once another has."""
MISSED_CHECKS = 3
"""Health checks in a row that a busy engine may let time out before it counts as gone."""


LORA_INFO = re.compile(r"^vllm:lora_requests_info\{([^}]*)\} (\S+)$", re.MULTILINE)
"""A line of vLLM's /metrics: the adapters that had requests at a time, and that time."""
ADAPTERS = re.compile(r'(?:running|waiting)_lora_adapters="([^"]*)"')


class EngineProblem(Exception):
    """Why an engine cannot answer yet, in words for anybody; `raw`, the engine's own or a path, is for the operator."""

    def __init__(self, message: str, raw: str) -> None:
        super().__init__(message)
        self.raw = raw


def words(error: BaseException) -> str:
    """What went wrong, for the operator."""
    return f"{error}: {error.raw}" if isinstance(error, EngineProblem) else str(error) or type(error).__name__


class PolicyRefused(EngineProblem):
    """A healthy engine does not take a policy: trying again would change nothing."""


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
    held: dict[str, str] = field(default_factory=dict)
    """The policies that it held when we last looked, by name, each with the folder it is from."""
    warm: set[str] = field(default_factory=set)
    """Those of them that have answered once."""
    giving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a policy is loaded and warmed, or unloaded: nobody counts on one that is about to go."""
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
        self.warm.clear()
        self.ready, self.problem = False, f"{problem}; the log says why" if raw else problem
        self.wake.set()


class Engines:
    """All engines. An engine gets traffic only while it holds the serving policy and has answered a warm-up."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        home: Path,
        wanted: Callable[[], list[Policy]],
        folder_of: Callable[[Policy], Path],
    ) -> None:
        """`home` is the folder that all policies lie in. `wanted()` is asked at every look for the policies that an
        engine must hold before it gets traffic, the serving one first, and `folder_of(policy)`, in another thread, for
        the checked folder of one that is to be loaded; both may raise RuntimeError with a message for the operator."""
        self.engines = [Engine(url.rstrip("/")) for url in settings.urls]
        self.serving = ""
        """The policy that new requests take, by name: the first of those wanted, once an engine that is ready holds it.
        Asking the record at every request is dear: each answer written makes a reader read its pages anew."""
        self.running: Counter[str] = Counter()
        """Requests under way, by policy."""
        self._settings = settings
        self._home = home
        self._wanted = wanted
        self._folder_of = folder_of
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

    def follow(self) -> None:
        """Point new requests at the policy that is to serve, once an engine in traffic holds it."""
        name = self._wanted()[0].name
        if name == self.serving:
            return
        ready = [engine for engine in self.engines if engine.ready]
        if any(name in engine.held for engine in ready):
            log.info("New requests take %s", name)
            self.serving = name
        for engine in ready:
            if name not in engine.held:
                engine.wake.set()

    def all_hold(self, name: str) -> bool:
        """Whether every engine in traffic holds this policy."""
        return all(name in engine.held for engine in self.engines if engine.ready)

    @asynccontextmanager
    async def chat(self, policy: str, request: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one chat request, a body of JSON that names `policy`, to the least busy engine that holds it; its
        response, not yet read, has status 200.

        Closing early stops the generation. Raises ApiError."""
        while True:
            ready = [engine for engine in self.engines if engine.ready]
            holding = [engine for engine in ready if policy in engine.held]
            engine = min(holding or ready, key=lambda e: e.in_flight, default=None)
            if engine is None:
                raise not_ready()
            engine.in_flight += 1
            self.running[policy] += 1
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
                        said = (await response.text())[:500]
                        if policy != self.serving:  # it left service, and nothing of it was running here
                            engine.held.pop(policy, None)
                            engine.wake.set()
                            raise engine_failed(f"it has let {policy} go")
                        engine.lost("it lost a policy", said)
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
                self.running[policy] -= 1

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
                async with asyncio.timeout(self._settings.poll_s):  # as in HotSwap._follow
                    await engine.wake.wait()

    async def _bring_up(self, engine: Engine) -> None:
        """Check health; load what is missing; warm up; only then let traffic in."""
        # Asked before the engine is: what came to serve by now was loaded before the engine says what it holds.
        serving, *others = self._wanted()
        async with self._http.get(f"{engine.url}/health", timeout=HEALTH_TIMEOUT) as response:
            if response.status != 200:
                raise EngineProblem("it is not healthy", f"/health answers {response.status}")
        await self._look_at(engine)
        if engine.ready and serving.name in engine.held:
            self.follow()
            return
        engine.ready = False
        engine.warm.clear()
        await self._give(engine, serving, await asyncio.to_thread(self._folder_of, serving))
        for policy in others:
            try:
                await self._give(engine, policy, await asyncio.to_thread(self._folder_of, policy))
            except (EngineProblem, *UNREADABLE) as error:  # people need not wait for what only duels need
                log.warning("%s goes without %s: %s", engine.url, policy.name, error)
        if self._wanted()[0].name not in engine.warm:
            engine.wake.set()  # another policy came to serve in the meantime
            return
        engine.ready, engine.problem, engine.logged = True, "", ""
        self.follow()
        log.info("%s is ready with %s", engine.url, ", ".join(sorted(engine.held)))

    async def _look_at(self, engine: Engine) -> None:
        """Ask an engine what it holds."""
        async with self._http.get(f"{engine.url}/v1/models", timeout=HEALTH_TIMEOUT) as response:
            if response.status != 200:
                raw = f"/v1/models answers {response.status}. Is engine.api_key right?"
                raise EngineProblem("it does not say what it holds", raw)
            try:
                models = {model["id"]: model for model in (await response.json())["data"]}
                lengths = [model.get("max_model_len") for model in models.values()]
                engine.context_length = min((length for length in lengths if length), default=None)
                engine.held = {name: str(model.get("root")) for name, model in models.items()}
                engine.warm &= engine.held.keys()
            except (aiohttp.ContentTypeError, ValueError, LookupError, TypeError, AttributeError):
                raise EngineProblem("it does not answer as vLLM does", "/v1/models. Is this URL right?") from None

    async def _give(self, engine: Engine, policy: Policy, folder: Path) -> None:
        """Load a policy where it is missing, and have it answer once. Traffic may go on meanwhile."""
        async with engine.giving:
            if policy.name not in engine.held:
                await self._load(engine, policy.name, folder)
            elif engine.held[policy.name] != str(folder):
                raw = f"it is from {engine.held[policy.name]}. Restart that server"
                raise EngineProblem(f"it holds another {policy.name}", raw)
            if policy.name not in engine.warm:
                await self._warm(engine, policy.name)
                engine.warm.add(policy.name)

    async def _load(self, engine: Engine, name: str, folder: Path) -> None:
        engine.problem = f"loading {name}"
        request = {"lora_name": name, "lora_path": str(folder)}
        url = f"{engine.url}/v1/load_lora_adapter"
        async with self._http.post(url, json=request, timeout=LOAD_TIMEOUT) as response:
            status, said = response.status, (await response.text())[:500]
        if status == 200:
            engine.held[name] = str(folder)
            return
        await self._look_at(engine)
        if engine.held.get(name) == str(folder):
            return  # another process of ours was first
        async with self._http.get(f"{engine.url}/health", timeout=HEALTH_TIMEOUT) as response:
            healthy = response.status == 200
        if status == 404 and '"error"' not in said:  # vLLM has no such route
            raise EngineProblem(
                "it takes no adapters", "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        if status == 404:
            raise EngineProblem(f"it does not find {name}", f"{said} It must see {folder.parent} under this path")
        raise (PolicyRefused if healthy else EngineProblem)(f"it refused {name}", said)

    async def _warm(self, engine: Engine, name: str) -> None:
        # The first request after a start can take half a minute; nobody should wait for it. And a policy that is to
        # serve must not wait behind the queue of the one that should not: it goes first.
        engine.problem = f"warming up {name}"
        request = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "priority": -1}
        url = f"{engine.url}/v1/chat/completions"
        async with self._http.post(url, json=request, timeout=LOAD_TIMEOUT) as response:
            if response.status != 200:
                raise EngineProblem(f"the warm-up of {name} failed", (await response.text())[:500])

    # Beside running traffic: what a swap is made of

    async def load(self, policy: Policy, engines: Sequence[Engine]) -> None:
        """Load and warm a policy on all of these engines, or on none: where one fails it is taken from the others.

        Raises PolicyRefused, EngineProblem, RegistryError, OSError."""
        await self._load_on_all(policy, await asyncio.to_thread(self._folder_of, policy), engines)

    async def _load_on_all(self, policy: Policy, folder: Path, engines: Sequence[Engine]) -> None:
        new: list[Engine] = []

        async def load_on(engine: Engine) -> None:
            await self._look_at(engine)
            if policy.name not in engine.held:
                new.append(engine)
            await self._give(engine, policy, folder)

        results = await asyncio.gather(*(load_on(engine) for engine in engines), return_exceptions=True)
        failed = [(e, error) for e, error in zip(engines, results, strict=True) if isinstance(error, BaseException)]
        if not failed:
            return
        await asyncio.gather(*(self._unload(engine, policy.name) for engine in new), return_exceptions=True)
        for _, error in failed:
            if not isinstance(error, EngineProblem | aiohttp.ClientError | TimeoutError):
                raise error
        # One refusal settles it, whatever else went wrong.
        engine, error = min(failed, key=lambda pair: not isinstance(pair[1], PolicyRefused))
        number = self.engines.index(engine) + 1
        if isinstance(error, EngineProblem):
            raise type(error)(f"engine {number}: {error}", error.raw) from error
        why = f"engine {number} does not answer"
        raise EngineProblem(why, f"{engine.url}: {error or type(error).__name__}") from error

    async def load_back(self, policy: Policy) -> None:
        """Load a policy on the engines in traffic, which should hold it still: nobody who goes back waits for one that
        hangs. BACK_S after the first one holds it the others get no more traffic before they have what serves. Where it
        has left them all, or is about to, they load it as on the way onward.

        Raises as `load` does, where none of them comes to hold it."""
        ready = [engine for engine in self.engines if engine.ready]
        if not ready:
            raise EngineProblem("no engine is ready", "the log of the engines says why")
        folder = await asyncio.to_thread(self._folder_of, policy)
        if not any(policy.name in engine.held and not engine.giving.locked() for engine in ready):
            return await self._load_on_all(policy, folder, ready)
        loads = [asyncio.create_task(self._load_on_all(policy, folder, [engine])) for engine in ready]
        late = set(loads)
        try:
            while late and all(load in late or load.exception() for load in loads):
                _, late = await asyncio.wait(late, return_when=asyncio.FIRST_COMPLETED)
            if late:
                _, late = await asyncio.wait(late, timeout=BACK_S)
        finally:
            for load in loads:
                load.cancel()
        problems = [None if load in late else load.exception() for load in loads]
        if all(problems):
            raise min(filter(None, problems), key=lambda problem: not isinstance(problem, PolicyRefused))
        for engine, load, problem in zip(ready, loads, problems, strict=True):
            if load in late or problem:
                engine.lost(f"it does not go back to {policy.name}", words(problem) if problem else "it is late")

    async def busy_with(self, name: str) -> bool:
        """Whether a request of this policy still runs or waits, ours or another process's."""
        if self.running[name]:
            return True
        answers = await asyncio.gather(*(self._in_use(e) for e in self.engines if e.ready and name in e.held))
        return any(name in names for names in answers)

    async def _in_use(self, engine: Engine) -> set[str]:
        """The adapters that vLLM has requests of now. It keeps a line for every mix of adapters that ever was, each
        with the time at which it last held; the newest is now."""
        try:
            async with self._http.get(f"{engine.url}/metrics", timeout=HEALTH_TIMEOUT) as response:
                lines = LORA_INFO.findall(await response.text())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineProblem("it does not say what runs", str(error) or type(error).__name__) from error
        newest = max(lines, key=lambda line: float(line[1]), default=("", "0"))[0]
        return {name for names in ADAPTERS.findall(newest) for name in names.split(",") if name}

    def held(self) -> set[str]:
        """The policies of ours that any engine in traffic held when we last looked."""
        ready = [engine for engine in self.engines if engine.ready]
        return {name for e in ready for name, root in e.held.items() if Path(root).parent == self._home}

    async def unload(self, name: str) -> None:
        """Have every engine in traffic forget a policy; another is asked when it is back, or has loaded what it loads
        now. Raises EngineProblem."""
        free = [engine for engine in self.engines if engine.ready and not engine.giving.locked()]
        await asyncio.gather(*(self._unload(engine, name) for engine in free if name in engine.held))

    async def _unload(self, engine: Engine, name: str) -> None:
        url = f"{engine.url}/v1/unload_lora_adapter"
        async with engine.giving:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._http.post(url, json={"lora_name": name}, timeout=HEALTH_TIMEOUT) as response:
                    if response.status not in (200, 404):
                        raise EngineProblem(f"it does not let {name} go", (await response.text())[:500])
                engine.held.pop(name, None)
                engine.warm.discard(name)


async def _refusal(response: aiohttp.ClientResponse) -> ApiError:
    """What a status other than 200 from vLLM means to the client."""
    text = await response.text()
    try:
        error = orjson.loads(text)["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = text[:500], None
    if response.status in (400, 422):
        return rejected_by_engine(message, param)
    if response.status in (429, 503):
        return ApiError(
            503,
            "All places are taken: too many requests wait for the model. Try again in a moment.",
            type="service_unavailable_error",
            code="engine_overloaded",
            retry_after_s=2,
        )
    return engine_failed(f"it answered {response.status}")
