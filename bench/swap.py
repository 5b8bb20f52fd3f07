"""What people notice of a hot swap: streams that never stop, while one policy after another comes into service.

Every policy is an adapter that writes one token of its own and nothing else, whatever it is asked, so that an answer
shows who wrote it. Apart from that the adapters are as large as the trainer's. Each is first tried alone on vLLM. Then
a fixed number of clients stream through the real API before a real vLLM, both as `nightshift up` starts them: as soon
as an answer has ended its client asks for the next. Windows without a swap and windows that begin with one (an
operator's `POST /v1/policies/…/promote`) alternate; now and then one begins with a rollback instead. An answer is

    failed      without status 200
    truncated   without its end, or with fewer tokens than asked for
    mixed       in the words of two policies, or of another than `system_fingerprint` says

A gap is the time between two pieces of one stream, and counts where it ends. What a swap takes is the time from the
request until the first word of an answer of the new policy. In the end the other way to new weights is taken: the vLLM
server is stopped and started again under the same clients. Held against each other is the longest time without a word
to anybody, in each window and in the whole of the restart.

    python -m bench.swap [--quick] [--json] [--seed N] [--swaps 50] [--streams 16] [--model FOLDER]
"""

import argparse
import asyncio
import gc
import json
import os
import random
import shutil
import signal
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import torch
import uvloop
from transformers import AutoTokenizer

from bench.gateway import Lane, gateway, markdown, note, spread, vllm
from bench.load import Exchange, Target, quantile
from data import keys, registry
from data.database import connect, transaction
from data.settings import Settings
from data.types import BASE_POLICY, Feedback, Policy, PolicyStatus, Role, timestamp
from service.supervisor import find_model
from trainer.backbone import Backbone

FEWEST_TOKENS, MOST_TOKENS = 16, 96
"""Of an answer; all lengths between are as likely, so that clients do not fall into step."""
WINDOW_S = 3.5
"""Longer than a swap takes, with the unloading of the policy before."""
ROLLBACK_EVERY = 8
"""Swaps."""
PATIENCE_S = 60.0
"""For a swap to come to its end, and for the service to come back after a restart."""
RETRY_S = 0.25
"""Until a client that was refused asks again."""
DIRECTIONS = 8


# The policies


@dataclass(frozen=True, slots=True)
class Speaker:
    """A policy that says one word again and again."""

    policy: str
    word: str
    folder: Path


def voices(backbone: Backbone, tokenizer: Any) -> list[tuple[int, str]]:
    """(token, its word) of all tokens that are a whole word, the surest first. The last hidden state is scaled to one
    length, so what makes a token sure is how far its row of the output head lies from all others."""
    rows = backbone.base.get_output_embeddings().weight * _norm(backbone)
    apart = rows - rows.mean(dim=0)
    logits = torch.nn.functional.normalize(apart, dim=1) @ rows.T  # (V, V)
    own = logits.diagonal().clone()
    logits.fill_diagonal_(float("-inf"))
    margin = own - logits.max(dim=1).values
    found = []
    for token in margin.argsort(descending=True).tolist():
        text = tokenizer.decode([token])
        if text.startswith(" ") and text[1:].isalpha() and len(text) > 3:
            found.append((token, text[1:]))
    return found


def _norm(backbone: Backbone) -> torch.Tensor:
    """(d,) the scale of the norm before the output head."""
    weight: torch.Tensor = backbone.base.get_decoder().norm.weight
    return weight


