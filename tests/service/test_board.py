"""What the operator's board is told."""

from typing import Any

from sqlite_utils import Database

from data import duels, runs
from data.database import transaction
from data.types import BASE_POLICY, PolicyStatus, Role, RunStatus
from tests.conftest import AddPair, AddPolicy, FakeEngine, House, OpenHouse, Refusal, eventually


async def board(house: House) -> dict[str, Any]:
    answer = await house.call("GET", "/v1/board", role=Role.OPERATOR)
    assert answer.status == 200
    whole: dict[str, Any] = answer.json
    return whole


async def test_a_fresh_service_has_a_board(house: House) -> None:
    whole = await board(house)
    assert whole["runs"] == whole["schedules"] == whole["reward_models"] == []
    assert whole["duel"] is None
    assert whole["predecessor"] is None
    assert whole["clock_runs"] is False
    assert [policy["name"] for policy in whole["policies"]] == [BASE_POLICY]
    assert [engine["problem"] for engine in whole["engines"]] == [None]
    assert len(whole["votes"]["days"]) == 30
    assert (house.settings.training.min_votes, whole["votes"]["needed"]) == (100, 143)


async def test_the_board_is_the_operators(house: House) -> None:
    for role in (Role.USER, Role.RATER):
        assert (await house.call("GET", "/v1/board", role=role)).status == 403
        assert (await house.call("GET", f"/v1/policies/{BASE_POLICY}/pairs", role=role)).status == 403


async def test_the_board_says_what_an_engine_lacks(open_house: OpenHouse, engine: FakeEngine) -> None:
    engine.refuses_load = Refusal(500, "CUDA error")
    house = await open_house(engine, ready=False)
    await eventually(lambda: house.state.engines.engines[0].logged)
    (told,) = (await board(house))["engines"]
    assert told["ready"] is False
    assert "CUDA error" in told["problem"]


async def test_the_board_has_the_trial_with_its_curve_and_its_pairs(
    house: House, add_policy: AddPolicy, add_pair: AddPair
) -> None:
    name = add_policy()
    await eventually(lambda: house.state.hot_swap.duel)
    duel = house.state.hot_swap.duel
    assert duel is not None
    comparison = add_pair(
        house.keys[Role.USER].id, answers=("new", "old"), policies=(name, BASE_POLICY), duel_id=duel.id
    )
    assert (await house.vote(comparison, "a")).status == 200
    told = (await board(house))["duel"]
    assert (told["challenger"], told["wins"], told["threshold"], told["reject_at"]) == (name, 1, 20.0, 20.0)
    assert [votes for votes, *_ in told["curve"]] == [1]
    pairs = await house.call("GET", f"/v1/policies/{name}/pairs", role=Role.OPERATOR)
    assert [(pair["answer"], pair["against_answer"]) for pair in pairs.json["data"]] == [("new", "old")]
    assert (await house.call("GET", "/v1/policies/policy-0099/pairs", role=Role.OPERATOR)).status == 404


async def test_a_duel_that_has_ended_stays_on_the_board(house: House, db: Database, add_policy: AddPolicy) -> None:
    add_policy()
    await eventually(lambda: house.state.hot_swap.duel)
    with transaction(db):
        duels.end_running(db, reason="over")
        db.execute("UPDATE policies SET status = ? WHERE name <> ?", (PolicyStatus.REJECTED, BASE_POLICY))
    told = (await board(house))["duel"]
    assert (told["status"], told["reason"]) == ("ended", "over")


async def test_an_infinite_figure_is_no_fault(house: House, db: Database) -> None:
    with transaction(db):
        runs.request(db, requested_by="test", config={})
        run = runs.claim(db)
        assert run is not None
        runs.finish(db, run.id, RunStatus.FAILED, error="the disk is full")
        db.execute(
            "INSERT INTO reward_models VALUES ('rm_1', ?, 'x', '0', '{\"log_loss\": Infinity}', '2026')", (run.id,)
        )
    whole = await board(house)
    assert whole["reward_models"][0]["log_loss"] is None
    assert whole["runs"][0]["error"] == "the disk is full"
