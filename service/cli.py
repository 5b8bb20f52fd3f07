"""The `nightshift` command: every verb a thin call. Heavy imports live inside the verbs, so that --help is quick."""

import json as jsonlib
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from service.cli_night import policies_app, runs_app, schedule_app
from service.cli_raters import raters_app
from service.console import Json, State, fail, open_record, print_rows, read_settings

if TYPE_CHECKING:
    from data.settings import Settings


class Words(TyperGroup):
    """A command whose words are all UTF-8: what else a shell can pass cannot be kept, nor printed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError:
                raise fail(f"{word!a} is not UTF-8.") from None
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Words,
    help="Chats by day, learns by night.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
keys_app = typer.Typer(help="API keys: who may chat, rate and operate.", no_args_is_help=True)
votes_app = typer.Typer(help="The votes people cast.", no_args_is_help=True)
users_app = typer.Typer(help="What is kept of users.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(votes_app, name="votes")
app.add_typer(raters_app, name="raters")
app.add_typer(schedule_app, name="schedule")
app.add_typer(runs_app, name="runs")
app.add_typer(policies_app, name="policies")
app.add_typer(users_app, name="users")


def main() -> None:
    app()


@app.command()
def up(
    state: State = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a Hugging Face id.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    key: Annotated[bool, typer.Option("--key/--no-key", help="Make and print an API key.")] = True,
    json: Json = False,
) -> None:
    """Start everything: the engine, the API and the clock. Ctrl-C stops it all."""
    import asyncio
    import os

    # The children read the same settings, from the environment.
    for name, value in {"STATE": state, "MODEL": model, "SERVER__HOST": host, "SERVER__PORT": port}.items():
        if value is not None:
            os.environ[f"NIGHTSHIFT_{name}"] = str(value)
    settings = read_settings()

    from data.registry import RegistryError
    from service.supervisor import StartError
    from service.supervisor import up as run

    waiting = _Waiting()

    def ready(url: str, token: str | None) -> None:
        waiting.close()
        code = _sign_in_code(settings, token) if token else None
        link = f"{url}/sign-in#{code}" if code else None
        _say_ready(url, token, link, settings.chat.model_name, json=json)

    try:
        asyncio.run(run(settings, make_key=key, waiting=waiting, ready=ready))
    except (StartError, RegistryError, OSError) as error:
        waiting.close()
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        waiting.close()


class _Waiting:
    """Shows what the start waits for: a spinner on a terminal, a line for each change elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._status = self._console.status("starting") if self._console.is_terminal else None
        self._began = time.monotonic()
        self._last = ""
        if self._status:
            self._status.start()

    def __call__(self, what: str) -> None:
        seconds = f"{time.monotonic() - self._began:3.0f} s"
        if self._status:
            self._status.update(f"{seconds}  {what}")
        elif what != self._last:
            typer.echo(f"{seconds}  {what}", err=True)
        self._last = what

    def close(self) -> None:
        if self._status:
            self._status.stop()


def _sign_in_code(settings: "Settings", token: str) -> str | None:
    """What signs a browser in as this key, once: a link goes into histories, where a key must not be. None where the
    record cannot be written just now: the service goes on without."""
    from pysqlite3 import dbapi2 as sqlite3

    from data import keys, sessions
    from data.database import connect, transaction

    try:
        with closing(connect(settings.database)) as db:
            key = keys.authenticate(db, token)
            assert key is not None  # it was made a moment ago
            with transaction(db):
                return sessions.create_code(db, key.id)
    except sqlite3.OperationalError:
        return None


