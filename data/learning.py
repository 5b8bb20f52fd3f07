"""What a run learned from, and the reward models that came of it."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from data.registry import RegistryError, folder_digest
from data.types import PolicyStatus, timestamp

TRAIN_SHARE = 0.7
"""Of the votes: a reward model is fitted to these, and the others judge it."""
SCORER_SOCKET = "scorer.sock"
"""Where in the state folder the process listens that scores answers for the service."""


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


def reward_models(db: Database, *, without: Collection[str] = (), limit: int = -1) -> list[RewardModelRow]:
    """The latest first; at most `limit`, or all."""
    rows = db.execute(
        "SELECT id, run_id, path, sha256, metrics FROM reward_models"
        " WHERE id NOT IN (SELECT value FROM json_each(?)) ORDER BY rowid DESC LIMIT ?",
        (json.dumps(list(without)), limit),
    )
    return [RewardModelRow(id, run_id, path, sha256, json.loads(metrics)) for id, run_id, path, sha256, metrics in rows]


def turned_away(db: Database) -> set[str]:
    """The reward models whose policy somebody turned away: the gate, people in a trial, a rollback. What may not serve
    as a policy may not choose among answers either."""
    rows = db.execute(
        "SELECT reward_model FROM policies WHERE status IN (?, ?) AND reward_model IS NOT NULL",
        (PolicyStatus.REJECTED, PolicyStatus.ROLLED_BACK),
    )
    return {id for (id,) in rows}


def checked_folder(state: Path, row: RewardModelRow) -> Path:
    """The folder of a reward model, its contents proved to be what was published. Raises RegistryError."""
    folder = (state / row.path).resolve()
    if not folder.is_relative_to((state / "reward_models").resolve()):
        raise RegistryError(f"{row.id} lies at {row.path}, outside {state / 'reward_models'}: it will not be loaded.")
    if not folder.is_dir() or folder_digest(folder) != row.sha256:
        raise RegistryError(
            f"{folder} is not what was published as {row.id} (its sha256 differs or files are missing)."
            " Restore the folder from a backup, or train anew."
        )
    return folder


def scorer_address(state: int) -> str:
    """The scorer's socket, to bind or to connect to, by a descriptor of the open state folder: a socket's path has 107
    bytes at most, which a state folder's may well exceed."""
    return f"/proc/self/fd/{state}/{SCORER_SOCKET}"
