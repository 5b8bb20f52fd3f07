"""Errors as OpenAI shapes them: {"error": {"message", "type", "code", "param"}}, and what to do in the message."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pysqlite3 import dbapi2 as sqlite3
from starlette.exceptions import HTTPException

log = logging.getLogger("nightshift")


class ApiError(HTTPException):
    """An answer other than 2xx, complete with what the client should do.

    An HTTPException, since FastAPI turns any other that is raised while it reads a body into a 400 of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        again: bool = True,
    ) -> None:
        """`again`: OpenAI's clients repeat what failed with this status; False where that is no use."""
        super().__init__(status, message)
        self.retry_after_s = retry_after_s
        self.again = again
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "code": code, "param": param}}

    def response(self) -> JSONResponse:
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if not self.again:
            headers["x-should-retry"] = "false"
        if self.status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status_code, headers)


def not_ready(retry_after_s: int = 5) -> ApiError:
    return ApiError(
        503,
        "The model is not ready yet: no engine has loaded the serving policy. Try again in a few seconds.",
        type="service_unavailable_error",
        code="engine_not_ready",
        retry_after_s=retry_after_s,
    )


def model_not_found(name: str, ours: str) -> ApiError:
    return ApiError(
        404,
        f"There is no model '{name}' here; the one that serves is called '{ours}'.",
        code="model_not_found",
        param="model",
    )


def engine_failed(detail: str) -> ApiError:
    return ApiError(
        502,
        f"The engine broke off before the answer was complete ({detail}). Nothing was stored as an answer: try again.",
        type="server_error",
        code="engine_failed",
    )


def rejected_by_engine(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code="rejected_by_engine", param=param)


def storage_unavailable(error: Exception) -> ApiError:
    log.error("The record could not be written or read: %s", error)
    return ApiError(
        503,
        "The record could not be written or read. Nothing was acknowledged; the operator should check the disk, and"
        " will find more in the log. Try again later.",
        type="server_error",
        code="storage_unavailable",
        retry_after_s=10,
    )


def _first_wrong(error: RequestValidationError) -> tuple[dict[str, Any], str | None]:
    """The first thing that is wrong with a request, and its place as the client knows it: "messages.1.role".

    Where a value may be of several kinds, each kind complains: the complaint that goes deepest is about the kind that
    was meant, and one that is not about the kind at all."""
    errors = error.errors()
    of_one_parameter = [one for one in errors if one["loc"][:2] == errors[0]["loc"][:2]]
    deepest = max(of_one_parameter, key=lambda one: (len(_place(one, error.body)), not one["type"].endswith("_type")))
    return deepest, ".".join(_place(deepest, error.body)) or None


def _place(error: dict[str, Any], body: Any) -> list[str]:
    """The names and numbers that lead to `error` in the body, without the kinds that pydantic puts between them."""
    if error["loc"][0] != "body":
        return [str(part) for part in error["loc"][1:]]
    place = []
    for part in error["loc"][1:]:
        if isinstance(body, dict):
            leads_on = part in body
        else:
            leads_on = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if leads_on:
            body = body[part]
            place.append(str(part))
    return [*place, str(error["loc"][-1])] if error["type"] == "missing" else place


def install(app: FastAPI) -> None:
    """Give every error the one shape."""

    @app.exception_handler(ApiError)
    async def _ours(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        first, param = _first_wrong(error)
        if first["type"] == "json_invalid":
            message = f"The body is not valid JSON ({first['ctx']['error']} at byte {first['loc'][-1]})."
            return ApiError(400, message, code="invalid_json").response()
        if first["type"] == "extra_forbidden":
            message = f"Unsupported parameter: '{param}' is not taken here. Leave it out."
            return ApiError(400, message, code="unsupported_parameter", param=param).response()
        if first["loc"] == ("body",):
            message = "The body must be a JSON object, sent with 'Content-Type: application/json'."
            return ApiError(400, message, code="invalid_body").response()
        if first["type"] == "missing":
            message = f"Missing required parameter: '{param}'."
            return ApiError(400, message, code="missing_required_parameter", param=param).response()
        message = first["msg"].removeprefix("Value error, ")
        message = f"Invalid value for '{param}': {message}."
        return ApiError(400, message, code="invalid_value", param=param).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            message = f"There is no {request.method} {request.url.path}."
            return ApiError(404, message, type="not_found_error", code="unknown_url").response()
        if error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}."
            return ApiError(405, message, code="method_not_allowed").response()
        if error.status_code == 400:  # FastAPI's own: not UTF-8, or nested too deeply
            message = "The body is not valid JSON: it cannot be read as UTF-8, or is nested too deeply."
            return ApiError(400, message, code="invalid_json").response()
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(sqlite3.OperationalError)
    async def _storage(request: Request, error: sqlite3.OperationalError) -> JSONResponse:
        return storage_unavailable(error).response()

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        return ApiError(
            500, "Something unexpected went wrong here; the log has the details.", type="server_error", code="internal"
        ).response()
