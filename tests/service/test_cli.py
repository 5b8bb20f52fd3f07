"""The `nightshift` command: each verb, with and without --json, and its exit code."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import click
import pytest
import typer
from click.testing import Result
from rich.console import Console
from sqlite_utils import Database
from typer.testing import CliRunner

from data import comparisons, database, keys
from data.database import connect, transaction
from data.settings import Settings
from data.types import Choice, Feedback, Role
from service import doctor, terminal
from service.cli import app
from service.doctor import Check
from tests.conftest import AddPair, FakeEngine, House, MakeKey, Refusal, say

Command = Callable[..., Result]


@pytest.fixture
def nightshift(settings: Settings) -> Command:
    """Run the command on the test's own state folder."""

    def run(*arguments: str, state: Path | None = None, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [*arguments, "--state", str(state or settings.state)], input=input)

    return run


@pytest.fixture
def vote(db: Database, add_pair: AddPair, make_key: MakeKey) -> str:
    """The key of a user who cast a vote."""
    key_id = make_key()[0].id
    comparison = add_pair(key_id, answers=("Grüße", "Guten Tag"))
    with transaction(db):
        comparisons.vote(db, comparison, key_id=key_id, role=Role.USER, choice=Choice.B, comment=None, window_s=600.0)
    return key_id


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not (subcommands := getattr(command, "commands", None)):
        yield path, command
        return
    for name, subcommand in subcommands.items():
        yield from leaves(subcommand, (*path, name))


VERBS = dict(leaves(typer.main.get_command(app)))


# All verbs


@pytest.mark.parametrize("path", [(), *VERBS], ids=" ".join)
def test_every_verb_has_help(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_every_verb_says_what_it_does_and_takes_json() -> None:
    for path, command in VERBS.items():
        assert (command.help or "").strip().endswith("."), path
        assert "--json" in [option for parameter in command.params for option in parameter.opts], path


@pytest.mark.parametrize("group", [(), ("keys",), ("votes",), ("policies",), ("users",)], ids=" ".join)
def test_a_group_without_a_verb_shows_its_help(group: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*group])
    assert result.exit_code == 2
    assert "Usage: " in result.output


@pytest.mark.parametrize("arguments", [["nothing"], ["keys", "create"], ["keys", "revoke"], ["stats", "--what"]])
def test_a_wrong_command_line_is_exit_code_2(nightshift: Command, arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_help_needs_nothing_heavy() -> None:
    heavy = (
        "torch transformers vllm fastapi starlette uvicorn aiohttp pydantic sqlite_utils pysqlite3 prometheus_client"
    )
    look = f"import service.cli, sys; print([name for name in {heavy.split()} if name in sys.modules])"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    seen = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, env=environment)
    assert seen.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats"],
        ["keys", "create", "--role", "user"],
        ["keys", "list"],
        ["keys", "revoke", "key_x"],
        ["votes", "list"],
        ["votes", "export"],
        ["policies", "list"],
        ["users", "forget", "key_x"],
    ],
    ids=" ".join,
)
def test_without_a_record_a_verb_says_how_to_start_and_makes_none(
    nightshift: Command, tmp_path: Path, arguments: list[str]
) -> None:
    result = nightshift(*arguments, state=tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nightshift up" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_bad_setting_is_named(nightshift: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_SERVER__PORT", "70000")
    result = nightshift("stats")
    assert result.exit_code == 1
    assert "server.port" in result.stderr
    assert "Traceback" not in result.output


# keys


def test_a_key_is_made_shown_and_works(nightshift: Command, db: Database) -> None:
    result = nightshift("keys", "create", "--role", "rater", "--feedback", "auto", "--label", "Ada")
    assert result.exit_code == 0
    described, token = result.stdout.splitlines()
    key = keys.authenticate(db, token)
    assert key is not None
    assert (key.role, key.feedback, key.label) == (Role.RATER, Feedback.AUTO, "Ada")
    assert described == f"{key.id} (rater, feedback auto)"


def test_a_key_is_made_as_json(nightshift: Command, db: Database) -> None:
    made = json.loads(nightshift("keys", "create", "--role", "user", "--json").stdout)
    assert made.keys() == {"id", "role", "feedback", "key"}
    assert (made["role"], made["feedback"]) == ("user", "off")
    key = keys.authenticate(db, made["key"])
    assert key is not None
    assert key.id == made["id"]


