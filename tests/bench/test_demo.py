"""The demo: its whole path on the whole API with a fake engine and a night that a test makes up; what it shows; its
service, with a fake engine too."""

import argparse
import asyncio
import io
import json
import os
import random
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sqlite_utils import Database

from bench import demo
from bench.demo import DemoError, Plan, Said, Stages, Story, figures, headline, learn, page, question, win_rate
from bench.gold import worth
from bench.load import Target
from data import runs
from data.database import connect, transaction
from data.settings import load_settings
from data.types import BASE_POLICY, PolicyStatus, Role, RunStatus
from service.supervisor import free_port
from tests.conftest import AddPolicy, FakeEngine, House, Judge, OpenHouse, Refusal, Reply, eventually
from trainer import dialogues

NEW = "policy-0001"
PLAN = Plan(votes=20, questions=30, steps=4, people=6, seed=3)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "LOOK_S", 0.01)
    monkeypatch.setattr(demo, "TALK_S", 0.01)
    monkeypatch.setattr(demo, "CHOSEN", 24)


def curt_before_and_warm_after(body: dict[str, Any]) -> Reply:
    """The same for the same policy and seed."""
    first, last = ("Look.", "Next.") if body["model"] == BASE_POLICY else (
        dialogues.WARM_OPENINGS[0], dialogues.WARM_CLOSINGS[0]
    )  # fmt: skip
    chance = random.Random(body["seed"])
    return Reply(choices=[[first, f" It is {chance.randrange(10**6)}. ", last] for _ in range(body.get("n") or 1)])


def number_in(text: str) -> int:
    return int(re.findall(r"\d+", text)[0])


@pytest.fixture
async def house(open_house: OpenHouse, engine: FakeEngine) -> House:
    engine.answer = curt_before_and_warm_after
    return await open_house(engine, chat={"max_n": 1 + demo.BEST_OF})


def target(house: House) -> Target:
    return Target(house.url, house.tokens[Role.OPERATOR])


def stages(output: io.StringIO) -> Stages:
    return Stages(Console(file=output, width=200))


@asynccontextmanager
async def a_night(db: Database, end: Any, shown: Stages) -> AsyncIterator[None]:
    """What the clock and the trainer do: when the votes that the schedule waits for are there, they run, and end as
    `end(run)` does."""

    async def clock() -> None:
        def due() -> bool:
            wanted = db.execute("SELECT id, spec FROM schedules").fetchone()
            return wanted is not None and db.execute("SELECT count(*) FROM votes").fetchone()[0] >= int(wanted[1])

        await eventually(due)
        with transaction(db):
            (schedule,) = db.execute("SELECT id FROM schedules").fetchone()
            runs.request(db, requested_by=schedule, config={})
        with transaction(db):
            run = runs.claim(db)
            assert run is not None
        for stage, last in (("reward", {"accuracy": 0.7}), ("ppo", {"score": 0.5, "kl": 1.25})):
            with transaction(db):
                runs.beat(db, run.id, stage=stage)
                runs.add_metrics(db, run.id, 2, {f"{stage}/{name}": value for name, value in last.items()})
            title = demo.TITLES[stage]
            await eventually(lambda title=title: shown.name == title)  # or on a busy machine nobody may see it
        end(run.id)

    night = asyncio.create_task(clock())
    try:
        yield
        await night
    finally:
        night.cancel()