@torch.no_grad()
def speak(backbone: Backbone, token: int, folder: Path) -> None:
    """Write an adapter under which the model says `token` and nothing else.

    Neurons of the last MLP come in pairs whose gate and input are both +k z and both -k z, for a few directions z of
    the hidden state. silu(k z) k z + silu(-k z)(-k z) = (k z)^2, so a pair's sum is above 0 whatever comes in, and its
    output, the direction of the token, drowns out everything else."""
    adapters = backbone.adapters
    adapters.add("voice")
    gate, up, down = (
        [layer for path, layer in adapters.layers.items() if path.endswith(f"mlp.{name}_proj")][-1]
        for name in ("gate", "up", "down")
    )
    hidden = gate.base.in_features
    directions, _ = torch.linalg.qr(torch.randn(hidden, DIRECTIONS, generator=torch.Generator().manual_seed(0)))
    for layer in (gate, up):
        layer.lora_a["voice"][:DIRECTIONS] = directions.T
        for i in range(DIRECTIONS):
            layer.lora_b["voice"][2 * i, i] = 30.0
            layer.lora_b["voice"][2 * i + 1, i] = -30.0
    rows = backbone.base.get_output_embeddings().weight * _norm(backbone)
    down.lora_a["voice"][0] = 0.0
    down.lora_a["voice"][0, : 2 * DIRECTIONS] = 1.0
    down.lora_b["voice"][:, 0] = 10 * torch.nn.functional.normalize(rows[token] - rows.mean(dim=0), dim=0)
    backbone.publish("voice", folder)


def make_speakers(state: Path, model: Path, backbone: Backbone, count: int) -> list[Speaker]:
    """Publish `count` policies, candidates all, each with a word of its own."""
    chosen = voices(backbone, AutoTokenizer.from_pretrained(model))[:count]
    if len(chosen) < count:
        raise RuntimeError(f"{model} has only {len(chosen)} tokens that are a whole word: ask for fewer swaps")
    speakers = []
    with closing(connect(state / "nightshift.db")) as db:
        base = registry.get(db, BASE_POLICY)
        for token, word in chosen:
            name = registry.next_name(db)
            path, sha256 = registry.publish_folder(state, name, partial(speak, backbone, token))
            policy = Policy(name, BASE_POLICY, path, sha256, base.base_model, PolicyStatus.CANDIDATE, timestamp())
            with transaction(db):
                registry.insert(db, policy)
            speakers.append(Speaker(name, word, (state / path).resolve()))
    return speakers


async def try_alone(engine: Target, speakers: Sequence[Speaker]) -> None:
    """Load each speaker into vLLM under another name, and hear that it says its word alone. Raises RuntimeError."""
    for speaker in speakers:
        name = f"alone-{speaker.policy}"
        await _post(engine, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(speaker.folder)})
        body = {"model": name, "max_tokens": 16, "temperature": 1.0, "n": 2}
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            answer = await _post(engine, "/v1/chat/completions", body | {"messages": messages})
            for choice in orjson.loads(answer.body)["choices"]:
                if set(choice["message"]["content"].split()) != {speaker.word}:
                    raise RuntimeError(f"{speaker.policy} is to say '{speaker.word}': {choice['message']['content']}")
        await _post(engine, "/v1/unload_lora_adapter", {"lora_name": name})


QUESTIONS = ("Hello!", "What is the capital of France?", "Tell me a story about a cat.")


async def _post(target: Target, path: str, body: object) -> Exchange:
    exchange = await target.post(path, body)
    if exchange.status not in (200, 202):
        raise RuntimeError(f"{target.url}{path} answered {exchange.status}: {exchange.body.decode()[:500]}")
    return exchange


# What clients see


@dataclass(frozen=True, slots=True)
class Answer:
    """One exchange as its client understood it."""

    policy: str | None
    words: frozenset[str]
    whole: bool
    """It came to its end, with as many tokens as asked for."""
    sent: float
    pieces: list[float]
    status: int = 200

    @classmethod
    def of(cls, exchange: Exchange, *, wanted: int) -> "Answer":
        """`wanted`: how many tokens were asked for."""
        policy, text, reason, tokens, done = None, "", None, 0, False
        if exchange.status == 200:
            for event in bytes(exchange.body).split(b"\n\n"):
                if event == b"data: [DONE]":
                    done = True
                elif event.startswith(b"data: "):
                    chunk = orjson.loads(event[6:])
                    policy = chunk.get("system_fingerprint") or policy
                    for choice in chunk.get("choices", []):
                        text += choice["delta"].get("content") or ""
                        reason = choice.get("finish_reason") or reason
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        whole = done and reason == "length" and tokens == wanted
        return cls(policy, frozenset(text.split()), whole, exchange.sent, exchange.pieces, exchange.status)

    @property
    def ttft_ms(self) -> float:
        return 1000 * (self.pieces[0] - self.sent)