@pytest.mark.parametrize(("option", "value"), [("--role", "king"), ("--feedback", "never")])
def test_a_key_of_no_such_role_or_default_is_refused(nightshift: Command, option: str, value: str) -> None:
    arguments = {"--role": "user"} | {option: value}
    result = nightshift("keys", "create", *(part for pair in arguments.items() for part in pair))
    assert result.exit_code == 1
    assert value in result.stderr
    assert "user, rater or operator" in result.stderr


def test_keys_are_listed_whole_however_narrow_the_terminal(
    nightshift: Command, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    key, token = make_key(Role.RATER)
    listed = nightshift("keys", "list")
    assert listed.exit_code == 0
    (line,) = [line for line in listed.stdout.splitlines() if key.id in line]
    assert "rater" in line
    assert key.created_at in line
    assert token not in listed.stdout


def test_a_label_is_neither_markup_nor_a_command_to_the_terminal(nightshift: Command, db: Database) -> None:
    labels = ["team [/ops]", "say [red]hello", "all\x1b[2J gone\x07"]
    for label in labels:
        assert nightshift("keys", "create", "--role", "user", "--label", label).exit_code == 0
    listed = nightshift("keys", "list")
    assert listed.exit_code == 0
    for label in ("team [/ops]", "say [red]hello", "all[2J gone"):
        assert label in listed.stdout
    assert not {"\x1b", "\x07"} & set(listed.stdout)


def test_keys_are_listed_as_json(nightshift: Command, make_key: MakeKey) -> None:
    key, token = make_key(Role.RATER)
    listed = nightshift("keys", "list", "--json")
    (row,) = [row for row in json.loads(listed.stdout) if row["id"] == key.id]
    assert row == {
        "id": key.id,
        "role": "rater",
        "feedback": "off",
        "label": "",
        "created_at": key.created_at,
        "revoked_at": None,
    }
    assert token.split("-", 2)[2] not in listed.stdout


def test_a_record_without_keys_says_how_to_make_one(nightshift: Command, tmp_path: Path) -> None:
    connect(tmp_path / "empty" / "nightshift.db").close()
    result = nightshift("keys", "list", state=tmp_path / "empty")
    assert "nightshift keys create --role user" in result.stdout
    assert json.loads(nightshift("keys", "list", "--json", state=tmp_path / "empty").stdout) == []


def test_a_key_is_revoked(nightshift: Command, db: Database, make_key: MakeKey) -> None:
    (one, token), (other, _) = make_key(), make_key()
    assert nightshift("keys", "revoke", one.id).stdout == f"{one.id} is revoked\n"
    assert keys.authenticate(db, token) is None
    revoked = json.loads(nightshift("keys", "revoke", other.id, "--json").stdout)
    assert revoked["id"] == other.id
    assert revoked["revoked_at"] is not None


def test_revoking_an_unknown_key_is_exit_code_1(nightshift: Command) -> None:
    result = nightshift("keys", "revoke", "key_nobody")
    assert result.exit_code == 1
    assert "no key 'key_nobody'" in result.stderr


# votes, policies, stats, users


def test_votes_are_listed(nightshift: Command, vote: str) -> None:
    (row,) = json.loads(nightshift("votes", "list", "--json").stdout)
    assert (row["choice"], row["voter"], row["kind"]) == ("b", vote, "same_policy")
    listed = nightshift("votes", "list")
    assert listed.exit_code == 0
    assert row["id"] in listed.stdout


def test_votes_are_listed_up_to_a_limit(nightshift: Command, vote: str) -> None:
    assert len(json.loads(nightshift("votes", "list", "--limit", "1", "--json").stdout)) == 1
    assert nightshift("votes", "list", "--limit", "0").exit_code == 2


def test_without_votes_the_lists_are_empty(nightshift: Command) -> None:
    assert nightshift("votes", "list").stdout == "No votes yet.\n"
    assert json.loads(nightshift("votes", "list", "--json").stdout) == []
    assert nightshift("votes", "export").stdout == ""
    assert json.loads(nightshift("votes", "export", "--json").stdout) == []


def test_votes_are_exported_as_lines_or_as_one_array(nightshift: Command, vote: str, db: Database) -> None:
    records = list(comparisons.export_preferences(db))
    lines = nightshift("votes", "export").stdout
    assert [json.loads(line) for line in lines.splitlines()] == records
    assert "Grüße" in lines
    assert json.loads(nightshift("votes", "export", "--json").stdout) == records


def test_votes_are_exported_to_a_file_whole_or_not_at_all(
    nightshift: Command, vote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "votes.jsonl"
    output.write_text("the old export")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert nightshift("votes", "export", "-o", str(output)).exit_code == 1
    assert output.read_text() == "the old export"
    result = nightshift("votes", "export", "--output", str(output))
    assert result.exit_code == 0
    assert (result.stdout, result.stderr) == ("", f"1 votes written to {output}\n")
    assert json.loads(output.read_text())["choice"] == "b"
    assert sorted(path.name for path in tmp_path.glob("votes*")) == ["votes.jsonl"]
    assert output.stat().st_mode & 0o777 == 0o600


def test_an_export_goes_through_a_link_and_into_a_pipe(
    nightshift: Command, vote: str, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "latest").symlink_to(tmp_path / "votes-of-today")
    assert nightshift("votes", "export", "-o", str(tmp_path / "latest")).exit_code == 0
    assert (tmp_path / "latest").is_symlink()
    assert json.loads((tmp_path / "votes-of-today").read_text())["choice"] == "b"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert nightshift("votes", "export", "-o", str(pipe)).exit_code == 0
        assert json.loads(os.read(reader, 100_000))["choice"] == "b"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    result = nightshift("votes", "export", "-o", str(tmp_path / "circle"))
    assert (result.exit_code, "cannot be written" in result.stderr) == (1, True)
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "votes",
        "export",
        "-o",
        "/dev/stdout",
        "--state",
        str(settings.state),
    ]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed)["choice"] == "b"


