"""Votes a second that one API process acknowledges, each on disk before its 200 (synchronous=FULL), and how long the
slowest hundredth waits.

Voters keep one request each in flight, over HTTP, every vote on a comparison of its own. Beside it, in the same run and
on the same disk: the same votes without HTTP, one transaction each and many to a transaction, and bare fsyncs. In the
end the API is killed by SIGKILL, and every vote it acknowledged must be in the database. (That shows that they were
committed; that a commit outlasts a power cut is what synchronous=FULL and the fsync rate beside it stand for.)

    python bench/votes.py [--quick] [--json] [--seed N] [--voters 1,8,64,256]
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
from collections import defaultdict
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import orjson
import uvloop
from sqlite_utils import Database

from bench.gateway import markdown, note, running, spread
from bench.load import Exchange, Target, closed_loop, quantile, until_ready
from data import comparisons, completions, keys
from data.database import Writer, connect, transaction
from data.ids import new_id
from data.types import (
    BASE_POLICY,
    Choice,
    Comparison,
    ComparisonKind,
    Completion,
    CompletionStatus,
    Feedback,
    Role,
    timestamp,
)
from service.supervisor import free_port

Ballot = tuple[str, int, Choice]
"""A comparison, the number of the key that owns it, and the vote."""

KEYS = 16
HEADLINE = 64
"""Voters at once for the figures of the JSON; the most of --voters where it is not among them."""


@dataclass(frozen=True, slots=True)
class Rate:
    """One repetition: votes a second, and milliseconds that one takes (None where nothing waits for a single one)."""

    per_s: float
    p50_ms: float | None = None
    p99_ms: float | None = None


def prepare(db: Database, votes: int) -> tuple[list[tuple[str, str]], list[tuple[str, int]]]:
    """(id, token) of keys, and (id, number of the key that owns it) of `votes` comparisons."""
    with transaction(db):
        db.execute(
            "INSERT INTO policies (name, path, sha256, base_model, status, created_at)"
            " VALUES (?, 'policies/policy-0000', '', '', 'serving', ?)",
            (BASE_POLICY, timestamp()),
        )
        owners = []
        for _ in range(KEYS):
            key, token = keys.create(db, role=Role.USER, feedback=Feedback.OFF, label="bench", actor="bench")
            owners.append((key.id, token))
    pairs = []
    numbers: Iterator[int] = iter(range(votes))
    while batch := list(islice(numbers, 2000)):
        with transaction(db):
            for i in batch:
                key_id, _ = owners[i % KEYS]
                a, b = _completion(key_id, i), _completion(key_id, i)
                completions.insert(db, a)
                completions.insert(db, b)
                at, until = timestamp(), timestamp(plus_s=86_400)
                kind = ComparisonKind.SAME_POLICY
                pair = Comparison(new_id("cmp"), key_id, a.id, b.id, kind, False, at, until)
                comparisons.insert(db, pair)
                pairs.append((pair.id, i % KEYS))
    return owners, pairs


def _completion(key_id: str, i: int) -> Completion:
    messages = [{"role": "user", "content": f"Tell me something about the number {i}, in a sentence or two."}]
    return Completion(
        id=new_id("cpl"),
        key_id=key_id,
        user=key_id,
        conversation=completions.conversation_of(key_id, messages),
        messages=messages,
        answer="It is the sum of the numbers before it, if you choose them well. " * 3,
        policy=BASE_POLICY,
        sampling={"max_tokens": 64, "temperature": 0.8},
        status=CompletionStatus.COMPLETE,
        finish_reason="stop",
        prompt_tokens=20,
        completion_tokens=40,
        first_token_ms=20.0,
        total_ms=135.0,
        created_at=timestamp(),
    )


async def over_http(targets: list[Target], votes: list[Ballot], *, at_once: int) -> tuple[Rate, dict[str, str]]:
    """Cast `votes`; the rate, and {comparison: choice} of what was acknowledged."""

    def ask(i: int) -> Awaitable[Exchange]:
        pair, key, choice = votes[i]
        return targets[key].post(f"/v1/comparisons/{pair}/vote", {"choice": choice})

    gc.collect()
    run = await closed_loop(len(votes), ask, at_once=at_once)
    if run.failed:
        raise RuntimeError(f"{run.failed} of {len(votes)} votes were not acknowledged")
    answers = [orjson.loads(exchange.body) for exchange in run.exchanges]
    took = [1000 * exchange.total_s for exchange in run.exchanges]
    rate = Rate(len(votes) / run.wall_s, quantile(took, 0.5), quantile(took, 0.99))
    return rate, {answer["comparison"]: answer["choice"] for answer in answers}


def one_by_one(db: Database, owners: list[tuple[str, str]], votes: list[Ballot]) -> Rate:
    """Each vote in a transaction of its own, straight on the data layer."""
    began, took = time.perf_counter(), []
    for vote in votes:
        start = time.perf_counter()
        with transaction(db):
            _cast(db, owners, vote)
        took.append(1000 * (time.perf_counter() - start))
    return Rate(len(votes) / (time.perf_counter() - began), quantile(took, 0.5), quantile(took, 0.99))


def in_groups(path: Path, owners: list[tuple[str, str]], votes: list[Ballot]) -> Rate:
    """All of them handed to a writer like the API's at once."""
    writer = Writer(path)
    began = time.perf_counter()
    futures = [writer.submit(partial(_cast, owners=owners, vote=vote)) for vote in votes]
    for future in futures:
        future.result()
    rate = Rate(len(votes) / (time.perf_counter() - began))
    writer.close()
    return rate