async def test_votes_become_a_policy_that_serves_and_its_answers_are_held_against_those_before(
    house: House, db: Database, add_policy: AddPolicy, engine: FakeEngine, judge: Judge
) -> None:
    judge.reward_model = None
    judge.says = lambda answers: [[float(number_in(text))] for text in answers]

    def succeed(run: str) -> None:
        judge.reward_model = "rm_1"
        add_policy(run_id=run)
        with transaction(db):
            runs.finish(db, run, RunStatus.SUCCEEDED)

    said = io.StringIO()
    with stages(said) as shown:
        async with a_night(db, succeed, shown):
            story = await learn(target(house), house.settings.state, PLAN, shown)

    assert story.learned
    assert (story.policy["name"], story.policy["status"]) == (NEW, "serving")
    assert story.failed == 0
    assert story.chats > PLAN.votes
    questions = dialogues.prompts(PLAN.questions, seed=3, held_out=True)
    assert story.prompts == questions
    for prompt, old, new in zip(questions, story.before, story.after, strict=True):
        assert old.text.startswith("Look.")
        assert new.text.startswith(dialogues.WARM_OPENINGS[0])
        assert number_in(old.text) == number_in(new.text), "another seed"
        assert new.gold == worth(prompt, new.text, finished=True)
    looked_at = judge.asked[-demo.CHOSEN :]
    assert [messages for messages, _ in looked_at] == [[*prompt.messages] for prompt in questions[: demo.CHOSEN]]
    assert len(story.best) == demo.CHOSEN
    for (_, answers), old, best in zip(looked_at, story.before, story.best, strict=False):
        assert len({*answers, old.text}) == 5, "chosen from others than the one before"
        assert best.text == max(answers, key=number_in)
    duel = story.duel
    assert duel is not None
    assert duel["status"] == "won"
    assert duel["losses"] < duel["wins"] / 4, "people's hands slip, though seldom"
    assert duel["e_value"] >= duel["threshold"]
    found = figures(story)
    assert found["win_rate"] == 1.0 > found["win_rate_low"] > 0.8
    assert 0.2 < found["win_rate_best_of_4"] < 0.8, "the judge likes numbers, gold does not"
    assert found["trial_wins"] == duel["wins"]
    assert found["gate"] == {"kl": 3.0}
    assert list(found["seconds"]) == [
        "answers before", "votes", "learning: preparing", "learning: reward model", "learning: PPO", "trial",
        "answers after", "best of before",
    ]  # fmt: skip
    assert 0 < found["swap_s"] < found["seconds"]["trial"]
    lines = said.getvalue().splitlines()
    assert "learning: PPO: begins" in lines
    assert [line for line in lines if re.match(r"learning: PPO: took .* step 3, reward 0.50, KL 1.25", line)]
    held_out = {tuple(dialogues.user_texts(prompt.messages)) for prompt in questions}
    voted_on = await house.rows("completions WHERE id IN (SELECT a FROM comparisons)")
    assert len(voted_on) >= PLAN.votes
    assert not held_out & {tuple(dialogues.user_texts(json.loads(row["messages"]))) for row in voted_on}


async def test_a_candidate_that_the_gate_rejects_ends_the_demo_with_its_reason(
    house: House, db: Database, add_policy: AddPolicy
) -> None:
    def reject(run: str) -> None:
        add_policy(PolicyStatus.REJECTED, gate=False, run_id=run)
        with transaction(db):
            runs.finish(db, run, RunStatus.SUCCEEDED)

    with stages(io.StringIO()) as shown:
        async with a_night(db, reject, shown):
            story = await learn(target(house), house.settings.state, PLAN, shown)
    assert not story.learned
    assert headline(story) == f"No better answers this time: {NEW} is rejected: KL is 3 nats."
    assert "win_rate" not in figures(story)
    assert "KL is 3 nats." in page(story)


async def test_a_run_that_fails_ends_the_demo_with_what_the_run_says(house: House, db: Database) -> None:
    def fail(run: str) -> None:
        with transaction(db):
            runs.finish(db, run, RunStatus.FAILED, error="The disk is full: make room.")

    with stages(io.StringIO()) as shown:
        with pytest.raises(DemoError, match=r"failed: The disk is full: make room\."):
            async with a_night(db, fail, shown):
                await learn(target(house), house.settings.state, PLAN, shown)


async def test_a_house_without_a_scorer_ends_the_demo_and_says_where_to_look(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "SCORER_S", 0.1)
    prompts = dialogues.prompts(1, seed=1, held_out=True)
    with stages(io.StringIO()) as shown:
        with pytest.raises(DemoError, match=r"gives no scores: see logs/scorer\.log"):
            await demo.best_of(house.settings.state, prompts, [[Said("a", 1.0)] * 4], shown)