@pytest.mark.parametrize(
    "arguments",
    [
        ["keys", "create", "--role", "user", "--label", "a\udcff"],
        ["keys", "revoke", "a\udcff"],
        ["runs", "show", "a\udcff"],
        ["raters", "confirm", "a\udcff"],
        ["policies", "promote", "policy-0000", "--reason=a\udcff"],
        ["chat", "a\udcff"],
    ],
    ids=" ".join,
)
def test_what_is_not_utf_8_is_refused(nightshift: Command, vote: str, arguments: list[str]) -> None:
    result = nightshift(*arguments)
    assert (result.exit_code, "a\\udcff' is not UTF-8" in result.stderr) == (1, True)


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_no_run_can_take_is_a_wrong_command_line(nightshift: Command, vote: str, seed: str) -> None:
    result = nightshift("train", "--seed", seed)
    assert (result.exit_code, "--seed" in result.stderr) == (2, True)


def test_an_export_is_utf_8_whatever_the_locale(vote: str, settings: Settings, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "votes", "export", "--state", str(settings.state)]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": ":".join(sys.path)}
    printed = subprocess.run(command, capture_output=True, check=True, env=plain).stdout
    assert "Grüße" in printed.decode()
    subprocess.run([*command, "-o", str(tmp_path / "votes.jsonl")], capture_output=True, check=True, env=plain)
    assert (tmp_path / "votes.jsonl").read_bytes() == printed


def test_an_export_that_fails_in_any_way_leaves_nothing(
    nightshift: Command, vote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Path, "write_text", out_of_memory)
    assert nightshift("votes", "export", "-o", str(tmp_path / "votes.jsonl")).exit_code != 0
    assert list(tmp_path.glob("votes*")) == []


def test_an_export_that_cannot_be_written_says_why(nightshift: Command, vote: str, tmp_path: Path) -> None:
    result = nightshift("votes", "export", "--output", str(tmp_path))  # a folder
    assert result.exit_code == 1
    assert f"{tmp_path} cannot be written: Is a directory" in result.stderr
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.part")) == []
    result = nightshift("votes", "export", "--output", ".")
    assert (result.exit_code, "Is a directory" in result.stderr) == (1, True)


def test_of_our_own_export_the_ties_are_not_trusted(nightshift: Command, vote: str, tmp_path: Path) -> None:
    lines = [json.loads(nightshift("votes", "export").stdout)]
    lines.append(lines[0] | {"choice": "tie"})
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    said = nightshift("votes", "import-trusted", str(file)).stdout
    assert said == "1 new pairs, 0 known already, 1 left out (votes for neither answer)\n"
    again = json.loads(nightshift("votes", "import-trusted", str(file), "--json").stdout)
    assert again == {"new": 0, "known": 1, "left_out": 1}


