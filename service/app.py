"""Wiring only: settings in, an ASGI app out."""

import gc
import logging
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data import registry, swaps
from data.database import Writer, connect
from data.settings import Settings, load_settings
from data.types import Key, Policy, Role
from service import admin, board, chat, comparisons, errors, policies, raters, runs, schedules, web
from service.auth import needs
from service.engine import Engines
from service.errors import ApiError, model_not_found, not_ready
from service.hot_swap import HotSwap
from service.metrics import Metrics
from service.scoring import Scorer
from service.state import State, state_of

SIGN_IN_BYTES = 8_000


def create_app(settings: Settings | None = None, *, rng: random.Random | None = None) -> FastAPI:
    """The whole API. The engines named in `settings.engine.urls` are watched while the app's lifespan runs."""
    settings = settings or load_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = _open_state(settings, metrics, rng or random.SystemRandom())
        app.state.nightshift = state
        await state.engines.start()
        state.hot_swap.start()
        await state.scorer.start()
        try:
            yield
        finally:
            await state.scorer.close()
            await state.hot_swap.close()
            await state.engines.close()
            state.writer.close()
            state.renderer.shutdown(wait=False, cancel_futures=True)
            state.reader.close()

    metrics = Metrics()
    app = FastAPI(title="Nightshift", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    for part in (chat, comparisons, raters, policies, admin, web, runs, schedules, board):
        app.include_router(part.router)
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", get_model, methods=["GET"])
    app.add_api_route("/healthz", healthz, methods=["GET", "HEAD"])
    app.add_api_route("/readyz", readyz, methods=["GET", "HEAD"])
    app.add_api_route("/metrics", metrics_text, methods=["GET"])
    app.add_middleware(BodyLimit, largest=settings.server.max_body_bytes)
    app.add_middleware(Measured, metrics=metrics)
    return app


def _open_state(settings: Settings, metrics: Metrics, rng: random.Random) -> State:
    reader = connect(settings.database)
    writer = Writer(settings.database)

    def wanted() -> list[Policy]:
        policies = swaps.wanted(reader)
        if not policies:
            raise RuntimeError(f"{settings.database} holds no policy to serve: start with `nightshift up`")
        return policies

    def folder_of(policy: Policy) -> Path:
        with closing(connect(settings.database)) as db:  # in another thread: it reads the whole folder
            return registry.servable_folder(db, settings.state, policy, max_rank=settings.engine.max_lora_rank)

    engines = Engines(settings.engine, home=(settings.state / "policies").resolve(), wanted=wanted, folder_of=folder_of)
    hot_swap = HotSwap(settings, reader, writer, engines, metrics)
    renderer = ThreadPoolExecutor(1, thread_name_prefix="markdown")
    return State(settings, reader, writer, engines, hot_swap, Scorer(settings, metrics), metrics, rng, renderer)


async def list_models(request: Request, key: Annotated[Key, needs(Role.USER)]) -> dict[str, Any]:
    return {"object": "list", "data": [_model(state_of(request))]}


async def get_model(name: str, request: Request, key: Annotated[Key, needs(Role.USER)]) -> dict[str, Any]:
    model = _model(state_of(request))
    if name != model["id"]:
        raise model_not_found(name, model["id"])
    return model


def _model(state: State) -> dict[str, Any]:
    return {"id": state.settings.chat.model_name, "object": "model", "created": 0, "owned_by": "nightshift"}


async def healthz() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


async def readyz(request: Request) -> dict[str, Any]:
    """200 once an engine holds the serving policy and has answered a warm-up request."""
    state = state_of(request)
    if not state.engines.ready:
        error = not_ready()
        error.body["error"]["engines"] = state.engines.problems
        raise error
    serving = registry.serving(state.reader)
    return {"status": "ready", "policy": serving.name if serving else None}


async def metrics_text(request: Request) -> Response:
    state = state_of(request)
    for number, engine in enumerate(state.engines.engines, 1):  # as /readyz counts them; a URL is nobody's business
        state.metrics.engine_ready.labels(number).set(engine.ready)
        state.metrics.engine_in_flight.labels(number).set(engine.in_flight)
    state.metrics.serving.clear()
    if state.engines.serving:
        state.metrics.serving.labels(state.engines.serving).set(1)
    state.metrics.scored_by.clear()
    if state.scorer.reward_model:
        state.metrics.scored_by.labels(state.scorer.reward_model).set(1)
    state.metrics.duel_e_value.clear()
    if duel := state.hot_swap.duel:
        state.metrics.duel_e_value.labels(duel.kind, duel.challenger, duel.incumbent).set(duel.e_value)
    return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")


class BodyLimit:
    """Refuses a body as soon as it is known to be too large, before anything parses it. What anybody may send without a
    key is short."""

    def __init__(self, app: ASGIApp, *, largest: int) -> None:
        self._app = app
        self._largest = largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        largest = min(self._largest, SIGN_IN_BYTES) if scope["path"] == "/sign-in" else self._largest
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > largest:
            return await _too_large(largest).response()(scope, receive, send)
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > largest:
                raise _too_large(largest)
            return message

        await self._app(scope, counted, send)


def _too_large(largest: int) -> ApiError:
    message = f"The body is larger than {largest} bytes. Send fewer or shorter messages."
    return ApiError(413, message, code="body_too_large")


class Measured:
    """Counts requests by route and status, and their time to the last byte."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        status = 499  # the client went away before the response began

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(scope["method"], route, status).inc()
            self._metrics.request_s.labels(route).observe(time.perf_counter() - started)


def serve() -> None:
    """Run the API as `nightshift up` does: `python -m service.app`."""
    import uvicorn

    settings = load_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    app = create_app(settings)
    # Requests free nearly all they make by reference counting. A full collection would go through the modules and stop
    # every stream for tens of milliseconds to find nothing: take them out of it, and collect seldom.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    uvicorn.run(
        app,
        host=settings.server.host,
        port=settings.server.port,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=settings.server.shutdown_timeout_s,
        server_header=False,
    )


if __name__ == "__main__":
    serve()
