"""Duels in service: from candidate to promotion by votes over HTTP, the watch after it, and the way back by itself."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlite_utils import Database

from data import completions, duels, registry, swaps
from data.database import transaction
from data.ids import new_id
from data.types import (
    BASE_POLICY,
    Completion,
    CompletionStatus,
    Duel,
    DuelKind,
    DuelStatus,
    Feedback,
    PolicyStatus,
    Role,
    timestamp,
)
from tests.conftest import (
    AddPolicy,
    FakeEngine,
    House,
    MakeKey,
    OpenHouse,
    Refusal,
    Reply,
    eventually,
    has_drained,
    has_looked,
    rounds,
    say,
)

NEW = "policy-0001"

ALL = {"duel_share": 1.0, "watch_share": 1.0}
"""Every comparison is a duel while one runs."""


def by_policy(body: dict[str, Any]) -> Reply:
    """An answer that tells who wrote it, and from which seed."""
    return say(body["model"], " ", str(body.get("seed")))


@pytest.fixture
async def house(open_house: OpenHouse, engine: FakeEngine, db: Database) -> House:
    engine.answer = by_policy
    return await open_house(engine, gate=ALL)


def status(db: Database, name: str) -> PolicyStatus:
    return registry.get(db, name).status


async def running(house: House, db: Database, kind: DuelKind = DuelKind.TRIAL) -> Duel:
    """Wait until a duel runs and the service puts it before people."""

    def is_shown() -> bool:
        shown, duel = house.state.hot_swap.duel_beside(house.state.engines.serving), duels.running(db)
        return shown is not None and duel is not None and shown.id == duel.id

    await eventually(is_shown)
    duel = duels.running(db)
    assert duel is not None
    assert duel.kind is kind
    return duel


async def ask(house: House, **parameters: Any) -> tuple[str, dict[str, str]]:
    """One pair: the comparison's id, and who wrote a and b."""
    answer = await house.chat(feedback="always", **parameters)
    assert answer.status == 200, answer.body
    a, b = (choice["message"]["content"].split()[0] for choice in answer.json["choices"])
    return answer.json["comparison"]["id"], {a: "a", b: "b"}


async def vote_for(house: House, winner: str, *, times: int) -> None:
    """Votes of people who always like the same policy better, until the duel that runs is over."""
    reader = house.state.reader
    duel = duels.running(reader)
    assert duel is not None
    for _ in range(times):
        if duels.get(reader, duel.id).status is not DuelStatus.RUNNING:
            return
        comparison, side = await ask(house)
        assert (await house.vote(comparison, side[winner])).status == 200


# The trial


