"""What people notice of a training run beside them: chat's first-token latency with and without one, on one machine.

People chat: streams that arrive at random moments (Poisson) and do not wait for one another, on the real API before a
real vLLM, both as `nightshift up` starts them. They first cast the votes that the run learns from. Then, in every
repetition, three windows of the same length: the same chats alone, the same chats beside a training run, and the same
training run alone. The windows take turns in being first. A window with a run begins once that has done its first step
of PPO: the run loads and fits its reward models before, with nobody chatting. It gets more steps, and a wider KL
budget, than it can use up in the window.

Ratios are of quantiles over all repetitions; in brackets, the least and the greatest of one repetition. The slowdown is
the time per step of PPO beside chat over that alone, over the steps that both came to.

    python -m bench.manners [--quick] [--json] [--seed N] [--rate 3] [--model FOLDER]

What else NIGHTSHIFT_TRAINING__… in the environment says holds for the runs.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from sqlite_utils import Database

from bench.crowd import MAX_TOKENS, crowd, join
from bench.gateway import Lane, gateway, markdown, note, running, vllm
from bench.load import Exchange, Target, open_loop, quantile
from bench.personas import personas
from data import keys, runs
from data.database import connect, transaction
from data.settings import Settings
from data.types import Feedback, Role
from service.supervisor import find_model
from trainer import dialogues

MIN_VOTES = 50
"""Decisive ones on the training side: fewer than a run wants by itself, so that they are soon cast."""
PPO = {"steps": 1000, "kl_budget": 1e9}
LOOK_S = 0.1
"""Between looks at how far a run has come."""
PATIENCE_S = 600.0
"""For a run that has the machine to itself to come to PPO."""


@dataclass(slots=True)
class Window:
    """What was seen in one window."""

    ttft_ms: list[float] = field(default_factory=list)
    """From a chat's request to the first byte of its answer."""
    failed: int = 0
    late_ms: float = 0.0
    steps_s: list[float] = field(default_factory=list)
    """When each training step was done, from the first of PPO on; seconds since any moment."""
    stages: Counter[str] = field(default_factory=Counter)
    """How many of those steps were of which stage."""


@dataclass(frozen=True, slots=True)
class Repetition:
    alone: Window
    beside: Window
    training: Window

    @property
    def slowdown(self) -> float | None:
        return slowdown(self.training.steps_s, self.beside.steps_s)

    def ratio(self, q: float) -> float:
        return quantile(self.beside.ttft_ms, q) / quantile(self.alone.ttft_ms, q)


def slowdown(alone: Sequence[float], beside: Sequence[float]) -> float | None:
    """How much longer the same steps took, from the end of the first to the end of the last that both came to; None
    where one did not come to its second."""
    both = min(len(alone), len(beside))
    if both < 2:
        return None
    return (beside[both - 1] - beside[0]) / (alone[both - 1] - alone[0])


def arrivals(rng: random.Random, *, rate: float, seconds: float) -> list[float]:
    """Random moments within a window, `rate` a second on average."""
    moments, at = [], rng.expovariate(rate)
    while at < seconds:
        moments.append(at)
        at += rng.expovariate(rate)
    return moments


