"""`nightshift chat`: a conversation in the terminal; where two answers come side by side, one key votes."""

import json as jsonlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import aiohttp
import click
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from service.console import CONTROLS

VOTE_KEYS = {"1": "a", "2": "b", "t": "tie", "b": "both_bad"}
QUESTION = "Which is better? [1] left  [2] right  [t] tie  [b] both bad  [s] skip"
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5)


class ChatError(RuntimeError):
    """Why a message was not answered, or a vote not taken."""


class Conversation:
    """The talk so far, and the API it is held with."""

    def __init__(self, http: aiohttp.ClientSession, url: str, *, model: str, feedback: str) -> None:
        self._http = http
        self._url = url
        self._model = model
        self._feedback = feedback
        self.messages: list[dict[str, str]] = []

    async def ask(self, text: str) -> AsyncIterator[dict[str, Any]]:
        """Say `text`; the answer's chunks as they come. Raises ChatError."""
        self.messages.append({"role": "user", "content": text})
        body = {"model": self._model, "messages": self.messages, "stream": True, "feedback": self._feedback}
        async with self._post("/v1/chat/completions", body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = jsonlib.loads(line[6:])
                    if "error" in chunk:
                        raise ChatError(chunk["error"]["message"])
                    yield chunk

    async def vote(self, comparison: str, choice: str) -> dict[str, Any]:
        """Raises ChatError."""
        async with self._post(f"/v1/comparisons/{comparison}/vote", {"choice": choice}) as response:
            result: dict[str, Any] = await response.json()
            return result

    @asynccontextmanager
    async def _post(self, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response of status 200, to be read. Raises ChatError, also for what goes wrong while it is read."""
        try:
            async with self._http.post(f"{self._url}{path}", json=body) as response:
                if response.status != 200:
                    raise ChatError(_message(await response.text()))
                yield response
        except aiohttp.ClientError as error:
            raise ChatError(f"{self._url} cannot be reached ({error}). Is `nightshift up` running there?") from None


def _message(body: str) -> str:
    try:
        return str(jsonlib.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300]


async def converse(url: str, key: str, *, model: str, feedback: str, message: str | None, json: bool) -> None:
    """One message, or a conversation up to the end of input. With `json`, one object a turn on standard output.

    At a terminal a conversation goes on after an error, as if its message had not been said. Else raises ChatError."""
    console = Console(stderr=json)
    headers = {"Authorization": f"Bearer {key}"}
    # While somebody thinks, the service closes the connection, and nobody here would notice: each request has its own.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=TIMEOUT) as http:
        talk = Conversation(http, url.rstrip("/"), model=model, feedback=feedback)
        while True:
            text = message if message is not None else _read_line(console)
            if text is None:
                return
            if text.strip():
                so_far = len(talk.messages)
                try:
                    await _turn(talk, text, console, json=json)
                except ChatError as error:
                    if message is not None or not sys.stdin.isatty():
                        raise
                    del talk.messages[so_far:]
                    _say(error, console)
            if message is not None:
                return


def _read_line(console: Console) -> str | None:
    try:
        return console.input("[bold]you>[/] ") if sys.stdin.isatty() else input()
    except EOFError:
        return None


async def _turn(talk: Conversation, text: str, console: Console, *, json: bool) -> None:
    answers = ["", ""]
    comparison = fingerprint = None
    # Into a file or a pipe goes what was said, as it was said: without frames, and not broken at 80 columns.
    plain = not console.is_terminal
    with nullcontext() if plain else Live(console=console, auto_refresh=False, transient=json) as live:
        async for chunk in talk.ask(text):
            fingerprint = chunk.get("system_fingerprint") or fingerprint
            comparison = chunk.get("comparison") or comparison
            for choice in chunk["choices"]:
                answers[choice["index"]] += choice["delta"].get("content") or ""
            if live is not None:
                live.update(_picture(answers), refresh=True)
        if comparison is None and answers[1]:
            answers[1] = ""  # the two came out the same, or the second failed: a plain answer
            if live is not None:
                live.update(_picture(answers), refresh=True)
    shown = answers if comparison else answers[:1]
    if plain and not json:
        both = "\n\n".join(f"{side}: {answer}" for side, answer in enumerate(shown, 1))
        print(both if comparison else shown[0], flush=True)
    vote = None
    if comparison is not None and sys.stdin.isatty():
        vote = await _ask_for_vote(talk, comparison["id"], console)
    kept = answers[1] if vote is not None and vote["choice"] == "b" else answers[0]
    talk.messages.append({"role": "assistant", "content": kept})
    if json:
        record = {"answers": shown, "policy": fingerprint, "comparison": comparison, "vote": vote}
        print(jsonlib.dumps(record, ensure_ascii=False), flush=True)


def _picture(answers: list[str]) -> Text | Columns:
    # Text, not str: what a model writes is not markup. Nor is it a command to the terminal.
    shown = [Text(answer.translate(CONTROLS)) for answer in answers]
    if not answers[1]:
        return shown[0]
    panels = [Panel(text, title=side) for side, text in zip(("1", "2"), shown, strict=True)]
    return Columns(panels, equal=True, expand=True)


async def _ask_for_vote(talk: Conversation, comparison: str, console: Console) -> dict[str, Any] | None:
    console.print(QUESTION)
    while (pressed := click.getchar().lower()) != "s":
        if pressed not in VOTE_KEYS:
            continue
        try:
            vote = await talk.vote(comparison, VOTE_KEYS[pressed])
        except ChatError as error:
            _say(error, console)
            console.print(QUESTION)
            continue
        policies = vote["policies"]
        console.print(f"Thank you. 1 was {policies['a']}, 2 was {policies['b']}.", style="dim")
        return vote
    return None


def _say(error: ChatError, console: Console) -> None:
    console.print(Text(str(error), style="red"), soft_wrap=True)
