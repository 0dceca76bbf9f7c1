"""JSON and queries become Structs, and Structs become replies: the only place of the API that touches JSON.

What a client got wrong is a FieldError with the JSON pointer of the field, the keys of maps included.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web

from propolis.errors import FieldError, PropolisError

T = TypeVar("T")

MAX_BODY = 1 << 20
BODY_TIMEOUT = 30.0  # seconds for a body to arrive in
MAX_ECHO = 1000  # characters of a message that may repeat what the client sent
JSON = "application/json"

_AT = re.compile(r"(?P<message>.*) - at `(?P<path>[^`]*)`", re.DOTALL)
_STEP = re.compile(r"\.(?P<field>\w+)|\[(?P<index>\d+)\]|(?P<key>\[\.\.\.\])")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)

Path = tuple["str | int | None", ...]  # None: some key of a map


class BodyError(PropolisError):
    """A body that cannot be read at all."""

    code = "InvalidBody"
    status = 400


class BodyTooLargeError(BodyError):
    status = 413


class BodyTimeoutError(BodyError):
    status = 408


async def body(request: web.Request, content_type: str = JSON) -> bytes:
    """The body of a request. Raises BodyError where it is of another type, too large, or does not arrive."""
    if request.body_exists and request.headers.get("Content-Type") is not None and request.content_type != content_type:
        raise BodyError(f"a body of type {request.content_type[:MAX_ECHO]!r}: expected {content_type}")
    if (request.content_length or 0) > request.client_max_size:  # nothing to wait for
        raise BodyTooLargeError(f"the body is larger than {request.client_max_size} bytes")
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await request.read()
    except TimeoutError:
        raise BodyTimeoutError(f"the body did not arrive within {BODY_TIMEOUT:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise BodyTooLargeError(f"the body is larger than {MAX_BODY} bytes") from None
    except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, web.RequestPayloadError) as error:
        raise BodyError(f"read the body: {_short(str(error))}") from error


async def decode(request: web.Request, kind: type[T]) -> T:
    """The body as a `kind`."""
    if not request.body_exists:
        raise BodyError("there is no body")
    return decode_bytes(await body(request), kind)


def decode_bytes(data: bytes, kind: type[T]) -> T:
    """JSON as a `kind`. Raises FieldError, or BodyError where it is no JSON."""
    try:
        value = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _field_error(data, kind, error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BodyError(f"the body is no JSON: {_short(str(error))}") from error
    try:
        json.loads(data, object_pairs_hook=_refuse_twins)
    except (RecursionError, ValueError) as error:  # a number of more digits than Python reads
        raise BodyError(f"the body cannot be used: {_short(str(error))}") from error
    return value


def query(request: web.Request, kind: type[T]) -> T:
    """The query of a request as a `kind`."""
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name in given:
            raise FieldError([("", f"{name[:MAX_ECHO]!r} is given twice in the query")])
        given[name] = value
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        message, path = _parse(str(error))
        place = ".".join(map(str, path))
        raise FieldError([("", _short(f"{place}: {message}" if place else message) + " in the query")]) from error


def encode(value: object, status: int = 200) -> web.Response:
    """A reply."""
    return web.Response(body=msgspec.json.encode(value), status=status, content_type=JSON)


def no_content() -> web.Response:
    """The reply to what is done, or begun."""
    return web.Response(status=204)


def pointer(path: Path) -> str:
    """The JSON pointer of RFC 6901."""
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


def _refuse_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise FieldError([("", f"{name[:MAX_ECHO]!r} is given twice in one object")])
            seen.add(name)
    return found


def _field_error(data: bytes, kind: type[T], error: msgspec.ValidationError) -> FieldError:
    message, path = _parse(str(error))
    if None in path:
        message, path = _find_key(data, kind, message, path)
    return FieldError([(pointer(path), _short(message))])


def _parse(text: str) -> tuple[str, Path]:
    """The message of a ValidationError, apart from the path in it; a field that is named is part of the path."""
    path: list[str | int | None] = []
    match = _AT.fullmatch(text)  # up to the last " - at": a name that the client chose may have one as well
    if match is not None:
        text = match["message"]
        steps = _STEP.finditer(match["path"])
        path += [step["field"] or (int(step["index"]) if step["index"] else None) for step in steps]
    if named := _MISSING.fullmatch(text) or _UNKNOWN.fullmatch(text):
        path.append(named[1])
    return text, tuple(path)


def _find_key(data: bytes, kind: type[T], message: str, path: Path) -> tuple[str, Path]:
    """Which entries of maps are meant: msgspec does not say, so ever smaller parts of each map are tried."""
    root = msgspec.json.decode(data)
    while None in path:
        at = path.index(None)
        known = path[:at]
        table: Any = root
        for step in known:
            table = table[step]
        entries = list(table.items())
        while len(entries) > 1:
            half = entries[: len(entries) // 2]
            table.clear()
            table.update(half)
            entries = half if _fails_at(root, kind, known) else entries[len(half) :]
        table.clear()
        table.update(entries)
        failure = _fails_at(root, kind, known)
        if failure is None:
            return message, known
        message, path = failure
        path = (*known, entries[0][0], *path[at + 1 :])
    return message, path


def _fails_at(root: object, kind: type[T], prefix: Path) -> tuple[str, Path] | None:
    """How `root` fails to be a `kind` at some key of the map at `prefix`, if it does."""
    try:
        msgspec.convert(root, kind)
    except msgspec.ValidationError as error:
        message, path = _parse(str(error))
        # A key that is known by now is again none in the message; and there has to be one after the prefix.
        expected = zip(path, (*prefix, None), strict=False)
        if len(path) > len(prefix) and all(found is None or found == known for found, known in expected):
            return message, path
    return None


def _short(text: str) -> str:
    return text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "…"
