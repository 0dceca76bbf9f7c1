"""From the daemon to a VM's worker: requests are passed on to its unix socket, and their replies back as they come."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, NamedTuple, Self, cast

import aiohttp
from aiohttp import web
from yarl import URL

from propolis.errors import BackendError
from propolis.http import codec, errors
from propolis.http.access import ACCESS, Access
from propolis.http.websocket_filter import ControlFrames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from propolis.instance import Instance
    from propolis.running_vm import RunningVm

_CONNECT_SECONDS = 5.0
_SMALL = 1 << 20  # a reply up to this size is passed on in one piece
_PIECE = 65536
_MAX_HEAD = 16384
_PASSED_ON = ("content-type", "last-event-id", errors.API_VERSION)
_PASSED_BACK = ("content-type", "cache-control", "allow", "retry-after")
_UPGRADE = ("sec-websocket-key", "sec-websocket-version", "sec-websocket-protocol", errors.API_VERSION, "last-event-id")
_OWN_PREFIXES = ("propolis-", "x-propolis-")


class WorkerGoneError(BackendError):
    """The worker ended before it answered."""

    code = "worker_gone"
    status = 503


class Answer(NamedTuple):
    """A worker's whole reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def response(self) -> web.Response:
        """The same to the client."""
        return web.Response(status=self.status, headers=_back(self.headers), body=self.body)


