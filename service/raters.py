"""/v1/raters: who votes, whose votes are left out and why, and the operator's word on it."""

import asyncio
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from sqlite_utils import Database

from data import raters
from data.database import connect
from data.types import Key, Role
from service.auth import needs
from service.errors import ApiError
from service.state import state_of

router = APIRouter()

Operator = Annotated[Key, needs(Role.OPERATOR)]


@router.get("/v1/raters")
async def list_raters(request: Request, operator: Operator) -> dict[str, Any]:
    """Everybody who voted; whose votes are left out comes first."""
    path = state_of(request).settings.database

    def read() -> list[dict[str, Any]]:
        with closing(connect(path)) as db:  # it reads whole tables: not on the event loop
            return raters.standing(db)

    return {"object": "list", "data": await asyncio.to_thread(read)}


@router.post("/v1/raters/{id}/confirm")
async def confirm(id: str, request: Request, operator: Operator) -> dict[str, Any]:
    """Their votes are left out from the next run on, for good."""
    return await _rule(request, id, "confirmed", lambda db: raters.confirm(db, id, actor=operator.id))


@router.post("/v1/raters/{id}/release")
async def release(id: str, request: Request, operator: Operator) -> dict[str, Any]:
    """Their votes count from the next run on, whatever that makes of them."""
    return await _rule(request, id, "released", lambda db: raters.release(db, id, actor=operator.id))


@router.post("/v1/raters/{id}/reconsider")
async def reconsider(id: str, request: Request, operator: Operator) -> dict[str, Any]:
    """An operator's word is taken back: the next run judges them."""
    return await _rule(request, id, None, lambda db: raters.reconsider(db, id, actor=operator.id))


async def _rule(
    request: Request, id: str, quarantine: str | None, decide: Callable[[Database], None]
) -> dict[str, Any]:
    try:
        await state_of(request).write(decide)
    except raters.UnknownRater:
        message = f"There is no key '{id}'; GET /v1/raters lists who votes."
        raise ApiError(404, message, type="not_found_error", code="unknown_rater") from None
    except raters.NoRuling:
        message = f"No operator has ruled on {id}: there is nothing to take back."
        raise ApiError(409, message, code="no_ruling") from None
    return {"key": id, "quarantine": quarantine}
