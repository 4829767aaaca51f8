"""Errors as OpenAI's API has them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gspo.core.errors import BusyError, GspoError, RequestError, ServeError

HUNG_UP = 499
"""The status of a request whose client left before its answer was out; nobody reads it."""
_RETRY_SECONDS = 1
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer that is no success holds."""

    error: ErrorDetail


class Refusal(ServeError):
    """A request that is answered with this status.

    Args:
        status: of HTTP.
        message: for the person who reads it.
        code: for the program that reads it.
        param: what of the request is to blame.
        headers: beside the usual ones; `_` stands for `-`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        **headers: str,
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


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
    """Return status and body: a `Refusal`'s own, 400 if the request is to blame, 429 if it should
    be sent again later, else 500.

    >>> refusal(RequestError("n = 0: must be in 1..4096", "n"))[1]["error"]["param"]
    'n'
    """
    message, param, code, status = str(error), None, None, 500
    if isinstance(error, Refusal):
        status, code, param = error.status, error.code, error.param
    elif isinstance(error, RequestError):
        status, param = 400, error.param
    elif isinstance(error, BusyError):
        status = 429
    elif isinstance(error, RequestValidationError):
        message, param = _of_validation(error)
        status = 400
    elif isinstance(error, HTTPException):
        message, status = str(error.detail), error.status_code
    elif not isinstance(error, GspoError):
        message = f"an error of the server itself, {type(error).__name__}: see its log"
    message = message.encode(errors="backslashreplace").decode()  # half a surrogate pair is no text
    param = param if param is None else param.encode(errors="backslashreplace").decode()
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """The answer that an error is."""
    status, body = refusal(error)
    headers = dict(getattr(error, "headers", None) or {})  # such as Allow, of a 405
    if status in (429, 503):
        headers.setdefault("Retry-After", str(_RETRY_SECONDS))
    return JSONResponse(body, status_code=status, headers=headers)


def _of_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """Name the first field that is wrong. A union names a field once for each of its kinds."""
    first = error.errors()[0]
    names = [str(name) for name in first["loc"] if name != "body"]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']} at character {names[0]}", None
    if not names and first["type"] == "value_error":
        return f"the body: {first['ctx']['error']}", None
    if not names:
        return f"the body must be a JSON object, sent as application/json: {first['msg']}", None
    param = ".".join(names)
    return f"{param}: {first['msg']}", param


async def _answer(http: fastapi.Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and error.detail in _STOCK:
        said = _STOCK[error.detail].format(http.method, http.url.path)
        error = HTTPException(error.status_code, said, error.headers)
    return error_response(error)


_STOCK = {
    "Not Found": "no route {1}. A base URL ends in /v1, and /openapi.json lists all routes. This "
    "server writes text: embeddings, images and audio need another one",
    "Method Not Allowed": "{1} does not answer {0}: see /openapi.json",
}
"""Starlette's own words for them, which name nothing."""
