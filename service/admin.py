"""What operators do: keys, figures, exports, forgetting."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from data import comparisons, completions, keys, stats
from data.database import connect, empty_wal
from data.types import Feedback, Key, Role
from service.auth import needs
from service.errors import ApiError
from service.state import state_of

log = logging.getLogger("nightshift")
router = APIRouter()

Operator = Annotated[Key, needs(Role.OPERATOR)]


class KeyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Role
    feedback: Feedback = Feedback.OFF
    label: Annotated[str, Field(max_length=200)] = ""


@router.post("/v1/keys", status_code=201)
async def create_key(body: KeyRequest, request: Request, operator: Operator) -> dict[str, Any]:
    """A new key. Its secret is in this answer and nowhere else."""
    key, token = await state_of(request).write(
        lambda db: keys.create(db, role=body.role, feedback=body.feedback, label=body.label, actor=operator.id)
    )
    return _key_json(key) | {"key": token}


@router.get("/v1/keys")
async def list_keys(request: Request, operator: Operator) -> dict[str, Any]:
    return {"object": "list", "data": [_key_json(key) for key in keys.list_all(state_of(request).reader)]}


@router.delete("/v1/keys/{id}")
async def revoke_key(id: str, request: Request, operator: Operator) -> dict[str, Any]:
    """The key stops working at once."""
    try:
        return _key_json(await state_of(request).write(lambda db: keys.revoke(db, id, actor=operator.id)))
    except keys.UnknownKey:
        raise ApiError(404, f"There is no key '{id}'.", type="not_found_error", code="unknown_key") from None


def _key_json(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "role": key.role,
        "feedback": key.feedback,
        "label": key.label,
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }


@router.get("/v1/stats")
async def get_stats(request: Request, operator: Operator) -> dict[str, Any]:
    path = state_of(request).settings.database

    def summary() -> dict[str, Any]:
        with closing(connect(path)) as db:  # it reads whole tables: not on the event loop
            return stats.summary(db)

    return await asyncio.to_thread(summary)


@router.get("/v1/export/preferences")
async def export_preferences(request: Request, operator: Operator) -> StreamingResponse:
    """Every vote as a line of JSON in TRL's conversational preference format, with `choice` beside it."""
    path = state_of(request).settings.database

    def lines() -> Iterator[bytes]:
        db = connect(path)  # read in another thread, as one snapshot
        try:
            for record in comparisons.export_preferences(db):
                yield orjson.dumps(record) + b"\n"
        finally:
            db.close()

    return StreamingResponse(lines(), media_type="application/jsonl")


@router.delete("/v1/users/{id:path}")
async def forget_user(id: str, request: Request, operator: Operator) -> dict[str, Any]:
    """Erase what a user (a key's id, or `key/end user`) wrote and was answered. An answer that is still being written
    is put on record when it ends: ask again after it."""
    state = state_of(request)
    emptied = await state.write(lambda db: completions.forget_user(db, id, actor=operator.id))

    def empty() -> bool:
        with closing(connect(state.settings.database)) as db:
            return empty_wal(db)

    if not await asyncio.to_thread(empty):
        log.warning("A long reader (an export?) keeps what was forgotten in the record's WAL: forget again after it")
    if not emptied:
        raise ApiError(404, f"Nothing is kept of a user '{id}'.", type="not_found_error", code="unknown_user")
    return {"id": id, "emptied": emptied}
