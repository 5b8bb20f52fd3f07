"""What operators see of the policies, and which one they make serve."""

import asyncio
from contextlib import closing
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlite_utils import Database

from data import duels, registry, swaps
from data.database import connect
from data.types import Duel, Key, Policy, Role, Swap
from service.auth import needs
from service.errors import ApiError
from service.state import State, state_of

router = APIRouter()

Operator = Annotated[Key, needs(Role.OPERATOR)]


class Why(BaseModel):
    model_config = ConfigDict(extra="forbid")
    reason: Annotated[str, Field(min_length=1, max_length=500)] = "an operator asked for it"


class WayBack(Why):
    seen: Annotated[str | None, Field(alias="from", max_length=100)] = None


@router.get("/v1/policies")
async def list_policies(request: Request, operator: Operator) -> dict[str, Any]:
    policies = registry.list_policies(state_of(request).reader)
    return {"object": "list", "data": [_brief(policy) for policy in policies]}


@router.get("/v1/policies/{name}")
async def get_policy(name: str, request: Request, operator: Operator) -> dict[str, Any]:
    """One policy with its figures, what the gate said of it, its duels and the swaps that brought it in or out."""
    db = state_of(request).reader
    policy = _find(request, name)
    return _brief(policy) | {
        "sha256": policy.sha256,
        "metrics": policy.metrics,
        "gate": policy.gate,
        "duels": _with_curve(db, duels.list_duels(db, policy=name)),
        "swaps": [asdict(swap) for swap in swaps.list_swaps(db, policy=name)],
    }


@router.get("/v1/policies/{name}/lineage")
async def get_lineage(name: str, request: Request, operator: Operator) -> dict[str, Any]:
    """Where a policy comes from: its run, its reward model, and the exact votes, each with its comparison."""
    _find(request, name)
    path = state_of(request).settings.database

    def lineage() -> dict[str, Any]:
        with closing(connect(path)) as db:  # a run learns from all votes there are: not on the event loop
            return registry.lineage(db, name)

    return await asyncio.to_thread(lineage)


@router.post("/v1/policies/{name}/promote", status_code=202)
async def promote(name: str, request: Request, operator: Operator, body: Why | None = None) -> dict[str, Any]:
    """Let a policy serve. 202: it does once every engine has loaded it, which `GET /v1/policies` will say."""
    state = state_of(request)
    await _check_folder(state, _find(request, name))
    reason = (body or Why()).reason
    return await _decide(state, lambda db: swaps.promote(db, name, actor=operator.id, reason=reason))


@router.post("/v1/policies/rollback", status_code=202)
async def roll_back(request: Request, operator: Operator, body: WayBack | None = None) -> dict[str, Any]:
    """Let the predecessor of the policy that serves serve again. `from`: the one that serves, as the caller saw it; 409
    where another does by now, so that two who ask at once go back one policy."""
    state = state_of(request)
    body = body or WayBack()
    try:
        name = swaps.predecessor(state.reader, body.seen)
    except swaps.CannotPromote as error:
        raise _cannot(str(error)) from None
    await _check_folder(state, registry.get(state.reader, name))
    return await _decide(state, lambda db: swaps.roll_back(db, actor=operator.id, reason=body.reason, seen=body.seen))


@router.get("/v1/duels")
async def list_duels(request: Request, operator: Operator) -> dict[str, Any]:
    """The duels, the latest first; the one that runs with its curve."""
    db = state_of(request).reader
    return {"object": "list", "data": _with_curve(db, duels.list_duels(db))}


def _with_curve(db: Database, all_of_them: list[Duel]) -> list[dict[str, Any]]:
    """Only the one that runs has its curve: of a long-serving policy's all they would be megabytes."""
    return [
        asdict(duel) | ({"curve": duels.curve(db, duel.id)} if duel.ended_at is None else {}) for duel in all_of_them
    ]


def _brief(policy: Policy) -> dict[str, Any]:
    return {
        "name": policy.name,
        "parent": policy.parent,
        "status": policy.status,
        "problem": policy.problem,
        "gate_passed": policy.gate and policy.gate["passed"],
        "run": policy.run_id,
        "reward_model": policy.reward_model,
        "created_at": policy.created_at,
    }


def _find(request: Request, name: str) -> Policy:
    try:
        return registry.get(state_of(request).reader, name)
    except registry.UnknownPolicy:
        message = f"There is no policy '{name}'; GET /v1/policies lists them."
        raise ApiError(404, message, type="not_found_error", code="unknown_policy") from None


async def _check_folder(state: State, policy: Policy) -> None:
    """Say at once what the engines would be spared from. Raises ApiError."""
    settings = state.settings

    def check() -> None:
        with closing(connect(settings.database)) as db:
            registry.servable_folder(db, settings.state, policy, max_rank=settings.engine.max_lora_rank)

    try:
        await asyncio.to_thread(check)
    except (registry.RegistryError, OSError) as error:
        raise _cannot(str(error)) from None


async def _decide(state: State, decision: Any) -> dict[str, Any]:
    try:
        swap: Swap = await state.write(decision)
    except swaps.CannotPromote as error:
        raise _cannot(str(error)) from None
    state.hot_swap.kick()
    return {"policy": swap.policy, "swap": asdict(swap)}


def _cannot(why: str) -> ApiError:
    return ApiError(409, why, code="cannot_promote")