def test_policies_are_listed(nightshift: Command) -> None:
    (row,) = json.loads(nightshift("policies", "list", "--json").stdout)
    assert (row["name"], row["status"], row["parent"]) == ("policy-0000", "promoted", None)
    assert "policy-0000" in nightshift("policies", "list").stdout


def test_stats_are_shown(nightshift: Command, vote: str) -> None:
    figures = json.loads(nightshift("stats", "--json").stdout)
    assert figures["votes"] == {"b": 1}
    assert figures["first_share"] == 0.0
    said = nightshift("stats").stdout
    assert "votes: 1 (b 1)\n" in said
    assert "comparisons: 1 (same_policy 1)\n" in said


def test_stats_of_an_empty_record_are_shown(nightshift: Command) -> None:
    said = nightshift("stats").stdout
    assert "votes: 0\n" in said
    assert "first_share: none yet\n" in said


@pytest.mark.parametrize("verb", [("stats",), ("keys", "list"), ("runs", "list"), ("votes", "export")])
def test_a_record_that_is_broken_is_said_to_be_so(nightshift: Command, tmp_path: Path, verb: tuple[str, ...]) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "nightshift.db").write_bytes(b"no database" * 1000)
    result = nightshift(*verb, state=tmp_path / "broken")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nightshift.db cannot be used (file is not a database)" in result.stderr
    assert "nightshift doctor" in result.stderr


def test_a_user_is_forgotten(nightshift: Command, vote: str, db: Database, settings: Settings) -> None:
    assert nightshift("users", "forget", vote).stdout == "2 answers and comments emptied\n"
    assert not any("Grüße".encode() in path.read_bytes() for path in settings.state.glob("nightshift.db*"))
    assert db.execute("SELECT DISTINCT answer FROM completions").fetchall() == [("",)]


def test_a_user_is_forgotten_as_json(nightshift: Command, vote: str) -> None:
    assert json.loads(nightshift("users", "forget", vote, "--json").stdout) == {"id": vote, "emptied": 2}


def test_forgetting_an_unknown_user_is_exit_code_1(nightshift: Command) -> None:
    result = nightshift("users", "forget", "key_nobody")
    assert result.exit_code == 1
    assert "Nothing is kept of a user 'key_nobody'" in result.stderr


# chat


async def chat(house: House, *arguments: str, input: str | None = None, key: str | None = None) -> Result:
    token = key or house.tokens[Role.USER]
    line = ["chat", *arguments, "--url", house.url, "--key", token]
    return await asyncio.to_thread(CliRunner().invoke, app, line, input=input)


async def test_one_message_is_answered_and_that_is_all(house: House) -> None:
    result = await chat(house, "Hello")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hi there.\n"


async def test_into_a_pipe_an_answer_goes_as_it_was_said(house: House, engine: FakeEngine) -> None:
    long = "word " * 100 + "end"
    engine.answer = lambda body: say(long + str(body.get("seed", "")))
    assert (await chat(house, "Hello", "--feedback", "off")).stdout == long + "\n"
    one, two = (await chat(house, "Hello", "--feedback", "always")).stdout.split("\n\n")
    assert (one[:8], two[:8]) == ("1: word ", "2: word ")


@pytest.mark.parametrize("message", ["", "  "])
async def test_an_empty_message_is_refused(house: House, message: str) -> None:
    result = await chat(house, message)
    assert result.exit_code == 1
    assert "nothing to say" in result.stderr


async def test_one_message_is_answered_as_json(house: House, engine: FakeEngine) -> None:
    result = await chat(house, "Hello", "--json", "--feedback", "off")
    assert json.loads(result.stdout) == {
        "answers": ["Hi there."],
        "policy": "policy-0000",
        "comparison": None,
        "vote": None,
    }
    assert engine.chats[0].body["messages"] == [{"role": "user", "content": "Hello"}]


async def test_a_conversation_goes_on_to_the_end_of_input(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(f"answer {len(body['messages'])}")
    result = await chat(house, "--json", input="one\n\ntwo\n")
    assert result.exit_code == 0
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["answers"] for turn in turns] == [["answer 1"], ["answer 3"]]
    said = [message["content"] for message in engine.chats[1].body["messages"]]
    assert said == ["one", "answer 1", "two"]


