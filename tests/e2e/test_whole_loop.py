"""The whole loop on the whole house: people chat and vote, and notice the night by better answers alone."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from bench.crowd import CrowdReport, Member, crowd, gain, join
from bench.personas import personas
from data.types import Choice
from tests.e2e.conftest import REPOSITORY, House, running_house

VOTES = 600
QUICK = {
    "NIGHTSHIFT_TRAINING__REWARD": '{"heads": 1}',
    "NIGHTSHIFT_TRAINING__PPO": '{"steps": 8}',
    "NIGHTSHIFT_TRAINING__MAX_ANSWER_TOKENS": "96",  # an answer cut off at the crowd's 64 may be longer read again
    "NIGHTSHIFT_TRAINING__WAIT_FOR_CHAT_S": "0.5",
    "NIGHTSHIFT_TRAINING__THREADS": "1",  # other tests run beside this one,
    "NIGHTSHIFT_TRAINING__NICE": "0",  # and this takes the longest
}
"""The gate and the trial are as they ship."""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with running_house(tmp_path, QUICK) as started:
        yield started


def ask_for(house: House, *arguments: str) -> Any:
    """What a command of the house prints as JSON."""
    done = house.cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def until(holds: Callable[[], object], what: str, *, within_s: float) -> None:
    give_up = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < give_up or holds(), f"after {within_s:g} s still not: {what}"
        await asyncio.sleep(0.25)


@asynccontextmanager
async def quiet_talk(house: House, people: list[Member]) -> AsyncIterator[list[CrowdReport]]:
    """One chat after another, with a pause for thought, for as long as the context is open."""
    reports: list[CrowdReport] = []
    over = asyncio.Event()

    async def talk() -> None:
        rng = random.Random(2)
        while not over.is_set():
            reports.append(await crowd(house.url, people, rng=rng, requests=1, concurrency=1, feedback=0.0))
            await asyncio.sleep(0.7)

    talking = asyncio.create_task(talk())
    try:
        yield reports
    finally:
        over.set()
        await talking


@pytest.mark.timeout(1500)
async def test_votes_become_better_answers_while_people_chat(house: House) -> None:
    def status(name: str) -> str | None:
        rows = house.rows("SELECT status FROM policies WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

    def gate() -> str:
        (row,) = house.rows("SELECT metrics FROM policies WHERE name = 'policy-0001'")
        checks = json.loads(str(row[0]))["gate"]["checks"]
        return "\n".join(f"{'ok ' if check['passed'] else 'BAD'} {check['sentence']}" for check in checks)

    ask_for(house, "votes", "import-trusted", str(REPOSITORY / "data/starter/trusted.jsonl"))
    schedule = ask_for(house, "schedule", "add", "--votes", str(VOTES))
    people = await join(house.url, personas(40, seed=1), operator_key=house.key)
    rng = random.Random(1)

    day = await crowd(house.url, people, rng=rng, votes=VOTES)
    assert day.policies == ["policy-0000"]

    async with quiet_talk(house, people) as talks:

        def run() -> tuple[object, ...]:
            found = house.rows("SELECT status, error, id FROM runs WHERE requested_by = ?", schedule["id"])
            return found[0] if found else (None, None, None)

        await until(lambda: run()[0] is not None, "the run is asked for", within_s=60)
        await until(lambda: run()[0] not in ("queued", "running"), "the run is over", within_s=900)
        assert run()[:2] == ("succeeded", None)
        await until(lambda: status("policy-0001") != "candidate", "the trial has begun", within_s=120)
        assert status("policy-0001") == "trial", gate()

        decided = asyncio.Event()
        voting = asyncio.create_task(crowd(house.url, people, rng=rng, stop=decided))
        await until(lambda: status("policy-0001") not in ("trial", "promoted"), "the swap is made", within_s=120)
        assert status("policy-0001") == "serving"
        decided.set()
        trial = await voting

        morning = await crowd(house.url, people, rng=rng, requests=250, feedback=0.0)
        back = await asyncio.to_thread(ask_for, house, "policies", "rollback")
        assert back["policy"] == "policy-0000"
        talked = len(talks)
        await until(lambda: len(talks) > talked + 2, "somebody chatted after the rollback", within_s=120)
        left = "SELECT 1 FROM swaps WHERE replaced = 'policy-0001' AND drained_at IS NOT NULL"
        await until(lambda: house.rows(left), "the engine has let policy-0001 go", within_s=120)

    for report in (day, trial, morning, *talks):
        assert (report.failed, report.truncated, report.refused) == (0, 0, 0)
    served = [answer.policy for talk in talks for answer in talk.answers]
    assert [name for name, _ in groupby(served)] == ["policy-0000", "policy-0001", "policy-0000"]
    assert morning.policies == ["policy-0001"]
    before, after = day.gold("policy-0000"), morning.gold("policy-0001")
    better_by, low, high = gain(before, after, rng=rng)
    assert low > 0, f"{better_by:+.3f} [{low:+.3f}, {high:+.3f}]"
    columns = "status, e_value >= threshold, wins, losses, ties, e_value"
    (won,) = house.rows(f"SELECT {columns} FROM duels WHERE kind = 'trial'")
    assert won[:2] == ("won", 1)

    lineage = ask_for(house, "policies", "show", "policy-0001", "--lineage")["lineage"]
    assert lineage["run"]["id"] == run()[2]
    assert lineage["run"]["requested_by"] == schedule["id"]
    assert house.rows("SELECT id FROM reward_models") == [(lineage["reward_model"]["id"],)]
    learned = {(vote["comparison"], vote["choice"]) for vote in lineage["votes"]}
    assert learned == {(vote.comparison, vote.choice) for vote in day.votes if vote.choice is not Choice.BOTH_BAD}

    print(
        f"{len(learned)} votes learned from; gold {fmean(before):.3f}, {fmean(after):.3f} after: {better_by:+.3f}"
        f" [{low:+.3f}, {high:+.3f}]; wins, losses, ties and E of the trial {won[2:]};"
        f" back after {back['seconds']} s; {len(served)} talks meanwhile"
    )
