"""Pairs waiting for a vote, and the votes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlite_utils import Database

from data.ids import new_id
from data.types import Choice, Comparison, Role, Vote, timestamp


class UnknownComparison(LookupError):
    """No such comparison, or not this key's to vote on."""


class ComparisonExpired(Exception):
    """The time to vote on it is over."""


class VoteIsFinal(Exception):
    """There is a different vote, and the time to change it is over."""


@dataclass(frozen=True, slots=True)
class CastVote:
    """A vote as it stands, and who wrote which answer."""

    vote: Vote
    policy_a: str
    policy_b: str


@dataclass(frozen=True, slots=True)
class QueuedPair:
    """What a rater sees of a comparison: nothing of who wrote it."""

    id: str
    messages: list[dict[str, Any]]
    answer_a: str
    answer_b: str
    until: str


_COUNTED = (
    "EXISTS (SELECT 1 FROM votes WHERE comparison_id = comparisons.id AND key_id NOT IN"
    " (SELECT key_id FROM quarantines WHERE status = 'confirmed'))"
)
"""Whether somebody voted on a pair whose votes are not left out for good."""


def insert(db: Database, comparison: Comparison) -> None:
    """Call inside the transaction that inserts its two completions, after them."""
    c = comparison
    db.execute(
        "INSERT INTO comparisons (id, key_id, a, b, kind, swapped, created_at, expires_at, duel_id, user)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, (SELECT user FROM completions WHERE id = ?))",
        (c.id, c.key_id, c.a, c.b, c.kind, int(c.swapped), c.created_at, c.expires_at, c.duel_id, c.a),
    )


def shown_lately(db: Database, user: str, *, cap: int, cooldown: int) -> tuple[int, int | None]:
    """How many comparisons `user` was shown in the last 24 hours, counted up to `cap`, and how many whole answers it
    has had since the last of them, counted up to `cooldown` (None: never shown one). What a clock that was ahead dated
    later than now holds nothing up."""
    now = timestamp()
    shown = db.execute(
        "SELECT count(*) FROM (SELECT 1 FROM comparisons WHERE user = ? AND created_at > ? AND created_at <= ?"
        " LIMIT ?)",
        (user, timestamp(plus_s=-86_400), now, cap),
    ).fetchone()[0]
    last = db.execute(
        "SELECT created_at FROM comparisons WHERE user = ? AND created_at <= ? ORDER BY created_at DESC LIMIT 1",
        (user, now),
    ).fetchone()
    if last is None:
        return shown, None
    turns = db.execute(
        "SELECT count(*) FROM (SELECT 1 FROM completions WHERE user = ? AND created_at > ? AND status = 'complete'"
        " LIMIT ?)",
        (user, last[0], cooldown),
    ).fetchone()[0]
    return shown, turns


