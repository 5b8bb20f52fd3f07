"""/v1/raters, `nightshift raters` and the board's card: whose votes are left out, and the operator's word on it."""

import json

import pytest
from sqlite_utils import Database
from typer.testing import CliRunner

from data import raters, runs
from data.database import transaction
from data.settings import Settings
from data.types import Role
from service.cli import app
from tests.conftest import AddPair, House, MakeKey


@pytest.fixture
def suspected(db: Database, make_key: MakeKey) -> str:
    key = make_key()[0].id
    with transaction(db):
        run = runs.request(db, requested_by="test", config={})
        reason = "30 of 30 votes are for the answer shown first, though sides are random."
        raters.keep(db, run.id, {key: raters.Standing(30, 14, 0.123, reason)})
    return key


async def test_an_operator_sees_and_rules_over_the_wire(house: House, suspected: str, add_pair: AddPair) -> None:
    user = house.keys[Role.USER].id
    assert (await house.vote(add_pair(user), "a")).status == 200
    listed = (await house.call("GET", "/v1/raters", role=Role.OPERATOR)).json["data"]
    assert [(row["key"], row["quarantine"], row["votes"]) for row in listed] == [
        (suspected, "suspected", 0), (user, None, 1),
    ]  # fmt: skip
    board = (await house.call("GET", "/v1/board", role=Role.OPERATOR)).json
    assert board["raters"] == {"total": 2, "listed": listed}

    answer = await house.call("POST", f"/v1/raters/{suspected}/release", role=Role.OPERATOR)
    assert (answer.status, answer.json) == (200, {"key": suspected, "quarantine": "released"})
    answer = await house.call("POST", f"/v1/raters/{user}/confirm", role=Role.OPERATOR)
    assert answer.json == {"key": user, "quarantine": "confirmed"}
    rows = {row["key"]: row for row in (await house.call("GET", "/v1/raters", role=Role.OPERATOR)).json["data"]}
    assert (rows[suspected]["quarantine"], rows[user]["quarantine"]) == ("released", "confirmed")
    assert rows[user]["ruled_by"] == house.keys[Role.OPERATOR].id
    answer = await house.call("POST", f"/v1/raters/{user}/reconsider", role=Role.OPERATOR)
    assert answer.json == {"key": user, "quarantine": None}
    answer = await house.call("POST", f"/v1/raters/{user}/reconsider", role=Role.OPERATOR)
    assert (answer.status, answer.json["error"]["code"]) == (409, "no_ruling")
    rows = {row["key"]: row for row in (await house.call("GET", "/v1/raters", role=Role.OPERATOR)).json["data"]}
    assert rows[user]["quarantine"] is None


async def test_nobody_else_may(house: House, suspected: str) -> None:
    for role in (Role.USER, Role.RATER):
        assert (await house.call("GET", "/v1/raters", role=role)).status == 403
        for ruling in ("confirm", "release", "reconsider"):
            assert (await house.call("POST", f"/v1/raters/{suspected}/{ruling}", role=role)).status == 403
    answer = await house.call("POST", "/v1/raters/key_nobody/release", role=Role.OPERATOR)
    assert (answer.status, answer.json["error"]["code"]) == (404, "unknown_rater")


def test_an_operator_sees_and_rules_on_the_command_line(settings: Settings, db: Database, suspected: str) -> None:
    def nightshift(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["raters", *arguments, "--state", str(settings.state)])
        assert result.exit_code == 0, result.output
        return result.output

    listed = nightshift("list")
    assert "30 of 30 votes are for the answer shown first" in listed
    assert " 0.12 " in listed
    assert nightshift("release", suspected) == f"{suspected} is released\n"
    assert raters.left_out(db) == set()
    assert json.loads(nightshift("confirm", suspected, "--json")) == {"key": suspected, "quarantine": "confirmed"}
    assert raters.left_out(db) == {suspected}
    assert json.loads(nightshift("list", "--json"))[0]["quarantine"] == "confirmed"
    assert nightshift("reconsider", suspected) == f"{suspected} is left to the next run\n"
    result = CliRunner().invoke(app, ["raters", "reconsider", suspected, "--state", str(settings.state)])
    assert result.exit_code == 1
    assert "nothing to take back" in result.output
    assert raters.left_out(db) == set()
    result = CliRunner().invoke(app, ["raters", "confirm", "key_nobody", "--state", str(settings.state)])
    assert result.exit_code == 1
    assert "nightshift raters list" in result.output
