"""Figures over the whole record."""

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlite_utils import Database

from data.types import Choice

Z = 1.96
"""Standard errors on either side of a share in a 95 % interval."""


def summary(db: Database) -> dict[str, Any]:
    """Counts of answers, comparisons and votes. `first_share` is how often a decisive vote went to the answer shown
    first: far from 0.5 means position bias."""
    completions = dict(db.execute("SELECT status, count(*) FROM completions GROUP BY status").fetchall())
    comparisons = dict(db.execute("SELECT kind, count(*) FROM comparisons GROUP BY kind").fetchall())
    votes = choices(db)
    decisive = votes.get("a", 0) + votes.get("b", 0)
    serving = db.execute("SELECT name FROM policies WHERE status = 'serving'").fetchone()
    return {
        "serving": serving[0] if serving else None,
        "completions": completions,
        "comparisons": comparisons,
        "votes": votes,
        "first_share": votes.get("a", 0) / decisive if decisive else None,
    }


def choices(db: Database) -> dict[str, int]:
    """How often people voted what."""
    return dict(db.execute("SELECT choice, count(*) FROM votes GROUP BY choice").fetchall())


def wilson(count: float, total: float, *, z: float = Z) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, "Probable inference, the law of succession, and statistical
    inference"): it stays within 0 and 1 and holds where all or none of a few did. (0, 1) of nothing. `z`: how many
    standard errors, where the standard error is not as well known as a share tells."""
    if total == 0:
        return 0.0, 1.0
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def _share(count: int, total: int) -> dict[str, Any]:
    """A share with its 95 % interval; None where there is nothing to take it of."""
    low, high = wilson(count, total)
    return {"count": count, "total": total, "share": count / total if total else None, "low": low, "high": high}


def votes_by_day(db: Database, *, days: int, now: datetime | None = None) -> list[dict[str, Any]]:
    """{"day", "votes", "decisive"} of the last `days` days (UTC), the earliest first, days without votes among them."""
    today = (now or datetime.now(UTC)).astimezone(UTC).date()
    first = today - timedelta(days=days - 1)
    counted = {
        day: (votes, decisive)
        for day, votes, decisive in db.execute(
            "SELECT substr(created_at, 1, 10) AS day, count(*), sum(choice IN ('a', 'b')) FROM votes"
            " WHERE created_at >= ? GROUP BY day",
            (first.isoformat(),),
        )
    }
    listed = []
    for day in ((first + timedelta(days=n)).isoformat() for n in range(days)):
        votes, decisive = counted.get(day, (0, 0))
        listed.append({"day": day, "votes": votes, "decisive": decisive})
    return listed


def agreement(db: Database) -> dict[str, Any]:
    """Of two people who voted on the same pair, and each for one of its answers, how often it was the same one. Active
    pairs are chosen for being hard, and say nothing of how people agree on what they are shown by chance."""
    pairs, agreed = db.execute(
        "WITH judged_twice AS (SELECT comparison_id FROM votes GROUP BY comparison_id HAVING count(*) > 1)"
        " SELECT count(*), coalesce(sum(mine.choice = other.choice), 0) FROM judged_twice"
        " JOIN votes AS mine ON mine.comparison_id = judged_twice.comparison_id"
        " JOIN votes AS other ON other.comparison_id = mine.comparison_id AND other.key_id > mine.key_id"
        " JOIN comparisons ON comparisons.id = mine.comparison_id AND kind <> 'active'"
        " WHERE mine.choice IN ('a', 'b') AND other.choice IN ('a', 'b')"
    ).fetchone()
    return _share(agreed, pairs)


def gold_answers(db: Database) -> dict[str, Any]:
    """How many of the answered gold questions were answered rightly (a tie is not)."""
    asked, right = db.execute(
        "SELECT count(choice), coalesce(sum(choice = chosen_side), 0) FROM gold_questions"
    ).fetchone()
    return _share(right, asked)


def first_share(choices: dict[str, int]) -> dict[str, Any]:
    """How often a decisive vote went to the answer shown first. Sides are drawn by chance, so an interval without 0.5
    means that the place is what people vote for."""
    first, second = choices.get(Choice.A, 0), choices.get(Choice.B, 0)
    return _share(first, first + second)


def votes_since_last_run(db: Database) -> int:
    """Votes cast since the last run that succeeded began; all of them before there is one."""
    count: int = db.execute(
        "SELECT count(*) FROM votes WHERE created_at > coalesce("
        "(SELECT started_at FROM runs WHERE status = 'succeeded' ORDER BY rowid DESC LIMIT 1), '')"
    ).fetchone()[0]
    return count


def reward_reports(db: Database, *, limit: int) -> list[dict[str, Any]]:
    """What the latest reward models are worth on votes that they have not seen, beside what length alone is; the
    earliest first."""
    rows = db.execute(
        "SELECT id, run_id, created_at, metrics FROM reward_models ORDER BY rowid DESC LIMIT ?", (limit,)
    ).fetchall()
    return [
        {"id": id, "run": run_id, "created_at": created_at} | json.loads(metrics)
        for id, run_id, created_at, metrics in reversed(rows)
    ]


def thinned_curve(db: Database, duel_id: str, *, points: int) -> list[dict[str, Any]]:
    """How the evidence of a duel went: about `points` of its steps, the last one among them."""
    (last,) = db.execute("SELECT max(votes) FROM duel_curve WHERE duel_id = ?", (duel_id,)).fetchone()
    if last is None:
        return []
    return list(
        db.query(
            "SELECT votes, e_value, e_mirrored FROM duel_curve WHERE duel_id = ? AND (votes % ? = 0 OR votes = ?)"
            " ORDER BY votes",
            (duel_id, max(1, last // points), last),
        )
    )


def duel_pairs(db: Database, policy: str, *, limit: int) -> list[dict[str, Any]]:
    """Prompts that `policy` and another policy both answered in their duels, drawn by chance, with what people said.

    Each is {"comparison", "created_at", "messages", "answer", "against", "against_answer", "votes"}, where `votes`
    counts those for "policy", for "against", "tie" and "both_bad". What was forgotten is left out."""
    drawn = db.execute(
        "SELECT comparisons.id, comparisons.created_at, first.policy = :policy, first.messages, first.answer,"
        " second.answer, iif(first.policy = :policy, second.policy, first.policy)"
        " FROM duels JOIN comparisons ON duel_id = duels.id"
        " JOIN completions AS first ON first.id = a JOIN completions AS second ON second.id = b"
        " WHERE :policy IN (challenger, incumbent) AND first.messages <> '[]' ORDER BY random() LIMIT :limit",
        {"policy": policy, "limit": limit},
    ).fetchall()
    pairs = []
    for id, created_at, is_first, messages, first, second, against in drawn:
        votes = dict.fromkeys(("policy", "against", "tie", "both_bad"), 0)
        for choice, count in db.execute(
            "SELECT choice, count(*) FROM votes WHERE comparison_id = ? GROUP BY choice", (id,)
        ):
            if choice in (Choice.A, Choice.B):
                choice = "policy" if (choice == Choice.A) == bool(is_first) else "against"
            votes[choice] = count
        mine, other = (first, second) if is_first else (second, first)
        pairs.append(
            {
                "comparison": id,
                "created_at": created_at,
                "messages": json.loads(messages),
                "answer": mine,
                "against": against,
                "against_answer": other,
                "votes": votes,
            }
        )
    return pairs