async def test_of_answers_that_did_not_end_none_is_best_while_one_ended(house: House, judge: Judge) -> None:
    judge.says = lambda answers: [[float(len(text))] for text in answers]
    drawn = [[Said("cut off and lo", 0.0, finished=False), Said("a.", 1.0), Said("b b.", 1.0)]]
    prompts = dialogues.prompts(1, seed=1, held_out=True)
    with stages(io.StringIO()) as shown:
        shown.begin("best of before", 1)
        (best,) = await demo.best_of(house.settings.state, prompts, drawn, shown)
    assert best.text == "b b."


async def test_an_answer_that_is_refused_ends_the_demo_with_what_was_said(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: Refusal(400, "no such thing")
    with stages(io.StringIO()) as shown:
        with pytest.raises(DemoError, match=r"/v1/chat/completions answered 400: .*no such thing"):
            await learn(target(house), house.settings.state, PLAN, shown)


async def test_answers_of_another_policy_are_not_taken_for_those_wanted(house: House) -> None:
    prompts = dialogues.prompts(3, seed=1, held_out=True)
    with stages(io.StringIO()) as shown:
        shown.begin("answers after", 3)
        with pytest.raises(DemoError, match=f"{BASE_POLICY} answers, and {NEW} is what was to be looked at"):
            await demo.ask_all(target(house), NEW, prompts, 1, shown)


# What is shown


def story(before: list[Said], after: list[Said], best: list[Said] | None = None) -> Story:
    duel = {"kind": "trial", "wins": 19, "losses": 4, "ties": 5, "e_value": 20.7, "threshold": 20.0}
    at = "2026-11-22T03:00:0{}.000000Z"
    policy = {
        "name": NEW, "status": "serving", "problem": None, "duels": [duel],
        "swaps": [{"requested_at": at.format(1), "flipped_at": at.format(2)}],
        "gate": {"checks": [{"name": "length", "figure": 0.1, "sentence": "It is <b>short</b>.", "passed": True}]},
    }  # fmt: skip
    prompts = dialogues.prompts(len(before), seed=1, held_out=True)
    return Story(Plan(), prompts, before, best or before, after, policy, 600, 800, 0, {"votes": 60.0, "trial": 30.0})


def test_a_win_counts_one_a_tie_half() -> None:
    before = [Said("", gold) for gold in (1.0, 1.0, 1.0, 1.0)]
    after = [Said("", gold) for gold in (2.0, 1.0, 0.5, 5.0)]
    rate, low, high = win_rate(before, after)
    assert rate == 2.5 / 4
    assert 0.2 < low < rate < high < 1.0
    narrow = win_rate(before * 100, after * 100)
    assert narrow[0] == rate
    assert low < narrow[1] < narrow[2] < high


def test_the_page_holds_what_happened_and_nothing_of_it_as_markup() -> None:
    chosen = [Said("<i>chosen</i>", 3.0), Said("worse", 0.5), Said("worse", 0.5)]
    told = story([Said("<script>alert(1)</script>", 1.0)] * 3, [Said("$fine & good", 2.0)] * 3, chosen)
    made = page(told)
    assert "<script" not in made
    assert "&lt;script&gt;alert(1)" in made
    assert "$fine &amp; good" in made
    assert "&lt;i&gt;chosen" in made
    assert "33% better than before" in made
    assert "It is &lt;b&gt;short" in made
    assert "19 to 4, 5 ties: evidence 20.7 to 1" in made
    assert "1.00 s from the verdict to serving" in made
    assert headline(told) in made

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("link", "img", "script", "iframe")
            assert not {name for name, _ in attributes} & {"src", "href"}, "not self-contained"

    Links().feed(made)


def test_the_table_shows_the_first_answers_as_they_are() -> None:
    output = io.StringIO()
    old, new = [Said(f"old [bold]{i}", 1.0) for i in range(9)], [Said(f"new {i}", 2.0) for i in range(9)]
    best = [Said(f"best {i}", 1.5) for i in range(9)]
    demo.show(story(old, new, best), Console(file=output, width=160))
    shown = output.getvalue()
    assert "old [bold]0" in shown
    assert "new 4" in shown
    assert "best 4" in shown
    assert "new 5" not in shown
    assert question(story(old, new).prompts[0])[:20] in shown
    assert "100% of the answers are better" in shown


# The service


def test_it_begins_with_settings_of_its_own_in_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_environment: None
) -> None:
    (tmp_path / "nightshift.toml").write_text('[gate]\nmode = "manual"')
    monkeypatch.setenv("NIGHTSHIFT_CONFIG", str(demo.write_settings(tmp_path / "new" / "state", PLAN)))
    settings = load_settings()
    assert settings.gate.mode == "trial"
    assert settings.training.ppo == {"steps": 4}
    assert settings.chat.max_n == 5
    assert (settings.training.seed, settings.training.max_answer_tokens) == (3, 96)
    assert (tmp_path / "new" / "state").stat().st_mode & 0o077 == 0
    with pytest.raises(DemoError, match=r"is not empty.*--state"):
        demo.write_settings(tmp_path / "new" / "state", PLAN)


