"""Who may call what: every route but health, metrics and the pages declares the role that its caller must have.

A program sends its API key. A page sends the cookie of a session, which browsers add to requests that other pages make
them send too; so what comes with the cookie alone must come from a page of ours (`check_same_origin`), and to change
anything it must carry the session's CSRF token, which only a page of ours can read."""

import hmac
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, Request

from data import keys, sessions
from data.types import Key, Role
from service.errors import ApiError
from service.state import State, state_of

COOKIE = "nightshift_session"
CSRF_HEADER = "x-csrf-token"
READS = ("GET", "HEAD")


def needs(role: Role) -> Any:
    """A dependency that yields the caller's `Key`, or answers 401 or 403."""

    async def authorised(request: Request) -> Key:
        state = state_of(request)
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        is_key = scheme.lower() == "bearer"  # what else comes is for a proxy in front, and may come with every request
        secret = None if is_key else request.cookies.get(COOKIE)
        key = _of_session(state, request, secret) if secret else _of_header(state, token.strip() if is_key else "")
        if not key.role.covers(role):
            raise ApiError(
                403,
                f"This needs a key of role {role}; yours is of role {key.role}. Ask an operator for one.",
                type="permission_error",
                code="insufficient_role",
            )
        return key

    authorised.role = role  # type: ignore[attr-defined]  # read by the test that walks the routes
    return Depends(authorised)


def _of_header(state: State, token: str) -> Key:
    if not token:
        raise ApiError(
            401,
            "You didn't send an API key. Send it as 'Authorization: Bearer KEY'; an operator makes one with"
            " `nightshift keys create`.",
            code="missing_api_key",
        )
    key = keys.authenticate(state.reader, token)
    if key is None:
        raise ApiError(
            401,
            "This API key is unknown or was revoked. Ask an operator for a new one (`nightshift keys create`).",
            code="invalid_api_key",
        )
    return key


def _of_session(state: State, request: Request, secret: str) -> Key:
    check_same_origin(request)
    key = sessions.authenticate(state.reader, secret)
    if key is None:
        raise ApiError(401, "Your session is over. Sign in again.", code="session_over")
    token = request.headers.get(CSRF_HEADER, "")
    if request.method not in READS and not hmac.compare_digest(token.encode(), sessions.csrf_token(secret).encode()):
        raise ApiError(
            403,
            "This request came with a session's cookie but without its token. Reload the page and try again.",
            type="permission_error",
            code="bad_csrf_token",
        )
    return key


def check_same_origin(request: Request) -> None:
    """Refuse what another site's page made a browser send. Raises ApiError.

    Browsers name the relation in Sec-Fetch-Site, except to plain HTTP on another machine; there they still send Origin
    with whatever may change something."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        ours = site == "same-origin" or (site == "none" and request.method in READS)  # none: typed into the address bar
    else:
        origin = request.headers.get("origin")
        try:
            ours = origin is None or urlsplit(origin).netloc == request.headers.get("host")
        except ValueError:  # no browser sends such a one
            ours = False
    if not ours:
        raise ApiError(
            403,
            "Another site's page sent this in your name, so it was refused.",
            type="permission_error",
            code="cross_site",
        )


def declared_role(dependencies: list[Callable[..., Any]]) -> Role | None:
    """The role that a route's dependencies ask for, if any does."""
    for call in dependencies:
        role = getattr(call, "role", None)
        if isinstance(role, Role):
            return role
    return None
