"""One day, one night and the morning after, in minutes: people chat and vote, and the service learns what they like.

    1  the service starts, on a state folder of its own
    2  it answers questions that nobody trains on: the answers before
    3  a crowd of simulated people with a hidden taste (`bench.gold`) chats and votes over HTTP
    4  so many votes are what the schedule waits for: a reward model, PPO, the gate
    5  the candidate stands its trial by the crowd's votes, and is swapped in while people chat
    6  the same questions with the same seeds: the answers after; beside them, of BEST_OF more answers of before the one
       that the night's reward model likes best, which is what `serving.best_of_n` gives without any PPO

At the end it prints them, writes a page into the state folder, and serves on until Ctrl-C. The settings are those that
ship but for TRAINING and the choices that one request may ask for. Exit status 0: what serves was learned; 1: none was
good enough, or something went wrong; 130: interrupted before the end.

    python -m bench.demo [--quick] [--json] [--seed N] [--no-serve] [--state FOLDER] [--port N]
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from html import escape
from pathlib import Path
from shlex import quote
from statistics import fmean
from string import Template
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from bench.crowd import MAX_TOKENS, CrowdError, CrowdReport, Member, crowd, join
from bench.gold import worth
from bench.load import Exchange, Target
from bench.personas import personas
from data import trusted
from data.database import connect, transaction
from data.settings import STARTER, ServerSettings, ServingSettings, Settings
from data.stats import wilson
from data.types import BASE_POLICY
from service import pairing
from service.metrics import Metrics
from service.scoring import Scorer
from service.supervisor import StartError, check_port, free_port
from trainer import dialogues
from trainer.dialogues import Prompt

TRAINING: dict[str, float] = {
    "max_answer_tokens": 96,  # an answer cut off at the crowd's 64 may be longer read again
    "wait_for_chat_s": 0.5,
}
"""Settings of the training other than those that ship; the steps of PPO come on top."""
BEST_OF = 4
"""Answers of before among which the reward model chooses, none of them the one that is shown as such."""
CHOSEN = 200
"""Questions, the first, to which it does: each takes as long as five."""
AT_ONCE = 16
"""Questions that are asked at once."""
LOOK_S = 0.5
"""Between looks at what the service is doing."""
TALK_S = 2.0
"""Between two chats of the people who are up at night."""
SCORER_S = 60.0
"""What the scorer gets to take the new reward model."""
STOP_S = 90.0
"""What the service gets to end in order."""
READ_OUT, ON_THE_PAGE = 5, 40
"""Answers that are shown: those to the first questions, whatever they are."""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    votes: int = 1000
    """That the crowd casts before the night."""
    questions: int = 500
    """Asked before and after."""
    steps: int = 16
    """Of PPO, at most: half of what a night takes by itself, for the sake of those who look on."""
    people: int = 40
    seed: int = 0


QUICK = Plan(votes=300, questions=200, steps=8)


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, and what it is worth by gold, before scaling."""

    text: str
    gold: float
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Story:
    """What happened."""

    plan: Plan
    prompts: list[Prompt]
    before: list[Said]
    best: list[Said]
    """The best of BEST_OF others of before, to the first CHOSEN. This and the next are empty where no new policy
    serves."""
    after: list[Said]
    policy: dict[str, Any]
    """The candidate as the API shows it, with its gate, duels and swaps."""
    votes: int
    """That it was learned from."""
    chats: int
    failed: int
    """Chats and votes that had no answer, or half of one, from the first to the last."""
    seconds: dict[str, float]
    """What each stage took."""

    @property
    def learned(self) -> bool:
        return bool(self.after)

    @property
    def duel(self) -> dict[str, Any] | None:
        """The candidate's trial."""
        return _trial(self.policy)

    @property
    def chosen(self) -> tuple[float, float, float]:
        """The win rate of the best over those before."""
        return win_rate(self.before[: len(self.best)], self.best)

    @property
    def swap_s(self) -> float:
        """From the trial's verdict to the moment that the new policy served; too short for a stage of its own."""
        swap = self.policy["swaps"][-1]
        took = datetime.fromisoformat(swap["flipped_at"]) - datetime.fromisoformat(swap["requested_at"])
        return took.total_seconds()

    @property
    def outcome(self) -> str:
        if self.learned:
            return f"{self.policy['name']} serves"
        return (
            f"{self.policy['name']} is {self.policy['status']}: {self.policy['problem'] or _failed_checks(self.policy)}"
        )


