"""Who may call what: every route but health and metrics declares the role that its key must have."""

from collections.abc import Callable
from typing import Any

from fastapi import Depends, Request

from data import keys
from data.types import Key, Role
from service.errors import ApiError
from service.state import state_of


def needs(role: Role) -> Any:
    """A dependency that yields the caller's `Key`, or answers 401 or 403."""

    async def authorised(request: Request) -> Key:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise ApiError(
                401,
                "You didn't send an API key. Send it as 'Authorization: Bearer KEY'; an operator makes one with"
                " `nightshift keys create`.",
                code="missing_api_key",
            )
        key = keys.authenticate(state_of(request).reader, token.strip())
        if key is None:
            raise ApiError(
                401,
                "This API key is unknown or was revoked. Ask an operator for a new one (`nightshift keys create`).",
                code="invalid_api_key",
            )
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


def declared_role(dependencies: list[Callable[..., Any]]) -> Role | None:
    """The role that a route's dependencies ask for, if any does."""
    for call in dependencies:
        role = getattr(call, "role", None)
        if isinstance(role, Role):
            return role
    return None
