"""Every answer that was given, whole or broken off, and the right to have them forgotten."""

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlite_utils import Database

from data import audit
from data.ids import first_id, new_id
from data.types import Completion, timestamp


def conversation_of(user: str, messages: list[dict[str, Any]]) -> str:
    """A digest of the user and the talk up to its first user message: the same on every turn of one conversation.

    The chat API is stateless, so the opening is all that the turns of a conversation share."""
    opening = []
    for message in messages:
        opening.append([message.get("role"), message.get("content")])
        if message.get("role") == "user":
            break
    return hashlib.sha256(json.dumps([user, opening], sort_keys=True).encode()).hexdigest()[:24]


def insert(db: Database, completion: Completion) -> None:
    """Call inside a transaction."""
    c = completion
    db.execute(
        "INSERT INTO completions (id, key_id, user, conversation, messages, answer, tool_calls, policy, sampling,"
        " status, finish_reason, prompt_tokens, completion_tokens, first_token_ms, total_ms, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            c.id,
            c.key_id,
            c.user,
            c.conversation,
            json.dumps(c.messages, ensure_ascii=False),
            c.answer,
            None if c.tool_calls is None else json.dumps(c.tool_calls, ensure_ascii=False),
            c.policy,
            json.dumps(c.sampling, ensure_ascii=False),
            c.status,
            c.finish_reason,
            c.prompt_tokens,
            c.completion_tokens,
            c.first_token_ms,
            c.total_ms,
            c.created_at,
        ),
    )


@dataclass(frozen=True, slots=True)
class Outcomes:
    """How a policy's answers ended; those that the client did not wait for are left out."""

    answers: int
    failed: int
    """The engine broke off."""
    free: int
    """Of those that did not fail, the ones that their client gave all the tokens there are, and did not steer towards
    running on."""
    unfinished: int
    """Of the free, those cut off all the same."""


_FREE = (
    "coalesce(sampling ->> 'max_completion_tokens', sampling ->> 'max_tokens') >= :most_tokens"
    " AND coalesce(sampling ->> 'temperature', 1) <= 1 AND coalesce(sampling ->> 'presence_penalty', 0) = 0"
    " AND coalesce(sampling ->> 'frequency_penalty', 0) = 0 AND coalesce(sampling ->> 'repetition_penalty', 1) = 1"
    " AND sampling -> 'logit_bias' IS NULL AND sampling -> 'response_format' IS NULL"
)


def outcomes(
    db: Database,
    policy: str,
    *,
    most_tokens: int,
    since: str | None = None,
    until: str | None = None,
    limit: int,
) -> list[Outcomes]:
    """Of the first `limit` answers since then; or, with `until`, of the last `limit` until then; one for each key that
    was answered. `most_tokens`: what an answer may have where its client does not ask for less."""
    given = {
        "policy": policy,
        "most_tokens": most_tokens,
        "start": first_id("cpl", datetime.fromisoformat(since)) if since else "",
        "end": first_id("cpl", datetime.fromisoformat(until)) if until else "cpl_~",
        "limit": limit,
    }
    rows = db.execute(
        "SELECT count(*), sum(failed), coalesce(sum(free), 0), coalesce(sum(free AND cut), 0) FROM"
        " (SELECT key_id, status = 'failed' AS failed, finish_reason = 'length' AS cut,"
        f" status = 'complete' AND {_FREE} AS free"
        " FROM completions WHERE policy = :policy AND id >= :start AND id < :end AND status <> 'aborted'"
        f" ORDER BY id {'DESC' if until else 'ASC'} LIMIT :limit) GROUP BY key_id",
        given,
    )
    return [Outcomes(*row) for row in rows]


def forget_user(db: Database, user: str, *, actor: str) -> int:
    """Erase what `user` (a key's id, or `key/end user`) wrote and was answered, the comments on its pairs, the name of
    an end user, and the conversations that the chat page keeps for it. An answer that is still being written is put on
    record when it ends: forget again after it.

    The rows stay, empty and under another name, so that the lineage of a policy still adds up; an empty conversation
    never trains and is never exported. A key's id takes its end users along. Returns how many answers, comments and
    conversations were emptied. Call inside a transaction, and `database.empty_wal` after it."""
    key, _, end_user = user.partition("/")
    unknown = f"{key}/{new_id('forgotten')}"
    given = {"user": user, "key": key, "now": timestamp(), "unknown": unknown}
    whole_key = ":user = :key OR user = :user"  # only a key's own id stands for everybody under it
    mine = f"key_id = :key AND ({whole_key})"
    pairs = f"SELECT id FROM comparisons WHERE a IN (SELECT id FROM completions WHERE {mine})"
    about = f"comparison_id IN ({pairs}) OR key_id = :user"
    changes = [
        f"UPDATE vote_history SET comment = NULL WHERE comment IS NOT NULL"
        f" AND vote_id IN (SELECT id FROM votes WHERE {about})",
        f"UPDATE votes SET comment = NULL WHERE comment IS NOT NULL AND ({about})",
        # The digest of a conversation is of the user and the first message: a guess could be checked by it.
        f"UPDATE completions SET messages = '[]', answer = '', tool_calls = NULL, sampling = '{{}}', conversation = id,"
        f" user = iif(user = :key, user, :unknown) WHERE {mine} AND messages <> '[]'",
        # The pages' own list of conversations belongs to the key, not to an end user of it.
        "DELETE FROM conversations WHERE key_id = :user",
        "UPDATE gold_questions SET comment = NULL WHERE comment IS NOT NULL AND key_id = :user",
    ]
    # Before the completions lose their user, by whom the pairs are found.
    db.execute(f"UPDATE holds SET until = min(until, :now) WHERE comparison_id IN ({pairs})", given)
    db.execute(
        "UPDATE comparisons SET expires_at = min(expires_at, :now), waits = 0, user = iif(user = :key, user, :unknown)"
        f" WHERE id IN ({pairs})",
        given,
    )
    emptied = 0
    for change in changes:
        db.execute(change, given)
        emptied += db.execute("SELECT changes()").fetchone()[0]
    if emptied:
        audit.record(db, actor=actor, action="user.forget", subject=unknown if end_user else user)
    return emptied
