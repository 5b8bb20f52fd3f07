"""Trusted pairs: an operator's own preferences (right over wrong facts, a refusal over harm), mixed into training with
a weight of their own, since a crowd's votes say nothing of what the crowd did not look at."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from sqlite_utils import Database

from data import audit
from data.ids import new_id
from data.types import Choice, MessageRole, timestamp

ROLES = get_args(MessageRole)


class BadPair(ValueError):
    """A line that is not a preference; the message says which and why."""


@dataclass(frozen=True, slots=True)
class TrustedPair:
    """One preference; `chosen` and `rejected` are the texts of the two answers."""

    id: str
    messages: list[dict[str, Any]]
    chosen: str
    rejected: str


def import_lines(db: Database, lines: Iterable[str], *, actor: str) -> tuple[int, int, int]:
    """Read TRL's preference format, conversational or plain: a JSON object a line with `prompt`, `chosen` and
    `rejected`. All lines are taken or, where one is bad, none. Of our own export, votes for neither answer are left
    out: `chosen` is the first answer there, and not the better.

    Returns how many were new, known already, and left out. Raises BadPair. Call inside a transaction."""
    new = known = left_out = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _read(line, number)
        if record.get("choice") in (Choice.TIE, Choice.BOTH_BAD):
            left_out += 1
            continue
        messages, chosen, rejected = _pair(record, number)
        prompt = json.dumps(messages, ensure_ascii=False)
        digest = hashlib.sha256(json.dumps([messages, chosen, rejected]).encode()).hexdigest()
        row = db.execute(
            "INSERT INTO trusted_pairs (id, digest, prompt, chosen, rejected, created_at) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (digest) DO NOTHING RETURNING id",
            (new_id("pair"), digest, prompt, chosen, rejected, timestamp()),
        ).fetchone()
        new, known = (new + 1, known) if row else (new, known + 1)
    audit.record(db, actor=actor, action="trusted.import", subject=f"{new} pairs")
    return new, known, left_out


def list_pairs(db: Database) -> list[TrustedPair]:
    """In the order of import."""
    rows = db.execute("SELECT id, prompt, chosen, rejected FROM trusted_pairs ORDER BY rowid")
    return [TrustedPair(id, json.loads(prompt), chosen, rejected) for id, prompt, chosen, rejected in rows]


def _read(line: str, number: int) -> dict[str, Any]:
    try:
        record: object = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half surrogates can be read, and not kept
    except (ValueError, RecursionError) as error:
        raise BadPair(f"Line {number} is not JSON ({error}).") from None
    if not isinstance(record, dict) or not {"prompt", "chosen", "rejected"} <= record.keys():
        raise BadPair(f"Line {number} is not an object with prompt, chosen and rejected.")
    return record


def _pair(record: dict[str, Any], number: int) -> tuple[list[dict[str, Any]], str, str]:
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not _is_talk(messages) or messages[-1]["role"] == "assistant":
        raise BadPair(f"Line {number}: prompt is neither a text nor messages that end before an assistant's turn.")
    chosen, rejected = (_answer(record[side], side, number) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadPair(f"Line {number}: chosen and rejected are the same.")
    return messages, chosen, rejected


def _is_talk(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") in ROLES for m in messages)
    )


def _answer(side: object, name: str, number: int) -> str:
    if isinstance(side, str) and side:
        return side
    if isinstance(side, list) and len(side) == 1 and _is_talk(side) and side[0]["role"] == "assistant":
        content: str = side[0]["content"]
        return content
    raise BadPair(f"Line {number}: {name} is neither a text nor one message of the assistant.")
