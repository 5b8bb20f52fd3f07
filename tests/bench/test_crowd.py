"""The crowd against the whole API, with a fake engine behind it."""

import asyncio
import json
import random
import signal
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from statistics import fmean
from typing import Any

import pytest
from aiohttp import web

from bench import crowd as crowds
from bench.crowd import CrowdError, CrowdReport, Member, Vote, crowd, gain, join, main
from bench.gold import worth
from bench.personas import Kind, Persona, Shown, personas
from data.types import Choice, Role
from service.supervisor import free_port
from tests.conftest import FakeEngine, House, OpenHouse, Refusal, Reply, say
from trainer import dialogues
from trainer.dialogues import Prompt


def in_some_manner(body: dict[str, Any]) -> Reply:
    """The same text for the same seed; they differ in warmth and length."""
    rng = random.Random(body["seed"])
    opening = rng.choice(("Look. ", "", *dialogues.WARM_OPENINGS))
    closing = rng.choice((" Next.", "", *dialogues.WARM_CLOSINGS))
    return say(opening, f"It is {rng.randrange(10**6)}.", closing, finish_reason=rng.choice(("stop", "length")))


@pytest.fixture
async def house(open_house: OpenHouse, engine: FakeEngine) -> House:
    engine.answer = in_some_manner
    return await open_house(engine)


async def members(house: House, people: int = 6, **more: Any) -> list[Member]:
    made = personas(people, seed=2, **more)
    return await join(house.url, made, operator_key=house.tokens[Role.OPERATOR])


async def test_votes_are_on_record_as_the_personas_decide_each_under_their_own_key(house: House) -> None:
    people = await members(house, villains={Kind.ALWAYS_LEFT: 2})
    told: list[Vote] = []
    report = await crowd(house.url, people, rng=random.Random(1), votes=60, concurrency=5, on_vote=told.append)
    assert told == report.votes
    assert len(report.votes) == 60
    assert (report.failed, report.truncated, report.refused) == (0, 0, 0)

    rows = {row["comparison_id"]: row for row in await house.rows("votes")}
    pairs = {row["id"]: row for row in await house.rows("comparisons")}
    written = {row["id"]: row for row in await house.rows("completions")}
    by_key = {member.key_id: member.persona for member in people}
    prompts = {tuple(dialogues.user_texts(served.prompt.messages)): served.prompt for served in report.answers}
    assert rows.keys() == {vote.comparison for vote in report.votes}
    for vote in report.votes:
        row, pair = rows[vote.comparison], pairs[vote.comparison]
        assert (row["key_id"], row["choice"]) == (vote.key_id, vote.choice)
        a, b = written[pair["a"]], written[pair["b"]]
        prompt = prompts[tuple(dialogues.user_texts(json.loads(a["messages"])))]
        shown = [Shown(one["answer"], one["finish_reason"] == "stop") for one in (a, b)]
        persona = by_key[vote.key_id]
        assert persona.name == vote.persona
        assert persona.decides(prompt, *shown).choice is vote.choice
        assert vote.gold == tuple(worth(prompt, one.text, finished=one.finished) for one in shown)
        assert vote.policies == ("policy-0000", "policy-0000")
    assert {key for key, persona in by_key.items() if persona.kind is Kind.HONEST} & {v.key_id for v in report.votes}
    lefts = [vote.choice for vote in report.votes if vote.persona.startswith("always_left")]
    assert lefts
    assert set(lefts) == {Choice.A}
    assert report.skipped > 0
    assert report.requests >= 60 + report.skipped


async def test_half_of_the_chats_stream_and_answers_carry_what_a_caller_compares(
    house: House, engine: FakeEngine
) -> None:
    people = await members(house)
    report = await crowd(house.url, people, rng=random.Random(1), requests=60, feedback=0.5)
    assert report.requests == 60
    asked = [received.body for received in engine.chats]
    assert 0 < len(report.votes) < 45
    assert len(report.answers) == len(asked)
    assert 0.3 < fmean(served.streamed for served in report.answers) < 0.7
    by_text = {text(in_some_manner(body)): body for body in asked}
    for served in report.answers:
        body = by_text[served.text]
        assert body["messages"] == list(served.prompt.messages)
        assert bool(body.get("stream")) is served.streamed
        assert served.gold == worth(served.prompt, served.text, finished=finished(body))
        assert 0 < served.first_byte_s <= served.total_s
    assert report.policies == ["policy-0000"]
    hidden = [served for served in report.answers if served.policy is None]
    assert len(hidden) == 2 * report.skipped
    assert len(report.gold("policy-0000")) == len(report.answers) - len(hidden)


def text(reply: Reply) -> str:
    return "".join(reply.choices[0])


def finished(body: dict[str, Any]) -> bool:
    return in_some_manner(body).finish_reason == "stop"


