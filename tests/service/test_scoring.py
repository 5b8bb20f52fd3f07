"""What the reward model's scores change of what people are shown: active pairs, and the best of several answers."""

import asyncio
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from data.learning import SCORER_SOCKET
from service import doctor, pairing
from tests.conftest import FakeEngine, House, Judge, OpenHouse, Refusal, Reply, Scores, eventually, say
from tests.service.test_pairs import comparison_of, openai_s_stream
from trainer.scorer import CannotScore

PATIENT = {"score_timeout_s": 20.0}
"""So that a slow machine changes no result."""


async def open_scored(open_house: OpenHouse, engine: FakeEngine, *, share: float = 0.8, **sections: Any) -> House:
    """A house that knows of the reward model."""
    serving = PATIENT | sections.pop("serving", {})
    house = await open_house(engine, comparisons={"active_share": share}, serving=serving, **sections)
    await eventually(lambda: house.state.scorer.reward_model == "rm_1")
    return house


ALWAYS_ACTIVE = {"share": 1.0}
"""More than the settings allow, so that each pair of a test is active."""


def in_order(*texts: str) -> Callable[[dict[str, Any]], Reply]:
    """The engine's answers to the draws of a request that brings seed 7, in the order in which they are drawn."""
    plan = pairing.plan_pair("p", seed=7, rng=random.Random(0), active_share=1.0)
    seeds = [plan.seeds[plan.first], plan.seeds[1 - plan.first], *plan.more_seeds]
    said = dict(zip(seeds, texts, strict=True))
    return lambda body: say(*re.split("(?<= )", said[body["seed"]], maxsplit=1))


def shown(answer: Any) -> list[str]:
    if answer.body.startswith(b"data: "):
        return [answer.streamed(0), answer.streamed(1)]
    return [choice["message"]["content"] for choice in answer.json["choices"]]


FIRST, AGREED, DISPUTED, DULL = "First 0 0", "Agreed 3 3", "Disputed 1 -1", "Dull 0.5 0"
"""Answers that end with what the two heads say of them."""


# Active pairs


