"""The verbs of the night shift: when runs begin, how they go, and the versions of the policy that come of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.console import Json, State, fail, open_record, print_json, print_rows, read_settings, say

if TYPE_CHECKING:
    from sqlite_utils import Database

    from data.types import Policy, Swap

schedule_app = typer.Typer(help="When runs begin by themselves.", no_args_is_help=True)
runs_app = typer.Typer(help="Training runs. `nightshift train` starts one.", no_args_is_help=True)
policies_app = typer.Typer(help="The versions of the policy.", no_args_is_help=True)

Cron = Annotated[str | None, typer.Option(help="Minute, hour, day, month, weekday: '0 3 * * *' is 3:00 every day.")]
TimeZone = Annotated[str | None, typer.Option(help="Of the cron expression, e.g. Europe/Berlin. [default: UTC]")]
Every = Annotated[str | None, typer.Option(help="An interval: 90s, 30m, 6h or 1d.")]
Votes = Annotated[str | None, typer.Option(help="After so many new votes.")]
Reason = Annotated[str, typer.Option(help="Kept beside the swap.")]

ASKED_FOR = "an operator asked for it"
SERVES_WITHIN_S = 30.0
"""How long `promote` and `rollback` wait for the engines."""


# Schedules


@schedule_app.command("add")
def schedule_add(
    cron: Cron = None,
    timezone: TimeZone = None,
    every: Every = None,
    votes: Votes = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Let runs begin by themselves: by --cron, --every or --votes."""
    from data import schedules

    with _changing(state) as db:
        kind, spec = schedules.choose(cron=cron, every=every, votes=votes)
        added = schedules.describe(db, schedules.add(db, kind, spec, timezone=timezone, actor="cli"))
    _say_schedule(added, json=json)
    _warn_without_clock(state)


@schedule_app.command("list")
def schedule_list(state: State = None, json: Json = False) -> None:
    """All schedules, and when each is due next."""
    from data import schedules

    with open_record(state) as db:
        rows = [schedules.describe(db, schedule) for schedule in schedules.list_all(db)]
    if not json:
        rows = [row | {"when": _when(row), "next": _next(row)} for row in rows]
    columns = ["id", "when", "next", "last_due_at", "last_run"]
    print_rows(rows, json=json, columns=columns, empty="No schedules yet: nightshift schedule add --cron '0 3 * * *'")


@schedule_app.command("pause")
def schedule_pause(id: str, state: State = None, json: Json = False) -> None:
    """Nothing is due any more until it is resumed."""
    from data import schedules

    with _changing(state) as db:
        paused = schedules.describe(db, schedules.pause(db, id, actor="cli"))
    _say_schedule(paused, json=json)


@schedule_app.command("resume")
def schedule_resume(id: str, state: State = None, json: Json = False) -> None:
    """Go on from now; what was due meanwhile is left out."""
    from data import schedules

    with _changing(state) as db:
        resumed = schedules.describe(db, schedules.resume(db, id, actor="cli"))
    _say_schedule(resumed, json=json)