def win_rate(before: Sequence[Said], others: Sequence[Said]) -> tuple[float, float, float]:
    """The share of the others that gold likes better, ties counting half, and its 95 % interval."""
    wins = sum(0.5 + 0.5 * _sign(new.gold - old.gold) for old, new in zip(before, others, strict=True))
    low, high = wilson(wins, len(others))
    return wins / len(others), low, high


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


def _trial(policy: dict[str, Any]) -> dict[str, Any] | None:
    return next((duel for duel in policy["duels"] if duel["kind"] == "trial"), None)


def _failed_checks(policy: dict[str, Any]) -> str:
    return " ".join(check["sentence"] for check in policy["gate"]["checks"] if not check["passed"])


# What is seen meanwhile


class Stages:
    """A line for each stage: on a terminal with a bar; elsewhere when it begins, every ten seconds, and at its end."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self.name = ""
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<22}"), BarColumn(24), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=console, expand=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._note = ""

    def __enter__(self) -> "Stages":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str, total: float | None = None) -> None:
        """End the stage before. `total` is what `show` counts up to; None: nobody knows."""
        self.end()
        self.name, self._note = name, ""
        self._began = self._said_at = time.monotonic()
        self._task = self._progress.add_task(name, total=total, note="")
        self._say("begins")

    def show(self, note: str, done: float | None = None) -> None:
        self._note = note
        self._progress.update(self._task, note=note, completed=done)
        if time.monotonic() - self._said_at > 10:
            self._say(note)

    def end(self) -> None:
        """Of the stage under way, where there is one."""
        if not self.name:
            return
        self.seconds[self.name] = time.monotonic() - self._began
        self._progress.update(self._task, total=1, completed=1)
        self._progress.stop_task(self._task)
        self._say(f"took {self.seconds[self.name]:.1f} s. {self._note}")
        self.name = ""

    def _say(self, what: str) -> None:
        self._said_at = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"{self.name}: {what}", soft_wrap=True, markup=False, highlight=False)


# The loop


async def learn(house: Target, state: Path, plan: Plan, stages: Stages) -> Story:
    """From the answers before to those after. Raises DemoError, CrowdError and OSError."""
    rng = random.Random(plan.seed)
    prompts = dialogues.prompts(plan.questions, seed=plan.seed, held_out=True)
    stages.begin("answers before", len(prompts))
    drawn = await ask_all(house, BASE_POLICY, prompts, plan.seed, stages, draws=1 + BEST_OF)

    schedule = await post(house, "/v1/schedules", {"votes": plan.votes})
    people = await join(house.url, personas(plan.people, seed=plan.seed), operator_key=house.key)
    stages.begin("votes", plan.votes)
    cast = 0

    def count(_: object) -> None:
        nonlocal cast
        cast += 1
        stages.show(f"{cast} of {plan.votes}", cast)

    day = await crowd(house.url, people, rng=rng, votes=plan.votes, concurrency=AT_ONCE, on_vote=count)

    async with awake(house, people, plan.seed) as talks:
        run = await watch_run(house, schedule["id"], plan, stages)
    policy = await get(house, f"/v1/policies/{run['policy']}")
    reports = [day, *talks]
    if policy["gate_passed"]:
        policy, voting = await hold_trial(house, policy["name"], people, rng, stages)
        reports.append(voting)

    after: list[list[Said]] = []
    best: list[Said] = []
    if policy["status"] == "serving":
        stages.begin("answers after", len(prompts))
        after = await ask_all(house, policy["name"], prompts, plan.seed, stages)
        stages.begin("best of before", min(CHOSEN, len(prompts)))
        best = await best_of(state, prompts[:CHOSEN], [others for _, *others in drawn[:CHOSEN]], stages)
    lineage = await get(house, f"/v1/policies/{policy['name']}/lineage")
    stages.end()
    return Story(
        plan, prompts, [first for first, *_ in drawn], best, [only for (only,) in after], policy, len(lineage["votes"]),
        sum(report.requests for report in reports), sum(report.failed + report.truncated for report in reports),
        stages.seconds,
    )  # fmt: skip


async def ask_all(
    house: Target, policy: str, prompts: Sequence[Prompt], seed: int, stages: Stages, *, draws: int = 1
) -> list[list[Said]]:
    """`draws` answers to each of the first CHOSEN prompts and one to the others, the first of the i-th from a seed that
    `seed` and i choose. Nobody is asked for a vote. Raises DemoError where another policy than `policy` answers."""
    answers: dict[int, list[Said]] = {}
    numbers = iter(range(len(prompts)))

    async def ask() -> None:
        for i in numbers:
            body = {
                "model": "nightshift", "messages": prompts[i].messages, "feedback": "off", "max_tokens": MAX_TOKENS,
                "temperature": 1.0, "seed": seed * 1_000_000 + i,
                "n": draws if i < CHOSEN else 1,
            }  # fmt: skip
            answer = await post(house, "/v1/chat/completions", body)
            if answer["system_fingerprint"] != policy:
                raise DemoError(f"{answer['system_fingerprint']} answers, and {policy} is what was to be looked at.")
            answers[i] = []
            for choice in answer["choices"]:
                text, finished = choice["message"]["content"], choice["finish_reason"] == "stop"
                answers[i].append(Said(text, worth(prompts[i], text, finished=finished), finished))
            stages.show(f"{len(answers)} of {len(prompts)}", len(answers))

    await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    return [answers[i] for i in range(len(prompts))]


async def best_of(
    state: Path, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Said]], stages: Stages
) -> list[Said]:
    """Of the answers drawn to each prompt the one that the service would give: whose score by the scorer of this state
    folder is best, of those that ended. Raises DemoError where there is no scorer."""
    settings = Settings(state=state, serving=ServingSettings(score_timeout_s=SCORER_S))
    scorer = Scorer(settings, Metrics())
    await scorer.start()
    try:
        give_up = time.monotonic() + SCORER_S
        while True:
            if scorer.reward_model is not None or time.monotonic() > give_up:
                break
            await asyncio.sleep(LOOK_S)
        best = []
        for prompt, answers in zip(prompts, drawn, strict=True):
            ended = [said for said in answers if said.finished] or answers
            scores = await scorer.score([*prompt.messages], [said.text for said in ended])
            if scores is None:
                raise DemoError("The scorer, which knows the reward model, gives no scores: see logs/scorer.log.")
            best.append(ended[pairing.best(scores)])
            stages.show(f"{len(best)} of {len(prompts)}", len(best))
        return best
    finally:
        await scorer.close()


@asynccontextmanager
async def awake(house: Target, people: list[Member], seed: int) -> AsyncIterator[list[CrowdReport]]:
    """Somebody goes on chatting while the context is open; what became of each chat."""
    rng = random.Random(f"awake {seed}")
    reports: list[CrowdReport] = []
    morning = asyncio.Event()

    async def talk() -> None:
        while not morning.is_set():
            reports.append(await crowd(house.url, people, rng=rng, requests=1, concurrency=1, feedback=0.0))
            await asyncio.sleep(TALK_S)

    talking = asyncio.create_task(talk())
    try:
        yield reports
    finally:
        morning.set()
        await talking


TITLES = {
    "reward": "learning: reward model",
    "judge": "learning: judge",
    "ppo": "learning: PPO",
    "measuring": "learning: gate",
    "gate": "learning: gate",
    "publishing": "learning: gate",
}
"""What a run's stages are called here; those before are all preparation."""
PREPARING = "learning: preparing"


