"""Training runs over the wire: ask for one, look at them, watch one, cancel one."""

import asyncio
import time
from contextlib import closing
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlite_utils import Database

from data import keys, registry, runs
from data.database import connect
from data.types import Key, Role, Run
from service.auth import needs
from service.errors import ApiError
from service.run_watch import END, LOOK_S, OVER, Event, RunWatch, run_json
from service.sse import EventStream, SendBytes
from service.state import state_of

router = APIRouter()

Operator = Annotated[Key, needs(Role.OPERATOR)]

HEARTBEAT_S = 15.0
"""A stream that says nothing for longer than this may be taken for dead by what lies between."""


class RunRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None
    """Of everything random in the run; None: training.seed."""


@router.post("/v1/runs", status_code=201)
async def request_run(request: Request, operator: Operator, body: RunRequest | None = None) -> dict[str, Any]:
    """Queue a run; the clock starts it."""
    config = {} if body is None or body.seed is None else {"seed": body.seed}
    try:
        run = await state_of(request).write(lambda db: runs.request(db, requested_by=operator.id, config=config))
    except runs.RunActive as active:
        error = ApiError(
            409,
            f"{active} is queued or running already. Watch it (GET /v1/runs/{active}/events), or cancel it first"
            f" (POST /v1/runs/{active}/cancel).",
            code="run_active",
        )
        error.body["error"]["run"] = str(active)
        raise error from None
    return run_json(run)


@router.get("/v1/runs")
async def list_runs(
    request: Request, operator: Operator, limit: Annotated[int, Query(ge=1, le=1000)] = 50
) -> dict[str, Any]:
    """The latest first."""
    found = runs.list_runs(state_of(request).reader, limit=limit)
    return {"object": "list", "data": [run_json(run) for run in found]}


@router.get("/v1/runs/{id}")
async def get_run(id: str, request: Request, operator: Operator) -> Response:
    """One run, the policy that came of it with what keeps it from serving, and its curves: `metrics` is {name: [[step,
    value], …]}."""
    db = state_of(request).reader
    run = _find(db, id)
    policy = next((policy for policy in registry.list_policies(db) if policy.run_id == id), None)
    whole = run_json(run) | {
        "policy": policy and policy.name,
        "policy_problem": policy and policy.problem,
        "metrics": runs.metrics(db, id),
    }
    return Response(orjson.dumps(whole), media_type="application/json")  # a figure may be infinite, which JSON is not


@router.post("/v1/runs/{id}/cancel")
async def cancel_run(id: str, request: Request, operator: Operator) -> dict[str, Any]:
    """A queued run is cancelled at once, a running one ends in order a little later."""

    def cancel(db: Database) -> Run:
        run = _find(db, id)
        if run.status in OVER:
            raise ApiError(409, f"{id} has ended already ({run.status}).", code="run_ended")
        return runs.cancel(db, id, actor=operator.id)

    return run_json(await state_of(request).write(cancel))


@router.get("/v1/runs/{id}/events")
async def watch_run(id: str, request: Request, operator: Operator) -> Response:
    """Server-sent events: `status` at first and whenever status or stage change, `figures` for each step. Ends when the
    run has ended or the key is revoked. With the header Last-Event-ID it goes on after that event; after the last one
    the answer is 204."""
    state = state_of(request)
    after = request.headers.get("last-event-id", "")
    if _find(state.reader, id).status in OVER and after.split(",")[-1] == END:
        return Response(status_code=204)  # which tells a browser not to come back
    watch = RunWatch(id, after=after)

    def look() -> list[Event] | None:
        with closing(connect(state.settings.database)) as db:  # it may read thousands of figures: in a thread
            return watch.look(db) if keys.is_live(db, operator.id) else None

    async def respond(send: SendBytes) -> None:
        sent_at = time.monotonic()
        while True:
            if (events := await asyncio.to_thread(look)) is None:
                raise ApiError(401, "This API key was revoked.", code="invalid_api_key")
            if events:
                await send(b"".join(map(_encode, events)), last=watch.ended)
                sent_at = time.monotonic()
            elif time.monotonic() - sent_at > HEARTBEAT_S:
                await send(b": still here\n\n")
                sent_at = time.monotonic()
            if watch.ended:
                return
            await asyncio.sleep(LOOK_S)

    return EventStream(respond)


def _encode(event: Event) -> bytes:
    return f"event: {event.name}\nid: {event.id}\ndata: ".encode() + orjson.dumps(event.data) + b"\n\n"


def _find(db: Database, id: str) -> Run:
    try:
        return runs.get(db, id)
    except runs.UnknownRun:
        raise ApiError(404, f"There is no run '{id}'.", type="not_found_error", code="unknown_run") from None