def _say_ready(url: str, token: str | None, link: str | None, model: str, *, json: bool) -> None:
    if json:
        typer.echo(jsonlib.dumps({"url": url, "key": token, "sign_in": link, "model": model}))
        return
    typer.echo(f"Nightshift is ready at {url}")
    if token is None:
        typer.echo("Make a key with: nightshift keys create --role user")
        return
    if link is None:
        typer.echo(f"Chat in your browser: {url}/sign-in takes the key (no link: the record cannot be written now)\n")
    else:
        typer.echo(f"Chat in your browser (the link works once, within the hour): {link}\n")
    request = jsonlib.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    typer.echo(f"API key (shown this once): {token}\n")
    typer.echo(
        f"curl {url}/v1/chat/completions -H 'Authorization: Bearer {token}' -H 'Content-Type: application/json'"
        f" -d '{request}'\n"
    )
    typer.echo("Ctrl-C stops everything.")


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="Say this one thing, print the answer and end.")] = None,
    url: Annotated[
        str | None, typer.Option(envvar="NIGHTSHIFT_URL", help="Where the API is. [default: this machine's]")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="NIGHTSHIFT_API_KEY", help="API key.")] = None,
    feedback: Annotated[str, typer.Option(help="off, auto or always: whether to be shown two answers.")] = "auto",
    json: Json = False,
) -> None:
    """Talk in the terminal, vote with one key."""
    import asyncio

    from service.terminal import ChatError, converse

    settings = read_settings()
    if message is not None and not message.strip():
        raise fail("There is nothing to say in an empty message.")
    if not key:
        raise fail("An API key is needed: set NIGHTSHIFT_API_KEY, or use --key. `nightshift keys create` makes one.")
    address = url or settings.server.url
    if not address.startswith(("http://", "https://")):
        raise fail(f"'{address}' is no address of an API: it begins with http:// or https://.")
    try:
        asyncio.run(
            converse(address, key, model=settings.chat.model_name, feedback=feedback, message=message, json=json)
        )
    except ChatError as error:
        raise fail(str(error)) from None
    except (KeyboardInterrupt, EOFError):
        raise typer.Exit(0) from None


@app.command()
def train(
    state: State = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a Hugging Face id.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, help="Of everything random in the run. [default: training.seed]"),
    ] = None,
    json: Json = False,
) -> None:
    """Learn from the votes now: a better policy, saved as a candidate. Ctrl-C cancels the run."""
    import os
    import signal
    import subprocess

    with open_record(state):
        pass  # says how to start where there is no record
    given = {"NIGHTSHIFT_STATE": state, "NIGHTSHIFT_MODEL": model}
    command = [sys.executable, "-P", "-m", "trainer", "once", "--request"]
    command += ["--seed", str(seed)] if seed is not None else []
    command += ["--json"] if json else []
    # Ctrl-C reaches the trainer too; it cancels the run once, however often it is asked to, and we wait for that.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    trainer = subprocess.Popen(command, env=os.environ | {name: str(v) for name, v in given.items() if v is not None})
    while True:
        try:
            status = trainer.wait()
            raise typer.Exit(status if status >= 0 else 128 - status)
        except KeyboardInterrupt:
            trainer.send_signal(signal.SIGINT)