async def test_two_answers_are_both_in_the_json(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say(str(body["seed"]))
    result = await chat(house, "Hello", "--json", "--feedback", "always")
    turn = json.loads(result.stdout)
    assert len(set(turn["answers"])) == 2
    assert turn["policy"] is None
    assert turn["comparison"]["id"].startswith("cmp_")


async def test_an_error_of_the_api_is_said_in_its_words(house: House) -> None:
    result = await chat(house, "Hello", key="ns-x-y")
    assert result.exit_code == 1
    assert "unknown or was revoked" in result.stderr
    result = await chat(house, "Hello", "--feedback", "sometimes")
    assert result.exit_code == 1
    assert "'feedback'" in result.stderr


async def test_a_stream_that_breaks_off_is_exit_code_1(house: House, engine: FakeEngine) -> None:
    engine.answer = lambda body: say("One", " two", error_after=1)
    result = await chat(house, "Hello")
    assert result.exit_code == 1
    assert "broke off" in result.stderr


def test_an_api_that_cannot_be_reached_is_said_to_be_so(settings: Settings) -> None:
    result = CliRunner().invoke(app, ["chat", "Hello", "--url", "http://127.0.0.1:1", "--key", "ns-x-y"])
    assert result.exit_code == 1
    assert "http://127.0.0.1:1 cannot be reached" in result.stderr
    assert "nightshift up" in result.stderr


def test_an_address_without_http_is_refused(settings: Settings) -> None:
    result = CliRunner().invoke(app, ["chat", "Hello", "--url", "localhost:8000", "--key", "ns-x-y"])
    assert result.exit_code == 1
    assert "begins with http://" in result.stderr


def test_chatting_without_a_key_says_how_to_get_one(settings: Settings) -> None:
    result = CliRunner().invoke(app, ["chat", "Hello"])
    assert result.exit_code == 1
    assert "NIGHTSHIFT_API_KEY" in result.stderr
    assert "nightshift keys create" in result.stderr


async def test_url_and_key_come_from_the_environment(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_URL", house.url)
    monkeypatch.setenv("NIGHTSHIFT_API_KEY", house.tokens[Role.USER])
    result = await asyncio.to_thread(CliRunner().invoke, app, ["chat", "Hello"])
    assert result.exit_code == 0
    assert "Hi there." in result.stdout


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], str], None]:
    """Sit at a terminal: type these lines, and press these keys when asked for a vote."""

    def type_(lines: list[str], pressed: str) -> None:
        waiting, keys_pressed = iter(lines), iter(pressed)

        def next_line(*_: Any, **__: Any) -> str:
            line = next(waiting, None)
            if line is None:
                raise EOFError
            return line

        terminal_in = type("TerminalIn", (), {"isatty": lambda self: True})
        monkeypatch.setattr(terminal.sys, "stdin", terminal_in())
        monkeypatch.setattr(terminal.click, "getchar", lambda: next(keys_pressed))
        monkeypatch.setattr(Console, "input", next_line)

    return type_


async def converse(house: House, *, feedback: str = "always") -> None:
    token = house.tokens[Role.USER]
    await terminal.converse(house.url, token, model="nightshift", feedback=feedback, message=None, json=False)


@pytest.mark.parametrize(("pressed", "choice"), [("1", "a"), ("2", "b"), ("t", "tie"), ("B", "both_bad"), ("x?2", "b")])
async def test_one_key_votes(
    house: House, engine: FakeEngine, typed: Callable[..., None], pressed: str, choice: str
) -> None:
    engine.answer = lambda body: say(f"seed {body.get('seed')}")
    typed(["Hello"], pressed)
    await converse(house)
    (vote,) = await house.rows("votes")
    assert vote["choice"] == choice