@schedule_app.command("edit")
def schedule_edit(
    id: str,
    cron: Cron = None,
    timezone: TimeZone = None,
    every: Every = None,
    votes: Votes = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Make it another one; --timezone alone moves a cron expression there."""
    from data import schedules

    with _changing(state) as db:
        if timezone is not None and (cron, every, votes) == (None, None, None):
            before = schedules.get(db, id)
            kind, spec = before.kind, before.spec
        else:
            kind, spec = schedules.choose(cron=cron, every=every, votes=votes)
        edited = schedules.describe(db, schedules.edit(db, id, kind, spec, timezone=timezone, actor="cli"))
    _say_schedule(edited, json=json)


@schedule_app.command("remove")
def schedule_remove(id: str, state: State = None, json: Json = False) -> None:
    """Forget the schedule; its runs stay."""
    from data import schedules

    with _changing(state) as db:
        schedules.remove(db, id, actor="cli")
    if json:
        print_json({"id": id, "deleted": True})
    else:
        typer.echo(f"{id} is removed")


@contextmanager
def _changing(state: Path | None) -> Iterator["Database"]:
    """The record, to change a schedule in one transaction."""
    from data import schedules
    from data.database import transaction

    with open_record(state) as db:
        try:
            with transaction(db):
                yield db
        except schedules.BadSchedule as error:
            raise fail(str(error)) from None
        except schedules.UnknownSchedule as error:
            raise fail(f"There is no schedule '{error}'. `nightshift schedule list` shows them all.") from None


def _say_schedule(described: dict[str, Any], *, json: bool) -> None:
    if json:
        print_json(described)
    else:
        typer.echo(f"{described['id']}  {_when(described)}  next: {_next(described)}")


def _when(described: dict[str, Any]) -> str:
    if described["cron"] is not None:
        return f"cron {described['cron']} ({described['timezone']})"
    return f"every {described['every']}" if described["every"] else f"after {described['votes']} votes"


def _next(described: dict[str, Any]) -> str:
    if described["paused"]:
        return "paused"
    if described["votes"]:
        return f"{described['new_votes']} of {described['votes']} votes"
    return str(described["next_due_at"] or described["problem"])


def _warn_without_clock(state: Path | None) -> None:
    from data import leases

    with open_record(state) as db:
        if leases.holder_of(db, "clock") is None:
            typer.echo("No clock is running, so nothing starts yet: it comes with `nightshift up`.", err=True)


# Runs


@runs_app.command("list")
def runs_list(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the latest first.")] = 50,
    state: State = None,
    json: Json = False,
) -> None:
    """The latest runs, and what became of them."""
    from data import runs
    from service.run_watch import run_json

    with open_record(state) as db:
        rows = [run_json(run) for run in runs.list_runs(db, limit=limit)]
    columns = ["id", "status", "stage", "requested_by", "created_at", "ended_at", "error"]
    print_rows(rows, json=json, columns=columns, empty="No runs yet: nightshift train")


@runs_app.command("show")
def runs_show(id: str, state: State = None, json: Json = False) -> None:
    """One run, the policy that came of it, and its figures."""
    from data import registry, runs
    from service.run_watch import run_json

    with open_record(state) as db:
        shown = run_json(_find_run(db, id))
        policy = next((policy for policy in registry.list_policies(db) if policy.run_id == id), None)
        shown |= {"policy": policy and policy.name, "policy_problem": policy and policy.problem}
        curves = runs.metrics(db, id)
    if json:
        print_json(shown | {"metrics": curves})
        return
    for name, value in shown.items():
        if value is not None:
            typer.echo(f"{name}: {value}")
    rows = [
        {"figure": name, "steps": len(curve), "first": _figure(curve[0][1]), "last": _figure(curve[-1][1])}
        for name, curve in curves.items()
    ]
    print_rows(rows, json=False, columns=["figure", "steps", "first", "last"], empty="No figures yet.")


@runs_app.command("watch")
def runs_watch(
    id: Annotated[str | None, typer.Argument(help="[default: the run under way, or else the latest]")] = None,
    state: State = None,
    json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON.")] = False,
) -> None:
    """Follow a run to its end. Ends with 0 where it succeeded, 1 where it failed, 130 where it was cancelled."""
    from data import runs
    from service.run_watch import LOOK_S, RunDisplay, RunWatch

    with open_record(state) as db:
        latest = runs.active(db) or next(iter(runs.list_runs(db, limit=1)), None)
        run = _find_run(db, id) if id is not None else latest
        if run is None:
            raise fail("There are no runs yet. Start one with `nightshift train`.")
        if run.status == "queued":
            _warn_without_clock(state)
        watch = RunWatch(run.id)
        display = None if json else RunDisplay()
        try:
            while True:
                for event in watch.look(db):
                    if display is None:
                        print_json({"event": event.name} | event.data)
                    else:
                        display(event)
                if watch.ended:
                    break
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None  # of watching; the run goes on
        finally:
            if display is not None:
                display.close()
        run = runs.get(db, run.id)
    if not json:
        say(f"{run.id} {run.status}" + (f": {run.error}" if run.error else ""))
    raise typer.Exit({"succeeded": 0, "cancelled": 130}.get(run.status, 1))


@runs_app.command("cancel")
def runs_cancel(
    id: Annotated[str | None, typer.Argument(help="[default: the run under way]")] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Cancel a queued run at once; a running one ends in order a little later."""
    from data import runs
    from data.database import transaction
    from service.run_watch import OVER, run_json

    with open_record(state) as db, transaction(db):
        run = runs.active(db) if id is None else _find_run(db, id)
        if run is None:
            raise fail("No run is queued or under way.")
        if run.status in OVER:
            raise fail(f"{run.id} has ended already ({run.status}).")
        run = runs.cancel(db, run.id, actor="cli")
    if json:
        print_json(run_json(run))
    else:
        typer.echo(f"{run.id} {'is cancelled' if run.status in OVER else 'is asked to stop'}")


def _find_run(db: "Database", id: str) -> Any:
    from data import runs

    try:
        return runs.get(db, id)
    except runs.UnknownRun:
        raise fail(f"There is no run '{id}'. `nightshift runs list` shows them all.") from None


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# Policies


@policies_app.command("list")
def policies_list(state: State = None, json: Json = False) -> None:
    """All versions of the policy and what became of them."""
    from dataclasses import asdict

    from data import registry

    with open_record(state) as db:
        rows = [asdict(policy) for policy in registry.list_policies(db)]
    columns = ["name", "parent", "status", "created_at", "problem"]
    print_rows(rows, json=json, columns=columns, empty="No policies yet: start with `nightshift up`.")


@policies_app.command("show")
def policies_show(
    name: str,
    lineage: Annotated[bool, typer.Option("--lineage", help="Its run, reward model, votes and comparisons.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """One version: what the gate found, its duels, and when it served."""
    from dataclasses import asdict

    from data import duels, registry, swaps

    with open_record(state) as db:
        policy = _find_policy(db, name)
        fought = [asdict(duel) for duel in duels.list_duels(db, policy=name)]
        swapped = [asdict(swap) for swap in swaps.list_swaps(db, policy=name)]
        origin = registry.lineage(db, name) if lineage else None
    if json:
        more = {"duels": fought, "swaps": swapped} | ({"lineage": origin} if origin else {})
        print_json(asdict(policy) | more)
        return
    say(f"{name} is {policy.status}" + (f": {policy.problem}" if policy.problem else ""))
    if policy.gate is None:
        typer.echo("It never met the gate.")
    else:
        typer.echo(f"The gate {'let it through' if policy.gate['passed'] else 'turned it away'}:")
        for check in policy.gate["checks"]:
            color = None if check["passed"] else "red"
            typer.secho(f"  {'ok ' if check['passed'] else 'BAD'} {check['name']}: {check['sentence']}", fg=color)
    for duel in fought:
        typer.echo(
            f"The {duel['kind']} of {duel['challenger']} against {duel['incumbent']} is {duel['status']}:"
            f" {duel['wins']} wins, {duel['losses']} losses, {duel['ties']} ties;"
            f" E = {duel['e_value']:.3g} of {duel['threshold']:g},"
            f" mirrored {duel['e_mirrored']:.3g}; it wins {duel['rate_low']:.0%} to {duel['rate_high']:.0%}"
        )
    for swap in swapped:
        when = f"at {swap['flipped_at']}" if swap["flipped_at"] else f"not yet ({swap['problem'] or 'it is loading'})"
        say(f"{swap['policy']} for {swap['replaced'] or 'none'}, {when}: {swap['reason']} ({swap['actor']})")
    if origin is not None:
        run, reward_model = origin["run"] or {}, origin["reward_model"] or {}
        typer.echo(f"parent: {origin['parent']}\nrun: {run.get('id')}\nreward model: {reward_model.get('id')}")
        columns = ["vote", "choice", "split", "weight", "comparison", "kind", "policy_a", "policy_b"]
        print_rows(origin["votes"], json=False, columns=columns, empty="It learned from no votes.")


@policies_app.command("promote")
def policies_promote(name: str, reason: Reason = ASKED_FOR, state: State = None, json: Json = False) -> None:
    """Let a version serve."""
    from data import swaps

    with open_record(state) as db:
        _find_policy(db, name)
        _serve(db, name, lambda: swaps.promote(db, name, actor="cli", reason=reason), state=state, json=json)


@policies_app.command("rollback")
def policies_rollback(reason: Reason = ASKED_FOR, state: State = None, json: Json = False) -> None:
    """Let the predecessor of the version that serves serve again."""
    from data import registry, swaps

    with open_record(state) as db:
        serving = registry.serving(db)
        seen = serving.name if serving else None
        try:
            name = swaps.predecessor(db)
        except swaps.CannotPromote as error:
            raise fail(str(error)) from None
        typer.echo(f"Going back from {seen} to {name}", err=True)
        _serve(db, name, lambda: swaps.roll_back(db, actor="cli", reason=reason, seen=seen), state=state, json=json)


def _serve(db: "Database", name: str, decide: Callable[[], "Swap"], *, state: Path | None, json: bool) -> None:
    """Decide that a version is to serve, and wait until it does."""
    from data import leases, registry, swaps
    from data.database import transaction
    from data.types import PolicyStatus

    settings = read_settings(state=state)
    began = time.monotonic()
    try:
        registry.servable_folder(db, settings.state, registry.get(db, name), max_rank=settings.engine.max_lora_rank)
        with transaction(db):
            swap = decide()
    except (swaps.CannotPromote, registry.RegistryError, OSError) as error:
        raise fail(str(error)) from None
    if leases.holder_of(db, "swap") is None:
        typer.echo(f"Nothing runs here now: {name} serves at the next start.", err=True)
        if json:
            print_json({"policy": name, "swap": swap.id, "seconds": None})
        return
    while (policy := registry.get(db, name)).status is PolicyStatus.PROMOTED:
        if time.monotonic() - began > SERVES_WITHIN_S:
            why = policy.problem or "the engines are still loading it"
            raise fail(f"{name} does not serve after {SERVES_WITHIN_S:.0f} s: {why}. The service goes on trying.")
        time.sleep(0.02)
    if policy.status is not PolicyStatus.SERVING:
        raise fail(f"{name} is {policy.status}: {policy.problem}")
    seconds = time.monotonic() - began
    if json:
        print_json({"policy": name, "swap": swap.id, "seconds": round(seconds, 3)})
    else:
        typer.echo(f"{name} serves after {seconds:.2f} s")


def _find_policy(db: "Database", name: str) -> "Policy":
    from data import registry

    try:
        return registry.get(db, name)
    except registry.UnknownPolicy:
        raise fail(f"There is no policy '{name}'. `nightshift policies list` shows them all.") from None
