"""What the verbs of the `nightshift` command share: options, the record, tables, and how to fail."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

if TYPE_CHECKING:
    from sqlite_utils import Database

    from data.settings import Settings

CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
"""For str.translate: without what a terminal takes for commands. What a model or a user wrote may hold some."""
State = Annotated[Path | None, typer.Option("--state", help="The state folder. [default: var]", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def fail(message: str) -> typer.Exit:
    """Say what went wrong; the caller raises what this returns."""
    typer.secho(message, fg="red", err=True)
    return typer.Exit(1)


def say(message: str) -> None:
    """Print a message that holds what others wrote."""
    typer.echo(message.translate(CONTROLS))


def read_settings(**given: Any) -> "Settings":
    """The settings in force; what was `given` on the command line wins."""
    from data.settings import BadSettings, load_settings

    try:
        return load_settings(**{name: value for name, value in given.items() if value is not None})
    except BadSettings as error:
        raise fail(str(error)) from None


@contextmanager
def open_record(state: Path | None) -> Iterator["Database"]:
    """A connection to the record; a verb must not make one where there is none."""
    from pysqlite3 import dbapi2 as sqlite3

    from data.database import connect

    settings = read_settings(state=state)
    if not settings.database.exists():
        raise fail(f"There is no record at {settings.database} yet. Start with `nightshift up`, or name its --state.")
    try:
        with closing(connect(settings.database)) as db:
            yield db
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise  # a fault of ours
        raise fail(
            f"The record {settings.database} cannot be used ({error}). `nightshift doctor` says what is wrong with it."
        ) from None


def print_json(value: Any) -> None:
    """One line. A figure that is infinite, for which JSON has no word, is null."""
    typer.echo(orjson.dumps(value).decode())


def print_rows(rows: list[dict[str, Any]], *, json: bool, columns: list[str], empty: str) -> None:
    if json:
        print_json(rows)
        return
    if not rows:
        typer.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        # Text, not str: what a label or a message holds is not markup.
        cells = ("" if row[column] is None else str(row[column]) for column in columns)
        table.add_row(*(Text(cell.translate(CONTROLS)) for cell in cells))
    Console(width=10_000).print(table)  # a long line wraps; an id that is cut short is of no use