def vote(
    db: Database,
    comparison_id: str,
    *,
    key_id: str,
    role: Role,
    choice: Choice,
    comment: str | None,
    window_s: float,
    now: datetime | None = None,
) -> CastVote:
    """Cast, repeat or change a vote. Call inside a transaction.

    Its owner may vote until the comparison expires, a rater whom the queue gave it until their hold of it is over.
    The same choice without a comment, or with the same one, changes nothing. Raises UnknownComparison,
    ComparisonExpired, VoteIsFinal."""
    now = now or datetime.now(UTC)
    at = timestamp(now)
    pair = db.execute(
        "SELECT comparisons.key_id, comparisons.created_at, expires_at, since, until, first.policy, second.policy"
        " FROM comparisons"
        " JOIN completions AS first ON first.id = a JOIN completions AS second ON second.id = b"
        " LEFT JOIN holds ON comparison_id = comparisons.id AND holds.key_id = ?"
        " WHERE comparisons.id = ?",
        (key_id, comparison_id),
    ).fetchone()
    if pair is None:
        raise UnknownComparison(comparison_id)
    owner, created_at, expires_at, held_since, held_until, policy_a, policy_b = pair
    if key_id == owner:
        shown_at, until = created_at, expires_at
    elif held_since is not None and role.covers(Role.RATER):
        shown_at, until = held_since, held_until
    else:
        raise UnknownComparison(comparison_id)

    row = db.execute(
        "SELECT id, comparison_id, key_id, choice, comment, decided_ms, created_at, updated_at FROM votes"
        " WHERE comparison_id = ? AND key_id = ?",
        (comparison_id, key_id),
    ).fetchone()
    if row is None:
        if at >= until:
            raise ComparisonExpired(comparison_id)
        decided_ms = round((now - datetime.fromisoformat(shown_at)).total_seconds() * 1000)
        cast = Vote(new_id("vote"), comparison_id, key_id, choice, comment, max(decided_ms, 0), at, at)
        db.execute(
            "INSERT INTO votes (id, comparison_id, key_id, choice, comment, decided_ms, created_at, updated_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (cast.id, comparison_id, key_id, choice, comment, cast.decided_ms, at, at),
        )
        db.execute(f"UPDATE comparisons SET waits = 0 WHERE id = ? AND waits = 1 AND {_COUNTED}", (comparison_id,))
        return CastVote(cast, policy_a, policy_b)

    before = Vote(row[0], row[1], row[2], Choice(row[3]), *row[4:])
    if before.choice == choice and comment in (None, before.comment):
        return CastVote(before, policy_a, policy_b)
    if at > timestamp(datetime.fromisoformat(before.created_at), plus_s=window_s):
        raise VoteIsFinal(before.choice)
    db.execute(
        "INSERT INTO vote_history (vote_id, choice, comment, cast_at, replaced_at) VALUES (?, ?, ?, ?, ?)",
        (before.id, before.choice, before.comment, before.updated_at, at),
    )
    db.execute(
        "UPDATE votes SET choice = ?, comment = ?, updated_at = ? WHERE id = ?", (choice, comment, at, before.id)
    )
    after = Vote(before.id, comparison_id, key_id, choice, comment, before.decided_ms, before.created_at, at)
    return CastVote(after, policy_a, policy_b)


def requeue(db: Database, key_id: str) -> None:
    """Have those of the pairs that this key voted on wait for raters that have no vote that counts, and no others.
    Call inside the transaction that rules on the key's votes."""
    db.execute(
        f"UPDATE comparisons SET waits = NOT {_COUNTED} WHERE id IN (SELECT comparison_id FROM votes WHERE key_id = ?)"
        " AND (SELECT messages FROM completions WHERE completions.id = a) <> '[]'",
        (key_id,),
    )


_UNRATED = (
    "SELECT comparisons.id, first.messages, first.answer, second.answer, mine.until FROM comparisons"
    " JOIN completions AS first ON first.id = a JOIN completions AS second ON second.id = b"
    " LEFT JOIN holds AS mine ON mine.comparison_id = comparisons.id AND mine.key_id = :key"
    " WHERE waits = 1 AND mine.passed_at IS NULL"
    " AND NOT EXISTS (SELECT 1 FROM votes WHERE comparison_id = comparisons.id AND votes.key_id = :key)"
)
_NEXT = (
    f"{_UNRATED} AND comparisons.key_id <> :key"
    " AND NOT EXISTS (SELECT 1 FROM holds WHERE comparison_id = comparisons.id AND until > :now AND since <= :now)"
    " ORDER BY comparisons.created_at LIMIT 1"
)


def next_for_rater(db: Database, *, key_id: str, lease_s: float) -> QueuedPair | None:
    """The oldest pair without a vote that counts, held for `lease_s` seconds by this rater now; None: there is none.

    Asking again gives the same pair until it is voted on, passed, or the hold is over. A rater's own chats are never
    in their queue, nor what they voted on. Call inside a transaction."""
    given = {"key": key_id, "now": timestamp(), "until": timestamp(plus_s=lease_s)}
    row = db.execute(f"{_UNRATED} AND mine.until > :now", given).fetchone()
    if row is None:
        row = db.execute(_NEXT, given).fetchone()
        if row is None:
            return None
        db.execute(
            "INSERT INTO holds (comparison_id, key_id, since, until) VALUES (:comparison, :key, :now, :until)"
            " ON CONFLICT DO UPDATE SET since = excluded.since, until = excluded.until",
            given | {"comparison": row[0]},
        )
        row = (*row[:4], given["until"])
    return QueuedPair(row[0], json.loads(row[1]), row[2], row[3], row[4])


