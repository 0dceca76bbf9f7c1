"""A VM's serial port over a websocket, which outlives the connection: a lost one is made again where it broke off."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import aiohttp
import msgspec

from propolis.errors import PropolisError
from propolis.http.client_replies import DeniedError, RefusedError, UnavailableError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    # From an offset or the latest bytes; with the websocket, the offset of the first byte that it brings.
    Connect = Callable[[int | None, int | None], Awaitable[tuple[aiohttp.ClientWebSocketResponse, int]]]
    # From an offset, or of the latest bytes the first; with the offset just after them.
    History = Callable[[int | None, int | None], Awaitable[tuple[bytes, int]]]

_END = 1001  # the code that a console is closed with when there is no more of it
_EXPIRED = "expired_range"  # what is asked for is no longer kept
_ALL = 1 << 30
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # seconds between attempts to connect again


class _Gap(msgspec.Struct, frozen=True):
    resumes_at: int


class _Notice(msgspec.Struct, frozen=True):
    """What a text frame says; other kinds are not for us."""

    gap: _Gap | None = msgspec.field(default=None, name="Gap")


class Console:
    """Output to be read, in order and once, and input to be sent, as long as somebody reads."""

    def __init__(
        self,
        connect: Connect,
        history: History,
        *,
        patience: float = 0.0,
        on_lost: Callable[[PropolisError], None] | None = None,
        on_back: Callable[[], None] | None = None,
    ) -> None:
        """A lost connection is made again for up to `patience` seconds; `on_lost` and `on_back` hear of that."""
        self._connect = connect
        self._history = history
        self._patience = patience
        self._on_lost = on_lost
        self._on_back = on_back
        self._websocket: aiohttp.ClientWebSocketResponse | None = None
        self._is_connected = asyncio.Event()
        self._is_over = False
        self._is_past = False  # the VM does not run: what it printed is read from the history
        self._offset = 0
        self._note = b""  # for the reader, before anything else

    @property
    def offset(self) -> int:
        """Of the next byte that will be read, since the VM was made."""
        return self._offset

    @property
    def is_over(self) -> bool:
        """Whether there is no more."""
        return self._is_over

    async def open(self, from_start: int | None, most_recent: int | None) -> None:
        """Connect for the first time; of a VM that does not run there is what it printed."""
        try:
            self._websocket, self._offset = await self._connect(from_start, most_recent)
        except DeniedError as error:
            try:
                data, after = await self._history(None, most_recent or 0)
            except PropolisError:
                raise error from None
            self._is_past = True
            self._offset = from_start if from_start is not None else after - len(data)
        self._is_connected.set()

    async def close(self) -> None:
        """Leave; twice is fine."""
        self._is_over = True
        self._is_connected.set()
        if self._websocket is not None:
            await self._websocket.close()

    async def read(self) -> bytes:
        """The next bytes, as many as there are; nothing at the end."""
        while not self._is_over:
            if self._note:
                note, self._note = self._note, b""
                return note
            if self._is_past:
                return await self._read_past()
            assert self._websocket is not None
            message = await self._websocket.receive()
            if message.type is aiohttp.WSMsgType.BINARY:
                data: bytes = message.data
                self._offset += len(data)
                return data
            if message.type is aiohttp.WSMsgType.TEXT:
                self._heed(message.data)
            elif self._websocket.close_code == _END:
                await self.close()
            elif not self._is_over:
                await self._go_on(self._why(message))
        return b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """All that can be read, piece by piece."""
        while data := await self.read():
            yield data

    async def send(self, data: bytes) -> None:
        """Type this; of what was sent just before a connection is lost, nobody knows whether it arrived."""
        while not self._is_over:
            await self._is_connected.wait()
            websocket = self._websocket
            if self.is_over or self._is_past or websocket is None:
                return
            try:
                await websocket.send_bytes(data)
            except (OSError, aiohttp.ClientError) as error:
                if self._patience <= 0:
                    raise UnreachableError(f"type on the console: {error}") from error
                if self._websocket is websocket:  # whoever reads has not noticed yet
                    self._is_connected.clear()
            else:
                return

    async def _read_past(self) -> bytes:
        try:
            data, self._offset = await self._history(self._offset, None)
        except RefusedError as error:
            if error.code != _EXPIRED:
                raise
            first, after = await self._history(None, _ALL)
            self._skip_to(after - len(first))
            data, self._note = self._note, b""
        self._is_over = not data
        return data

    def _heed(self, text: str) -> None:
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):
            notice = msgspec.json.decode(text, type=_Notice)
            if notice.gap is not None:
                self._skip_to(notice.gap.resumes_at)

    def _skip_to(self, offset: int) -> None:
        if offset > self._offset:
            self._note += f"\r\n[{offset - self._offset} bytes of console output are no longer kept]\r\n".encode()
        elif offset < self._offset:
            self._note += b"\r\n[the console begins anew]\r\n"
        self._offset = offset

    def _why(self, message: aiohttp.WSMessage) -> PropolisError:
        if message.type is aiohttp.WSMsgType.CLOSE:
            reason = f": {message.extra}" if message.extra else ""
            return UnreachableError(f"the console's connection was closed with code {message.data}{reason}")
        return UnreachableError("the console's connection was lost")

    async def _go_on(self, error: PropolisError) -> None:
        """Connect again and read on from the same byte."""
        self._is_connected.clear()
        if self._websocket is not None:
            await self._websocket.close()
        if self._patience <= 0:
            raise error
        if self._on_lost is not None:
            self._on_lost(error)
        try:
            websocket, offset = await self._connect_again()
        except DeniedError:  # the VM has ended meanwhile
            self._is_past = True
            self._is_connected.set()
            return
        self._websocket = websocket
        if self.is_over:  # closed in the meantime
            await websocket.close()
            return
        self._skip_to(offset)
        self._is_connected.set()
        if self._on_back is not None:
            self._on_back()

    async def _connect_again(self) -> tuple[aiohttp.ClientWebSocketResponse, int]:
        loop = asyncio.get_running_loop()
        end, pause = loop.time() + self._patience, _FIRST_PAUSE
        while True:
            try:
                return await self._connect(self._offset, None)
            except RefusedError as error:
                if error.code != _EXPIRED:
                    raise
                return await self._connect(None, _ALL)  # what is kept up to now, in one piece
            except (UnreachableError, UnavailableError):
                if loop.time() + pause > end:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LAST_PAUSE)