async def watch_run(house: Target, schedule: str, plan: Plan, stages: Stages) -> dict[str, Any]:
    """Wait for the run that the schedule asks for, and for its end; the run. Raises DemoError where it fails."""
    stages.begin(PREPARING)
    asked_for = None
    while asked_for is None:
        runs = (await get(house, "/v1/runs"))["data"]
        asked_for = next((run for run in runs if run["requested_by"] == schedule), None)
        await asyncio.sleep(LOOK_S)
    while True:
        run = await get(house, f"/v1/runs/{asked_for['id']}")
        title = TITLES.get(run["stage"], PREPARING)
        if title != stages.name:
            stages.begin(title, plan.steps if run["stage"] == "ppo" else None)
        step, note = _news(run["metrics"], run["stage"])
        stages.show(note, step)
        if run["status"] == "succeeded":
            return dict(run)
        if run["status"] in ("failed", "cancelled"):
            raise DemoError(f"The run has {run['status']}: {run['error']}")
        await asyncio.sleep(LOOK_S)


def _news(metrics: dict[str, list[list[float]]], stage: str | None) -> tuple[int, str]:
    """How many steps of a stage are done, and what the last ones gave."""
    said, step = [], 0
    for name, title, last in (("accuracy", "accuracy", 20), ("score", "reward", 1), ("kl", "KL", 1)):
        if curve := metrics.get(f"{stage}/{name}"):
            step = 1 + int(curve[-1][0])
            said.append(f"{title} {fmean(value for _, value in curve[-last:]):.2f}")
    return step, ", ".join([f"step {step}", *said]) if step else ""


