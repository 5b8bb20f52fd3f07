"""Schedules over the wire: when runs begin by themselves."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from sqlite_utils import Database

from data import schedules
from data.types import Key, Role
from service.auth import needs
from service.errors import ApiError
from service.state import state_of

router = APIRouter()

Operator = Annotated[Key, needs(Role.OPERATOR)]


class ScheduleRequest(BaseModel):
    """One of `cron`, `every` and `votes`."""

    model_config = ConfigDict(extra="forbid")
    cron: Annotated[str | None, Field(max_length=200)] = None
    """minute, hour, day of the month, month, day of the week; `0 3 * * 0` is Sunday at 3:00."""
    timezone: Annotated[str | None, Field(max_length=100)] = None
    """Of the cron expression, as the IANA names it; UTC by default."""
    every: Annotated[str | None, Field(max_length=50)] = None
    """`6h`, `30m`, `1d`, `90s`."""
    votes: StrictInt | None = None
    """After so many new votes."""


class ScheduleChange(ScheduleRequest):
    """What is to change."""

    paused: bool | None = None


@router.post("/v1/schedules", status_code=201)
async def add_schedule(body: ScheduleRequest, request: Request, operator: Operator) -> dict[str, Any]:
    def add(db: Database) -> dict[str, Any]:
        kind, spec = schedules.choose(cron=body.cron, every=body.every, votes=body.votes)
        added = schedules.add(db, kind, spec, timezone=body.timezone, actor=operator.id)
        return schedules.describe(db, added)

    try:
        return await state_of(request).write(add)
    except schedules.BadSchedule as error:
        raise _bad(error) from None


@router.get("/v1/schedules")
async def list_schedules(request: Request, operator: Operator) -> dict[str, Any]:
    db = state_of(request).reader
    return {"object": "list", "data": [schedules.describe(db, schedule) for schedule in schedules.list_all(db)]}


@router.patch("/v1/schedules/{id}")
async def change_schedule(id: str, body: ScheduleChange, request: Request, operator: Operator) -> dict[str, Any]:
    """Pause it (`paused`), or make it another one; a time zone alone moves a cron expression there."""
    has_spec = (body.cron, body.every, body.votes) != (None, None, None)
    if not (has_spec or body.timezone is not None or body.paused is not None):
        raise ApiError(400, "Nothing to change: send paused, cron, timezone, every or votes.", code="bad_schedule")

    def change(db: Database) -> dict[str, Any]:
        schedule = schedules.get(db, id)
        if has_spec or body.timezone is not None:
            kind, spec = schedule.kind, schedule.spec
            if has_spec:
                kind, spec = schedules.choose(cron=body.cron, every=body.every, votes=body.votes)
            schedule = schedules.edit(db, id, kind, spec, timezone=body.timezone, actor=operator.id)
        if body.paused is not None:
            schedule = (schedules.pause if body.paused else schedules.resume)(db, id, actor=operator.id)
        return schedules.describe(db, schedule)

    try:
        return await state_of(request).write(change)
    except schedules.BadSchedule as error:
        raise _bad(error) from None
    except schedules.UnknownSchedule:
        raise _unknown(id) from None


@router.delete("/v1/schedules/{id}")
async def remove_schedule(id: str, request: Request, operator: Operator) -> dict[str, Any]:
    """Its runs stay."""
    try:
        await state_of(request).write(lambda db: schedules.remove(db, id, actor=operator.id))
    except schedules.UnknownSchedule:
        raise _unknown(id) from None
    return {"id": id, "deleted": True}


def _bad(error: schedules.BadSchedule) -> ApiError:
    return ApiError(400, str(error), code="bad_schedule")


def _unknown(id: str) -> ApiError:
    message = f"There is no schedule '{id}'. GET /v1/schedules lists them."
    return ApiError(404, message, type="not_found_error", code="unknown_schedule")
