"""Errors become replies in one place: the middleware that every application of ours has.

Also there: the number of a request, which its reply and the log share, and the check of the API's version.
"""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING

from aiohttp import web

from propolis.errors import ConfigError, FieldError, ForbiddenStateError, PropolisError, StateError
from propolis.http import codec, v5

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
API_VERSION = "api-version"
SUPPORTED_VERSIONS = (v5.API_VERSION,)

_NUMBER: web.RequestKey[str] = web.RequestKey("request_id", str)


def request_id(request: web.Request) -> str:
    """The number of a request: the client's where it has one that is a UUID, as the router's has."""
    number = request.get(_NUMBER)
    if number is None:
        number = _uuid(request.headers.get(REQUEST_ID, "")) or str(uuid.uuid4())
        request[_NUMBER] = number
    return number


def _uuid(text: str) -> str | None:
    if len(text) != 36:
        return None
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Runs a handler; whatever goes wrong is a JSON body with the error's own status."""
    try:
        _check_version(request)
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _from_aiohttp(request, error)
    except PropolisError as error:
        if error.status >= 500:
            log.error("request failed: request=%s %s", request_id(request), _printable(str(error)))  # noqa: TRY400
        return reply(request, error)
    except Exception:
        log.exception("bug: request=%s method=%s path=%r", request_id(request), request.method, request.path)
        return _body(request, 500, "Internal", "an error of the server's own; its log has more under this request_id")


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """Every reply has its request's number; the signal `on_response_prepare`."""
    response.headers[REQUEST_ID] = request_id(request)


def reply(request: web.Request, error: PropolisError) -> web.Response:
    """The reply that reports an error."""
    message = str(error)
    code = error.code
    if isinstance(error, ForbiddenStateError):  # where 5.0.0 has its reason
        code = f"instance state change not allowed: {message}"
    state = error.state if isinstance(error, StateError) else None
    pointer = error.pointer if isinstance(error, FieldError) else None
    return _body(request, error.status, code, message, state=state, pointer=pointer or None)


def _check_version(request: web.Request) -> None:
    version = request.headers.get(API_VERSION)
    if version is not None and version.strip() not in SUPPORTED_VERSIONS:
        expected = ", ".join(SUPPORTED_VERSIONS)
        raise ConfigError(f"{API_VERSION} {version[:100]!r} is not served: expected {expected}")


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> web.Response:
    """What the framework itself refuses: no such route, no such method."""
    messages = {
        404: f"there is no {request.path[: codec.MAX_ECHO]}",
        405: f"{request.method[:100]} is not for {request.path[: codec.MAX_ECHO]}",
    }
    codes = {404: "NotFound", 405: "MethodNotAllowed"}
    response = _body(
        request, error.status, codes.get(error.status, "Refused"), messages.get(error.status, error.reason)
    )
    if allow := error.headers.get("Allow"):
        response.headers["Allow"] = allow
    return response


def _body(
    request: web.Request, status: int, code: str, message: str, *, state: str | None = None, pointer: str | None = None
) -> web.Response:
    body = v5.Error(request_id=request_id(request), message=message, error_code=code, state=state, pointer=pointer)
    return codec.encode(body, status)


def _printable(text: str) -> str:
    """One line of a log, whatever a client put into it."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
