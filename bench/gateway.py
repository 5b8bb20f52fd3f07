"""What the gateway costs: latency added to an upstream's own, and tokens a second kept of the engine's own.

Added latency. The same requests, at the same random moments, go straight to a mock of vLLM, through the gateway, and
through LiteLLM's proxy, one after the other; that is one repetition. Arrivals are Poisson and do not wait for answers.
Half of the requests stream, half do not; either kind takes the mock the same time. Added p50 is p50 through the gateway
less p50 direct of the same repetition, added p99 likewise; the table shows the median over the repetitions and, in
brackets, the least and the greatest. The gateway is the process that `nightshift up` starts, with a real key, and
every answer must be in its database at the end. LiteLLM runs without a database: it checks a key and records nothing.

Throughput. Streams on a real vLLM, a fixed number at once, all of the same length: direct and through the gateway in
turn; the ratio is of tokens a second within a repetition.

    python bench/gateway.py [--quick] [--json] [--seed N] [--rates 1,50,200] [--model FOLDER] [--no-engine]
                            [--litellm auto|off|PYTHON]
"""

import argparse
import asyncio
import gc
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import uvloop

from bench.load import Exchange, Run, Target, closed_loop, open_loop, quantile, until_ready
from data import keys, registry
from data.database import connect, transaction
from data.settings import EngineSettings, Settings
from data.types import BASE_POLICY, Feedback, Role
from service.supervisor import StartError, engine_command, engine_environment, find_model, free_port

LITELLM = "litellm[proxy]==1.103.0"
LITELLM_FOLDER = Path(".bench") / "litellm-1.103.0"

STREAMS = 16
STREAM_TOKENS = 96

CHAT = [
    {"role": "system", "content": "You answer in one or two friendly sentences."},
    {"role": "user", "content": "I have a free afternoon by the sea. What would you do with it?"},
    {"role": "assistant", "content": "Walk along the water until you are hungry, then eat something fried."},
    {"role": "user", "content": "And if it rains the whole time?"},
]


@dataclass(frozen=True, slots=True)
class Lane:
    """One way to the model."""

    name: str
    target: Target
    model: str
    process: asyncio.subprocess.Process | None = None

    def body(self, *, stream: bool, **more: Any) -> dict[str, Any]:
        body = {"model": self.model, "stream": stream} | more
        return body | {"stream_options": {"include_usage": True}} if stream else body

    def cpu_s(self) -> float:
        """CPU time of its process so far, seconds; 0 where there is none between us and the upstream."""
        if self.process is None:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Latencies:
    """One lane's part of one repetition: {measure: (p50, p99)} in milliseconds, CPU milliseconds a request."""

    quantiles: dict[str, tuple[float, float]]
    cpu_ms: float
    late_ms: float
    failed: int


MEASURES = ("first byte, streams", "last byte, streams", "whole answers, not streamed", "last byte, all")


async def measure(lane: Lane, arrivals: list[float], streams: list[bool]) -> Latencies:
    cpu_before = lane.cpu_s()

    def ask(i: int) -> Awaitable[Exchange]:
        return lane.target.post("/v1/chat/completions", lane.body(stream=streams[i], messages=CHAT, max_tokens=64))

    run = await open_loop(arrivals, ask, patience_s=30)
    cpu_ms = (lane.cpu_s() - cpu_before) * 1000 / len(arrivals)
    streamed = [e for e in run.exchanges if e.body.startswith(b"data: ")]
    whole = [e for e in run.exchanges if not e.body.startswith(b"data: ")]
    seconds = {
        MEASURES[0]: [e.first_byte_s for e in streamed],
        MEASURES[1]: [e.total_s for e in streamed],
        MEASURES[2]: [e.total_s for e in whole],
        MEASURES[3]: [e.total_s for e in run.exchanges],
    }
    quantiles = {name: (1000 * quantile(of, 0.5), 1000 * quantile(of, 0.99)) for name, of in seconds.items()}
    return Latencies(quantiles, cpu_ms, run.late_s * 1000, run.failed)


async def latency(
    lanes: list[Lane], rate: float, *, seconds: float, repetitions: int, rng: random.Random
) -> dict[str, list[Latencies]]:
    """{lane: one `Latencies` a repetition}; the lanes take turns in being first."""
    taken: dict[str, list[Latencies]] = {lane.name: [] for lane in lanes}
    for repetition in range(repetitions):
        arrivals, at = [], 0.0
        for _ in range(max(4, round(rate * seconds))):
            at += rng.expovariate(rate)
            arrivals.append(at)
        streams = [rng.random() < 0.5 for _ in arrivals]
        turn = repetition % len(lanes)
        for lane in lanes[turn:] + lanes[:turn]:
            note(f"{rate:g}/s, repetition {repetition + 1} of {repetitions}: {lane.name}")
            gc.collect()
            run = await measure(lane, arrivals, streams)
            taken[lane.name].append(run)
            if run.failed:
                await idle(lane)
    return taken


