"""`nightshift policies`: what is shown of a version, and the two verbs that let one serve."""

import asyncio
import json
import math
from collections.abc import Callable

import pytest
from click.testing import Result
from sqlite_utils import Database
from typer.testing import CliRunner

from data import duels, registry, swaps
from data.database import transaction
from data.settings import Settings
from data.types import BASE_POLICY, DuelKind, PolicyStatus, Role
from service.cli import app
from tests.conftest import AddPolicy, FakeEngine, House, OpenHouse, Refusal, eventually, strictly

Command = Callable[..., Result]


@pytest.fixture
def nightshift(settings: Settings) -> Command:
    """Run the command on the test's own state folder."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--state", str(settings.state)])

    return run


@pytest.fixture
async def house(open_house: OpenHouse, engine: FakeEngine, db: Database) -> House:
    """The API, policy-0000 in service, where no candidate goes on trial by itself."""
    return await open_house(engine, gate={"mode": "manual"})


def test_a_version_is_shown_with_the_gate_s_sentences(nightshift: Command, add_policy: AddPolicy) -> None:
    name = add_policy(PolicyStatus.REJECTED, gate=False, problem="It lost its trial")
    shown = nightshift("policies", "show", name)
    assert shown.exit_code == 0
    assert f"{name} is rejected: It lost its trial" in shown.stdout
    assert "turned it away" in shown.stdout
    assert "BAD kl: KL is 3 nats." in shown.stdout
    as_json = json.loads(nightshift("policies", "show", name, "--json").stdout)
    assert as_json["metrics"]["gate"]["checks"][0]["threshold"] == 15.0
    assert "lineage" not in as_json


def test_a_version_is_shown_with_its_duels_and_swaps(nightshift: Command, db: Database, add_policy: AddPolicy) -> None:
    name = add_policy(PolicyStatus.TRIAL)
    with transaction(db):
        duels.begin(db, DuelKind.TRIAL, challenger=name, incumbent=BASE_POLICY, threshold=20.0, budget=50)
        swaps.promote(db, name, actor="key_1", reason="why not")
    shown = nightshift("policies", "show", name).stdout
    assert f"The trial of {name} against policy-0000 is ended: 0 wins" in shown
    assert "not yet (it is loading): why not (key_1)" in shown


def test_a_figure_of_the_gate_that_is_infinite_is_null_in_json(nightshift: Command, add_policy: AddPolicy) -> None:
    check = {"name": "kl", "figure": math.inf, "threshold": 12.0, "passed": False, "sentence": "KL is infinite."}
    name = add_policy(PolicyStatus.REJECTED, metrics={"gate": {"passed": False, "checks": [check]}})
    shown = strictly(nightshift("policies", "show", name, "--json").stdout)
    (_, listed) = strictly(nightshift("policies", "list", "--json").stdout)
    for policy in (shown, listed):
        assert policy["metrics"]["gate"]["checks"] == [check | {"figure": None}]


def test_an_unknown_version_is_an_error(nightshift: Command) -> None:
    for verb in ("show", "promote"):
        result = nightshift("policies", verb, "policy-0009")
        assert result.exit_code == 1
        assert "no policy 'policy-0009'" in result.stderr


async def test_a_version_is_promoted_and_rolled_back_while_the_service_runs(
    house: House, nightshift: Command, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy()
    promoted = await asyncio.to_thread(nightshift, "policies", "promote", name)
    assert promoted.exit_code == 0
    assert promoted.stdout.startswith(f"{name} serves after ")
    await eventually(lambda: house.state.engines.serving == name)
    assert (await house.chat()).json["system_fingerprint"] == name
    back = await asyncio.to_thread(nightshift, "policies", "rollback", "--reason", "rude", "--json")
    assert back.exit_code == 0
    assert f"Going back from {name} to {BASE_POLICY}" in back.stderr
    shown = json.loads(back.stdout)
    assert shown["policy"] == BASE_POLICY
    assert shown["seconds"] >= 0.0
    assert swaps.list_swaps(db)[0].reason == "rude"
    await eventually(lambda: house.state.engines.serving == BASE_POLICY)
    assert (await house.chat()).json["system_fingerprint"] == BASE_POLICY
    actors = [row[0] for row in db.execute("SELECT actor FROM audit WHERE action = 'policy.promote'")]
    assert actors == ["cli", "cli"]


async def test_a_version_that_the_engine_refuses_is_exit_code_1_with_the_reason(
    house: House, engine: FakeEngine, nightshift: Command, add_policy: AddPolicy
) -> None:
    engine.refuses_load = Refusal(500, "not this one")
    result = await asyncio.to_thread(nightshift, "policies", "promote", add_policy())
    assert result.exit_code == 1
    assert "not this one" in result.stderr


async def test_a_version_that_cannot_be_loaded_yet_is_exit_code_1_with_the_reason(
    house: House,
    engine: FakeEngine,
    nightshift: Command,
    db: Database,
    add_policy: AddPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.cli_night.SERVES_WITHIN_S", 0.0)
    engine.refuses_warm_up = Refusal(503, "queue is full")
    name = add_policy()
    assert (await house.call("POST", f"/v1/policies/{name}/promote", role=Role.OPERATOR)).status == 202
    await eventually(lambda: registry.get(db, name).problem)
    result = await asyncio.to_thread(nightshift, "policies", "promote", name)
    assert result.exit_code == 1
    assert "queue is full" in result.stderr
    assert "goes on trying" in result.stderr


def test_without_a_service_a_promotion_waits_for_the_next_start(
    nightshift: Command, db: Database, add_policy: AddPolicy
) -> None:
    name = add_policy()
    result = nightshift("policies", "promote", name)
    assert result.exit_code == 0
    assert "next start" in result.stderr
    assert registry.get(db, name).status is PolicyStatus.PROMOTED
    said = json.loads(nightshift("policies", "promote", name, "--json").stdout)
    assert said == {"policy": name, "swap": swaps.list_swaps(db)[0].id, "seconds": None}


@pytest.mark.parametrize("arguments", [["rollback"], ["promote", "policy-0000"], ["promote", "policy-0001"]])
def test_what_cannot_serve_is_exit_code_1_with_the_reason(
    nightshift: Command, settings: Settings, db: Database, add_policy: AddPolicy, arguments: list[str]
) -> None:
    registry.set_serving(db, BASE_POLICY)
    folder = settings.state / "policies" / add_policy()
    (folder / "adapter_config.json").unlink()
    result = nightshift("policies", *arguments)
    assert result.exit_code == 1
    said = {"rollback": "nothing to go back to", "policy-0000": "serves already", "policy-0001": "sha256"}
    assert said[arguments[-1]] in result.stderr
    assert swaps.list_swaps(db) == []