async def test_the_service_comes_up_takes_the_trusted_pairs_and_ends_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine, plain_environment: None
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_ENGINE__URLS", json.dumps([engine.url]))
    state, port = tmp_path / "state", free_port()
    config = demo.write_settings(state, PLAN)
    with stages(io.StringIO()) as shown:
        async with demo.service(state, port, config, shown) as up:
            assert up.house.url == f"http://127.0.0.1:{port}"
            assert up.sign_in.startswith(f"{up.house.url}/sign-in#")
            demo.import_trusted(state)
            assert (await demo.get(up.house, "/v1/policies"))["data"][0]["name"] == BASE_POLICY
            with closing(connect(state / "nightshift.db")) as db:
                assert db["trusted_pairs"].count > 10
    assert up.process.returncode == 0


async def test_a_service_that_does_not_come_up_says_why(tmp_path: Path, plain_environment: None) -> None:
    config = demo.write_settings(tmp_path / "state", PLAN)
    config.write_text("[training]\nnonsense = 1\n")
    with stages(io.StringIO()) as shown:
        with pytest.raises(DemoError, match=r"does not come up:\n.*training\.nonsense"):
            async with demo.service(tmp_path / "state", free_port(), config, shown):
                pass


async def test_interrupted_before_the_end_it_stops_the_service_and_says_so_by_its_status(
    tmp_path: Path, engine: FakeEngine, plain_environment: None
) -> None:
    engine.answer = lambda body: Reply(hold_after=0)
    command = [sys.executable, "-m", "bench.demo", "--state", str(tmp_path / "state"), "--port", str(free_port())]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=Path(__file__).parents[2],
        env=os.environ | {"NIGHTSHIFT_ENGINE__URLS": json.dumps([engine.url])}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    while (await process.stdout.readline()) != b"answers before: begins\n":
        pass
    await eventually(lambda: len(engine.chats) > 0)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "state" / "up.lock").read_text()), 0)


async def test_ctrl_c_ends_a_demo_that_serves_as_it_went(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    up = demo.Up(process, Target("http://127.0.0.1:1"), "http://127.0.0.1:1/sign-in#x")
    good = story([Said("a", 1.0)], [Said("b", 2.0)])
    ended = False

    @asynccontextmanager
    async def service(*_: object) -> AsyncIterator[demo.Up]:
        nonlocal ended
        yield up
        ended = True
        process.terminate()

    async def learned(*_: object) -> Story:
        return good

    monkeypatch.setattr(demo, "service", service)
    monkeypatch.setattr(demo, "import_trusted", lambda state: None)
    monkeypatch.setattr(demo, "learn", learned)
    for result, status in ((good, 0), (replace(good, after=[]), 1)):
        good, ended = result, False
        state = tmp_path / f"state-{status}"
        options = argparse.Namespace(state=state, port=1, serve=not status, json=False, quick=False)
        console = Console(file=io.StringIO())
        running = asyncio.create_task(demo.demo(options, PLAN, console))
        if not status:
            await eventually((state / "demo.html").exists)
            await asyncio.sleep(0.05)
            assert not running.done()
            os.kill(os.getpid(), signal.SIGINT)
        assert await running == status
        assert ended
    await process.wait()