async def hold_trial(
    house: Target, name: str, people: list[Member], rng: random.Random, stages: Stages
) -> tuple[dict[str, Any], CrowdReport]:
    """Let people vote until the candidate serves or is rejected; how it stands then, and how the voting went."""
    stages.begin("trial", 1.0)
    over = asyncio.Event()
    voting = asyncio.create_task(crowd(house.url, people, rng=rng, concurrency=AT_ONCE, stop=over))
    try:
        while True:
            policy = await get(house, f"/v1/policies/{name}")
            if duel := _trial(policy):
                share = math.log(max(1.0, duel["e_value"])) / math.log(duel["threshold"])
                stages.show(f"{duel['wins']} to {duel['losses']}: {_odds(duel)}", min(1.0, share))
            if policy["problem"]:
                stages.show(policy["problem"])
            if policy["status"] not in ("candidate", "trial", "promoted") or voting.done():
                break
            await asyncio.sleep(LOOK_S)
    finally:
        over.set()
        report = await voting
    return policy, report


def _odds(duel: dict[str, Any]) -> str:
    return f"evidence {duel['e_value']:.3g} to 1 ({duel['threshold']:g} to 1 decides)"


async def get(house: Target, path: str) -> Any:
    """Raises DemoError and OSError."""
    return _read(path, await house.get(path))


async def post(house: Target, path: str, body: object) -> Any:
    """Raises DemoError and OSError."""
    return _read(path, await house.post(path, body))


def _read(path: str, exchange: Exchange) -> Any:
    if exchange.status not in (200, 201):
        raise DemoError(f"{path} answered {exchange.status}: {exchange.body.decode(errors='replace')}")
    return orjson.loads(exchange.body)


# What is shown of it


def figures(story: Story) -> dict[str, Any]:
    """What --json prints."""
    found: dict[str, Any] = {
        "learned": story.learned, "outcome": story.outcome, "votes": story.votes, "questions": len(story.prompts),
        "gold_before": round(fmean(said.gold for said in story.before), 3),
    }  # fmt: skip
    if story.learned:
        rate, low, high = win_rate(story.before, story.after)
        found["gold_after"] = round(fmean(said.gold for said in story.after), 3)
        found |= {"win_rate": round(rate, 3), "win_rate_low": round(low, 3), "win_rate_high": round(high, 3)}
        found[f"win_rate_best_of_{BEST_OF}"] = round(story.chosen[0], 3)
        found["swap_s"] = round(story.swap_s, 3)
    if duel := story.duel:
        found |= {f"trial_{name}": duel[name] for name in ("wins", "losses", "ties", "e_value")}
    found["gate"] = {check["name"]: check["figure"] for check in story.policy["gate"]["checks"]}
    found |= {"chats": story.chats, "failed": story.failed}
    found["seconds"] = {name: round(seconds, 1) for name, seconds in story.seconds.items()}
    return found | {"total_s": round(sum(story.seconds.values()), 1), "seed": story.plan.seed}


def headline(story: Story) -> str:
    if not story.learned:
        return f"No better answers this time: {story.outcome}"
    rate, low, high = win_rate(story.before, story.after)
    return (
        f"{rate:.0%} of the answers are better than before [{low:.0%} to {high:.0%}], by the taste that the votes came"
        f" from: {len(story.prompts)} questions that nobody trained on, ties counting half."
    )