async def idle(lane: Lane) -> None:
    """Wait until a lane that could not keep up has stopped working, so that the next one has the machine."""
    before, now = float("-inf"), lane.cpu_s()
    while now - before > 0.1:
        await asyncio.sleep(1)
        before, now = now, lane.cpu_s()


def added(taken: dict[str, list[Latencies]], lane: str, measure: str, which: int) -> list[float]:
    """Milliseconds that `lane` adds to direct, one figure a repetition; `which`: 0 for p50, 1 for p99."""
    return [
        through.quantiles[measure][which] - direct.quantiles[measure][which]
        for through, direct in zip(taken[lane], taken["direct"], strict=True)
    ]


async def throughput(lanes: list[Lane], *, eos: list[int], requests: int, repetitions: int) -> dict[str, list[float]]:
    """{lane: tokens a second, one figure a repetition}."""
    taken: dict[str, list[float]] = {lane.name: [] for lane in lanes}
    for repetition in range(repetitions):
        turn = repetition % len(lanes)
        for lane in lanes[turn:] + lanes[:turn]:
            note(f"{STREAMS} streams on vLLM, repetition {repetition + 1} of {repetitions}: {lane.name}")

            def ask(i: int, lane: Lane = lane) -> Awaitable[Exchange]:
                body = lane.body(
                    stream=True,
                    messages=[{"role": "user", "content": f"Tell me something about the number {i}."}],
                    max_tokens=STREAM_TOKENS,
                    seed=i,
                    logit_bias={str(token): -100 for token in eos},  # so that all answers are of one length
                )
                return lane.target.post("/v1/chat/completions", body)

            run = await closed_loop(requests, ask, at_once=STREAMS)
            if run.failed:
                raise RuntimeError(f"{run.failed} of {requests} streams through {lane.name} failed")
            taken[lane.name].append(_tokens(run) / run.wall_s)
    return taken


def _tokens(run: Run) -> int:
    """Completion tokens as the servers counted them."""
    total = 0
    for exchange in run.exchanges:
        usages = [
            orjson.loads(event[6:]).get("usage")
            for event in bytes(exchange.body).split(b"\n\n")
            if b'"usage"' in event and b"completion_tokens" in event
        ]
        total += usages[-1]["completion_tokens"]
    return total


# The processes


