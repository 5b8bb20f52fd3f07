"""`nightshift schedule` and `nightshift runs`: each verb, with and without --json, and its exit code."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from sqlite_utils import Database
from typer.testing import CliRunner

from data import leases, runs, schedules
from data.database import transaction
from data.settings import Settings
from data.types import RunStatus
from service.cli import app
from tests.conftest import AddPolicy, strictly

Command = Callable[..., Result]


@pytest.fixture
def nightshift(settings: Settings) -> Command:
    """Run the command on the test's own state folder."""

    def run(*arguments: str, state: Path | None = None) -> Result:
        return CliRunner().invoke(app, [*arguments, "--state", str(state or settings.state)])

    return run


@pytest.fixture
def run_id(db: Database) -> str:
    """A run that is queued."""
    with transaction(db):
        return runs.request(db, requested_by="key_1", config={"seed": 3}).id


def carry_out(db: Database, id: str, status: RunStatus, *, error: str | None = None) -> None:
    with transaction(db):
        runs.claim(db)
        runs.beat(db, id, stage="ppo")
        for step in range(21):
            runs.add_metrics(db, id, step, {"ppo/score": step / 10, "ppo/kl": 0.5})
        runs.finish(db, id, status, error=error)


# Both groups


@pytest.mark.parametrize("group", ["schedule", "runs"])
def test_a_group_without_a_verb_shows_its_help(group: str) -> None:
    result = CliRunner().invoke(app, [group])
    assert result.exit_code == 2
    assert "Usage: " in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule", "add", "--every", "6h"],
        ["schedule", "list"],
        ["schedule", "pause", "sched_x"],
        ["schedule", "resume", "sched_x"],
        ["schedule", "edit", "sched_x", "--every", "6h"],
        ["schedule", "remove", "sched_x"],
        ["runs", "list"],
        ["runs", "show", "run_x"],
        ["runs", "watch", "run_x"],
        ["runs", "cancel", "run_x"],
    ],
    ids=" ".join,
)
def test_without_a_record_or_a_row_a_verb_says_so(nightshift: Command, tmp_path: Path, arguments: list[str]) -> None:
    result = nightshift(*arguments, state=tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nightshift up" in result.stderr
    assert not (tmp_path / "nowhere").exists()
    if {"sched_x", "run_x"} & {*arguments}:
        result = nightshift(*arguments)
        assert result.exit_code == 1
        assert f"no {arguments[0].removesuffix('s')} '{arguments[2]}'" in result.stderr
        assert f"nightshift {arguments[0]} list" in result.stderr


# schedule


def test_a_schedule_is_added_listed_changed_and_removed(nightshift: Command, db: Database) -> None:
    added = nightshift("schedule", "add", "--cron", "0 3 * * 0", "--timezone", "Asia/Kathmandu")
    assert added.exit_code == 0
    (schedule,) = schedules.list_all(db)
    assert added.stdout.startswith(f"{schedule.id}  cron 0 3 * * 0 (Asia/Kathmandu)  next: 20")
    assert "T21:15:00.000Z" in added.stdout
    assert schedule.id in nightshift("schedule", "list").stdout
    assert "paused" in nightshift("schedule", "pause", schedule.id).stdout
    assert "paused" in nightshift("schedule", "list").stdout
    assert "T21:15:00.000Z" in nightshift("schedule", "resume", schedule.id).stdout
    assert "T03:00:00.000Z" in nightshift("schedule", "edit", schedule.id, "--timezone", "UTC").stdout
    assert "every 30m" in nightshift("schedule", "edit", schedule.id, "--every", "30m").stdout
    assert "0 of 5 votes" in nightshift("schedule", "edit", schedule.id, "--votes", "5").stdout
    assert nightshift("schedule", "remove", schedule.id).stdout == f"{schedule.id} is removed\n"
    assert "nightshift schedule add" in nightshift("schedule", "list").stdout
    actors = {row["actor"] for row in db.query("SELECT actor FROM audit WHERE action LIKE 'schedule.%'")}
    assert actors == {"cli"}


def test_every_verb_of_schedules_prints_json(nightshift: Command) -> None:
    added = json.loads(nightshift("schedule", "add", "--votes", "5", "--json").stdout)
    assert (added["votes"], added["new_votes"], added["cron"]) == (5, 0, None)
    assert json.loads(nightshift("schedule", "list", "--json").stdout) == [added]
    id = added["id"]
    assert json.loads(nightshift("schedule", "pause", id, "--json").stdout)["paused"] is True
    assert json.loads(nightshift("schedule", "resume", id, "--json").stdout)["paused"] is False
    assert json.loads(nightshift("schedule", "edit", id, "--every", "6h", "--json").stdout)["every"] == "6h"
    assert json.loads(nightshift("schedule", "remove", id, "--json").stdout) == {"id": id, "deleted": True}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cron", "0 3 * *"], "'0 3 * *' has 4 fields"),
        (["--cron", "0 3 * * *", "--timezone", "Mars/Phobos"], "'Mars/Phobos' is no time zone"),
        (["--every", "0s"], "'0s' is no interval"),
        (["--votes", "many"], "'many' is no number of votes"),
        (["--every", "6h", "--votes", "5"], "Both every and votes given"),
        (["--every", "6h", "--timezone", "UTC"], "Only a cron expression has a time zone"),
        ([], "Nothing given"),
    ],
)
def test_what_is_no_schedule_is_exit_code_1(
    nightshift: Command, db: Database, options: list[str], sentence: str
) -> None:
    result = nightshift("schedule", "add", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert schedules.list_all(db) == []
    id = json.loads(nightshift("schedule", "add", "--every", "6h", "--json").stdout)["id"]
    result = nightshift("schedule", "edit", id, *options)
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert schedules.get(db, id).spec == "6h"


def test_a_schedule_without_a_clock_says_that_nothing_starts(nightshift: Command, db: Database) -> None:
    assert "No clock is running" in nightshift("schedule", "add", "--every", "6h").stderr
    with transaction(db):
        leases.acquire(db, "clock", "somebody", for_s=60)
    assert nightshift("schedule", "add", "--every", "6h").stderr == ""


# runs


def test_runs_are_listed(nightshift: Command, db: Database, run_id: str) -> None:
    assert run_id in nightshift("runs", "list").stdout
    (row,) = json.loads(nightshift("runs", "list", "--json").stdout)
    assert (row["id"], row["status"], row["config"]) == (run_id, "queued", {"seed": 3})
    assert nightshift("runs", "list", "--limit", "0").exit_code == 2


def test_without_runs_the_verbs_say_how_to_start_one(nightshift: Command) -> None:
    assert "nightshift train" in nightshift("runs", "list").stdout
    result = nightshift("runs", "watch")
    assert result.exit_code == 1
    assert "nightshift train" in result.stderr


def test_a_run_is_shown_with_its_figures(nightshift: Command, db: Database, run_id: str) -> None:
    carry_out(db, run_id, RunStatus.FAILED, error="The disk is full.")
    shown = nightshift("runs", "show", run_id)
    assert shown.exit_code == 0
    assert "error: The disk is full." in shown.stdout
    (line,) = [line for line in shown.stdout.splitlines() if "ppo/score" in line]
    assert line.split() == ["ppo/score", "21", "0", "2"]
    as_json = json.loads(nightshift("runs", "show", run_id, "--json").stdout)
    assert as_json["metrics"]["ppo/score"][-1] == [20, 2.0]
    assert (as_json["policy"], as_json["policy_problem"]) == (None, None)


def test_a_run_says_what_keeps_the_policy_that_came_of_it_from_serving(
    nightshift: Command, run_id: str, add_policy: AddPolicy
) -> None:
    name = add_policy(run_id=run_id, problem="The engine has no room.")
    shown = nightshift("runs", "show", run_id).stdout.splitlines()
    assert {f"policy: {name}", "policy_problem: The engine has no room."} <= {*shown}
    as_json = json.loads(nightshift("runs", "show", run_id, "--json").stdout)
    assert (as_json["policy"], as_json["policy_problem"]) == (name, "The engine has no room.")


def test_a_figure_of_a_run_that_is_infinite_is_null_in_json(nightshift: Command, db: Database, run_id: str) -> None:
    with transaction(db):
        runs.claim(db)
        runs.add_metrics(db, run_id, 0, {"ppo/kl": math.inf})
        runs.finish(db, run_id, RunStatus.FAILED, error="KL is infinite.")
    assert strictly(nightshift("runs", "show", run_id, "--json").stdout)["metrics"] == {"ppo/kl": [[0, None]]}
    events = [strictly(line) for line in nightshift("runs", "watch", run_id, "--json").stdout.splitlines()]
    assert [event["figures"] for event in events if event["event"] == "figures"] == [{"kl": None}]


@pytest.mark.parametrize(
    ("status", "code"), [(RunStatus.SUCCEEDED, 0), (RunStatus.FAILED, 1), (RunStatus.CANCELLED, 130)]
)
def test_watching_a_run_ends_as_the_run_does(
    nightshift: Command, db: Database, run_id: str, status: RunStatus, code: int
) -> None:
    carry_out(db, run_id, status, error="why" if code == 1 else None)
    watched = nightshift("runs", "watch", run_id)
    assert watched.exit_code == code
    assert watched.stdout == f"{run_id} {status}" + (": why\n" if code == 1 else "\n")
    assert "reward 2  KL 0.5" in watched.stderr


def test_a_run_is_watched_while_it_goes_on(
    nightshift: Command, db: Database, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = iter(["reward", "ppo"])

    def go_on(seconds: float) -> None:
        stage = next(stages, None)
        with transaction(db):
            runs.claim(db)
            if stage is None:
                runs.finish(db, run_id, RunStatus.SUCCEEDED)
            else:
                runs.beat(db, run_id, stage=stage)
                runs.add_metrics(db, run_id, 10, {f"{stage}/loss": 0.5})

    monkeypatch.setattr(time, "sleep", go_on)
    watched = nightshift("runs", "watch", "--json")
    assert watched.exit_code == 0
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    seen = [(event["event"], event.get("status"), event.get("stage")) for event in events]
    assert seen == [
        ("status", "queued", None),
        ("status", "running", "reward"), ("figures", None, "reward"),
        ("status", "running", "ppo"), ("figures", None, "ppo"),
        ("status", "succeeded", "ppo"),
    ]  # fmt: skip


def test_a_run_is_cancelled(nightshift: Command, db: Database, run_id: str) -> None:
    assert nightshift("runs", "cancel", run_id).stdout == f"{run_id} is cancelled\n"
    again = nightshift("runs", "cancel", run_id)
    assert again.exit_code == 1
    assert "has ended already (cancelled)" in again.stderr
    with transaction(db):
        running = runs.request(db, requested_by="cli", config={}).id
        runs.claim(db)
    assert nightshift("runs", "cancel", running).stdout == f"{running} is asked to stop\n"
    asked = json.loads(nightshift("runs", "cancel", "--json").stdout)
    assert (asked["id"], asked["cancel_requested_at"] is not None) == (running, True)


def test_without_a_run_there_is_none_to_cancel(nightshift: Command) -> None:
    result = nightshift("runs", "cancel")
    assert result.exit_code == 1
    assert "No run is queued or under way" in result.stderr
