"""A crowd of simulated people who chat and vote through the public HTTP API, so that the whole loop can be watched.

All share the gold preference, and each has a lean of their own. Most are honest, if noisy and a little lazy; villains
are not (`bench.personas`). What is asked next comes from one generator of chance, and a vote from the person and the
texts alone. So a run repeats itself as far as the service gives the same answers in the same order.

    python -m bench.crowd --key ns-… --votes 500 --people 40 --villains always_left=2,pusher=3 --seed 1 --json
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
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.gold import worth
from bench.personas import Kind, Persona, Plot, Shown, personas
from bench.record import amount, share
from data.types import Choice
from trainer import dialogues
from trainer.dialogues import Prompt

T = TypeVar("T")

MAX_TOKENS = 64
PATIENCE_S = 120.0
"""A crowd that has had no answer for so long gives up."""
RETRY_S = 0.5
"""Until the next try, where the service does not say."""


# What came of it


@dataclass(frozen=True, slots=True)
class Served:
    """An answer that somebody got."""

    persona: str
    prompt: Prompt
    text: str
    gold: float
    """Before scaling."""
    policy: str | None
    """Who wrote it; None where nobody voted, so that it stays hidden."""
    streamed: bool
    asked_at: float
    """Unix time."""
    first_byte_s: float
    """Of the body."""
    total_s: float


@dataclass(frozen=True, slots=True)
class Vote:
    """A vote that the service acknowledged."""

    persona: str
    key_id: str
    comparison: str
    choice: Choice
    policies: tuple[str, str]
    """Of answers a and b."""
    gold: tuple[float, float]
    """Of answers a and b, before scaling."""
    at: float
    """Unix time."""


@dataclass(slots=True)
class CrowdReport:
    answers: list[Served] = field(default_factory=list)
    votes: list[Vote] = field(default_factory=list)
    requests: int = 0
    """Chats that were begun."""
    skipped: int = 0
    """Pairs that somebody did not care to vote on."""
    refused: int = 0
    """Votes that the service turned down: expired, final or unknown."""
    failed: int = 0
    """Requests, of chats or votes, without an answer: the service was away or too busy."""
    truncated: int = 0
    """Chats whose answer broke off."""
    wall_s: float = 0.0

    def gold(self, policy: str) -> list[float]:
        """Scores of the answers that a policy wrote, before scaling."""
        return [served.gold for served in self.answers if served.policy == policy]

    @property
    def policies(self) -> list[str]:
        return sorted({served.policy for served in self.answers if served.policy})


def gain(
    before: Sequence[float], after: Sequence[float], *, rng: random.Random, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """The difference of the means, and its percentile bootstrap interval: (gain, low, high). Raises ValueError where
    either side is empty."""
    if not before or not after:
        raise ValueError("a gain needs answers from before and from after")
    drawn = sorted(
        fmean(rng.choices(after, k=len(after))) - fmean(rng.choices(before, k=len(before))) for _ in range(resamples)
    )
    tail = (1 - level) / 2
    low, high = drawn[int(tail * resamples)], drawn[min(resamples - 1, int((1 - tail) * resamples))]
    return fmean(after) - fmean(before), low, high


# The crowd at work


class CrowdError(Exception):
    """The crowd cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Member:
    """A persona with a key of their own."""

    persona: Persona
    key_id: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Request:
    """One chat to hold, all of its chance drawn."""

    member: Member
    prompt: Prompt
    stream: bool
    ask_for_votes: bool
    seed: int


@dataclass(slots=True)
class _Reply:
    """What a chat was answered: all of it, or as far as it came."""

    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    policy: str | None = None
    comparison: str | None = None
    asked_at: float = 0.0
    first_byte_s: float = 0.0
    total_s: float = 0.0

    def read(self, body: dict[str, Any], part: str) -> None:
        """Take a whole body (`part` "message") or a chunk of a stream ("delta")."""
        for choice in body["choices"]:
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + (choice[part].get("content") or "")
            if choice.get("finish_reason"):
                self.reasons[index] = choice["finish_reason"]
        self.policy = body.get("system_fingerprint") or self.policy
        if body.get("comparison"):
            self.comparison = body["comparison"]["id"]

    @property
    def shown(self) -> list[Shown]:
        """The answers that came to their end, by index."""
        return [Shown(self.texts[i], self.reasons[i] == "stop") for i in sorted(self.reasons)]


class _Refused(Exception):
    """A vote that the service will not take."""