class Bench:
    def __init__(self, lane: Lane, state: Path, engine: Target, folder: Path, *, seconds: float) -> None:
        self.lane = lane
        self.state = state
        self.engine = engine
        self.folder = folder
        self.seconds = seconds

    async def vote(self, votes: int, rng: random.Random) -> None:
        """Let a crowd cast the votes that training learns from."""
        with closing(connect(self.state / "nightshift.db")) as db, transaction(db):
            _, key = keys.create(db, role=Role.OPERATOR, feedback=Feedback.OFF, label="bench", actor="bench")
        people = await join(self.lane.target.url, personas(20, seed=rng.randrange(2**31)), operator_key=key)
        await crowd(self.lane.target.url, people, rng=rng, votes=votes)

    async def repetition(self, number: int, *, rate: float, rng: random.Random) -> Repetition:
        moments = arrivals(rng, rate=rate, seconds=self.seconds)
        prompts = [dialogues.sample_prompt(rng, rng.choice(dialogues.TOPICS), held_out=False) for _ in moments]
        seed = rng.randrange(2**31)

        def ask(i: int) -> Awaitable[Exchange]:
            body = self.lane.body(
                stream=True, messages=prompts[i].messages, max_tokens=MAX_TOKENS, temperature=1.0, seed=seed + i
            )
            return self.lane.target.post("/v1/chat/completions", body)

        async def chat(window: Window) -> None:
            run = await open_loop(moments, ask, patience_s=60)
            window.ttft_ms = [1000 * exchange.first_byte_s for exchange in run.exchanges]
            window.failed, window.late_ms = run.failed, 1000 * run.late_s

        windows = {"chat alone": Window(), "chat beside training": Window(), "training alone": Window()}
        names = list(windows)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            note(f"repetition {number + 1}: {name}")
            gc.collect()
            window = windows[name]
            if "training" in name:
                await self.train(window, seed=number, beside=chat if "chat" in name else None)
            else:
                await chat(window)
        return Repetition(*windows.values())

    async def train(
        self, window: Window, *, seed: int, beside: Callable[[Window], Awaitable[None]] | None = None
    ) -> None:
        """Start a run, begin the window at its first step of PPO, and cancel the run when the window has ended.

        Raises:
            RuntimeError: the run ended by itself.
            TimeoutError: it did not come to PPO.
        """
        environment = {
            "NIGHTSHIFT_STATE": str(self.state),
            "NIGHTSHIFT_ENGINE__URLS": json.dumps([self.engine.url]),
            "NIGHTSHIFT_ENGINE__API_KEY": self.engine.key,
            "NIGHTSHIFT_TRAINING__MIN_VOTES": str(MIN_VOTES),
            "NIGHTSHIFT_TRAINING__PPO": json.dumps(Settings().training.ppo | PPO),
        }
        command = [sys.executable, "-m", "trainer", "once", "--request", "--seed", str(seed)]
        log = self.folder / "training.log"
        seen: dict[str, int] = {}
        with closing(connect(self.state / "nightshift.db")) as db:
            async with running(command, log, environment) as process:

                async def watch(until: Callable[[], bool]) -> None:
                    while not until():
                        if process.returncode is not None:
                            raise RuntimeError(f"the training run ended before its window:\n{log.read_text()[-2000:]}")
                        look(db, window, seen)
                        await asyncio.sleep(LOOK_S)

                async with asyncio.timeout(PATIENCE_S):
                    await watch(lambda: bool(window.steps_s))
                end = time.perf_counter() + self.seconds
                await asyncio.gather(
                    beside(window) if beside else asyncio.sleep(0),
                    watch(lambda: time.perf_counter() >= end),
                )


def look(db: Database, window: Window, seen: dict[str, int]) -> None:
    """Note the steps that the active run has done since the last look, from its first of PPO on; `seen` is {stage: the
    last step noted}."""
    run = runs.active(db)
    if run is None:
        return
    for stage, step, _ in runs.figures_after(db, run.id, seen):
        seen[stage] = step
        if stage == "ppo" or window.steps_s:
            window.steps_s.append(time.perf_counter())
            window.stages[stage] += 1


async def bench(folder: Path, model: Path, options: argparse.Namespace) -> list[Repetition]:
    rng = random.Random(options.seed)
    repetitions, seconds, votes = (2, 30.0, 150) if options.quick else (3, 50.0, 200)
    gc.disable()  # pauses of ours would look like theirs; collected between the windows
    async with AsyncExitStack() as stack:
        note("starting vLLM")
        engine = await stack.enter_async_context(vllm(folder, model))
        lane, database = await stack.enter_async_context(gateway(folder, model, engine.target))
        bench = Bench(lane, database.parent, engine.target, folder, seconds=seconds)
        note(f"{votes} votes")
        await bench.vote(votes, rng)
        taken = [await bench.repetition(number, rate=options.rate, rng=rng) for number in range(repetitions)]
    if failed := sum(window.failed for r in taken for window in (r.alone, r.beside)):
        raise RuntimeError(f"{failed} chats had no answer of status 200 within 60 s")
    return taken


