"""Gold questions: now and then a rater is shown a trusted pair, whose right answer is known, as if it were any other.

They measure the rater. They are no comparisons and their votes are no votes: nothing here trains, is exported, or
counts in a duel."""

import json
import random
from datetime import UTC, datetime

from sqlite_utils import Database

from data.comparisons import CastVote, ComparisonExpired, QueuedPair, UnknownComparison, VoteIsFinal
from data.ids import new_id
from data.types import Choice, Vote, timestamp


def open_question(db: Database, key_id: str) -> QueuedPair | None:
    """What this rater was asked and has not answered, while their hold of it lasts."""
    row = db.execute(
        "SELECT gold_questions.id, prompt, chosen, rejected, chosen_side, until FROM gold_questions"
        " JOIN trusted_pairs ON trusted_pairs.id = pair_id WHERE key_id = ? AND choice IS NULL AND until > ?",
        (key_id, timestamp()),
    ).fetchone()
    return None if row is None else _queued(*row)


def ask(db: Database, key_id: str, *, lease_s: float, rng: random.Random) -> QueuedPair | None:
    """A trusted pair that this rater has not seen, held like any other; None when there is none. Call inside a
    transaction."""
    unseen = db.execute(
        "SELECT id, prompt, chosen, rejected FROM trusted_pairs WHERE NOT EXISTS"
        " (SELECT 1 FROM gold_questions WHERE pair_id = trusted_pairs.id AND key_id = ?)",
        (key_id,),
    ).fetchall()
    if not unseen:
        return None
    pair_id, prompt, chosen, rejected = rng.choice(unseen)
    id_, side, until = new_id("cmp"), rng.choice("ab"), timestamp(plus_s=lease_s)
    db.execute(
        "INSERT INTO gold_questions (id, vote_id, key_id, pair_id, chosen_side, since, until)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (id_, new_id("vote"), key_id, pair_id, side, timestamp(), until),
    )
    return _queued(id_, prompt, chosen, rejected, side, until)


def _queued(id_: str, prompt: str, chosen: str, rejected: str, side: str, until: str) -> QueuedPair:
    a, b = (chosen, rejected) if side == "a" else (rejected, chosen)
    return QueuedPair(id_, json.loads(prompt), a, b, until)


def vote(
    db: Database,
    id_: str,
    *,
    key_id: str,
    choice: Choice,
    comment: str | None,
    window_s: float,
    now: datetime | None = None,
) -> CastVote:
    """As `comparisons.vote`, and with the same errors; of both answers it is said that the serving policy wrote them.
    Call inside a transaction."""
    now = now or datetime.now(UTC)
    at = timestamp(now)
    row = db.execute(
        "SELECT vote_id, since, until, choice, comment, decided_ms, created_at, updated_at FROM gold_questions"
        " WHERE id = ? AND key_id = ?",
        (id_, key_id),
    ).fetchone()
    if row is None:
        raise UnknownComparison(id_)
    vote_id, since, until, before, comment_before, decided_ms, created_at, updated_at = row
    if before is None:
        if at >= until:
            raise ComparisonExpired(id_)
        decided_ms = max(round((now - datetime.fromisoformat(since)).total_seconds() * 1000), 0)
        created_at = updated_at = at
    elif before == choice and comment in (None, comment_before):
        comment = comment_before
    elif at > timestamp(datetime.fromisoformat(created_at), plus_s=window_s):
        raise VoteIsFinal(before)
    else:
        updated_at = at
    db.execute(
        "UPDATE gold_questions SET choice = ?, comment = ?, decided_ms = ?, created_at = ?, updated_at = ?"
        " WHERE id = ?",
        (choice, comment, decided_ms, created_at, updated_at, id_),
    )
    cast = Vote(vote_id, id_, key_id, choice, comment, decided_ms, created_at, updated_at)
    (policy,) = db.execute("SELECT name FROM policies WHERE status = 'serving'").fetchone() or ("",)
    return CastVote(cast, policy, policy)
