"""Errors as OpenAI's API has them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gspo.core.errors import BusyError, GspoError, RequestError, ServeError

RETRY_SECONDS = 1
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer that is no success holds."""

    error: ErrorDetail


class UnknownModelError(RequestError):
    """The server has no such model (HTTP 404)."""


class HungUpError(ServeError):
    """The client left before its answer was there; nobody reads this one."""


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request is to blame, or comes too early"},
    "5XX": {"model": ErrorBody, "description": "the server failed"},
}
"""The errors that any route may answer with, for the server's document."""


def add_handlers(app: fastapi.FastAPI) -> None:
    """Make the app answer each error in OpenAI's form."""
    for kind in (GspoError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)


def refusal(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return status and body: 400 if the request is to blame, 404 for an unknown model, 429 if it
    should be sent again later, else 500.

    >>> refusal(RequestError("n = 0: must be in 1..4096", "n"))[1]["error"]["param"]
    'n'
    """
    message, param, code, status = str(error), None, None, 500
    if isinstance(error, RequestError):
        param, status = error.param, 400
        if isinstance(error, UnknownModelError):
            status, code = 404, "model_not_found"
    elif isinstance(error, BusyError):
        status = 429
    elif isinstance(error, HungUpError):
        status = 499
    elif isinstance(error, RequestValidationError):
        message, param = _of_validation(error)
        status = 400
    elif isinstance(error, HTTPException):
        message, status = str(error.detail), error.status_code
    elif not isinstance(error, GspoError):
        message = f"an error of the server itself, {type(error).__name__}: see its log"
    message = message.encode(errors="backslashreplace").decode()  # half a surrogate pair is no text
    param = param if param is None else param.encode(errors="backslashreplace").decode()
    return status, error_body(status, message, param, code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the body that goes with a status."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _of_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """Name the first field that is wrong. A union names a field once for each of its kinds."""
    first = error.errors()[0]
    names = [str(name) for name in first["loc"] if name != "body"]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']} at character {names[0]}", None
    if not names:
        return f"the body must be a JSON object, sent as application/json: {first['msg']}", None
    param = ".".join(names)
    return f"{param}: {first['msg']}", param


async def _answer(http: fastapi.Request, error: Exception) -> JSONResponse:
    status, body = refusal(error)
    headers = dict(getattr(error, "headers", None) or {})  # Allow, of a 405
    if isinstance(error, HTTPException) and status in (404, 405) and error.detail in _STOCK:
        body["error"]["message"] = _STOCK[error.detail].format(http.method, http.url.path)
    if status == 429:
        headers.setdefault("Retry-After", str(RETRY_SECONDS))
    return JSONResponse(body, status_code=status, headers=headers)


_STOCK = {
    "Not Found": "no route {1}. A base URL ends in /v1, and /openapi.json lists all routes. This "
    "server writes text: embeddings, images and audio need another one",
    "Method Not Allowed": "{1} does not answer {0}: see /openapi.json",
}
"""Starlette's own words for them, which name nothing."""