def facts(story: Story) -> list[tuple[str, str]]:
    """What else is worth knowing."""
    minutes = sum(story.seconds.values()) / 60
    rows = [("outcome", story.outcome), ("learned from", f"{story.votes} votes of {story.plan.people} people")]
    if duel := story.duel:
        rows.append(("trial", f"{duel['wins']} to {duel['losses']}, {duel['ties']} ties: {_odds(duel)}"))
    if story.learned:
        rate, low, high = story.chosen
        rows.append(
            (
                f"best of {BEST_OF}, without PPO",
                f"{rate:.0%} better than before [{low:.0%} to {high:.0%}], where the same reward model chooses among"
                f" {BEST_OF} answers of {BASE_POLICY} to {len(story.best)} of the questions",
            )
        )
        rows.append(("swap", f"{story.swap_s:.2f} s from the verdict to serving"))
    mean_before = fmean(said.gold for said in story.before)
    mean_after = f", {fmean(said.gold for said in story.after):.2f} after" if story.learned else ""
    rows.append(("what an answer is worth", f"{mean_before:.2f} before{mean_after} (-1.5 to 5)"))
    rows.append(("chats", f"{story.chats}; {story.failed} requests, of chats or votes, without a whole answer"))
    return [*rows, ("in all", f"{minutes:.1f} minutes")]


def question(prompt: Prompt) -> str:
    """What the user said; an ellipsis stands for each answer."""
    return " … ".join(dialogues.user_texts(prompt.messages))


def show(story: Story, console: Console) -> None:
    if story.learned:
        titles = ("asked", "before", f"best of {BEST_OF} of before", "after")
        table = Table(*titles, title="The same questions, before and after", show_lines=True)
        answered = zip(story.prompts, story.before, story.best, story.after, strict=False)
        for prompt, *answers in [*answered][:READ_OUT]:
            table.add_row(Text(question(prompt)), *(Text(said.text) for said in answers))
        console.print(table)
    table = Table("stage", "seconds", title="The stages")
    for name, seconds in story.seconds.items():
        table.add_row(name, f"{seconds:.1f}")
    console.print(table)
    for name, fact in facts(story):
        console.print(f"{name}: {fact}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"\n{headline(story)}\n", soft_wrap=True, markup=False)


def page(story: Story) -> str:
    """The same as HTML that stands alone."""
    longest = max(story.seconds.values())
    stages = "".join(
        f"<tr><th>{escape(name)}<td>{seconds:.1f} s<td><i style='width:{100 * seconds / longest:.1f}%'></i>"
        for name, seconds in story.seconds.items()
    )
    checks = "".join(
        f"<li class={'good' if check['passed'] else 'bad'}>{escape(check['sentence'])}"
        for check in story.policy["gate"]["checks"]
    )
    answered = zip(story.prompts, story.before, story.best, story.after, strict=False)
    answers = "".join(
        f"<tr><th>{escape(question(prompt))}"
        + "".join(f"<td>{escape(answer.text)}<small>{answer.gold:.2f}</small>" for answer in answers)
        for prompt, *answers in [*answered][:ON_THE_PAGE]
    )
    return Template(Path(__file__).with_suffix(".html").read_text()).substitute(
        headline=escape(headline(story)), best_of=BEST_OF, stages=stages, checks=checks, answers=answers,
        facts="".join(f"<tr><th>{escape(name)}<td>{escape(fact)}" for name, fact in facts(story)),
    )  # fmt: skip


# The service


@dataclass(frozen=True, slots=True)
class Up:
    """A running `nightshift up`."""

    process: asyncio.subprocess.Process
    house: Target
    sign_in: str = field(repr=False)


def write_settings(state: Path, plan: Plan) -> Path:
    """The file of settings, in a new state folder. Raises DemoError where the folder is in use."""
    if state.exists() and any(state.iterdir()):
        raise DemoError(f"{state} is not empty: the demo begins with a new state folder. Choose another with --state.")
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = ["[training]", *(f"{name} = {value}" for name, value in TRAINING.items()), f"seed = {plan.seed}"]
    file = state / "nightshift.toml"
    lines += ["[training.ppo]", f"steps = {plan.steps}", "[chat]", f"max_n = {1 + BEST_OF}", ""]
    file.write_text("\n".join(lines))
    return file


@asynccontextmanager
async def service(state: Path, port: int, config: Path, stages: Stages) -> AsyncIterator[Up]:
    """`nightshift up` until the context is left. Raises DemoError where it does not come up."""
    stages.begin("start")
    log = state / "up.log"
    command = [sys.executable, "-P", "-m", "service.cli", "up", "--json", "--state", str(state), "--port", str(port)]
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command, "--model", str(STARTER), env=os.environ | {"NIGHTSHIFT_CONFIG": str(config)},
            stdout=asyncio.subprocess.PIPE, stderr=errors, start_new_session=True,  # Ctrl-C is for us: see `finally`
        )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = asyncio.create_task(process.stdout.readline())
        while not ready.done():
            await asyncio.wait([ready], timeout=LOOK_S)
            lines = log.read_text(errors="replace").splitlines()
            stages.show(lines[-1] if lines else "")
        if not ready.result():
            raise DemoError(f"The service does not come up:\n{log.read_text(errors='replace')}")
        said = json.loads(ready.result())
        yield Up(process, Target(said["url"], said["key"]), said["sign_in"])
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()


