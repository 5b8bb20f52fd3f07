"""The verbs on raters: who votes, and whose votes are left out."""

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from service.console import Json, State, fail, open_record, print_rows

if TYPE_CHECKING:
    from sqlite_utils import Database

raters_app = typer.Typer(help="Who votes, and whose votes are left out.", no_args_is_help=True)


@raters_app.command("list")
def raters_list(state: State = None, json: Json = False) -> None:
    """Everybody who voted, how far their votes are relied on, and why they are left out, if they are."""
    from data import raters

    with open_record(state) as db:
        rows = raters.standing(db)
    if not json:
        rows = [row | {"reliability": _figure(row["reliability"])} for row in rows]
    columns = ["key", "label", "votes", "first", "second", "gold", "gold_right", "reliability", "quarantine", "reason"]
    print_rows(rows, json=json, columns=columns, empty="Nobody has voted yet.")


@raters_app.command("confirm")
def raters_confirm(key: str, state: State = None, json: Json = False) -> None:
    """Leave a rater's votes out of every run from now on. They stay on disk."""
    from data import raters

    _rule(lambda db: raters.confirm(db, key, actor="cli"), key, "confirmed", state=state, json=json)


@raters_app.command("release")
def raters_release(key: str, state: State = None, json: Json = False) -> None:
    """Let a rater's votes count from now on, whatever a run makes of them."""
    from data import raters

    _rule(lambda db: raters.release(db, key, actor="cli"), key, "released", state=state, json=json)


@raters_app.command("reconsider")
def raters_reconsider(key: str, state: State = None, json: Json = False) -> None:
    """Take `confirm` or `release` back: the next run judges the rater, and until then the votes count."""
    from data import raters

    _rule(lambda db: raters.reconsider(db, key, actor="cli"), key, None, state=state, json=json)


def _figure(reliability: float | None) -> str:
    return "" if reliability is None else f"{reliability:.2f}"


def _rule(
    decide: Callable[["Database"], None], key: str, ruling: str | None, *, state: Path | None, json: bool
) -> None:
    from data.database import transaction
    from data.raters import NoRuling, UnknownRater

    with open_record(state) as db:
        try:
            with transaction(db):
                decide(db)
        except UnknownRater:
            raise fail(f"There is no key '{key}'. `nightshift raters list` shows who votes.") from None
        except NoRuling:
            raise fail(f"No operator has ruled on {key}: there is nothing to take back.") from None
    said = f"{key} is {ruling or 'left to the next run'}"
    typer.echo(jsonlib.dumps({"key": key, "quarantine": ruling}) if json else said)