@pytest.mark.parametrize("stream", [False, True])
async def test_an_active_pair_shows_the_first_draw_and_the_one_that_the_heads_dispute(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    engine.answer = in_order(FIRST, AGREED, DISPUTED, DULL)
    sides = Counter()
    for _ in range(8):
        answer = await house.chat(feedback="always", seed=7, stream=stream)
        assert answer.status == 200
        assert sorted(shown(answer)) == [DISPUTED, FIRST]
        sides[shown(answer)[0]] += 1
        comparison = comparison_of(answer)
        assert comparison is not None
        (row,) = house.state.reader.query("SELECT * FROM comparisons WHERE id = ?", [comparison["id"]])
        assert row["kind"] == "active"
        assert row["swapped"] == (shown(answer)[1] == FIRST)
        texts = {c["id"]: c["answer"] for c in house.state.reader.query("SELECT id, answer FROM completions")}
        assert [texts[row["a"]], texts[row["b"]]] == shown(answer)
        assert row["a"] == (answer.chunks[0] if stream else answer.json)["id"]
    assert set(sides) == {FIRST, DISPUTED}, "the first draw is always on one side"
    assert len(await house.rows("completions")) == 16, "an answer that nobody was shown is on record"


async def test_openai_s_stream_helper_takes_active_pairs_whichever_side_begins(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    engine.answer = in_order(FIRST, AGREED, DISPUTED, DULL)
    sides = Counter()
    for _ in range(8):
        async with openai_s_stream(house) as stream:
            whole = await stream.get_final_completion()
        texts = [choice.message.content for choice in whole.choices]
        assert sorted(map(str, texts)) == [DISPUTED, FIRST]
        sides[texts[0]] += 1
    assert set(sides) == {FIRST, DISPUTED}


async def test_only_the_answers_that_are_shown_are_charged(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    engine.answer = in_order(FIRST, AGREED, DISPUTED, DULL)
    answer = await house.chat(feedback="always", seed=7)
    assert answer.json["usage"]["prompt_tokens"] == 10
    streamed = await house.chat(feedback="always", seed=7, stream=True, stream_options={"include_usage": True})
    assert streamed.chunks[-1]["usage"]["prompt_tokens"] == 10
    assert all("usage" not in chunk for chunk in streamed.chunks[:-1])
    metrics = (await house.call("GET", "/metrics", role=None)).body.decode()
    assert "nightshift_unseen_answers_total 4.0" in metrics
    assert 'nightshift_scorings_total{outcome="scored"} 2.0' in metrics
    assert 'nightshift_reward_model{id="rm_1"} 1.0' in metrics


async def test_the_first_answer_does_not_wait_for_those_beside_it(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    plain = in_order(FIRST, AGREED, DISPUTED, DULL)

    def held(body: dict[str, Any]) -> Reply:
        reply = plain(body)
        reply.hold_after = None if reply.choices[0][0] == "First " else 1
        return reply

    engine.answer = held
    async with house.open_chat(stream=True, feedback="always", seed=7) as response:
        seen = b""
        while b"First" not in seen or b"0 0" not in seen:
            seen += await response.content.readany()
        for index in (b'"index":0', b'"index":1'):
            assert index in seen, "a page would lay out one answer, then two"
        for other in (b"Agreed", b"Disputed", b"Dull"):
            assert other not in seen
        engine.go_on.set()
        seen += await response.content.read()
    assert b"Disputed" in seen
    assert b"comparison" in seen
    for unseen in (b"Agreed", b"Dull"):
        assert unseen not in seen


async def test_people_s_answers_go_before_those_that_may_never_be_shown(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    engine.answer = in_order(FIRST, AGREED, DISPUTED, DULL)
    await house.chat(feedback="always", seed=7)
    assert sorted(chat.body["priority"] for chat in engine.chats) == [0, 0, 1, 1]


def too_slow(answers: list[str]) -> Scores:
    time.sleep(0.5)
    return [[0.0, 0.0]] * len(answers)


def refuses(answers: list[str]) -> Scores:
    raise CannotScore("an answer is longer than training.max_answer_tokens (256)")


def breaks(answers: list[str]) -> Scores:
    raise RuntimeError("out of memory")


def diverged(answers: list[str]) -> Scores:
    return [[math.nan, 0.0]] * len(answers)


def forgets_one(answers: list[str]) -> Scores:
    return [[0.0, 0.0]] * (len(answers) - 1)


def speaks_another_version(answers: list[str]) -> Scores:
    return [{"mean": 0.0}] * len(answers)  # type: ignore[list-item]


def has_no_heads(answers: list[str]) -> Scores:
    return [[]] * len(answers)


def forgets_a_head(answers: list[str]) -> Scores:
    return [[0.0], *[[0.0, 0.0]] * (len(answers) - 1)]


NONSENSE = [diverged, forgets_one, speaks_another_version, has_no_heads, forgets_a_head]


def agrees(answers: list[str]) -> Scores:
    return [[float(len(text))] * 2 for text in answers]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("says", "outcome"),
    [
        (too_slow, "late"),
        (refuses, "refused"),
        (breaks, "failed"),
        (agrees, "scored"),
        *((nonsense, "failed") for nonsense in NONSENSE),
    ],
)
async def test_without_a_verdict_in_time_it_is_a_random_pair_with_the_first_answer_that_differs(
    open_house: OpenHouse,
    engine: FakeEngine,
    judge: Judge,
    says: Callable[[list[str]], Scores],
    outcome: str,
    stream: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    patience = {"score_timeout_s": 0.1} if says is too_slow else PATIENT
    house = await open_scored(open_house, engine, serving=patience, **ALWAYS_ACTIVE)
    judge.says = says
    engine.answer = in_order(FIRST, FIRST, AGREED, DISPUTED)
    answer = await house.chat(feedback="always", seed=7, stream=stream)
    assert sorted(shown(answer)) == [AGREED, FIRST]
    assert [row["kind"] for row in await house.rows("comparisons")] == ["same_policy"]
    metrics = (await house.call("GET", "/metrics", role=None)).body.decode()
    assert f'nightshift_scorings_total{{outcome="{outcome}"}} 1.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_that_all_read_the_same_are_no_comparison(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    engine.answer = in_order(FIRST, FIRST, FIRST, FIRST)
    answer = await house.chat(feedback="always", seed=7, stream=stream)
    assert comparison_of(answer) is None
    assert shown(answer)[0] == FIRST
    assert await house.rows("comparisons") == []
    assert judge.asked == []


@pytest.mark.parametrize("stream", [False, True])
async def test_challengers_that_fail_are_passed_over(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    plain = in_order(FIRST, AGREED, DISPUTED, DULL)

    def answer_some(body: dict[str, Any]) -> Reply | Refusal:
        reply = plain(body)
        return reply if reply.choices[0][0] in ("First ", "Dull ") else Refusal(503, "The request queue is full.")

    engine.answer = answer_some
    answer = await house.chat(feedback="always", seed=7, stream=stream)
    assert sorted(shown(answer)) == [DULL, FIRST]
    assert [row["kind"] for row in await house.rows("comparisons")] == ["same_policy"], "there was nothing to choose"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [Refusal(503, "full"), Reply(choices=[["broken", " off"]], die_after=1)])
async def test_where_all_challengers_fail_the_first_is_the_answer_whatever_its_side(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool, failure: Reply | Refusal
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    plain = in_order(FIRST, AGREED, DISPUTED, DULL)
    engine.answer = lambda body: reply if (reply := plain(body)).choices[0][0] == "First " else failure
    for _ in range(6):
        answer = await house.chat(feedback="always", seed=7, stream=stream)
        assert answer.status == 200
        assert comparison_of(answer) is None
        assert shown(answer)[0] == FIRST
        if stream:
            assert answer.events[-1] == "[DONE]"
    assert {row["swapped"] for row in await house.rows("comparisons")} == set()


async def test_a_first_answer_that_fails_fails_the_stream_and_stops_the_others(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    plain = in_order(FIRST, AGREED, DISPUTED, DULL)

    def answer_others(body: dict[str, Any]) -> Reply | Refusal:
        reply = plain(body)
        reply.hold_after = 1
        return Refusal(500) if reply.choices[0][0] == "First " else reply

    engine.answer = answer_others
    answer = await house.chat(feedback="always", seed=7, stream=True)
    assert answer.status == 502
    await eventually(lambda: sum(chat.cut_off for chat in engine.chats) == 3)


async def test_all_draws_stop_when_the_client_leaves(open_house: OpenHouse, engine: FakeEngine, judge: Judge) -> None:
    house = await open_scored(open_house, engine, **ALWAYS_ACTIVE)
    engine.answer = lambda body: say("One", " two", hold_after=1)
    async with house.open_chat(stream=True, feedback="always", seed=7) as response:
        await response.content.readany()
    await eventually(lambda: sum(chat.cut_off for chat in engine.chats) == 4)


async def test_a_share_of_the_pairs_is_active_and_the_rest_are_random(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, share=0.5)
    engine.answer = lambda body: say(f"{body['seed']}", f" 0 {body['seed']}")
    for _ in range(60):
        assert comparison_of(await house.chat(feedback="always")) is not None
    kinds = Counter(row["kind"] for row in await house.rows("comparisons"))
    assert kinds["active"] + kinds["same_policy"] == 60
    assert 15 <= kinds["active"] <= 45  # chance is seeded; 0.01 % of seeds fall outside


async def test_before_there_is_a_reward_model_and_once_the_scorer_is_gone_pairs_are_random(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    judge.reward_model = None
    house = await open_house(engine, comparisons={"active_share": 1.0}, serving=PATIENT | {"best_of_n": 4})
    engine.answer = lambda body: say("seed ", str(body.get("seed")))
    await asyncio.sleep(0.2)
    await house.chat(feedback="always")
    await house.chat()
    assert len(engine.chats) == 3
    judge.reward_model = "rm_2"
    await eventually(lambda: house.state.scorer.reward_model == "rm_2")
    judge.reward_model = None
    await eventually(lambda: house.state.scorer.reward_model is None)


async def test_at_temperature_zero_nothing_is_drawn_in_vain(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, serving={"best_of_n": 4}, **ALWAYS_ACTIVE)
    await house.chat(feedback="always", temperature=0)
    await house.chat(temperature=0)
    assert len(engine.chats) == 3


# Best of n


def by_turn(*texts: str) -> Callable[[dict[str, Any]], Reply]:
    """The engine's answers to the draws of a plain request with seed 7, in the order in which they are drawn."""
    chance = random.Random(7)
    said = {chance.randrange(2**31): text for text in texts}
    return lambda body: say(*re.split("(?<= )", said[body["seed"]], maxsplit=1))


@pytest.mark.parametrize("stream", [False, True])
async def test_the_best_of_n_is_given_and_says_so_on_record(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool
) -> None:
    house = await open_scored(open_house, engine, serving={"best_of_n": 4})
    engine.answer = by_turn(FIRST, DISPUTED, AGREED, DULL)
    messages = [{"role": "user", "content": "Which?"}]
    answer = await house.chat(seed=7, stream=stream, messages=messages)
    assert answer.status == 200
    assert (answer.streamed() if stream else answer.text) == AGREED
    assert (answer.chunks[0] if stream else answer.json)["system_fingerprint"] == "policy-0000"
    ((asked, answers),) = judge.asked
    assert asked == messages
    assert len(answers) == 4
    (row,) = await house.rows("completions")
    assert (row["answer"], row["status"]) == (AGREED, "complete")
    assert row["id"] == (answer.chunks[0] if stream else answer.json)["id"]
    sampling = json.loads(row["sampling"])
    assert (sampling["best_of_n"], sampling["reward_model"]) == (4, "rm_1")
    assert sorted(chat.body["priority"] for chat in engine.chats) == [0, 1, 1, 1]
    assert all("best_of_n" not in chat.body for chat in engine.chats)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("cut", "scored", "given"),
    [([AGREED], True, DULL), ([FIRST, DISPUTED, AGREED, DULL], True, AGREED), ([FIRST], False, DISPUTED)],
)
async def test_an_answer_that_was_cut_off_is_given_only_where_all_were(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool, cut: list[str], scored: bool, given: str
) -> None:
    if not scored:
        judge.says = refuses
    house = await open_scored(open_house, engine, serving={"best_of_n": 4})
    plain = by_turn(FIRST, DISPUTED, AGREED, DULL)

    def answer_to(body: dict[str, Any]) -> Reply:
        reply = plain(body)
        return replace(reply, finish_reason="length") if "".join(reply.choices[0]) in cut else reply

    engine.answer = answer_to
    answer = await house.chat(seed=7, stream=stream)
    assert (answer.streamed() if stream else answer.text) == given
    (row,) = await house.rows("completions")
    assert json.loads(row["sampling"]).get("best_of_n") == (4 if scored else None)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_best_of_n_is_charged_as_one_answer(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool
) -> None:
    house = await open_scored(open_house, engine, serving={"best_of_n": 4})
    engine.answer = by_turn(FIRST, DISPUTED, AGREED, DULL)
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = await house.chat(seed=7, **more)
    assert (answer.chunks[-1] if stream else answer.json)["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("says", [too_slow, refuses, breaks, *NONSENSE])
async def test_without_scores_in_time_the_first_draw_is_given(
    open_house: OpenHouse,
    engine: FakeEngine,
    judge: Judge,
    stream: bool,
    says: Callable[[list[str]], Scores],
    capsys: pytest.CaptureFixture[str],
) -> None:
    patience = {"score_timeout_s": 0.1} if says is too_slow else PATIENT
    house = await open_scored(open_house, engine, serving=patience | {"best_of_n": 4})
    judge.says = says
    engine.answer = by_turn(FIRST, DISPUTED, AGREED, DULL)
    answer = await house.chat(seed=7, stream=stream)
    assert (answer.streamed() if stream else answer.text) == FIRST
    (row,) = await house.rows("completions")
    assert "best_of_n" not in json.loads(row["sampling"]), "it is a draw like any other"


@pytest.mark.parametrize("stream", [False, True])
async def test_draws_that_fail_are_no_loss_while_one_is_whole(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, stream: bool
) -> None:
    house = await open_scored(open_house, engine, serving={"best_of_n": 3})
    plain = by_turn(FIRST, DISPUTED, AGREED)
    engine.answer = lambda body: reply if (reply := plain(body)).choices[0][0] == "Disputed " else Refusal(500)
    answer = await house.chat(seed=7, stream=stream)
    assert (answer.streamed() if stream else answer.text) == DISPUTED
    engine.answer = lambda body: Refusal(400, "maximum context length is 64")
    answer = await house.chat(seed=7, stream=stream)
    assert (answer.status, answer.json["error"]["code"]) == (400, "rejected_by_engine")


@pytest.mark.parametrize(
    "parameters",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
    ],
    ids=["n", "tools", "response_format"],
)
async def test_what_is_no_free_text_is_drawn_once(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge, parameters: dict[str, Any]
) -> None:
    house = await open_scored(open_house, engine, serving={"best_of_n": 4})
    assert (await house.chat(**parameters)).status == 200
    assert len(engine.chats) == 1


async def test_pairs_are_of_plain_draws_whatever_best_of_n_says(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, share=0.0, serving={"best_of_n": 4})
    engine.answer = lambda body: say(f"{body['seed']}", " 0 1")
    assert comparison_of(await house.chat(feedback="always")) is not None
    assert len(engine.chats) == 2
    assert judge.asked == []


async def test_all_draws_of_a_plain_answer_stop_when_the_client_leaves(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_scored(open_house, engine, serving={"best_of_n": 3})
    engine.answer = lambda body: say("One", " two", hold_after=1)
    for stream in (False, True):
        asked = asyncio.create_task(house.chat(stream=stream))
        await eventually(lambda: len(engine.chats) == 3)
        asked.cancel()
        await eventually(lambda: all(chat.cut_off for chat in engine.chats))
        engine.chats.clear()


async def test_a_house_that_wants_no_scores_asks_for_none(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_house(engine, comparisons={"active_share": 0.0})
    await asyncio.sleep(0.2)
    assert house.state.scorer.reward_model is None


# The doctor


async def test_the_doctor_says_who_scores_and_what_is_wrong_with_it(
    open_house: OpenHouse, engine: FakeEngine, judge: Judge
) -> None:
    house = await open_house(engine)
    host, port = house.url.removeprefix("http://").split(":")
    server = house.settings.server.model_copy(update={"host": host, "port": int(port)})
    settings = house.settings.model_copy(update={"server": server})

    async def look() -> doctor.Check:
        (check,) = [check for check in await asyncio.to_thread(doctor.examine, settings) if check.name == "Scorer"]
        return check

    assert await look() == doctor.Check("Scorer", True, "rm_1 scores answers", "Train anew: `nightshift train`.")
    judge.reward_model = None
    assert (await look()).ok, "before the first night"
    judge.problem = "rm_2 cannot be loaded: torn"
    check = await look()
    assert (check.ok, check.found) == (False, "rm_2 cannot be loaded: torn")
    (settings.state / SCORER_SOCKET).unlink()
    check = await look()
    assert not check.ok
    assert "does not answer" in check.found
    assert "scorer.log" in check.mend
