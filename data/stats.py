"""Figures over the whole record."""

from typing import Any

from sqlite_utils import Database


def summary(db: Database) -> dict[str, Any]:
    """Counts of answers, comparisons and votes. `first_share` is how often a decisive vote went to the answer shown
    first: far from 0.5 means position bias."""
    completions = dict(db.execute("SELECT status, count(*) FROM completions GROUP BY status").fetchall())
    comparisons = dict(db.execute("SELECT kind, count(*) FROM comparisons GROUP BY kind").fetchall())
    votes = dict(db.execute("SELECT choice, count(*) FROM votes GROUP BY choice").fetchall())
    decisive = votes.get("a", 0) + votes.get("b", 0)
    serving = db.execute("SELECT name FROM policies WHERE status = 'serving'").fetchone()
    return {
        "serving": serving[0] if serving else None,
        "completions": completions,
        "comparisons": comparisons,
        "votes": votes,
        "first_share": votes.get("a", 0) / decisive if decisive else None,
    }
