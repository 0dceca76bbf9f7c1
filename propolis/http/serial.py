"""The serial consoles: what was printed, and a websocket for what is printed and typed from now on."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from propolis.console.history import READ_BYTES, GapError, gap_note
from propolis.errors import FieldError, StateError
from propolis.http import codec, v5
from propolis.http.slot import ShutdownError, slot
from propolis.http.websocket_close import CLOSE_PATIENCE, close

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from propolis.console.hub import Client, ConsoleHub
    from propolis.http.slot import HistoryReader

routes = web.RouteTableDef()

OFFSET = "propolis-console-offset"  # header of the reply: the absolute offset of the first byte that is sent
MAX_HISTORY_BYTES = 2 << 20  # of one reply: all that is ever kept
MAX_MESSAGE = 65536  # bytes of one message from a client
SEND_BYTES = 65536  # bytes that wait for a client before the console is told to hold on
PATIENCE = 30.0  # seconds for a client to take what is sent


@routes.get("/instance/serial/history")
async def get_history(request: web.Request) -> web.Response:
    wanted = codec.query(request, v5.InstanceSerialConsoleHistoryRequest)
    if (wanted.from_start is None) == (wanted.most_recent is None):
        raise FieldError([("", "expected exactly one of from_start and most_recent in the query")])
    history = slot(request).active.hub(wanted.com).history
    max_bytes = min(READ_BYTES if wanted.max_bytes is None else wanted.max_bytes, MAX_HISTORY_BYTES)
    data, end = history.read(from_start=wanted.from_start, most_recent=wanted.most_recent, max_bytes=max_bytes)
    return codec.encode(v5.InstanceSerialConsoleHistoryResponse(data=tuple(data), last_byte_offset=end))


@routes.get("/instance/serial")
async def stream(request: web.Request) -> web.StreamResponse:
    wanted = codec.query(request, v5.InstanceSerialConsoleStreamRequest)
    here = slot(request)
    hub = here.active.hub(wanted.com)
    start = _start(hub.history, wanted)
    console = _Console(hub, hub.history, start, has_notices=wanted.control, patience=here.console_patience)
    return await _serve(request, console, here.until_shutdown())


async def stream_past(
    request: web.Request, wanted: v5.InstanceSerialConsoleStreamRequest, history: HistoryReader
) -> web.StreamResponse:
    """The console of a VM that nothing runs: what is kept of it, and the end."""
    console = _Console(None, history, _start(history, wanted), has_notices=wanted.control, patience=PATIENCE)
    return await _serve(request, console, contextlib.nullcontext())


async def _serve(
    request: web.Request, console: _Console, until_shutdown: AbstractAsyncContextManager[None]
) -> web.StreamResponse:
    socket = web.WebSocketResponse(timeout=CLOSE_PATIENCE, max_msg_size=MAX_MESSAGE, compress=False)
    socket.headers[OFFSET] = str(console.offset)
    try:
        await socket.prepare(request)
        async with until_shutdown:
            await console.run(socket)
        code, reason = console.farewell
    except ShutdownError:
        code, reason = console.farewell if console.is_over else (WSCloseCode.SERVICE_RESTART, "the server shuts down")
    finally:
        console.leave()
    await close(request, socket, code, reason)
    return socket


def _start(history: HistoryReader, wanted: v5.InstanceSerialConsoleStreamRequest) -> int:
    """The offset of the first byte to be sent: what follows, unless one of the two says otherwise. Raises GapError."""
    if (wanted.from_start is None) == (wanted.most_recent is None):
        return history.total_bytes
    if wanted.from_start is not None:
        history.read(from_start=wanted.from_start, max_bytes=1)
        return min(wanted.from_start, history.total_bytes)
    assert wanted.most_recent is not None
    return max(history.total_bytes - wanted.most_recent, history.resumes_at)


class _Console:
    """One client: a sink of the hub, if there is one yet, whose output waits here until the connection takes it."""

    def __init__(
        self, hub: ConsoleHub | None, history: HistoryReader, start: int, *, has_notices: bool, patience: float
    ) -> None:
        self.farewell: tuple[int, str] = (WSCloseCode.GOING_AWAY, "VM stopped")
        self.offset = start
        self._waiting: list[bytes | str] = []  # str: a notice
        self._waiting_bytes = 0
        self.is_over = False  # the VM prints no more
        self._grew = asyncio.Event()
        self._may_type = asyncio.Event()
        self._may_type.set()
        self._patience = patience
        self._client: Client | None = None
        if hub is not None:
            with contextlib.suppress(StateError):  # the VM is over
                self._client = hub.attach(self, start, on_gap=self._note_gap if has_notices else None)
        if self._client is None:  # what was printed is there all the same
            self._read_rest(history, start, has_notices=has_notices)
            self.close()

    def _read_rest(self, history: HistoryReader, offset: int, *, has_notices: bool) -> None:
        while offset < history.total_bytes:
            try:
                data, offset = history.read(from_start=offset)
            except GapError as gap:
                if has_notices:
                    self._note_gap(gap.resumes_at)
                else:
                    self.write(gap_note(gap.resumes_at - offset))
                offset = gap.resumes_at
            else:
                self.write(data)

    # -- as the hub sees it --------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self._grew.set()
        if self._waiting_bytes >= SEND_BYTES and self._client is not None:
            self._client.pause()

    def _note_gap(self, resumes_at: int) -> None:
        self._waiting.append(msgspec.json.encode({"Gap": {"resumes_at": resumes_at}}).decode())
        self._grew.set()

    def pause_input(self) -> None:
        self._may_type.clear()

    def resume_input(self) -> None:
        self._may_type.set()

    def close(self) -> None:
        self.is_over = True
        self._grew.set()

    def leave(self) -> None:
        if self._client is not None:
            self._client.detach()

    # -- as the connection sees it -------------------------------------------------------------------------------------

    async def run(self, socket: web.WebSocketResponse) -> None:
        """Passes on both ways until one side has enough; `farewell` is the close then."""
        typing = asyncio.create_task(self._type(socket))
        sending = asyncio.create_task(self._send(socket))
        try:
            await asyncio.wait({typing, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (typing, sending):
                task.cancel()
            results = await asyncio.gather(typing, sending, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, ConnectionError):
                raise result

    async def _send(self, socket: web.WebSocketResponse) -> None:
        while True:
            await self._grew.wait()
            self._grew.clear()
            while self._waiting:
                try:
                    async with asyncio.timeout(self._patience):
                        await self._send_next(socket)
                except TimeoutError:
                    self.farewell = (WSCloseCode.TRY_AGAIN_LATER, "the client does not read")
                    return
            if self.is_over:
                return

    async def _send_next(self, socket: web.WebSocketResponse) -> None:
        """All bytes up to the next notice, or that notice."""
        first = self._waiting[0]
        if isinstance(first, str):
            del self._waiting[0]
            await socket.send_str(first)
            return
        count = next((at for at, piece in enumerate(self._waiting) if isinstance(piece, str)), len(self._waiting))
        data = b"".join(piece for piece in self._waiting[:count] if isinstance(piece, bytes))
        del self._waiting[:count]
        self._waiting_bytes -= len(data)
        await socket.send_bytes(data)
        if not self._waiting and self._client is not None:
            self._client.resume()

    async def _type(self, socket: web.WebSocketResponse) -> None:
        while True:
            await self._may_type.wait()
            message = await socket.receive()
            if message.type is WSMsgType.BINARY:
                data = message.data
            elif message.type is WSMsgType.TEXT:
                data = message.data.encode()
            else:
                return  # closed, gone, or too large a message, which has been answered
            if self._client is not None:
                self._client.input(data)
