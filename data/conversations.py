"""The conversations that the chat page keeps for a key: what it shows again when it is opened the next time."""

import json
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from data.ids import new_id
from data.types import timestamp


class UnknownConversation(LookupError):
    """No such conversation, or another key's."""


@dataclass(frozen=True, slots=True)
class Conversation:
    id: str
    title: str
    messages: list[dict[str, Any]]
    """As the page sent them."""
    updated_at: str


def create(db: Database, key_id: str, *, title: str, messages: list[dict[str, Any]]) -> str:
    """Its id. Call inside a transaction."""
    id_, now = new_id("talk"), timestamp()
    db.execute(
        "INSERT INTO conversations (id, key_id, title, messages, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?)",
        (id_, key_id, title, json.dumps(messages, ensure_ascii=False), now, now),
    )
    return id_


def replace(db: Database, key_id: str, id_: str, *, title: str, messages: list[dict[str, Any]]) -> None:
    """Call inside a transaction. Raises UnknownConversation."""
    row = db.execute(
        "UPDATE conversations SET title = ?, messages = ?, updated_at = ? WHERE id = ? AND key_id = ? RETURNING id",
        (title, json.dumps(messages, ensure_ascii=False), timestamp(), id_, key_id),
    ).fetchone()
    if row is None:
        raise UnknownConversation(id_)


def find(db: Database, key_id: str, id_: str) -> Conversation:
    """Raises UnknownConversation."""
    row = db.execute(
        "SELECT id, title, messages, updated_at FROM conversations WHERE id = ? AND key_id = ?", (id_, key_id)
    ).fetchone()
    if row is None:
        raise UnknownConversation(id_)
    return Conversation(row[0], row[1], json.loads(row[2]), row[3])


def list_all(db: Database, key_id: str) -> list[dict[str, str]]:
    """{"id", "title", "updated_at"} of each, the latest first."""
    return list(
        db.query(
            "SELECT id, title, updated_at FROM conversations WHERE key_id = ? ORDER BY updated_at DESC, id DESC",
            (key_id,),
        )
    )


def delete(db: Database, key_id: str, id_: str) -> None:
    """Call inside a transaction. Raises UnknownConversation."""
    gone = db.execute("DELETE FROM conversations WHERE id = ? AND key_id = ? RETURNING id", (id_, key_id)).fetchone()
    if gone is None:
        raise UnknownConversation(id_)