# What is printed


def pooled(taken: Sequence[Repetition], q: float) -> tuple[float, float]:
    """The quantile over all repetitions, alone and beside training, milliseconds."""
    alone = [ms for repetition in taken for ms in repetition.alone.ttft_ms]
    beside = [ms for repetition in taken for ms in repetition.beside.ttft_ms]
    return quantile(alone, q), quantile(beside, q)


def stages(taken: Sequence[Repetition]) -> Counter[str]:
    """{stage: the steps of it in all windows together}."""
    return sum((window.stages for r in taken for window in (r.beside, r.training)), Counter())


def slowdowns(taken: Sequence[Repetition]) -> list[float]:
    """Of every repetition; empty where one has none, since those that have are then the quicker ones."""
    slow = [r.slowdown for r in taken]
    return [] if None in slow else [each for each in slow if each is not None]


def figures(taken: Sequence[Repetition], options: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, q in (("p50", 0.5), ("p95", 0.95)):
        alone, beside = pooled(taken, q)
        out |= {
            f"ttft_{name}_ratio": round(beside / alone, 3),
            f"ttft_{name}_ms_alone": round(alone, 1),
            f"ttft_{name}_ms_beside": round(beside, 1),
        }
    slow = slowdowns(taken)
    out["training_slowdown"] = round(median(slow), 2) if slow else None
    out["training_steps"] = stages(taken)
    chats = sum(len(r.beside.ttft_ms) for r in taken)
    return out | {"chats": chats, "rate": options.rate, "seed": options.seed, "quick": options.quick}


def table(taken: Sequence[Repetition]) -> str:
    rows = []
    for name, q in (("p50", 0.5), ("p95", 0.95)):
        alone, beside = pooled(taken, q)
        each = [r.ratio(q) for r in taken]
        ratio = f"{beside / alone:.2f} [{min(each):.2f}, {max(each):.2f}]"
        rows.append([f"first token, {name}, ms", f"{alone:.1f}", f"{beside:.1f}", ratio])
    slow = slowdowns(taken)
    steps = [median(len(window.steps_s) for window in windows) for windows in
             ([r.training for r in taken], [r.beside for r in taken])]  # fmt: skip
    ratio = f"{median(slow):.2f} [{min(slow):.2f}, {max(slow):.2f}]" if slow else "unknown: too few steps"
    rows.append(["training steps in a window; time a step", *(f"{count:g}" for count in steps), ratio])
    return markdown(["", "alone", "beside the other", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short repetitions")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3.0, help="chats a second")
    parser.add_argument("--model", default=Settings().model, help="a folder or a Hugging Face id")
    options = parser.parse_args()
    if not options.rate > 0:
        parser.error("--rate is how many chats arrive a second: more than 0")

    Path(".bench").mkdir(exist_ok=True)  # a real disk, unlike some /tmp
    folder = Path(tempfile.mkdtemp(prefix="manners-", dir=".bench")).absolute()
    model = find_model(options.model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes started below must end with us
    load = os.getloadavg()[0]  # of others: ours comes on top
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            taken = runner.run(bench(folder, model, options))
    except BaseException:
        note(f"the logs are in {folder}")
        raise
    shutil.rmtree(folder)

    print(f"\n{table(taken)}\n")
    late = max(window.late_ms for r in taken for window in (r.alone, r.beside))
    print("Training steps seen: " + ", ".join(f"{count} of {stage}" for stage, count in stages(taken).items()) + ".")
    print(f"{options.rate:g} chats a second; requests left at most {late:.1f} ms (p99) late.")
    print(f"{os.cpu_count()} cores, load average {load:.1f} before the start.\n")
    if options.json:
        print(json.dumps(figures(taken, options)))


if __name__ == "__main__":
    main()
