"""A screen on a socket of its own, for clients that speak RFB without a websocket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from propolis.display.session import MESSAGE_SECONDS, Session

if TYPE_CHECKING:
    import socket

    from propolis.display.screen import Screen

log = logging.getLogger(__name__)


class _Stream:
    """What a session reads and writes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.readexactly = reader.readexactly
        self.write = writer.write
        self.drain = writer.drain


class ScreenPort:
    """Owns the listening socket. `patience` is Session's."""

    def __init__(self, screen: Screen, listener: socket.socket, *, patience: float = MESSAGE_SECONDS) -> None:
        self._screen = screen
        self._listener = listener
        self._patience = patience
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self._leaving: set[asyncio.Task[None]] = set()  # those of them that only wait for their connection to be closed

    async def open(self) -> None:
        """Begins to serve."""
        self._server = await asyncio.start_server(self._begin, sock=self._listener)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it came in just before the end
            writer.transport.abort()
            return
        task = asyncio.create_task(self._run(_Stream(reader, writer), writer))
        self._sessions.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        self._leaving.discard(task)

    async def _run(self, stream: _Stream, writer: asyncio.StreamWriter) -> None:
        transport = writer.transport
        transport.set_write_buffer_limits(high=0)  # a piece is made when the one before it is gone
        try:
            session = Session(self._screen, stream, patience=self._patience)
            log.info("a client of the screen is gone: reason=%s", await session.run())
        finally:
            if (task := asyncio.current_task()) is not None:
                self._leaving.add(task)
            if transport.get_write_buffer_size():
                transport.abort()
            else:
                transport.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def close(self) -> None:
        """Sends everybody away; twice is fine."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._listener.close()
        for task in self._sessions - self._leaving:
            task.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions)