class Workers:
    """Connections to the workers' sockets. Async context manager."""

    def __init__(self) -> None:
        self._sessions: dict[Instance, tuple[RunningVm, aiohttp.ClientSession]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Twice is fine."""
        sessions = [session for _, session in self._sessions.values()]
        self._sessions.clear()
        for session in sessions:
            await session.close()
        if self._closing:
            await asyncio.wait(self._closing)

    async def forget(self, instance: Instance) -> None:
        """Its worker is gone, or it is itself."""
        if (entry := self._sessions.pop(instance, None)) is not None:
            await entry[1].close()

    async def ask(
        self,
        instance: Instance,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> Answer:
        """A request of the daemon's own. Raises WorkerGoneError, TimeoutError."""
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
        try:
            async with self._session(instance).request(
                method, f"http://worker{path}", data=body, headers=headers, timeout=timeout
            ) as reply:
                return Answer(reply.status, reply.headers, await self._bounded(instance, reply))
        except TimeoutError:
            raise
        except aiohttp.ClientError as error:
            raise _gone(instance) from error

    async def lines(self, instance: Instance, path: str, max_line: int) -> AsyncIterator[bytes]:
        """The lines of a reply without end. Raises WorkerGoneError, aiohttp.ClientError, BackendError."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        waiting = bytearray()
        async with self._session(instance).get(f"http://worker{path}", timeout=timeout) as reply:
            async for piece in reply.content.iter_any():
                waiting += piece
                *whole, rest = bytes(waiting).split(b"\n")
                waiting = bytearray(rest)
                if len(waiting) > max_line:
                    raise BackendError(f"the worker of VM {instance.name!r} says more than it has to say")
                for line in whole:
                    yield line

    async def _bounded(self, instance: Instance, reply: aiohttp.ClientResponse) -> bytes:
        """A worker that its guest has taken over may say anything, but not without end."""
        body = bytearray()
        async for piece in reply.content.iter_any():
            body += piece
            if len(body) > _SMALL:
                raise BackendError(f"the worker of VM {instance.name!r} says more than it has to say")
        return bytes(body)

    async def forward(self, request: web.Request, instance: Instance, path: str) -> web.StreamResponse:
        """This request, to `path` of the worker. Raises WorkerGoneError where there is no reply."""
        body = await read_body(request)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        response: web.StreamResponse | None = None
        try:
            async with self._session(instance).request(
                request.method,
                URL(f"http://worker{path}", encoded=True),
                data=body or None,
                headers=_on(request),
                timeout=timeout,
                allow_redirects=False,
            ) as reply:
                if reply.content_length is not None and reply.content_length <= _SMALL:
                    return Answer(reply.status, reply.headers, await reply.read()).response()
                response = web.StreamResponse(status=reply.status, headers=_back(reply.headers))
                await response.prepare(request)
                async for piece in reply.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except aiohttp.ClientError as error:
            if response is None:
                raise _gone(instance) from error
            if request.transport is not None:  # a reply that breaks off must not look like a whole one
                request.transport.abort()
            return response

    async def tunnel(self, request: web.Request, instance: Instance, path: str) -> web.StreamResponse:
        """A websocket: its opening is passed on, and after it whatever bytes come, both ways, until one side ends.

        What a client that may only read sends is left out, but for the frames that keep and close the connection.
        """
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_unix_connection(_socket(instance), limit=_MAX_HEAD)
        except (OSError, TimeoutError) as error:
            raise _gone(instance) from error
        try:
            writer.write(_opening(request, path))
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    status, reason, headers = _head(await reader.readuntil(b"\r\n\r\n"))
                    if status != 101:
                        size = int(headers.get("content-length", "0"))
                        body = await reader.readexactly(min(size, _SMALL))
                        return Answer(status, headers, body).response()
            except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                raise _gone(instance) from error
            response = web.StreamResponse(status=status, reason=reason, headers=_back(headers, upgrade=True))
            response.force_close()
            await response.prepare(request)
            await _Tunnel(request, response, reader, writer).run()
            return response
        finally:
            writer.transport.abort()

    def _session(self, instance: Instance) -> aiohttp.ClientSession:
        running = instance.running
        if running is None:
            raise _gone(instance)
        entry = self._sessions.get(instance)
        if entry is not None and entry[0] is running:
            return entry[1]
        if entry is not None:
            self._close_later(entry[1])
        connector = aiohttp.UnixConnector(_socket(instance), limit=0, keepalive_timeout=60)
        session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        self._sessions[instance] = running, session
        return session

    def _close_later(self, session: aiohttp.ClientSession) -> None:
        closing = asyncio.create_task(session.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class _Tunnel:
    """Bytes both ways between a client that was upgraded and a worker."""

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._request = request
        self._response = response
        self._reader = reader
        self._writer = writer
        self._filter = ControlFrames() if request.get(ACCESS) is Access.READ_ONLY else None
        self._waiting = bytearray()
        self._is_ended = False
        self._grew = asyncio.Event()

    async def run(self) -> None:
        """Until one side has ended."""
        # The framework hands over what comes after the head to a parser of the protocol it was upgraded to.
        self._request.protocol.set_parser(cast("aiohttp.http_websocket.WebSocketReader", self))
        inward = asyncio.create_task(self._inward())
        outward = asyncio.create_task(self._outward())
        try:
            await asyncio.wait({inward, outward}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (inward, outward):
                task.cancel()
            await asyncio.gather(inward, outward, return_exceptions=True)

    # -- as the framework sees a parser --------------------------------------------------------------------------------

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._waiting += data
        if len(self._waiting) > _PIECE and self._request.transport is not None:
            cast("asyncio.ReadTransport", self._request.transport).pause_reading()
        self._grew.set()
        return False, b""

    def feed_eof(self) -> None:
        self._is_ended = True
        self._grew.set()

    def set_exception(self, _: BaseException, __: BaseException | None = None) -> None:
        self.feed_eof()

    # -- the two ways --------------------------------------------------------------------------------------------------

    async def _inward(self) -> None:
        while True:
            await self._grew.wait()
            self._grew.clear()
            data = bytes(self._waiting)
            self._waiting.clear()
            if self._filter is not None:
                data = self._filter.feed(data)
            self._writer.write(data)
            await self._writer.drain()
            if self._is_ended:
                self._writer.write_eof()
                return
            if not self._waiting and self._request.transport is not None:
                with contextlib.suppress(RuntimeError):  # it is closing
                    cast("asyncio.ReadTransport", self._request.transport).resume_reading()

    async def _outward(self) -> None:
        while data := await self._reader.read(_PIECE):
            await self._response.write(data)


async def read_body(request: web.Request) -> bytes:
    """The body, whatever type it is of, with the limits of `codec`."""
    return await codec.body(request, request.content_type) if request.body_exists else b""


def _socket(instance: Instance) -> str:
    running = instance.running
    if running is None:
        raise _gone(instance)
    return running.run_directory.socket_path


def _gone(instance: Instance) -> WorkerGoneError:
    return WorkerGoneError(f"the worker of VM {instance.name!r} does not answer")


def _on(request: web.Request) -> dict[str, str]:
    headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
    headers[errors.REQUEST_ID] = errors.request_id(request)
    return headers


def _back(given: Mapping[str, str], *, upgrade: bool = False) -> dict[str, str]:
    names = {name.lower(): name for name in given}
    wanted = (*_PASSED_BACK, "upgrade", "connection", "sec-websocket-accept", "sec-websocket-protocol")
    kept = wanted if upgrade else _PASSED_BACK
    return {name: given[as_given] for name, as_given in names.items() if name in kept or name.startswith(_OWN_PREFIXES)}


def _opening(request: web.Request, path: str) -> bytes:
    headers = {name: request.headers[name] for name in _UPGRADE if name in request.headers}
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: worker",
        "Connection: Upgrade",
        "Upgrade: websocket",
        f"{errors.REQUEST_ID}: {errors.request_id(request)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    text = "\r\n".join(lines) + "\r\n\r\n"
    return text.encode("utf-8", "surrogateescape")


def _head(data: bytes) -> tuple[int, str, dict[str, str]]:
    """Status, reason and headers of a worker's reply. Raises ValueError."""
    first, *lines = data.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    version, _, rest = first.partition(" ")
    status, _, reason = rest.partition(" ")
    if not version.startswith("HTTP/1.") or not status.isdigit():
        raise ValueError(f"no status line: {first[:100]!r}")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or any(ord(character) < 32 and character != "\t" for character in value):
            raise ValueError(f"no header: {line[:100]!r}")
        headers[name.lower()] = value.strip()
    return int(status), reason, headers