def free_or_usual_port() -> int:
    server = ServerSettings()
    try:
        check_port(server.host, server.port)
    except StartError:
        return free_port()
    return server.port


def import_trusted(state: Path) -> None:
    """The pairs that come with the starter model, as `nightshift votes import-trusted` takes them."""
    with closing(connect(state / "nightshift.db")) as db, transaction(db):
        trusted.import_lines(db, (STARTER / "trusted.jsonl").read_text().splitlines(), actor="demo")


async def demo(options: argparse.Namespace, plan: Plan, console: Console) -> int:
    """The exit status. Raises DemoError, CrowdError and OSError."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    state: Path = options.state
    config = write_settings(state, plan)
    async with AsyncExitStack() as stack:
        with Stages(console) as stages:
            up = await stack.enter_async_context(service(state, options.port or free_or_usual_port(), config, stages))
            import_trusted(state)
            story = await learn(up.house, state, plan, stages)
        show(story, console)
        html = state / "demo.html"
        html.write_text(page(story))
        console.print(f"More of the answers: {html}", soft_wrap=True)
        if options.serve:
            console.print(
                f"Chat with it (the link works once, within an hour of the start): {up.sign_in}\n"
                f"It serves at {up.house.url}; Ctrl-C stops everything. This starts it again:"
                f" NIGHTSHIFT_CONFIG={quote(str(config))} nightshift up --state {quote(str(state))}",
                soft_wrap=True,
            )
        if options.json:
            print(json.dumps(figures(story) | {"page": str(html), "quick": options.quick}), flush=True)
        if options.serve:
            await until_interrupted(up.process)
    return 0 if story.learned else 1


async def until_interrupted(process: asyncio.subprocess.Process) -> None:
    """Raises DemoError where the process ends before."""
    try:
        status = await process.wait()
    except asyncio.CancelledError:
        return
    raise DemoError(f"The service has ended with status {status}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 votes, 8 steps of PPO and 200 questions")
    parser.add_argument("--json", action="store_true", help="one JSON object of the figures, on the last line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-serve", dest="serve", action="store_false", help="end when the answers are shown")
    parser.add_argument("--state", type=Path, help="a new folder [default: one in .bench]")
    parser.add_argument("--port", type=int, default=0, help="[default: the usual one, or one that is free]")
    options = parser.parse_args()
    options.state = (options.state or Path(".bench", f"demo-{datetime.now():%Y%m%d-%H%M%S}")).absolute()
    plan = replace(QUICK if options.quick else Plan(), seed=options.seed)
    try:
        sys.exit(asyncio.run(demo(options, plan, Console())))
    except (DemoError, CrowdError, OSError) as error:
        sys.exit(f"The demo has stopped: {error}\nThe logs are in {options.state}.")
    except asyncio.CancelledError:
        sys.exit(130)


if __name__ == "__main__":
    main()
