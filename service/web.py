"""What browsers get: the pages and their files, sign-in and sessions, the conversations that the chat page keeps, and
Markdown made safe. No page or file of ours names another host, and the Content-Security-Policy allows none."""

import asyncio
import hashlib
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from data import comparisons, conversations, keys, sessions
from data.types import Choice, Key, Role, timestamp
from service import markdown
from service.auth import COOKIE, check_same_origin, needs
from service.errors import ApiError
from service.state import state_of

router = APIRouter()
User = Annotated[Key, needs(Role.USER)]

LONGEST_MARKDOWN = 200_000
"""Characters of one request. Some take tens of microseconds each, and the page shows as text what is not rendered."""
PAGES = Path(__file__).parent / "pages"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none';"
        " require-trusted-types-for 'script'; trusted-types rendered-by-the-service"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # kept, but asked for again: a new version is seen at once
    "Vary": "Cookie",
}


# Pages and their files


@router.get("/")
async def chat_page(request: Request) -> Response:
    return _page(request, "chat.html")


@router.get("/rate")
async def rating_desk(request: Request) -> Response:
    return _page(request, "rate.html")


@router.get("/board")
async def operators_board(request: Request) -> Response:
    return _page(request, "board.html")


@router.get("/sign-in")
async def sign_in_page(request: Request) -> Response:
    """Where sign-in links lead, whoever is signed in."""
    return _file(request, "sign-in.html")


def _page(request: Request, name: str) -> Response:
    """The page, or in its place the door: after signing in, the same address shows what was wanted."""
    secret = request.cookies.get(COOKIE)
    signed_in = secret is not None and sessions.authenticate(state_of(request).reader, secret) is not None
    return _file(request, name if signed_in else "sign-in.html")


def _static_file(name: str) -> Any:
    async def static_file(request: Request) -> Response:
        return _file(request, name)

    return static_file


for _path in sorted((PAGES / "static").iterdir()):
    router.add_api_route(f"/static/{_path.name}", _static_file(f"static/{_path.name}"), methods=["GET"])


def _file(request: Request, name: str) -> Response:
    body, tag = _read(name)
    headers = HEADERS | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=MEDIA_TYPES[Path(name).suffix], headers=headers)