async def test_an_answer_does_not_command_the_terminal(
    house: House,
    engine: FakeEngine,
    typed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich this is a terminal then
    engine.answer = lambda body: say("Hi\x1b]0;owned\x07\x9b2J there")
    typed(["Hello"], "")
    await converse(house, feedback="off")
    assert "Hi]0;owned2J there" in capsys.readouterr().out


async def test_a_pair_can_be_skipped(house: House, engine: FakeEngine, typed: Callable[..., None]) -> None:
    engine.answer = lambda body: say(f"seed {body.get('seed')}")
    typed(["Hello"], "s")
    await converse(house)
    assert await house.rows("votes") == []


@pytest.mark.parametrize(("pressed", "side"), [("1", "a"), ("2", "b"), ("t", "a"), ("s", "a")])
async def test_the_talk_goes_on_with_the_answer_that_won(
    house: House, engine: FakeEngine, typed: Callable[..., None], pressed: str, side: str
) -> None:
    engine.answer = lambda body: say(f"seed {body.get('seed')}")
    typed(["Hello", "And now?"], pressed + "s")
    await converse(house)
    first = (await house.rows("comparisons"))[0]
    answers = {row["id"]: row["answer"] for row in await house.rows("completions")}
    said = [message["content"] for message in engine.chats[-1].body["messages"]]
    assert said == ["Hello", answers[first[side]], "And now?"]


async def test_nothing_is_asked_where_both_answers_are_the_same(
    house: House, engine: FakeEngine, typed: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    typed(["Hello"], "")
    await converse(house)
    assert "Which is better?" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "words"),
    [(Refusal(503, "no room"), "the model"), (say("One", " two", error_after=1), "broke off")],
    ids=["busy", "breaks"],
)
async def test_at_a_terminal_the_talk_goes_on_after_a_message_that_was_not_answered(
    house: House,
    engine: FakeEngine,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    fault: Any,
    words: str,
) -> None:
    replies = iter([say("Hi."), fault, say("Well.")])
    engine.answer = lambda body: next(replies)
    typed(["Hello", "How?", "And how?"], "")
    await converse(house, feedback="off")
    assert words in capsys.readouterr().out
    said = [message["content"] for message in engine.chats[-1].body["messages"]]
    assert said == ["Hello", "Hi.", "And how?"]


async def test_a_vote_that_cannot_be_taken_can_be_pressed_again(
    house: House,
    engine: FakeEngine,
    db: Database,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = []
    post = aiohttp.ClientSession.post

    def fails_twice(http: aiohttp.ClientSession, url: str, **more: Any) -> Any:
        if url.endswith("/vote"):
            sent.append(more["json"]["choice"])
            if len(sent) == 1:
                raise aiohttp.ServerDisconnectedError
            if len(sent) == 2:
                url = url.replace("cmp_", "cmp_x")
        return post(http, url, **more)

    monkeypatch.setattr(aiohttp.ClientSession, "post", fails_twice)
    engine.answer = lambda body: say(f"seed {body.get('seed')}")
    typed(["Hello", "And now?"], "212s")
    await converse(house)
    assert sent == ["b", "a", "b"]
    shown = capsys.readouterr().out
    assert shown.count("Which is better?") == 4
    assert "cannot be reached" in shown
    assert "There is no comparison" in shown
    assert [row["choice"] for row in await house.rows("votes")] == ["b"]


# doctor, up


async def test_doctor_exits_with_1_where_something_is_wrong(
    nightshift: Command, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [Check("Disk", True, "9 GiB"), Check("Model", False, "nothing there", "Name a folder.")]
    monkeypatch.setattr(doctor, "examine", lambda settings: checks)
    result = nightshift("doctor")
    assert result.exit_code == 1
    assert "ok   Disk: 9 GiB" in result.stdout
    assert "BAD  Model: nothing there\n     Name a folder." in result.stdout
    result = nightshift("doctor", "--json")
    assert result.exit_code == 1
    assert [(check["name"], check["ok"], check["mend"]) for check in json.loads(result.stdout)] == [
        ("Disk", True, ""),
        ("Model", False, "Name a folder."),
    ]
    checks.pop()
    assert nightshift("doctor").exit_code == 0


def test_up_says_why_it_cannot_start(nightshift: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `up` hands its options on through the environment: keep that to this test
    for name in ("STATE", "MODEL", "SERVER__HOST", "SERVER__PORT"):
        monkeypatch.setenv(f"NIGHTSHIFT_{name}", "0.0.0.0" if name == "SERVER__HOST" else "1234")
    (tmp_path / "nothing").mkdir()
    result = nightshift("up", "--model", str(tmp_path / "nothing"), "--host", "127.0.0.1", "--port", "18765")
    assert result.exit_code == 1
    assert "is not a model folder" in result.stderr


def test_up_goes_on_without_a_link_where_the_record_is_held(
    nightshift: Command, db: Database, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, token = make_key()

    async def up(settings: Settings, *, ready: Callable[[str, str], None], **_: object) -> None:
        monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 100)
        with transaction(db):
            ready("http://house", token)

    monkeypatch.setattr("service.supervisor.up", up)
    monkeypatch.setenv("NIGHTSHIFT_STATE", "kept by monkeypatch")
    result = nightshift("up")
    assert result.exit_code == 0
    assert "http://house/sign-in takes the key" in result.stdout
    assert token in result.stdout
    assert json.loads(nightshift("up", "--json").stdout)["sign_in"] is None
