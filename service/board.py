"""What the operator's board shows: everything that may change while somebody looks at it, in one answer."""

import asyncio
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Query, Request, Response
from sqlite_utils import Database

from data import audit, duels, keys, learning, leases, raters, registry, runs, schedules, stats, swaps
from data.database import connect
from data.settings import Settings
from data.types import Duel, Key, Policy, Role, timestamp
from service.auth import needs
from service.errors import ApiError
from service.run_watch import run_json
from service.state import State, state_of

router = APIRouter()

Operator = Annotated[Key, needs(Role.OPERATOR)]
T = TypeVar("T")

DAYS = 30
RUNS = 20
SWAPS = 10
ACTS = 50
RATERS = 50
CURVE_POINTS = 300
REWARD_MODELS = 30
CLOCK = "clock"
"""The lease of whoever starts the runs."""


@router.get("/v1/board")
async def get_board(request: Request, operator: Operator) -> Response:
    """Votes and what they are worth, and about how many that prefer an answer a run needs; who cast them and whose are
    left out, the latest runs, all policies, the latest duel with its curve, schedules, swaps and the audit log; which
    engines answer, and whether somebody starts the runs."""
    state = state_of(request)
    engines = [
        {"url": e.url, "ready": e.ready, "problem": None if e.ready else e.logged or e.problem}
        for e in state.engines.engines
    ]
    whole = await _read(state, lambda db: _board(db, state.settings)) | {"engines": engines}
    return Response(orjson.dumps(whole), media_type="application/json")  # a figure may be infinite, which JSON is not


@router.get("/v1/policies/{name}/pairs")
async def list_pairs(
    name: str, request: Request, operator: Operator, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """Prompts that a policy and another one both answered in their duels, drawn by chance: read some before you
    promote it."""

    def draw(db: Database) -> list[dict[str, Any]]:
        registry.get(db, name)
        return stats.duel_pairs(db, name, limit=limit)

    try:
        return {"object": "list", "data": await _read(state_of(request), draw)}
    except registry.UnknownPolicy:
        message = f"There is no policy '{name}'; GET /v1/policies lists them."
        raise ApiError(404, message, type="not_found_error", code="unknown_policy") from None


async def _read(state: State, read: Callable[[Database], T]) -> T:
    """What `read` finds, in another thread: it reads whole tables."""

    def in_thread() -> T:
        with closing(connect(state.settings.database)) as db:
            return read(db)

    return await asyncio.to_thread(in_thread)


def _board(db: Database, settings: Settings) -> dict[str, Any]:
    choices = stats.choices(db)
    people = raters.standing(db)
    duel = duels.running(db) or next(iter(duels.list_duels(db, limit=1)), None)
    return {
        "at": timestamp(),
        "votes": {
            "days": stats.votes_by_day(db, days=DAYS),
            "choices": choices,
            "since_last_run": stats.votes_since_last_run(db),
            "needed": math.ceil(settings.training.min_votes / learning.TRAIN_SHARE),
        },
        "agreement": stats.agreement(db),
        "gold": stats.gold_answers(db),
        "first_share": stats.first_share(choices),
        "raters": {"total": len(people), "listed": people[:RATERS]},
        "reward_models": stats.reward_reports(db, limit=REWARD_MODELS),
        "runs": [run_json(run) for run in runs.list_runs(db, limit=RUNS)],
        "clock_runs": leases.holder_of(db, CLOCK) is not None,
        "kl_budget": settings.gate.kl_budget,
        "gate_mode": settings.gate.mode,
        "policies": [_policy_json(policy) for policy in registry.list_policies(db)],
        "pending": swaps.pending(db),
        "predecessor": _predecessor(db),
        "duel": duel and _duel_json(db, duel, reject_at=1 / settings.gate.alpha),
        "swaps": [asdict(swap) for swap in swaps.list_swaps(db, limit=SWAPS)],
        "schedules": [schedules.describe(db, schedule) for schedule in schedules.list_all(db)],
        "audit": audit.latest(db, limit=ACTS),
        "operators": {key.id: key.label for key in keys.list_all(db) if key.role is Role.OPERATOR},
    }


def _policy_json(policy: Policy) -> dict[str, Any]:
    return {
        "name": policy.name,
        "parent": policy.parent,
        "status": policy.status,
        "problem": policy.problem,
        "gate_passed": policy.gate and policy.gate["passed"],
        "run": policy.run_id,
        "created_at": policy.created_at,
    }


def _duel_json(db: Database, duel: Duel, *, reject_at: float) -> dict[str, Any]:
    curve = [
        [point["votes"], point["e_value"], point["e_mirrored"]]
        for point in stats.thinned_curve(db, duel.id, points=CURVE_POINTS)
    ]
    return asdict(duel) | {"reject_at": reject_at, "curve": curve}


def _predecessor(db: Database) -> str | None:
    """The policy that rolling back would bring back."""
    try:
        return swaps.predecessor(db)
    except swaps.CannotPromote:
        return None