@app.command()
def doctor(
    state: State = None, model: Annotated[str | None, typer.Option(help="Base model.")] = None, json: Json = False
) -> None:
    """Say what is wrong and how to mend it."""
    from dataclasses import asdict

    from service.doctor import examine

    checks = examine(read_settings(state=state, model=model))
    if json:
        typer.echo(jsonlib.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            typer.secho(f"{'ok  ' if check.ok else 'BAD '} {check.name}: {check.found}", fg=None if check.ok else "red")
            if not check.ok:
                typer.echo(f"     {check.mend}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def stats(state: State = None, json: Json = False) -> None:
    """Counts of answers, comparisons and votes."""
    from data.stats import summary

    with open_record(state) as db:
        figures = summary(db)
    if json:
        typer.echo(jsonlib.dumps(figures))
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            parts = ", ".join(f"{part} {count}" for part, count in value.items())
            value = f"{sum(value.values())} ({parts})" if value else 0
        typer.echo(f"{name}: {'none yet' if value is None else value}")


@keys_app.command("create")
def keys_create(
    role: Annotated[str, typer.Option(help="user, rater or operator.")],
    feedback: Annotated[str, typer.Option(help="off, auto or always: what requests without `feedback` get.")] = "off",
    label: Annotated[str, typer.Option(help="Whose it is, for your own eyes.")] = "",
    state: State = None,
    json: Json = False,
) -> None:
    """Make a key. It is shown this once: only a hash of it is kept."""
    from data import keys
    from data.database import transaction
    from data.types import Feedback, Role

    try:
        as_role, as_feedback = Role(role), Feedback(feedback)
    except ValueError as error:
        raise fail(f"{error}: --role is user, rater or operator; --feedback is off, auto or always.") from None
    with open_record(state) as db, transaction(db):
        key, token = keys.create(db, role=as_role, feedback=as_feedback, label=label, actor="cli")
    if json:
        typer.echo(jsonlib.dumps({"id": key.id, "role": key.role, "feedback": key.feedback, "key": token}))
    else:
        typer.echo(f"{key.id} ({key.role}, feedback {key.feedback})\n{token}")


@keys_app.command("list")
def keys_list(state: State = None, json: Json = False) -> None:
    """All keys, without their secrets."""
    from dataclasses import asdict

    from data import keys

    with open_record(state) as db:
        rows = [asdict(key) for key in keys.list_all(db)]
    columns = ["id", "role", "feedback", "label", "created_at", "revoked_at"]
    print_rows(rows, json=json, columns=columns, empty="No keys yet: nightshift keys create --role user")


@keys_app.command("revoke")
def keys_revoke(id: str, state: State = None, json: Json = False) -> None:
    """Stop a key at once and for good."""
    from data import keys
    from data.database import transaction

    with open_record(state) as db:
        try:
            with transaction(db):
                key = keys.revoke(db, id, actor="cli")
        except keys.UnknownKey:
            raise fail(f"There is no key '{id}'. `nightshift keys list` shows them all.") from None
    typer.echo(jsonlib.dumps({"id": key.id, "revoked_at": key.revoked_at}) if json else f"{key.id} is revoked")


@votes_app.command("list")
def votes_list(
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the latest first.")] = 50,
    state: State = None,
    json: Json = False,
) -> None:
    """The latest votes."""
    from data import comparisons

    with open_record(state) as db:
        rows = comparisons.list_votes(db, limit=limit)
    columns = ["id", "comparison_id", "choice", "policy_a", "policy_b", "decided_ms", "updated_at"]
    print_rows(rows, json=json, columns=columns, empty="No votes yet.")


@votes_app.command("export")
def votes_export(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file, instead of standard output.")] = None,
    state: State = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a line for each vote.")] = False,
) -> None:
    """Every vote as JSON lines in TRL's conversational preference format."""
    from data import comparisons

    with open_record(state) as db:
        lines = [jsonlib.dumps(record, ensure_ascii=False) for record in comparisons.export_preferences(db)]
    text = "[" + ",\n".join(lines) + "]\n" if json else "".join(line + "\n" for line in lines)
    if output is None:
        typer.echo(text.encode(), nl=False)  # JSON is UTF-8, whatever the locale
        return
    try:
        if output.exists() and not output.is_file():  # a pipe or a device: in its place a file would stand
            output.write_text(text, "utf-8")
        else:  # what a link leads to is replaced, not the link
            _write_whole(output.resolve(), text)
    except (OSError, RuntimeError) as error:  # of links in a circle
        raise fail(f"{output} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    typer.echo(f"{len(lines)} votes written to {output}", err=True)


def _write_whole(path: Path, text: str) -> None:
    """All of it or nothing, and for its owner alone: it holds what people say."""
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        unfinished.write_text(text, "utf-8")
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


@votes_app.command("import-trusted")
def votes_import_trusted(file: Path, state: State = None, json: Json = False) -> None:
    """Take your own preferences from a JSONL file in TRL's format."""
    from data import trusted
    from data.database import transaction

    try:
        lines = file.read_text("utf-8-sig").split("\n")  # splitlines cuts at what JSON allows inside a text
    except (OSError, UnicodeDecodeError) as error:
        raise fail(f"{file} cannot be read: {error}") from None
    with open_record(state) as db:
        try:
            with transaction(db):
                new, known, left_out = trusted.import_lines(db, lines, actor="cli")
        except trusted.BadPair as error:
            raise fail(f"{error} Nothing was imported.") from None
    if json:
        typer.echo(jsonlib.dumps({"new": new, "known": known, "left_out": left_out}))
        return
    rest = f", {left_out} left out (votes for neither answer)" if left_out else ""
    typer.echo(f"{new} new pairs, {known} known already{rest}")


@users_app.command("forget")
def users_forget(id: str, state: State = None, json: Json = False) -> None:
    """Erase what a user (a key's id, or key/end user) wrote and was answered."""
    from data import completions
    from data.database import empty_wal, transaction

    with open_record(state) as db:
        with transaction(db):
            emptied = completions.forget_user(db, id, actor="cli")
        if not empty_wal(db):
            typer.echo("A long reader (an export?) keeps it in the record's WAL: forget again after it.", err=True)
    if not emptied:
        raise fail(f"Nothing is kept of a user '{id}'.")
    typer.echo(jsonlib.dumps({"id": id, "emptied": emptied}) if json else f"{emptied} answers and comments emptied")


if __name__ == "__main__":
    main()