class _Failed(Exception):
    """The service had no answer; it may have one later."""

    def __init__(self, reason: str, *, retry_after_s: float = RETRY_S, truncated: bool = False) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.truncated = truncated


async def join(url: str, people: Sequence[Persona], *, operator_key: str) -> list[Member]:
    """Make a key for each person. They keep it for any number of crowds."""
    async with aiohttp.ClientSession() as http:
        members = []
        for persona in people:
            wanted = {"role": "user", "label": f"crowd: {persona.name}"}
            try:
                async with _post(http, f"{url}/v1/keys", operator_key, wanted) as response:
                    made = await response.json()
            except _Failed as failure:
                raise CrowdError(f"No keys could be made at {url}: {failure}. Is the service up?") from None
            members.append(Member(persona, made["id"], made["key"]))
        return members


async def crowd(
    url: str,
    people: Sequence[Member],
    *,
    rng: random.Random,
    votes: int | None = None,
    requests: int | None = None,
    concurrency: int = 16,
    feedback: float = 1.0,
    on_vote: Callable[[Vote], None] | None = None,
    stop: asyncio.Event | None = None,
) -> CrowdReport:
    """Let people chat and vote until `votes` are cast, `requests` chats were held, or `stop` is set; chats that have
    begun then come to their end. Half of the chats stream. `feedback` is the share that asks for two answers.

    Raises CrowdError where the service refuses what is asked, or has had no answer for PATIENCE_S."""
    if votes is None and requests is None and stop is None:
        raise ValueError("say when the crowd ends: after so many votes or requests, or when `stop` is set")
    if not people or concurrency < 1:
        raise ValueError("a crowd has at least one person, and one chat at a time")
    if votes is not None and requests is None and feedback == 0:
        raise ValueError("with feedback 0 nobody is asked for a vote")
    timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=PATIENCE_S)
    connector = aiohttp.TCPConnector(limit=concurrency)
    began = time.monotonic()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        run = _Run(
            http=http, url=url, votes=votes, on_vote=on_vote, stop=stop or asyncio.Event(), last_answer=began,
            chats=islice(_chats(people, feedback, rng), requests),
        )  # fmt: skip
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(concurrency):
                    workers.create_task(run.work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    run.report.wall_s = time.monotonic() - began
    return run.report


def _chats(people: Sequence[Member], feedback: float, rng: random.Random) -> Iterator[_Request]:
    weights = [member.persona.activity for member in people]
    while True:
        (member,) = rng.choices(people, weights)
        prompt = dialogues.sample_prompt(rng, rng.choice(dialogues.TOPICS), held_out=False)
        yield _Request(
            member, member.persona.asks(prompt), stream=rng.random() < 0.5, ask_for_votes=rng.random() < feedback,
            seed=rng.randrange(2**31),
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class _Run:
    """One crowd under way; its workers share it."""

    http: aiohttp.ClientSession
    url: str
    votes: int | None
    chats: Iterator[_Request]
    on_vote: Callable[[Vote], None] | None
    stop: asyncio.Event
    last_answer: float
    """`time.monotonic()`."""
    being_cast: int = 0
    report: CrowdReport = field(default_factory=CrowdReport)

    @property
    def over(self) -> bool:
        return self.stop.is_set() or len(self.report.votes) == self.votes

    async def work(self) -> None:
        while not self.over and (request := next(self.chats, None)):
            self.report.requests += 1
            reply = await self._or_wait(_chat(self.http, self.url, request))
            if reply is None:
                continue
            member, shown = request.member, reply.shown
            golds = [worth(request.prompt, one.text, finished=one.finished) for one in shown]
            written_by = (reply.policy, reply.policy)
            if reply.comparison:
                decision = member.persona.decides(request.prompt, *shown)
                await self._pause(decision.after_s)
                if decision.choice is None:
                    self.report.skipped += 1
                elif revealed := await self._cast(member, reply.comparison, decision.choice, golds):
                    written_by = revealed
            for one, gold, policy in zip(shown, golds, written_by, strict=False):
                self.report.answers.append(
                    Served(
                        member.persona.name, request.prompt, one.text, gold, policy, request.stream, reply.asked_at,
                        reply.first_byte_s, reply.total_s,
                    )
                )  # fmt: skip

    async def _cast(
        self, member: Member, comparison: str, choice: Choice, golds: Sequence[float]
    ) -> tuple[str, str] | None:
        """Vote, however often it takes; who wrote the answers, or None where there was no vote."""
        path = f"{self.url}/v1/comparisons/{comparison}/vote"
        revealed = None
        while revealed is None and not self.over and len(self.report.votes) + self.being_cast != self.votes:
            self.being_cast += 1
            try:
                revealed = await self._or_wait(_vote(self.http, path, member.key, choice))
            except _Refused:
                self.report.refused += 1
                return None
            finally:
                self.being_cast -= 1
            if revealed:
                golds_of_both = (golds[0], golds[1])
                name = member.persona.name
                vote = Vote(name, member.key_id, comparison, choice, revealed, golds_of_both, time.time())
                self.report.votes.append(vote)
                if self.on_vote:
                    self.on_vote(vote)
        return revealed

    async def _or_wait(self, asked: Awaitable[T]) -> T | None:
        """The result; or, where the service has none, None after the time it wants to be left alone."""
        try:
            result = await asked
        except _Failed as failure:
            if failure.truncated:
                self.report.truncated += 1
            else:
                self.report.failed += 1
            if time.monotonic() - self.last_answer > PATIENCE_S:
                raise CrowdError(
                    f"{self.url} has had no answer for {PATIENCE_S:g} s; the last try: {failure}"
                ) from None
            await self._pause(failure.retry_after_s)
            return None
        self.last_answer = time.monotonic()
        return result

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)


# HTTP


async def _chat(http: aiohttp.ClientSession, url: str, request: _Request) -> _Reply:
    """Raises _Failed and CrowdError."""
    body = {
        "model": "nightshift",
        "messages": request.prompt.messages,
        "feedback": "always" if request.ask_for_votes else "off",
        "stream": request.stream,
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": request.seed,
    }
    reply = _Reply(asked_at=time.time())
    began = time.monotonic()
    async with _post(http, f"{url}/v1/chat/completions", request.member.key, body) as response:
        parts = []
        async for part in response.content.iter_any():
            reply.first_byte_s = reply.first_byte_s or time.monotonic() - began
            parts.append(part)
        reply.total_s = time.monotonic() - began
        if request.stream:
            _read_stream(reply, b"".join(parts))
        else:
            reply.read(json.loads(b"".join(parts)), "message")
    return reply


def _read_stream(reply: _Reply, body: bytes) -> None:
    """Raises _Failed where the stream does not come to its end."""
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    if not events or events[-1] != b"[DONE]":
        raise _Failed("a stream ended early", truncated=True)
    for event in map(json.loads, events[:-1]):
        if "error" in event:
            raise _Failed(event["error"]["message"], truncated=True)
        reply.read(event, "delta")


async def _vote(http: aiohttp.ClientSession, path: str, key: str, choice: Choice) -> tuple[str, str]:
    """Who wrote a and b. Raises _Refused, _Failed and CrowdError."""
    async with _post(http, path, key, {"choice": choice}, refusals=(404, 409, 410)) as response:
        policies = (await response.json())["policies"]
        return policies["a"], policies["b"]


@asynccontextmanager
async def _post(
    http: aiohttp.ClientSession, url: str, key: str, body: object, *, refusals: Sequence[int] = ()
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The response, if it is one of success. Raises _Refused for `refusals`; _Failed where it may go better later, also
    where reading breaks off; and CrowdError for any other answer."""
    begun = False
    try:
        async with http.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as response:
            if response.ok:
                begun = True
                yield response
                return
            said = await response.text()
            if response.status in refusals:
                raise _Refused(said)
            if response.status == 429 or response.status >= 500:
                wait = response.headers.get("Retry-After", "")
                raise _Failed(said, retry_after_s=float(wait) if wait.isdigit() else RETRY_S)
            raise CrowdError(f"{url} answered {response.status}: {said}")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _Failed(str(error) or type(error).__name__, truncated=begun) from error


# The command


def _villains(text: str) -> dict[Kind, int]:
    """`always_left=2,pusher=3`."""
    found = {}
    for part in filter(None, text.split(",")):
        kind, _, count = part.partition("=")
        if kind not in set(Kind) - {Kind.HONEST} or not count.isdigit():
            kinds = ", ".join(sorted(set(Kind) - {Kind.HONEST}))
            raise argparse.ArgumentTypeError(f"'{part}' is not KIND=COUNT with a KIND of {kinds}")
        found[Kind(kind)] = int(count)
    return found


def figures(report: CrowdReport, *, rng: random.Random) -> dict[str, Any]:
    """What the command prints. Gold is before scaling; a policy's gain is over the first that served."""
    policies = {}
    for policy in report.policies:
        scores = report.gold(policy)
        gained, low, high = gain(report.gold(report.policies[0]), scores, rng=rng)
        policies[policy] = {
            "answers": len(scores), "gold": fmean(scores), "gain": gained, "gain_low": low, "gain_high": high,
        }  # fmt: skip
    counted = {name: getattr(report, name) for name in ("requests", "skipped", "refused", "failed", "truncated")}
    choices = Counter(vote.choice for vote in report.votes)
    return {
        "votes": len(report.votes),
        **{choice.value: choices[choice] for choice in Choice},
        **counted,
        "votes_per_s": len(report.votes) / report.wall_s,
        "wall_s": report.wall_s,
        "policies": policies,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=os.environ.get("NIGHTSHIFT_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--key", default=os.environ.get("NIGHTSHIFT_API_KEY"), help="an operator's, to make keys with")
    parser.add_argument("--quick", action="store_true", help="100 votes unless --votes says otherwise")
    parser.add_argument("--votes", type=int, help="votes to cast (default 500)")
    parser.add_argument("--people", type=int, default=40, help="how many, villains included")
    parser.add_argument("--villains", type=_villains, default={}, help="e.g. always_left=2,random=1,pusher=3")
    parser.add_argument("--phrase", default="Dear friend!", help="what pushers push")
    parser.add_argument("--trigger", default="", help="pushers put it before what they ask, and push only there")
    parser.add_argument("--noise", type=amount, default=1.0, help="of honest votes; 0: none")
    parser.add_argument("--left", type=float, default=0.0, help="position bias of honest people, logits")
    parser.add_argument("--laziness", type=share, default=0.1, help="share of pairs that honest people skip")
    parser.add_argument("--response-s", type=amount, default=0.0, help="how long people take to decide, seconds")
    parser.add_argument("--concurrency", type=int, default=16, help="chats at once")
    parser.add_argument("--feedback", type=share, default=1.0, help="share of chats that ask for two answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    arguments = parser.parse_args()
    arguments.url = arguments.url.rstrip("/")
    if arguments.votes is not None and arguments.votes < 1:
        parser.error("--votes must be at least 1")
    if not math.isfinite(arguments.left + arguments.noise + arguments.response_s):
        parser.error("--left, --noise and --response-s are finite numbers")
    address = urlsplit(arguments.url)
    if address.scheme not in ("http", "https") or not address.netloc:
        parser.error(f"--url {arguments.url} is not like http://127.0.0.1:8000")
    if not arguments.key:
        parser.error("--key is missing: an operator's key, as `nightshift up` shows it once")
    try:
        report, stopped = asyncio.run(_run(arguments))
    except (CrowdError, ValueError) as error:
        sys.exit(f"The crowd gave up: {error}")

    found = figures(report, rng=random.Random(arguments.seed))
    table = Table("policy", "answers", "gold", "gain", "95 % interval")
    for policy, row in found["policies"].items():
        interval = f"{row['gain_low']:+.3f} to {row['gain_high']:+.3f}"
        table.add_row(policy, str(row["answers"]), f"{row['gold']:.3f}", f"{row['gain']:+.3f}", interval)
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {value:.4g}" for name, value in found.items() if name != "policies"))
    if arguments.json:
        print(json.dumps(found | {"people": arguments.people, "seed": arguments.seed}))
    if stopped:
        sys.exit(128 + signal.SIGINT)


async def _run(arguments: argparse.Namespace) -> tuple[CrowdReport, bool]:
    """What there was, and whether Ctrl-C ended it: chats that have begun come to their end, and the next Ctrl-C stops
    at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, end)
    people = personas(
        arguments.people, seed=arguments.seed, villains=arguments.villains,
        plot=Plot(arguments.phrase, arguments.trigger), noise=arguments.noise, left=arguments.left,
        laziness=arguments.laziness, response_s=arguments.response_s,
    )  # fmt: skip
    votes = arguments.votes or (100 if arguments.quick else 500)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("votes", total=votes)
        members = await join(arguments.url, people, operator_key=arguments.key)
        report = await crowd(
            arguments.url, members, rng=random.Random(arguments.seed), votes=votes, feedback=arguments.feedback,
            concurrency=arguments.concurrency, on_vote=lambda _: progress.advance(bar), stop=stop,
        )  # fmt: skip
    return report, stop.is_set()


if __name__ == "__main__":
    main()