@cache
def _read(name: str) -> tuple[bytes, str]:
    body = (PAGES / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'


# Signing in and out


class SignIn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    key: Annotated[str, Field(max_length=500)] | None = None
    code: Annotated[str, Field(max_length=500)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "SignIn":
        if (self.key is None) == (self.code is None):
            raise ValueError("send either 'key' or 'code'")
        return self


@router.post("/sign-in", status_code=204)
async def sign_in(body: SignIn, request: Request) -> Response:
    """An API key, or the code of a sign-in link, becomes a session's cookie, which no script can read. Who comes by a
    link and is signed in with as much of a role stays so: each start's link is of a new key, and conversations and
    votes that wait are the earlier one's."""
    check_same_origin(request)
    state = state_of(request)
    lasts_s = state.settings.server.session_s
    before = request.cookies.get(COOKIE)

    def begin(db: Any) -> str | None:
        if body.code is not None:
            secret = sessions.use_code(db, body.code, lasts_s=lasts_s)
            was, is_now = (one and sessions.authenticate(db, one) for one in (before, secret))
            if was and is_now and was.role.covers(is_now.role):
                sessions.end(db, secret or "")
                return before
        else:
            key = keys.authenticate(db, body.key or "")
            secret = None if key is None else sessions.create(db, key.id, lasts_s=lasts_s)
        if secret is not None and before is not None:
            sessions.end(db, before)
        return secret

    secret = await state.write(begin)
    if secret is None and body.code is not None:
        minutes = round(sessions.CODE_S / 60)
        message = f"This link was used before, or is older than {minutes} minutes. Sign in with an API key."
        raise ApiError(401, message, code="invalid_sign_in_code")
    if secret is None:
        message = "This API key is unknown or was revoked. Ask an operator for a new one (`nightshift keys create`)."
        raise ApiError(401, message, code="invalid_api_key")
    response = Response(status_code=204)
    response.set_cookie(
        COOKIE, secret, max_age=round(lasts_s), httponly=True, samesite="lax", secure=request.url.scheme == "https"
    )
    return response


@router.get("/v1/session")
async def get_session(request: Request, response: Response, key: User) -> dict[str, Any]:
    """Who is signed in, and what a page needs to know."""
    response.headers["Cache-Control"] = "no-store"
    settings = state_of(request).settings
    secret = request.cookies.get(COOKIE)
    return {
        "key": key.id,
        "label": key.label,
        "role": key.role,
        "feedback": key.feedback,
        "csrf": sessions.csrf_token(secret) if secret else None,
        "model": settings.chat.model_name,
        "vote_window_s": settings.comparisons.vote_window_s,
    }


@router.delete("/v1/session", status_code=204)
async def sign_out(request: Request, key: User) -> Response:
    secret = request.cookies.get(COOKIE)
    if secret is not None:
        await state_of(request).write(lambda db: sessions.end(db, secret))
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="lax", secure=request.url.scheme == "https")
    return response


# Conversations


_Text = Annotated[str, Field(max_length=2**24)]
"""`server.max_body_bytes` is the limit that is met first; a bound here makes pydantic refuse half surrogates."""


class _Cast(BaseModel):
    model_config = ConfigDict(extra="forbid")
    choice: Choice
    policies: dict[Literal["a", "b"], _Text]


class _Pair(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: _Text
    expires_at: _Text
    answers: tuple[_Text, _Text]
    cut: tuple[bool, bool] = (False, False)
    choice: Choice | Literal["skip"] | None
    policies: dict[Literal["a", "b"], _Text] | None
    voted_at: _Text | None = None
    cast: _Cast | None = None
    """The vote on record, while `choice` may be on its way."""


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["user", "assistant"]
    content: _Text
    policy: _Text | None = None
    stopped: bool = False
    cut: bool = False
    pair: _Pair | None = None


class ConversationRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    title: Annotated[str, Field(max_length=200)]
    messages: Annotated[list[_Turn], Field(fail_fast=True)]

    @property
    def fields(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


@router.get("/v1/conversations")
async def list_conversations(request: Request, key: User) -> dict[str, Any]:
    return {"object": "list", "data": conversations.list_all(state_of(request).reader, key.id)}


@router.post("/v1/conversations", status_code=201)
async def create_conversation(body: ConversationRequest, request: Request, key: User) -> dict[str, str]:
    return {"id": await state_of(request).write(lambda db: conversations.create(db, key.id, **body.fields))}


@router.get("/v1/conversations/{id}")
async def get_conversation(id: str, request: Request, key: User) -> dict[str, Any]:
    try:
        found = conversations.find(state_of(request).reader, key.id, id)
    except conversations.UnknownConversation:
        raise _unknown_conversation(id) from None
    return {"id": found.id, "title": found.title, "messages": found.messages, "updated_at": found.updated_at}


@router.put("/v1/conversations/{id}")
async def replace_conversation(id: str, body: ConversationRequest, request: Request, key: User) -> dict[str, str]:
    try:
        await state_of(request).write(lambda db: conversations.replace(db, key.id, id, **body.fields))
    except conversations.UnknownConversation:
        raise _unknown_conversation(id) from None
    return {"id": id}


@router.delete("/v1/conversations/{id}", status_code=204)
async def delete_conversation(id: str, request: Request, key: User) -> Response:
    """It leaves the list; answers and votes stay in the record until the user is forgotten."""
    try:
        await state_of(request).write(lambda db: conversations.delete(db, key.id, id))
    except conversations.UnknownConversation:
        raise _unknown_conversation(id) from None
    return Response(status_code=204)


def _unknown_conversation(id: str) -> ApiError:
    message = f"You have no conversation '{id}'; it may have been deleted."
    return ApiError(404, message, type="not_found_error", code="unknown_conversation")


# What the pages show


class MarkdownRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    texts: Annotated[list[_Text], Field(max_length=1000)]

    @field_validator("texts")
    @classmethod
    def _is_soon_done(cls, texts: list[str]) -> list[str]:
        if (length := sum(map(len, texts))) > LONGEST_MARKDOWN:
            raise ValueError(f"{length:,} characters in all; {LONGEST_MARKDOWN:,} are rendered at a time")
        return texts


@router.post("/v1/markdown")
async def render_markdown(body: MarkdownRequest, key: User, request: Request) -> dict[str, list[str]]:
    """The safe HTML of each text."""
    loop, renderer = asyncio.get_running_loop(), state_of(request).renderer
    return {"html": [await loop.run_in_executor(renderer, markdown.render, text) for text in body.texts]}


@router.get("/v1/votes/count")
async def count_votes(
    request: Request, key: Annotated[Key, needs(Role.RATER)], since: Annotated[AwareDatetime, Query()]
) -> dict[str, int]:
    """How many comparisons the caller has voted on since then."""
    # At either end of the calendar a zone leads out of it.
    moment: datetime = min(max(since, datetime(1970, 1, 1, tzinfo=UTC)), datetime.now(UTC))
    return {"count": comparisons.count_votes(state_of(request).reader, key.id, since=timestamp(moment))}