async def test_a_candidate_becomes_the_policy_that_serves_by_people_s_votes(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy()
    duel = await running(house, db)
    assert (duel.challenger, duel.incumbent, duel.threshold) == (name, BASE_POLICY, 20.0)
    assert status(db, name) is PolicyStatus.TRIAL
    assert engine.adapters.keys() == {BASE_POLICY, name}
    assert (await house.chat()).json["system_fingerprint"] == BASE_POLICY, "who is not asked gets what serves"
    await vote_for(house, name, times=30)
    await eventually(lambda: house.state.engines.serving == name)
    assert (await house.chat()).json["system_fingerprint"] == name
    ended = duels.get(db, duel.id)
    assert ended.status is DuelStatus.WON
    assert ended.losses == 0
    assert ended.e_value >= 20.0
    assert status(db, name) is PolicyStatus.SERVING
    assert swaps.list_swaps(db)[0].actor == "trial"


async def test_a_candidate_that_people_do_not_like_is_turned_away_and_leaves_the_engine(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy()
    duel = await running(house, db)
    await vote_for(house, BASE_POLICY, times=30)
    await eventually(lambda: status(db, name) is PolicyStatus.REJECTED)
    assert duels.get(db, duel.id).status is DuelStatus.LOST
    assert "lost its trial" in str(registry.get(db, name).problem)
    await eventually(lambda: engine.adapters.keys() == {BASE_POLICY})
    assert (await house.chat()).json["system_fingerprint"] == BASE_POLICY
    # The next one needs twice the evidence.
    add_policy()
    assert (await running(house, db)).threshold == 40.0


async def test_a_trial_ends_at_its_budget(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.answer = by_policy
    house = await open_house(engine, gate=ALL | {"max_trial_votes": 4})
    name = add_policy()
    duel = await running(house, db)
    for _ in range(4):
        comparison, _ = await ask(house)
        await house.vote(comparison, "tie")
    assert duels.get(db, duel.id).status is DuelStatus.UNDECIDED
    assert status(db, name) is PolicyStatus.REJECTED


async def test_a_pair_of_a_duel_hides_who_wrote_what_until_the_vote(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.answer = lambda body: say("seed ", str(body["seed"]))
    add_policy()
    duel = await running(house, db)
    sides = []
    for turn in range(12):
        answer = await house.chat(feedback="always", stream=turn % 2 == 0)
        assert answer.status == 200
        assert b"policy-" not in answer.body
        body = answer.chunks[-1] if turn % 2 == 0 else answer.json
        revealed = (await house.vote(body["comparison"]["id"], "tie")).json["policies"]
        assert set(revealed.values()) == {BASE_POLICY, NEW}
        sides.append(revealed["a"])
    assert set(sides) == {BASE_POLICY, NEW}, "each policy is shown on both sides"
    rows = await house.rows("comparisons")
    assert {(row["kind"], row["duel_id"]) for row in rows} == {("trial", duel.id)}
    assert [chat.body["model"] for chat in engine.chats].count(NEW) == 12


async def test_auto_feedback_duels_too_and_a_share_of_comparisons_does_not(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy, make_key: MakeKey
) -> None:
    engine.answer = by_policy
    house = await open_house(
        engine, gate={"duel_share": 0.5}, comparisons={"rate": 1.0, "cooldown_turns": 0, "daily_cap": 999}
    )
    add_policy()
    duel = await running(house, db)
    _, token = make_key(Role.USER, Feedback.AUTO)
    for _ in range(60):
        await house.chat(token=token)
    kinds = [(row["kind"], row["duel_id"]) for row in await house.rows("comparisons")]
    assert set(kinds) == {("trial", duel.id), ("same_policy", None)}
    assert 15 <= kinds.count(("trial", duel.id)) <= 45  # a chance of 1 in 10,000 to lie outside


async def test_without_its_challenger_on_an_engine_a_duel_pauses(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    add_policy()
    await running(house, db)
    await engine.stop()
    await eventually(lambda: not house.state.engines.ready)
    engine.refuses_load = Refusal(500, "no room for it")
    engine.refuses_only = NEW
    await engine.start()
    await eventually(house.is_ready)
    answer = await house.chat(feedback="always")
    assert answer.status == 200
    assert {choice["message"]["content"].split()[0] for choice in answer.json["choices"]} == {BASE_POLICY}
    assert [row["kind"] for row in await house.rows("comparisons")] == ["same_policy"]


async def test_an_engine_that_came_back_without_the_challenger_is_given_it_as_soon_as_it_takes_it(
    open_house: OpenHouse, engine: FakeEngine, second_engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.answer = second_engine.answer = by_policy
    house = await open_house(engine, second_engine, gate=ALL)
    second = house.state.engines.engines[1]
    await eventually(lambda: second.ready)
    add_policy()
    await running(house, db)
    await second_engine.stop()
    await eventually(lambda: not second.ready)
    second_engine.refuses_load = Refusal(500, "no room for it")
    second_engine.refuses_only = NEW
    await second_engine.start()
    await eventually(lambda: "no room for it" in (registry.get(db, NEW).problem or ""))
    assert second.ready, "people need not wait for what only duels need"
    assert status(db, NEW) is PolicyStatus.TRIAL
    second_engine.refuses_load = None
    await eventually(lambda: registry.get(db, NEW).problem is None)
    assert NEW in second_engine.adapters
    _, side = await ask(house)
    assert side.keys() == {BASE_POLICY, NEW}


async def test_a_trial_that_an_engine_keeps_waiting_gives_way_to_the_next(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.answer = by_policy
    house = await open_house(engine, gate=ALL)
    add_policy()
    stalled = await running(house, db)
    await engine.stop()
    await eventually(lambda: not house.state.engines.ready)
    engine.refuses_load = Refusal(500, "no room for it")
    engine.refuses_only = NEW
    await engine.start()
    await eventually(lambda: "no room for it" in (registry.get(db, NEW).problem or ""))
    later = add_policy()
    await eventually(lambda: status(db, later) is PolicyStatus.TRIAL)
    assert duels.get(db, stalled.id).status is DuelStatus.ENDED
    assert status(db, NEW) is PolicyStatus.REJECTED
    _, side = await ask(house)
    assert side.keys() == {BASE_POLICY, later}


async def test_a_trial_ends_where_the_challengers_folder_is_damaged(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    add_policy()
    stalled = await running(house, db)
    await engine.stop()
    await eventually(lambda: not house.state.engines.ready)
    (house.state.settings.state / "policies" / NEW / "adapter_model.safetensors").write_bytes(b"damaged")
    await engine.start()
    await eventually(lambda: status(db, NEW) is PolicyStatus.REJECTED)
    assert NEW in str(registry.get(db, NEW).problem)
    assert duels.get(db, stalled.id).status is DuelStatus.ENDED


async def test_an_engine_that_restarts_during_a_trial_gets_both_policies_back(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    add_policy()
    await running(house, db)
    await engine.stop()
    await eventually(lambda: not house.state.engines.ready)
    engine.events.clear()
    await engine.start()
    await eventually(house.is_ready)
    assert engine.events == ["load policy-0000", "warm policy-0000", "load policy-0001", "warm policy-0001"]
    _, side = await ask(house)
    assert side.keys() == {BASE_POLICY, NEW}


async def test_a_challenger_that_an_engine_has_lost_makes_a_pair_a_plain_answer(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    add_policy()
    await running(house, db)
    engine.answer = lambda body: Refusal(404, "gone") if body["model"] == NEW else by_policy(body)
    answer = await house.chat(feedback="always")
    assert answer.status == 200
    assert answer.json["system_fingerprint"] == BASE_POLICY
    assert answer.text.startswith(BASE_POLICY)
    assert "comparison" not in answer.json
    assert house.state.engines.ready


async def test_the_latest_of_several_candidates_goes_on_trial(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.answer = by_policy
    for gate in (True, True, False, None):
        add_policy(gate=gate)
    house = await open_house(engine, gate=ALL)
    assert (await running(house, db)).challenger == "policy-0002"
    assert status(db, "policy-0001") is PolicyStatus.REJECTED
    assert "policy-0002 came before" in str(registry.get(db, "policy-0001").problem)
    # Neither what failed the gate nor what never met it goes before people.
    assert [status(db, name) for name in ("policy-0003", "policy-0004")] == [PolicyStatus.CANDIDATE] * 2
    newer = add_policy()
    await has_looked(house)
    assert status(db, newer) is PolicyStatus.CANDIDATE, "a trial that runs is not broken off by the next candidate"
    await vote_for(house, BASE_POLICY, times=30)
    assert (await running(house, db)).challenger == newer


@pytest.mark.parametrize("mode", ["manual", "offline"])
async def test_only_in_the_trial_mode_do_candidates_go_on_trial(
    open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy, mode: str
) -> None:
    house = await open_house(engine, gate={"mode": mode})
    name = add_policy()
    await has_looked(house)
    assert status(db, name) is PolicyStatus.CANDIDATE
    assert duels.running(db) is None


async def test_a_candidate_that_the_engine_refuses_is_turned_away_and_one_that_cannot_load_now_waits(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    engine.refuses_warm_up = Refusal(503, "queue is full")
    name = add_policy()
    await eventually(lambda: "queue is full" in (registry.get(db, name).problem or ""))
    assert status(db, name) is PolicyStatus.CANDIDATE
    engine.refuses_warm_up = None
    await running(house, db)
    assert registry.get(db, name).problem is None
    await vote_for(house, BASE_POLICY, times=30)
    engine.refuses_load = Refusal(500, "LoRA rank 64")
    bad = add_policy()
    await eventually(lambda: status(db, bad) is PolicyStatus.REJECTED)
    assert "LoRA rank 64" in str(registry.get(db, bad).problem)


async def test_an_operator_may_promote_a_candidate_on_trial(
    house: House, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy()
    duel = await running(house, db)
    assert (await house.call("POST", f"/v1/policies/{name}/promote", role=Role.OPERATOR)).status == 202
    await eventually(lambda: house.state.engines.serving == name)
    assert duels.get(db, duel.id).status is DuelStatus.ENDED
    assert engine.events.count(f"load {name}") == 1, "it was on the engine already"


async def test_a_change_of_mind_comes_too_late_for_a_duel(house: House, db: Database, add_policy: AddPolicy) -> None:
    name = add_policy()
    duel = await running(house, db)
    comparison, side = await ask(house)
    await house.vote(comparison, side[name])
    await house.vote(comparison, side[name])
    assert (duels.get(db, duel.id).wins, duels.get(db, duel.id).losses) == (1, 0)
    await house.vote(comparison, side[BASE_POLICY])
    assert (duels.get(db, duel.id).wins, duels.get(db, duel.id).losses) == (1, 0), "by then it is told who wrote which"


async def test_two_processes_put_the_same_duel_before_people(
    house: House, open_house: OpenHouse, engine: FakeEngine, db: Database, add_policy: AddPolicy
) -> None:
    other = await open_house(engine, gate=ALL)
    add_policy()
    for one in (house, other):
        await running(one, db)
        _, side = await ask(one)
        assert side.keys() == {BASE_POLICY, NEW}
    await vote_for(other, NEW, times=30)
    for one in (house, other):
        await eventually(lambda one=one: one.state.engines.serving == NEW)
    assert engine.events.count(f"load {NEW}") == 1


# What is shown of it


async def test_operators_see_how_a_duel_stands(house: House, db: Database, add_policy: AddPolicy) -> None:
    name = add_policy()
    await running(house, db)
    await vote_for(house, name, times=3)
    (shown,) = (await house.call("GET", "/v1/duels", role=Role.OPERATOR)).json["data"]
    assert (shown["challenger"], shown["status"], shown["wins"], shown["threshold"]) == (name, "running", 3, 20.0)
    assert [point["votes"] for point in shown["curve"]] == [1, 2, 3]
    assert shown["curve"][-1]["e_value"] == shown["e_value"] > 1.0
    assert 0.0 < shown["rate_low"] < shown["rate_high"] <= 1.0
    (also,) = (await house.call("GET", f"/v1/policies/{name}", role=Role.OPERATOR)).json["duels"]
    assert also == shown
    await eventually(lambda: house.state.hot_swap.duel.wins == 3)  # type: ignore[union-attr]
    metrics = (await house.call("GET", "/metrics", role=None)).body.decode()
    labels = f'challenger="{name}",incumbent="policy-0000",kind="trial"'
    assert f"nightshift_duel_e_value{{{labels}}} {shown['e_value']}" in metrics


# The watch


Promoted = Callable[[House], Awaitable[str]]


@pytest.fixture
def promoted(add_policy: AddPolicy) -> Promoted:
    async def promote(house: House) -> str:
        name = add_policy(PolicyStatus.PROMOTED)
        await eventually(lambda: house.state.engines.serving == name)
        return name

    return promote


async def test_the_predecessor_stays_on_the_engine_and_comes_back_when_people_prefer_it(
    house: House, engine: FakeEngine, db: Database, promoted: Promoted
) -> None:
    name = await promoted(house)
    duel = await running(house, db, DuelKind.WATCH)
    assert (duel.challenger, duel.incumbent) == (BASE_POLICY, name)
    await has_drained(house)
    assert engine.adapters.keys() == {BASE_POLICY, name}
    await vote_for(house, BASE_POLICY, times=30)
    await eventually(lambda: house.state.engines.serving == BASE_POLICY)
    assert engine.events.count("load policy-0000") == 1
    assert status(db, name) is PolicyStatus.ROLLED_BACK
    assert swaps.list_swaps(db)[0].actor == "watch"
    assert "People prefer it" in swaps.list_swaps(db)[0].reason
    await eventually(lambda: engine.adapters.keys() == {BASE_POLICY})
    assert duels.running(db) is None


async def test_the_predecessor_is_let_go_when_people_prefer_what_serves(
    house: House, engine: FakeEngine, db: Database, promoted: Promoted
) -> None:
    name = await promoted(house)
    duel = await running(house, db, DuelKind.WATCH)
    await vote_for(house, name, times=30)
    assert duels.get(db, duel.id).status is DuelStatus.LOST
    await eventually(lambda: engine.adapters.keys() == {name})
    await eventually(lambda: swaps.list_swaps(db)[0].drained_at is not None)
    assert house.state.engines.serving == name


async def test_one_that_was_trained_earlier_and_never_served_is_watched_too(
    house: House, db: Database, promoted: Promoted, add_policy: AddPolicy
) -> None:
    earlier = add_policy(PolicyStatus.REJECTED)
    later = await promoted(house)
    with transaction(db):
        swaps.promote(db, earlier, actor="key_1", reason="because")
    await eventually(lambda: house.state.engines.serving == earlier)
    duel = await running(house, db, DuelKind.WATCH)
    assert (duel.challenger, duel.incumbent) == (later, earlier)
    await vote_for(house, later, times=30)
    await eventually(lambda: house.state.engines.serving == later)
    assert status(db, earlier) is PolicyStatus.ROLLED_BACK


async def test_a_trial_ends_the_watch(
    house: House, engine: FakeEngine, db: Database, promoted: Promoted, add_policy: AddPolicy
) -> None:
    await promoted(house)
    watch = await running(house, db, DuelKind.WATCH)
    add_policy()
    await eventually(lambda: duels.get(db, watch.id).status is DuelStatus.ENDED)
    assert (await running(house, db)).challenger == "policy-0002"
    await eventually(lambda: engine.adapters.keys() == {"policy-0001", "policy-0002"})


async def test_a_watch_that_waits_for_an_engine_keeps_no_candidate_from_its_trial(
    house: House, engine: FakeEngine, db: Database, promoted: Promoted, add_policy: AddPolicy
) -> None:
    await promoted(house)
    await running(house, db, DuelKind.WATCH)
    await engine.stop()
    await eventually(lambda: not house.state.engines.ready)
    engine.refuses_load = Refusal(500, "no room for it")
    engine.refuses_only = BASE_POLICY
    await engine.start()
    await eventually(lambda: [load["lora_name"] for load in engine.loads].count(BASE_POLICY) >= 3)
    assert status(db, BASE_POLICY) is PolicyStatus.RETIRED
    assert registry.get(db, BASE_POLICY).problem is None
    add_policy()
    assert (await running(house, db)).challenger == "policy-0002"


# Back by itself, without a vote


AddAnswers = Callable[..., None]


@pytest.fixture
def add_answers(house: House, db: Database) -> AddAnswers:
    def add(
        policy: str,
        *,
        good: int = 0,
        failed: int = 0,
        unfinished: int = 0,
        aborted: int = 0,
        sampling: dict[str, Any] | None = None,
        role: Role = Role.USER,
    ) -> None:
        kinds = [(CompletionStatus.COMPLETE, "stop")] * good + [(CompletionStatus.FAILED, None)] * failed
        kinds += [(CompletionStatus.COMPLETE, "length")] * unfinished + [(CompletionStatus.ABORTED, None)] * aborted
        sampling = sampling or {"max_tokens": house.state.settings.chat.max_tokens}
        key = house.keys[role].id
        with transaction(db):
            for how, finish in kinds:
                completions.insert(db, Completion(
                    id=new_id("cpl"), key_id=key, user=key, conversation="", messages=[], answer="", policy=policy,
                    sampling=sampling, status=how, finish_reason=finish, prompt_tokens=1, completion_tokens=1,
                    first_token_ms=None, total_ms=1.0, created_at=timestamp(),
                ))  # fmt: skip

    return add


@pytest.mark.parametrize("what", ["failed", "unfinished"])
async def test_a_policy_whose_answers_fail_more_often_than_its_predecessor_s_is_taken_back(
    house: House, db: Database, promoted: Promoted, add_answers: AddAnswers, what: str
) -> None:
    add_answers(BASE_POLICY, good=200, **{what: 4})
    await asyncio.sleep(0.002)
    name = await promoted(house)
    add_answers(name, good=40, **{what: 20})
    await eventually(lambda: house.state.engines.serving == BASE_POLICY)
    assert status(db, name) is PolicyStatus.ROLLED_BACK
    swap = swaps.list_swaps(db)[0]
    assert swap.actor == "watch"
    assert "20 of 60" in swap.reason
    await rounds(house, "_compare_with_predecessor")
    assert house.state.engines.serving == BASE_POLICY


async def test_a_policy_like_its_predecessor_stays(
    house: House, db: Database, promoted: Promoted, add_answers: AddAnswers
) -> None:
    add_answers(BASE_POLICY, good=1, failed=600)  # long ago
    add_answers(BASE_POLICY, good=180, failed=10, unfinished=10, aborted=50)
    await asyncio.sleep(0.002)
    name = await promoted(house)
    add_answers(BASE_POLICY, failed=50)  # running still when the other came
    add_answers(name, good=180, failed=15, unfinished=15, aborted=100)
    await rounds(house, "_compare_with_predecessor")
    assert house.state.engines.serving == name
    assert swaps.pending(db) is None


async def test_answers_that_their_client_kept_short_or_steered_say_nothing_about_a_policy(
    house: House, db: Database, promoted: Promoted, add_answers: AddAnswers
) -> None:
    add_answers(BASE_POLICY, good=200)
    await asyncio.sleep(0.002)
    name = await promoted(house)
    for short in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 512, "max_completion_tokens": 5}):
        add_answers(name, good=10, unfinished=30, sampling=short)
    for steered in (
        {"logit_bias": {"1": -100.0}}, {"temperature": 2.0}, {"frequency_penalty": -2.0}, {"presence_penalty": -2.0},
        {"repetition_penalty": 0.1}, {"response_format": {"type": "json_object"}},
    ):  # fmt: skip
        add_answers(name, unfinished=10, sampling={"max_tokens": 512} | steered)
    await rounds(house, "_compare_with_predecessor")
    assert house.state.engines.serving == name
    add_answers(name, good=20, unfinished=20, sampling={"max_completion_tokens": 512, "temperature": 0.7})
    await eventually(lambda: house.state.engines.serving == BASE_POLICY)
    assert "20 of 40" in swaps.list_swaps(db)[0].reason


async def test_nobody_takes_a_policy_back_alone_where_there_are_others(
    house: House, db: Database, promoted: Promoted, add_answers: AddAnswers
) -> None:
    add_answers(BASE_POLICY, good=200)
    await asyncio.sleep(0.002)
    name = await promoted(house)
    add_answers(name, good=20)
    add_answers(name, unfinished=100, failed=100, role=Role.RATER)
    await rounds(house, "_compare_with_predecessor")
    assert house.state.engines.serving == name
    add_answers(name, good=4, unfinished=8)
    await eventually(lambda: house.state.engines.serving == BASE_POLICY)


async def test_more_requests_than_there_is_place_for_say_nothing_about_a_policy(
    house: House, engine: FakeEngine, db: Database, promoted: Promoted
) -> None:
    name = await promoted(house)
    engine.answer = lambda body: Refusal(503, "The request queue is full.")
    for stream in (True, False):
        assert (await house.chat(stream=stream)).status == 503
    engine.answer = lambda body: say("Hello")
    assert (await house.chat()).status == 200
    assert [row["status"] for row in await house.rows("completions")] == ["complete"]
    assert house.state.engines.serving == name