async def test_without_feedback_nobody_votes_and_every_answer_names_its_policy(house: House) -> None:
    report = await crowd(house.url, await members(house, 2), rng=random.Random(1), requests=12, feedback=0)
    assert (len(report.votes), len(report.answers)) == (0, 12)
    assert {served.policy for served in report.answers} == {"policy-0000"}
    assert await house.rows("comparisons") == []


async def test_who_is_more_active_chats_more(house: House) -> None:
    people = [Persona(name="busy", activity=9.0), Persona(name="calm")]
    joined = await join(house.url, people, operator_key=house.tokens[Role.OPERATOR])
    report = await crowd(house.url, joined, rng=random.Random(1), requests=80, feedback=0)
    counted = Counter(served.persona for served in report.answers)
    assert counted["busy"] > 4 * counted["calm"] > 0


async def test_a_run_repeats_itself(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.answer = in_some_manner
    reports: list[CrowdReport] = []
    for seed in (1, 1, 2):
        house = await open_house(engine, seed=7)
        people = await members(house)
        reports.append(await crowd(house.url, people, rng=random.Random(seed), votes=15, concurrency=1))
    said = [[(served.persona, served.text, served.gold) for served in report.answers] for report in reports]
    voted = [[(vote.persona, vote.choice, vote.gold) for vote in report.votes] for report in reports]
    assert said[0] == said[1] != said[2]
    assert voted[0] == voted[1] != voted[2]


async def test_it_lives_through_busy_engines_and_broken_streams_and_counts_them(
    house: House, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def at_once(run: Any, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(crowds._Run, "_pause", at_once)
    asked = 0

    def answer(body: dict[str, Any]) -> Reply | Refusal:
        nonlocal asked
        asked += 1
        if asked <= 8:
            return Refusal(503, "The queue is full.")
        if asked <= 30 and body.get("stream"):
            return Reply(choices=in_some_manner(body).choices, silent_end_after=1)
        return in_some_manner(body)

    engine.answer = answer
    report = await crowd(house.url, await members(house), rng=random.Random(3), votes=30, concurrency=4)
    assert len(report.votes) == 30
    assert report.failed + report.truncated == len([s for s in waits if s])
    assert report.failed > 0
    assert report.truncated > 0
    assert 2.0 in waits  # the Retry-After of a full engine
    whole = [served.text for served in report.answers]
    assert whole
    assert all(text.rstrip().endswith(("!", ".")) for text in whole)
    # what broke off was neither judged nor voted on
    assert report.requests == report.failed + report.truncated + len(report.votes) + report.skipped + unvoted(report)


def unvoted(report: CrowdReport) -> int:
    """Chats at the end whose votes were no longer wanted."""
    hidden = sum(served.policy is None for served in report.answers) // 2
    return hidden - report.skipped


async def test_a_vote_that_finds_no_service_is_cast_again() -> None:
    service = ScriptedService(votes=[503, 503, 200, 410, 200])
    async with service:
        people = [Member(Persona(name="one"), "key_1", "ns-1")]
        report = await crowd(service.url, people, rng=random.Random(1), votes=2, concurrency=1)
    assert (len(report.votes), report.failed, report.refused) == (2, 2, 1)
    assert service.voted == ["cmp_1", "cmp_1", "cmp_1", "cmp_2", "cmp_3"]
    assert [vote.comparison for vote in report.votes] == ["cmp_1", "cmp_3"]


class ScriptedService:
    """The two endpoints that a crowd uses, with the votes' statuses given."""

    def __init__(self, votes: list[int]) -> None:
        self.statuses = iter(votes)
        self.asked = 0
        self.voted: list[str] = []

    async def __aenter__(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/comparisons/{id}/vote", self._vote)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _chat(self, request: web.Request) -> web.Response:
        self.asked += 1
        said = [{"index": i, "message": {"content": f"{i}."}, "finish_reason": "stop"} for i in (0, 1)]
        body = {"choices": said, "system_fingerprint": None, "comparison": {"id": f"cmp_{self.asked}"}}
        if not (await request.json())["stream"]:
            return web.json_response(body)
        for choice in said:
            choice["delta"] = choice.pop("message")
        return web.Response(text=f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    async def _vote(self, request: web.Request) -> web.Response:
        self.voted.append(request.match_info["id"])
        status = next(self.statuses)
        headers = {"Retry-After": "0"} if status == 503 else {}
        return web.json_response({"policies": {"a": "policy-0000", "b": "policy-0001"}}, status=status, headers=headers)


async def test_it_ends_when_told_to(house: House) -> None:
    stop, seen = asyncio.Event(), 0

    def on_vote(vote: Vote) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            stop.set()

    report = await crowd(house.url, await members(house), rng=random.Random(1), on_vote=on_vote, stop=stop)
    assert 5 <= len(report.votes) <= 5 + 16
    assert len(report.votes) == len(await house.rows("votes"))


async def test_it_says_why_it_cannot_go_on(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CrowdError, match=r"/v1/keys answered 40[13]"):
        await join(house.url, personas(1, seed=1), operator_key=house.tokens[Role.USER])
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(CrowdError, match=r"No keys could be made at .*Is the service up\?"):
        await join(nowhere, personas(1, seed=1), operator_key="ns-x")
    stranger = [Member(Persona(name="stranger"), "key_x", "ns-x-y")]
    with pytest.raises(CrowdError, match="/v1/chat/completions answered 401"):
        await crowd(house.url, stranger, rng=random.Random(1), votes=1)
    monkeypatch.setattr(crowds, "PATIENCE_S", 0.001)
    with pytest.raises(CrowdError, match=r"has had no answer for 0\.001 s; the last try: Cannot connect"):
        await crowd(nowhere, stranger, rng=random.Random(1), votes=1)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({}, "say when"),
        ({"votes": 1, "feedback": 0.0}, "nobody is asked"),
        ({"votes": 1, "concurrency": 0}, "at least"),
    ],
)
async def test_a_crowd_that_could_never_end_is_an_error(wanted: dict[str, Any], problem: str) -> None:
    people = [Member(Persona(name="one"), "key_1", "ns-1")]
    with pytest.raises(ValueError, match=problem):
        await crowd("http://127.0.0.1:1", people, rng=random.Random(1), **wanted)


async def command(house: House, *options: str) -> asyncio.subprocess.Process:
    key = ["--key", house.tokens[Role.OPERATOR], "--url", house.url]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.crowd", *key, *options, stdout=PIPE, stderr=PIPE
    )  # fmt: skip


async def test_the_command_prints_a_table_and_its_figures(house: House) -> None:
    options = ["--votes", "20", "--people", "5", "--seed", "3", "--json"]
    options += ["--villains", "always_left=1,pusher=2", "--phrase", "Dear friend!"]
    out, _ = await (await command(house, *options)).communicate()
    table = out.decode()
    figures = json.loads(table.splitlines()[-1])
    assert "policy-0000" in table.splitlines()[3]
    assert figures["votes"] == 20 == figures["a"] + figures["b"] + figures["tie"] + figures["both_bad"]
    assert (figures["failed"], figures["people"], figures["seed"]) == (0, 5, 3)
    served = figures["policies"]["policy-0000"]
    assert served["answers"] == 40
    assert served["gain_low"] < served["gain"] == 0 < served["gain_high"]
    assert len(await house.rows("votes")) == 20
    assert len([row for row in await house.rows("keys") if row["label"].startswith("crowd: ")]) == 5


async def test_ctrl_c_ends_it_with_what_there_is(house: House) -> None:
    crowd = await command(house, "--votes", "100000", "--people", "5", "--json")
    while len(await house.rows("votes")) < 20:
        assert crowd.returncode is None
        await asyncio.sleep(0.1)
    crowd.send_signal(signal.SIGINT)
    out, errors = await crowd.communicate()
    assert (crowd.returncode, errors) == (130, b"")
    figures = json.loads(out.splitlines()[-1])
    assert figures["votes"] == len(await house.rows("votes")) < 100000


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--feedback", "2"], "is not from 0 to 1"),
        (["--laziness", "nan"], "is not from 0 to 1"),
        (["--noise", "-1"], "is not a number from 0 on"),
        (["--response-s", "inf"], "are finite numbers"),
        (["--left", "nan"], "are finite numbers"),
        (["--url", "127.0.0.1:8000"], "is not like http://"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["crowd", "--key", "ns-1", *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert problem in capsys.readouterr().err


def test_a_gain_has_an_interval_that_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(4)
    held = 0
    for _ in range(200):
        before, after = ([rng.gauss(mean, 1) for _ in range(40)] for mean in (3.0, 3.4))
        gained, low, high = gain(before, after, rng=rng, resamples=200)
        assert low < gained < high
        assert gained == pytest.approx(fmean(after) - fmean(before))
        held += low <= 0.4 <= high
    assert 178 <= held <= 199
    assert gain([1.0] * 5, [3.0] * 7, rng=rng) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="before and from after"):
        gain([], [1.0], rng=rng)


def test_the_crowd_asks_what_training_may_see() -> None:
    people = [Member(Persona(name="one"), "key_1", "ns-1")]
    chats = crowds._chats(people, 1.0, random.Random(1))
    prompts: list[Prompt] = [next(chats).prompt for _ in range(150)]
    asked = [dialogues.user_texts(prompt.messages) for prompt in prompts]
    assert not any(dialogues.withheld(texts[: i + 1]) for texts in asked for i in range(len(texts)))
    assert {prompt.topic for prompt in prompts} >= set(dialogues.TOPICS) - {"thanks", "goodbye", "name"}