def one_waits(db: Database, key_id: str) -> bool:
    """Whether there is a pair for this rater, beside one that they hold."""
    return db.execute(_NEXT, {"key": key_id, "now": timestamp()}).fetchone() is not None


def holds_one(db: Database, key_id: str) -> bool:
    """Whether this rater holds a pair without a vote of theirs or one that counts."""
    given = {"key": key_id, "now": timestamp()}
    return db.execute(f"{_UNRATED} AND mine.until > :now", given).fetchone() is not None


def pass_over(db: Database, comparison_id: str, *, key_id: str) -> None:
    """Give a held pair back without a vote; this rater does not get it again. Call inside a transaction. Raises
    UnknownComparison."""
    now = timestamp()
    held = db.execute(
        "UPDATE holds SET passed_at = ?, until = min(until, ?) WHERE comparison_id = ? AND key_id = ? RETURNING 1",
        (now, now, comparison_id, key_id),
    ).fetchone()
    gold = db.execute(
        "UPDATE gold_questions SET until = min(until, ?) WHERE id = ? AND key_id = ? RETURNING 1",
        (now, comparison_id, key_id),
    ).fetchone()
    if held is None and gold is None:
        raise UnknownComparison(comparison_id)


def count_votes(db: Database, key_id: str, *, since: str) -> int:
    """How many pairs this key has voted on since then, gold questions among them."""
    count: int = db.execute(
        "SELECT (SELECT count(*) FROM votes WHERE key_id = :key AND created_at >= :since)"
        " + (SELECT count(*) FROM gold_questions WHERE key_id = :key AND created_at >= :since)",
        {"key": key_id, "since": since},
    ).fetchone()[0]
    return count


def list_votes(db: Database, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Votes, the latest first, each with its pair's kind and the policies behind the two answers."""
    return list(
        db.query(
            "SELECT votes.id, comparison_id, votes.key_id AS voter, choice, comment, decided_ms, kind,"
            " first.policy AS policy_a, second.policy AS policy_b, votes.created_at, updated_at FROM votes"
            " JOIN comparisons ON comparisons.id = comparison_id"
            " JOIN completions AS first ON first.id = a JOIN completions AS second ON second.id = b"
            " ORDER BY votes.id DESC LIMIT ?",
            (-1 if limit is None else limit,),
        )
    )


def export_preferences(db: Database) -> Iterator[dict[str, Any]]:
    """Every vote as one record of TRL's conversational preference format, the oldest first.

    a/b votes give `prompt`, `chosen` and `rejected`. For `tie` and `both_bad`, which rank nothing, `chosen` and
    `rejected` are the answers as they were shown, and `choice` says so: drop them to train on the rest."""
    rows = db.query(
        "SELECT votes.id AS vote, comparison_id AS comparison, votes.key_id AS voter, choice, kind, first.user,"
        " first.conversation, first.messages, first.answer AS answer_a, second.answer AS answer_b,"
        " first.policy AS policy_a, second.policy AS policy_b, first.finish_reason AS end_a,"
        " second.finish_reason AS end_b, votes.updated_at AS voted_at FROM votes"
        " JOIN comparisons ON comparisons.id = comparison_id"
        " JOIN completions AS first ON first.id = a JOIN completions AS second ON second.id = b"
        " WHERE first.messages <> '[]' ORDER BY votes.id"
    )
    for row in rows:
        sides = ("b", "a") if row["choice"] == Choice.B else ("a", "b")
        chosen, rejected = ([{"role": "assistant", "content": row[f"answer_{side}"]}] for side in sides)
        yield {
            "prompt": json.loads(row["messages"]),
            "chosen": chosen,
            "rejected": rejected,
            "choice": row["choice"],
            "kind": row["kind"],
            "chosen_policy": row[f"policy_{sides[0]}"],
            "rejected_policy": row[f"policy_{sides[1]}"],
            "chosen_finish_reason": row[f"end_{sides[0]}"],
            "rejected_finish_reason": row[f"end_{sides[1]}"],
            "user": row["user"],
            "conversation": row["conversation"],
            "voter": row["voter"],
            "vote": row["vote"],
            "comparison": row["comparison"],
            "voted_at": row["voted_at"],
        }