def _cast(db: Database, owners: list[tuple[str, str]], vote: Ballot) -> None:
    pair, key, choice = vote
    key_id, _ = owners[key]
    comparisons.vote(db, pair, key_id=key_id, role=Role.USER, choice=choice, comment=None, window_s=600)


def bare_fsyncs(folder: Path, times: int) -> Rate:
    """One page appended and synced at a time."""
    page, took = os.urandom(4096), []
    with (folder / "fsync").open("wb", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(times):
            start = time.perf_counter()
            file.write(page)
            os.fsync(file.fileno())
            took.append(1000 * (time.perf_counter() - start))
        wall_s = time.perf_counter() - began
    return Rate(times / wall_s, quantile(took, 0.5), quantile(took, 0.99))


async def bench(folder: Path, voters: list[int], options: argparse.Namespace) -> dict[str, list[Rate]]:
    """{what: one rate a repetition}. Raises RuntimeError where an acknowledged vote is not in the database."""
    rng = random.Random(options.seed)
    repetitions, size, small = (2, 500, 200) if options.quick else (5, 4000, 1000)
    database, port = folder / "state" / "nightshift.db", free_port()
    environment = {"NIGHTSHIFT_STATE": str(database.parent), "NIGHTSHIFT_SERVER__PORT": str(port)}
    note("preparing comparisons")
    db = connect(database)
    owners, pairs = prepare(db, (repetitions * (len(voters) + 2) + 1) * size)
    fresh = iter([(pair, key, rng.choice(list(Choice))) for pair, key in pairs])
    taken: dict[str, list[Rate]] = defaultdict(list)
    gc.disable()  # pauses of ours would look like theirs; collected between the runs
    async with running([sys.executable, "-m", "service.app"], folder / "api.log", environment) as process:
        targets = [Target(f"http://127.0.0.1:{port}", token) for _, token in owners]
        await until_ready(targets[0], "/healthz", process, seconds=60)
        note("warming up")
        _, acknowledged = await over_http(targets, list(islice(fresh, size)), at_once=voters[-1])
        for repetition in range(repetitions):
            note(f"repetition {repetition + 1} of {repetitions}")
            for at_once in voters:
                votes = list(islice(fresh, small if at_once == 1 else size))
                rate, said = await over_http(targets, votes, at_once=at_once)
                taken[f"API, {at_once} at once"].append(rate)
                acknowledged |= said
            taken["no HTTP, up to 256 to a transaction"].append(in_groups(database, owners, list(islice(fresh, size))))
            taken["no HTTP, a transaction each"].append(one_by_one(db, owners, list(islice(fresh, small))))
            taken["bare fsync of a page"].append(bare_fsyncs(folder, small))
        process.kill()
        await process.wait()
    db.close()
    check(database, acknowledged)
    return taken


def check(database: Path, acknowledged: dict[str, str]) -> None:
    db = connect(database)
    stored = dict(db.execute("SELECT comparison_id, choice FROM votes").fetchall())
    db.close()
    lost = [pair for pair, choice in acknowledged.items() if stored.get(pair) != choice]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(acknowledged)} acknowledged votes are not in the database")
    note(f"all {len(acknowledged)} acknowledged votes are in the database after SIGKILL")


def table(taken: dict[str, list[Rate]]) -> str:
    def milliseconds(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return spread(known) if known else ""

    rows = [
        [name, spread((r.per_s for r in rates), 0), milliseconds([r.p50_ms for r in rates]),
         milliseconds([r.p99_ms for r in rates])]
        for name, rates in taken.items()
    ]  # fmt: skip
    return markdown(["votes", "a second", "p50, ms", "p99, ms"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short repetitions")
    parser.add_argument("--json", action="store_true", help="end with one JSON object of the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--voters", default="1,8,64,256", help="how many vote at once")
    options = parser.parse_args()
    try:
        voters = sorted(int(at_once) for at_once in options.voters.split(","))
    except ValueError:
        voters = []
    if min(voters, default=0) < 1:
        parser.error("--voters are numbers from 1 on, between commas")

    Path(".bench").mkdir(exist_ok=True)  # a real disk, unlike some /tmp
    folder = Path(tempfile.mkdtemp(prefix="votes-", dir=".bench")).absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes started below must end with us
    load = os.getloadavg()[0]  # of others: ours comes on top
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            taken = runner.run(bench(folder, voters, options))
    except BaseException:
        note(f"the log is in {folder}")
        raise
    shutil.rmtree(folder)

    print(f"\n{table(taken)}\n\nMedian over the repetitions [least, greatest].")
    print(f"{os.cpu_count()} cores, load average {load:.1f} before the start.\n")
    if options.json:
        at_once = HEADLINE if HEADLINE in voters else voters[-1]
        headline = taken[f"API, {at_once} at once"]
        figures = {
            "votes_per_s": round(median(rate.per_s for rate in headline), 1),
            "p99_ms": round(median(rate.p99_ms or 0.0 for rate in headline), 3),
            "voters": at_once,
            "single_transactions_per_s": round(median(r.per_s for r in taken["no HTTP, a transaction each"]), 1),
            "fsyncs_per_s": round(median(r.per_s for r in taken["bare fsync of a page"]), 1),
            "seed": options.seed,
            "quick": options.quick,
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