@asynccontextmanager
async def running(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process in the folder of its log, ended when the block ends."""
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=log.parent, env=os.environ | (environment or {}), stdout=out, stderr=out
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 40)
        except TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def mock_upstream(folder: Path) -> AsyncIterator[Lane]:
    url = f"http://127.0.0.1:{free_port()}"
    script = Path(__file__).with_name("mock_upstream.py").resolve()
    command = [sys.executable, str(script), "--port", url.rpartition(":")[2]]
    async with running(command, folder / "mock.log") as process:
        target = Target(url)
        await until_ready(target, "/health", process, seconds=20)
        yield Lane("direct", target, BASE_POLICY)


@asynccontextmanager
async def vllm(folder: Path, model: Path, *, port: int = 0, key: str = "") -> AsyncIterator[Lane]:
    """vLLM as `nightshift up` starts it, on a free port and with a fresh key unless told."""
    settings = Settings(state=folder)
    port, key = port or free_port(), key or secrets.token_urlsafe(16)
    log = folder / "engine.log"
    environment = engine_environment(settings) | {"VLLM_API_KEY": key}
    async with running(engine_command(settings, model, port), log, environment) as process:
        target = Target(f"http://127.0.0.1:{port}", key)
        await until_ready(target, "/health", process, seconds=300)
        yield Lane("direct", target, BASE_POLICY)


@asynccontextmanager
async def gateway(folder: Path, model: Path, upstream: Target) -> AsyncIterator[tuple[Lane, Path]]:
    """The API process as `nightshift up` starts it, before `upstream`; and its database."""
    settings = Settings(state=folder / "state", engine=EngineSettings(urls=[upstream.url], api_key=upstream.key))
    db = connect(settings.database)
    registry.ensure_base_policy(db, settings.state, model)
    with transaction(db):
        _, token = keys.create(db, role=Role.USER, feedback=Feedback.OFF, label="bench", actor="bench")
    db.close()
    port, log = free_port(), folder / "api.log"
    environment = {
        "NIGHTSHIFT_STATE": str(settings.state),
        "NIGHTSHIFT_SERVER__PORT": str(port),
        "NIGHTSHIFT_ENGINE__URLS": json.dumps(settings.engine.urls),
        "NIGHTSHIFT_ENGINE__API_KEY": settings.engine.api_key,
    }
    async with running([sys.executable, "-m", "service.app"], log, environment) as process:
        target = Target(f"http://127.0.0.1:{port}", token)
        await until_ready(target, "/readyz", process, seconds=120)
        yield Lane("nightshift", target, settings.chat.model_name, process), settings.database


@asynccontextmanager
async def litellm(folder: Path, python: Path, upstream: Target) -> AsyncIterator[Lane]:
    """LiteLLM's proxy, one process, before `upstream`. Nothing of it reaches our environment."""
    key, port, log = "sk-" + secrets.token_hex(16), free_port(), folder / "litellm.log"
    config = {
        "model_list": [
            {
                "model_name": "nightshift",
                "litellm_params": {
                    "model": f"hosted_vllm/{BASE_POLICY}",
                    "api_base": f"{upstream.url}/v1",
                    "api_key": upstream.key or "none",
                },
            }
        ],
        "general_settings": {"master_key": key},
        "litellm_settings": {"telemetry": False, "num_retries": 0},
    }
    (folder / "litellm.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [str(python.with_name("litellm")), "--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
    async with running([*command, "--num_workers", "1"], log, environment) as process:
        target = Target(f"http://127.0.0.1:{port}", key)
        await until_ready(target, "/health/liveliness", process, seconds=120)
        yield Lane("LiteLLM", target, "nightshift", process)


def find_litellm(option: str) -> Path | None:
    """The Python of LiteLLM's own environment, made now under `auto` where there is none; None: do without."""
    if option == "off":
        return None
    if option != "auto":
        return Path(option).absolute()
    python = (LITELLM_FOLDER / "bin" / "python").absolute()
    if not python.exists():
        note(f"installing {LITELLM} into {LITELLM_FOLDER}")
        made = subprocess.run([sys.executable, "-m", "venv", str(LITELLM_FOLDER)], check=False).returncode == 0
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITELLM]
        if not made or subprocess.run(install, check=False).returncode:
            shutil.rmtree(LITELLM_FOLDER, ignore_errors=True)
            note("LiteLLM cannot be installed here: its column is left out")
            return None
    return python


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# The two halves


async def latency_half(
    folder: Path, model: Path, python: Path | None, rates: list[float], *, quick: bool, rng: random.Random
) -> dict[float, dict[str, list[Latencies]]]:
    """{rate: {lane: repetitions}}. Raises RuntimeError where an answer through the gateway is not in its record."""
    async with AsyncExitStack() as stack:
        direct = await stack.enter_async_context(mock_upstream(folder))
        ours, database = await stack.enter_async_context(gateway(folder, model, direct.target))
        lanes = [direct, ours]
        if python:
            lanes.append(await stack.enter_async_context(litellm(folder, python, direct.target)))
        note("warming up")
        for lane in lanes:
            await measure(lane, [i / 50 for i in range(100)], [i % 2 == 0 for i in range(100)])
        asked, taken = 100, {}
        for rate in rates:
            seconds = 2.0 if quick else max(6.0, 40 / rate)
            repetitions = 2 if quick else 3 if rate < 50 else 5
            taken[rate] = await latency(lanes, rate, seconds=seconds, repetitions=repetitions, rng=rng)
            asked += repetitions * max(4, round(rate * seconds))
        if failed := sum(run.failed for runs in taken.values() for run in runs["nightshift"] + runs["direct"]):
            raise RuntimeError(
                f"{failed} requests, direct or through the gateway, had no answer of status 200 within 30 s"
            )
    db = connect(database)
    logged = db.execute("SELECT count(*) FROM completions WHERE status = 'complete'").fetchone()[0]
    db.close()
    if logged != asked:
        raise RuntimeError(f"{asked} answers went through the gateway, {logged} are in its record")
    note(f"all {logged} answers through the gateway are in its record")
    return taken


async def throughput_half(folder: Path, model: Path, python: Path | None, *, quick: bool) -> dict[str, list[float]]:
    async with AsyncExitStack() as stack:
        note("starting vLLM")
        direct = await stack.enter_async_context(vllm(folder, model))
        ours, _ = await stack.enter_async_context(gateway(folder, model, direct.target))
        lanes = [direct, ours]
        if python:
            lanes.append(await stack.enter_async_context(litellm(folder, python, direct.target)))
        eos = json.loads((model / "config.json").read_text())["eos_token_id"]
        eos = eos if isinstance(eos, list) else [eos]
        await throughput(lanes, eos=eos, requests=STREAMS, repetitions=1)  # a warm-up
        rounds, repetitions = (2, 2) if quick else (8, 7)
        return await throughput(lanes, eos=eos, requests=STREAMS * rounds, repetitions=repetitions)


# What is printed


def spread(values: Iterable[float], digits: int = 2) -> str:
    values = list(values)
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def latency_table(taken: dict[float, dict[str, list[Latencies]]]) -> str:
    proxies = [lane for lane in next(iter(taken.values())) if lane != "direct"]
    header = ["requests/s", "milliseconds", "direct p50", "direct p99"]
    header += [f"{lane} adds, {p}" for lane in proxies for p in ("p50", "p99")]
    rows = []
    for rate, runs in taken.items():
        for measure in MEASURES:
            row = [f"{rate:g}", measure]
            row += [f"{median(run.quantiles[measure][which] for run in runs['direct']):.2f}" for which in (0, 1)]
            row += [spread(added(runs, lane, measure, which)) for lane in proxies for which in (0, 1)]
            rows.append(row)
        row = [f"{rate:g}", "CPU a request", "", ""]
        for lane in proxies:
            row += [spread(run.cpu_ms for run in runs[lane]), ""]
        rows.append(row)
        if any(run.failed for lane in proxies for run in runs[lane]):
            row = [f"{rate:g}", "failed requests", "", ""]
            for lane in proxies:
                row += [str(sum(run.failed for run in runs[lane])), ""]
            rows.append(row)
    return markdown(header, rows)


def throughput_table(taken: dict[str, list[float]]) -> str:
    rows = [
        [lane, spread(rates, 0), spread(ratios(taken, lane), 3) if lane != "direct" else ""]
        for lane, rates in taken.items()
    ]
    return markdown([f"{STREAMS} streams, vLLM", "tokens/s", "of direct"], rows)


def ratios(taken: dict[str, list[float]], lane: str) -> list[float]:
    return [through / direct for through, direct in zip(taken[lane], taken["direct"], strict=True)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def figures(
    taken: dict[float, dict[str, list[Latencies]]], tokens: dict[str, list[float]], options: argparse.Namespace
) -> dict[str, Any]:
    """The JSON: latencies are those of the highest rate."""
    rate = max(taken)
    out: dict[str, Any] = {"rate": rate, "seed": options.seed, "quick": options.quick}
    for lane, prefix in (("nightshift", ""), ("LiteLLM", "litellm_")):
        if lane in taken[rate]:
            for key, measure in (("added_ms", MEASURES[3]), ("first_byte_added_ms", MEASURES[0])):
                for which, p in enumerate(("p50", "p99")):
                    out[f"{prefix}{key}_{p}"] = round(median(added(taken[rate], lane, measure, which)), 3)
            out[f"{prefix}cpu_ms"] = round(median(run.cpu_ms for run in taken[rate][lane]), 3)
        if lane in tokens:
            out[f"{prefix}throughput_ratio"] = round(median(ratios(tokens, lane)), 4)
    return out


async def bench(
    folder: Path, model: Path, python: Path | None, rates: list[float], options: argparse.Namespace
) -> tuple[dict[float, dict[str, list[Latencies]]], dict[str, list[float]]]:
    gc.disable()  # pauses of ours would look like theirs; collected between the runs
    taken = await latency_half(folder, model, python, rates, quick=options.quick, rng=random.Random(options.seed))
    shutil.rmtree(folder / "state")
    tokens = {} if options.no_engine else await throughput_half(folder, model, python, quick=options.quick)
    return taken, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short repetitions")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", default="1,50,200", help="requests a second")
    parser.add_argument("--model", default=Settings().model, help="for vLLM: a folder or a Hugging Face id")
    parser.add_argument("--no-engine", action="store_true", help="leave out the throughput on a real vLLM")
    parser.add_argument("--litellm", default="auto", help="auto, off, or the Python of its environment")
    options = parser.parse_args()
    try:
        rates = sorted(float(rate) for rate in options.rates.split(","))
    except ValueError:
        rates = []
    if min(rates, default=0.0) <= 0:
        parser.error("--rates are numbers above 0, between commas")
    try:
        model = find_model(options.model)
    except StartError as error:
        parser.error(str(error))

    Path(".bench").mkdir(exist_ok=True)  # a real disk, unlike some /tmp
    folder = Path(tempfile.mkdtemp(prefix="gateway-", dir=".bench")).absolute()
    python = find_litellm(options.litellm)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes started below must end with us
    load = os.getloadavg()[0]  # of others: ours comes on top
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            taken, tokens = runner.run(bench(folder, model, python, rates, options))
    except BaseException:
        note(f"the logs are in {folder}")
        raise
    shutil.rmtree(folder)

    late = max(run.late_ms for runs in taken.values() for lane in runs.values() for run in lane)
    print(f"\n{latency_table(taken)}\n")
    print(f"Median over the repetitions [least, greatest]. Requests left at most {late:.1f} ms (p99) late.")
    print(f"{os.cpu_count()} cores, load average {load:.1f} before the start.\n")
    if tokens:
        print(f"{throughput_table(tokens)}\n")
    if options.json:
        print(json.dumps(figures(taken, tokens, options)))


if __name__ == "__main__":
    main()
