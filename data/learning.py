"""What a run learned from, and the reward models that came of it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from data.types import timestamp


@dataclass(frozen=True, slots=True)
class RewardModelRow:
    """A trained reward model: a folder with an adapter and its heads."""

    id: str
    run_id: str
    path: str
    """Relative to the state folder."""
    sha256: str
    metrics: dict[str, Any]


def record_votes(db: Database, run_id: str, votes: Iterable[tuple[str, str, str, float]]) -> None:
    """Keep (vote, choice, split, weight) of every vote a run learned from. Call inside a transaction."""
    for vote, choice, split, weight in votes:
        db.execute(
            "INSERT INTO run_votes (run_id, vote_id, choice, split, weight) VALUES (?, ?, ?, ?, ?)",
            (run_id, vote, choice, split, weight),
        )


def insert_reward_model(db: Database, row: RewardModelRow) -> None:
    """Call inside a transaction, after its folder is in place."""
    db.execute(
        "INSERT INTO reward_models (id, run_id, path, sha256, metrics, created_at) VALUES (?, ?, ?, ?, ?, ?)",
        (row.id, row.run_id, row.path, row.sha256, json.dumps(row.metrics), timestamp()),
    )


def reward_models(db: Database) -> list[RewardModelRow]:
    """The latest first."""
    rows = db.execute("SELECT id, run_id, path, sha256, metrics FROM reward_models ORDER BY id DESC")
    return [RewardModelRow(id, run_id, path, sha256, json.loads(metrics)) for id, run_id, path, sha256, metrics in rows]