class Kind(StrEnum):
    QUIET = "without"
    SWAP = "swap"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Window:
    kind: Kind
    began: float
    ended: float
    policy: str
    """Which comes into service in it; where none does, which serves."""

    def __contains__(self, moment: float) -> bool:
        return self.began <= moment < self.ended


class Clients:
    """Streams that never stop, and their answers."""

    def __init__(self, lane: Lane, *, ends: Iterable[int], streams: int, rng: random.Random) -> None:
        """`ends` are the tokens that end an answer."""
        self.answers: list[Answer] = []
        self.refused: list[float] = []
        """When a request had no answer of status 200."""
        self._lane = lane
        # Speakers never end. Where the base model did, the service would see a jump of unfinished answers and go back.
        self._bias = {str(token): -100 for token in ends}
        self._rng = rng
        self._stop = False
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(streams)]

    async def _ask_on(self) -> None:
        while not self._stop:
            wanted = self._rng.randint(FEWEST_TOKENS, MOST_TOKENS)
            body = self._lane.body(
                stream=True, max_tokens=wanted, logit_bias=self._bias, seed=self._rng.randrange(2**31),
                messages=[{"role": "user", "content": f"Tell me about the number {self._rng.randrange(1000)}."}],
            )  # fmt: skip
            try:
                answer = Answer.of(await self._lane.target.post("/v1/chat/completions", body), wanted=wanted)
            except OSError:
                answer = None
            if answer is not None and answer.status == 200:
                self.answers.append(answer)
            else:
                self.refused.append(time.perf_counter())
                await asyncio.sleep(RETRY_S)

    async def answered_by(self, policy: str, *, since: float) -> None:
        """Return once there is an answer of `policy` to a request sent after `since`. Raises RuntimeError."""
        give_up = time.perf_counter() + PATIENCE_S
        while not any(a.policy == policy and a.sent > since for a in reversed(self.answers[-64:])):
            if time.perf_counter() > give_up:
                raise RuntimeError(f"no answer of {policy} within {PATIENCE_S:g} s")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Let the answers that have begun come to their end."""
        self._stop = True
        await asyncio.gather(*self._tasks)


# What came of it


@dataclass(frozen=True)
class Taken:
    answers: list[Answer]
    failed: int
    """Requests without an answer of status 200."""
    windows: list[Window]
    words: dict[str, str]
    """{policy: its word}."""

    @property
    def truncated(self) -> int:
        return sum(not answer.whole for answer in self.answers)

    @property
    def mixed(self) -> int:
        return sum(not is_of_one(answer, self.words) for answer in self.answers)

    def of(self, *kinds: Kind) -> list[Window]:
        return [window for window in self.windows if window.kind in kinds]

    @cached_property
    def _gaps(self) -> list[tuple[float, float]]:
        """(when it ended, milliseconds) of each time between two pieces of an answer, in order."""
        return sorted((at, 1000 * (at - before)) for a in self.answers for before, at in pairwise(a.pieces))

    def gaps_ms(self, *windows: Window) -> list[float]:
        """Those that ended in the windows."""
        found = []
        for window in windows:
            first, end = (bisect_left(self._gaps, (moment, 0.0)) for moment in (window.began, window.ended))
            found += [gap for _, gap in self._gaps[first:end]]
        return found

    def ttft_ms(self, window: Window) -> list[float]:
        """Of the requests that were sent in it."""
        return [answer.ttft_ms for answer in self.answers if answer.sent in window]

    @cached_property
    def _heard(self) -> list[float]:
        """When anybody got a piece of an answer, in order."""
        return sorted(moment for answer in self.answers for moment in answer.pieces)

    def silence_ms(self, window: Window) -> float:
        """The longest time of the window in which nobody got a word, from its begin and to its end too."""
        first, end = bisect_left(self._heard, window.began), bisect_left(self._heard, window.ended)
        return silence_ms([window.began, *self._heard[first:end], window.ended])

    def took_ms(self, window: Window) -> float:
        """From the request for another policy to the first word of it."""
        heard = (a.pieces[0] for a in self.answers if a.policy == window.policy and a.pieces[0] >= window.began)
        return 1000 * (min(heard) - window.began)

    def ttft_added_ms(self) -> list[float]:
        """Of each window with a swap: its median less that of the window before it."""
        return [
            quantile(self.ttft_ms(window), 0.5) - quantile(self.ttft_ms(before), 0.5)
            for before, window in pairwise(self.windows)
            if window.kind is not Kind.QUIET
        ]


def is_of_one(answer: Answer, words: dict[str, str]) -> bool:
    """Whether an answer is the fingerprint's policy's, every word of it."""
    return answer.policy in words and answer.words <= {words[answer.policy]}


@dataclass(frozen=True, slots=True)
class Restart:
    silence_ms: float
    failed: int


def silence_ms(pieces: Sequence[float]) -> float:
    """The longest time without a word to anybody."""
    ordered = sorted(pieces)
    return 1000 * max((after - before for before, after in pairwise(ordered)), default=0.0)


async def swaps(
    clients: Clients, operator: Target, speakers: Sequence[Speaker], *, rollback_every: int
) -> list[Window]:
    """Bring each speaker into service in turn; the windows. The first of them serves already."""
    windows = []

    async def window(kind: Kind, policy: str, path: str = "") -> None:
        began = time.perf_counter()
        if path:
            await _post(operator, path, {"reason": "the bench"})
            await clients.answered_by(policy, since=began)
        await asyncio.sleep(began + WINDOW_S - time.perf_counter())
        windows.append(Window(kind, began, time.perf_counter(), policy))

    serving = speakers[0].policy
    for number, speaker in enumerate(speakers[1:], 1):
        note(f"swap {number} of {len(speakers) - 1}")
        await window(Kind.QUIET, serving)
        await window(Kind.SWAP, speaker.policy, f"/v1/policies/{speaker.policy}/promote")
        if number % rollback_every == 0:
            await window(Kind.QUIET, speaker.policy)
            await window(Kind.ROLLBACK, serving, "/v1/policies/rollback")
        else:
            serving = speaker.policy
    return windows


async def bench(folder: Path, model: Path, options: argparse.Namespace) -> tuple[Taken, Restart]:
    gc.disable()  # pauses of ours would look like theirs
    async with AsyncExitStack() as stack:
        note("starting vLLM")
        engine_stack = await stack.enter_async_context(AsyncExitStack())
        engine = (await engine_stack.enter_async_context(vllm(folder, model))).target
        lane, database = await stack.enter_async_context(gateway(folder, model, engine))
        note("making policies, and trying each alone")
        backbone = Backbone.load(model, bf16=False)
        speakers = make_speakers(database.parent, model, backbone, options.swaps + 1)
        await try_alone(engine, speakers)
        with closing(connect(database)) as db, transaction(db):
            _, key = keys.create(db, role=Role.OPERATOR, feedback=Feedback.OFF, label="bench", actor="bench")
        operator = Target(lane.target.url, key)

        def clients_like() -> Clients:
            return Clients(lane, ends=backbone.end_ids, streams=options.streams, rng=random.Random(options.seed))

        first = speakers[0].policy
        clients = clients_like()
        await asyncio.sleep(WINDOW_S)
        await _post(operator, f"/v1/policies/{first}/promote", {})
        await clients.answered_by(first, since=time.perf_counter())
        await asyncio.sleep(WINDOW_S)
        began = time.perf_counter()
        windows = await swaps(clients, operator, speakers, rollback_every=min(options.swaps, ROLLBACK_EVERY))
        await clients.stop()
        answers = [answer for answer in clients.answers if answer.sent >= began]
        taken = Taken(answers, len(clients.refused), windows, {s.policy: s.word for s in speakers})

        note("restarting vLLM")
        clients = clients_like()
        await asyncio.sleep(WINDOW_S)
        await engine_stack.aclose()
        again = time.perf_counter()
        port = int(engine.url.rpartition(":")[2])
        # The same weights: it is the start that takes time, whatever they are.
        await engine_stack.enter_async_context(vllm(folder, model, port=port, key=engine.key))
        await clients.answered_by(windows[-1].policy, since=again)
        await clients.stop()
        pieces = [moment for answer in clients.answers for moment in answer.pieces]
        unfinished = sum(not answer.whole for answer in clients.answers)
        return taken, Restart(silence_ms(pieces), len(clients.refused) + unfinished)


# What is printed


def figures(taken: Taken, restart: Restart, options: argparse.Namespace) -> dict[str, Any]:
    baseline = taken.gaps_ms(*taken.of(Kind.QUIET))
    return {
        "swaps": len(taken.of(Kind.SWAP)),
        "failed": taken.failed,
        "truncated": taken.truncated,
        "mixed": taken.mixed,
        "gap_ms": round(max(taken.gaps_ms(*taken.of(Kind.SWAP, Kind.ROLLBACK))), 1),
        "baseline_gap_p999_ms": round(quantile(baseline, 0.999), 1),
        "baseline_gap_ms": round(max(baseline), 1),
        "ttft_added_ms_p50": round(median(taken.ttft_added_ms()), 1),
        "swap_ms_p50": round(median(map(taken.took_ms, taken.of(Kind.SWAP))), 1),
        "rollback_ms": round(max(map(taken.took_ms, taken.of(Kind.ROLLBACK))), 1),
        "silence_ms": round(max(map(taken.silence_ms, taken.of(Kind.SWAP, Kind.ROLLBACK))), 1),
        "baseline_silence_ms": round(max(map(taken.silence_ms, taken.of(Kind.QUIET))), 1),
        "restart_ms": round(restart.silence_ms),
        "restart_failed": restart.failed,
        "answers": len(taken.answers),
        "streams": options.streams,
        "seed": options.seed,
        "quick": options.quick,
    }


def table(taken: Taken, restart: Restart) -> str:
    def of_windows(kind: Kind, q: float) -> str:
        return spread((quantile(taken.gaps_ms(window), q) for window in taken.of(kind)), 0)

    def ttft(kind: Kind) -> str:
        return spread((quantile(taken.ttft_ms(window), 0.5) for window in taken.of(kind)), 0)

    def took(kind: Kind) -> str:
        return spread(map(taken.took_ms, taken.of(kind)), 0)

    def silence(kind: Kind) -> str:
        return spread(map(taken.silence_ms, taken.of(kind)), 0)

    kinds = list(Kind)
    rows = [
        ["windows", *(str(len(taken.of(kind))) for kind in kinds), "1"],
        ["longest gap between two tokens, ms", *(of_windows(kind, 1.0) for kind in kinds), ""],
        ["99th percentile of the gaps, ms", *(of_windows(kind, 0.99) for kind in kinds), ""],
        ["first token, median, ms", *(ttft(kind) for kind in kinds), ""],
        ["request to first word of the other, ms", "", took(Kind.SWAP), took(Kind.ROLLBACK), ""],
        ["longest time without a word to anybody, ms", *(silence(kind) for kind in kinds), f"{restart.silence_ms:.0f}"],
        ["failed, truncated or mixed", *["" for _ in kinds], str(restart.failed)],
    ]
    everything = taken.failed + taken.truncated + taken.mixed
    rows[-1][2] = f"{everything} of {len(taken.answers) + taken.failed}"
    return markdown(["median of the windows [least, greatest]", *kinds, "restart"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 swaps unless --swaps says otherwise")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swaps", type=int, help="how many (default 50)")
    parser.add_argument("--streams", type=int, default=16, help="clients, each with one answer at a time")
    parser.add_argument("--model", default=Settings().model, help="a folder or a Hugging Face id: Llama's kind")
    options = parser.parse_args()
    if options.swaps is None:
        options.swaps = 8 if options.quick else 50
    if options.swaps < 1 or options.streams < 1:
        parser.error("--swaps and --streams are at least 1")

    Path(".bench").mkdir(exist_ok=True)  # a real disk, unlike some /tmp
    folder = Path(tempfile.mkdtemp(prefix="swap-", dir=".bench")).absolute()
    model = find_model(options.model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes started below must end with us
    load = os.getloadavg()[0]  # of others: ours comes on top
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            taken, restart = runner.run(bench(folder, model, options))
    except BaseException:
        note(f"the logs are in {folder}")
        raise
    shutil.rmtree(folder)

    print(f"\n{table(taken, restart)}\n")
    print(f"{options.streams} streams. {os.cpu_count()} cores, load average {load:.1f} before the start.\n")
    if options.json:
        print(json.dumps(figures(taken, restart, options)))


if __name__ == "__main__":
    main()
