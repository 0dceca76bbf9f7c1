"""What a server answers: the errors that its refusals are raised as, and the replies of routes that are ours."""

from __future__ import annotations

import uuid  # noqa: TC003 -- msgspec looks at it
from typing import NoReturn, TypeVar

import msgspec

from propolis.errors import (
    AlreadyInitializedError,
    ConfigError,
    NoInstanceError,
    NotFoundError,
    PropolisError,
    StateError,
    UnreachableGenerationError,
)
from propolis.http import v5

T = TypeVar("T")

_SHOWN = 1000  # characters of a reply that is not what it should be


def decode(body: bytes, kind: type[T]) -> T:
    """A reply."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadReplyError(f"the server's answer is none of this API: {error}") from error


# -- what is refused, and what does not answer -------------------------------------------------------------------------


class ReplyError(PropolisError):
    """A server refused or failed: `status` and `code` as it said them, `pointer` to the field of the request."""

    def __init__(self, status: int, error: v5.Error) -> None:
        super().__init__(error.message)
        self.status = status
        self.code = error.error_code or self.code
        self.state = error.state
        self.pointer = error.pointer
        self.request_id = error.request_id


class RefusedError(ReplyError, ConfigError):
    """The request itself is wrong."""


class DeniedError(ReplyError, StateError):
    """The VM's state does not admit it, or something else is in its place."""


class UnknownVmError(ReplyError, NotFoundError):
    """There is no VM of that name, or nothing at that place."""


class NoVmError(ReplyError, NoInstanceError):
    """A server of one VM has none."""


class VmExistsError(ReplyError, AlreadyInitializedError):
    """There is one already, and it is another."""


class VmIsOverError(ReplyError, UnreachableGenerationError):
    """The VM's state will not change any more."""


class UnauthorizedError(ReplyError):
    """The server wants a token, or another one."""


class UnavailableError(ReplyError):
    """The server cannot answer now, and may later."""


class UnreachableError(PropolisError):
    """No server answers."""

    code = "unreachable"
    status = 503


class UntrustedError(UnreachableError):
    """One answers with a certificate that is not trusted here."""


class BadReplyError(PropolisError):
    """What answers is no such server."""

    code = "bad_reply"
    status = 502


_BY_CODE: dict[tuple[int, str], type[ReplyError]] = {(409, "AlreadyInitialized"): VmExistsError}
_BY_STATUS: dict[int, type[ReplyError]] = {
    400: RefusedError,
    401: UnauthorizedError,
    403: DeniedError,
    404: UnknownVmError,
    408: RefusedError,
    409: DeniedError,
    410: VmIsOverError,
    413: RefusedError,
    415: RefusedError,
    422: RefusedError,
    424: NoVmError,
    429: UnavailableError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def refuse(status: int, body: bytes) -> NoReturn:
    """Raise what a reply that is no success means."""
    try:
        error = msgspec.json.decode(body, type=v5.Error)
    except (msgspec.MsgspecError, RecursionError):
        text = body[:_SHOWN].decode(errors="replace").strip()
        error = v5.Error(request_id="", message=f"the server answered {status}{f': {text}' if text else ''}")
    kind = _BY_CODE.get((status, error.error_code or "")) or _BY_STATUS.get(status, ReplyError)
    raise kind(status, error)


# -- replies that are ours ---------------------------------------------------------------------------------------------


class VmSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A VM in the list of all; `created` is seconds since 1970."""

    name: str
    uuid: uuid.UUID
    state: v5.InstanceState
    cpus: int
    memory_mib: int
    paused: bool = False
    detail: str = ""
    created: float | None = None


class VmList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of the list of all; `next` is where the following one begins."""

    instances: tuple[VmSummary, ...]
    next: str | None = None


class ConsoleHistory(msgspec.Struct, frozen=True, kw_only=True):
    """Part of what a serial port printed, and the offset just after it."""

    data: list[int]
    last_byte_offset: int


class LogPiece(msgspec.Struct, frozen=True, kw_only=True):
    """Part of a VM's log, and the offset just after it."""

    text: str
    last_byte_offset: int


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a VM; `time` is seconds since 1970."""

    id: int
    kind: str
    time: float = 0.0
    name: str = ""
    uuid: str = ""
    state: str | None = None
    detail: str | None = None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that the host needs, and how to mend it where it is missing."""

    name: str
    status: str  # "ok", "warning" or "error"
    message: str
    remedy: str | None = None


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All that was looked at."""

    checks: tuple[Check, ...]


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """What the server is, and which versions of the API it speaks."""

    version: str
    api: tuple[str, ...] = ()
