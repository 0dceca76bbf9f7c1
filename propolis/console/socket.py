"""A console on a unix socket: whoever connects gets the history, then what follows, and may type."""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING, cast

from propolis.errors import BackendError, StateError
from propolis.unix_name import UnixName

if TYPE_CHECKING:
    from propolis.console.hub import ConsoleHub, Peer

MAX_CLIENTS = 64
_WRITE_BUFFER = 65536
_READ_BUFFER = 4096
_BACKLOG = 64
_TURNS = 5  # of the loop, until a connection that waits in the queue is known here


class ConsoleSocket:
    """The listening socket of one console, and its connections."""

    def __init__(self, path: str, hub: ConsoleHub, *, max_clients: int = MAX_CLIENTS, grace: float = 1.0) -> None:
        """`grace` bounds, in seconds, how long a client that does not read keeps its connection after the end."""
        self._name = UnixName(path, "console socket")
        self.path = self._name.path
        self._hub = hub
        self._max_clients = max_clients
        self._grace = grace
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._is_open = False
        self._all_gone: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Listen; BusyError where another program does, while what a dead one left is replaced."""
        listener = await self._name.take(0o600, backlog=_BACKLOG)
        try:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(lambda: _Connection(self), sock=listener)
            self._is_open = True
        except BaseException as error:
            listener.close()
            await self.close()
            if isinstance(error, OSError):
                raise BackendError(f"open console socket {self.path!r}: {error.strerror or error}") from error
            raise

    async def stop_listening(self) -> None:
        """Remove the name, if it is still ours. Those who have connected by then are clients; twice is fine."""
        await self._name.release()
        if self._server is not None:
            for _ in range(_TURNS):  # else the kernel resets those that were not accepted yet
                await asyncio.sleep(0)
            self._server.close()
            self._server = None

    async def close(self) -> None:
        """Stop listening, let clients read what was sent; twice is fine."""
        await self.stop_listening()
        self._is_open = False
        for connection in tuple(self._connections):
            connection.close()
        if self._connections:
            self._all_gone = asyncio.get_running_loop().create_future()
            try:
                await self._all_gone
            finally:
                self._all_gone = None
                for connection in tuple(self._connections):
                    connection.abort()

    def _admit(self, connection: _Connection) -> bool:
        """Count a connection in, if there is room or can be made."""
        for other in tuple(self._connections):
            if other.is_dead():
                other.abort()
                self._discard(other)
        if len(self._connections) >= self._max_clients or not self._is_open:
            return False
        self._connections.add(connection)
        return True

    def _discard(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if not self._connections and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)


class _Connection(asyncio.BufferedProtocol):
    """One client. Its read buffer is small and its own, so that 64 of them together bound what can be waiting."""

    def __init__(self, owner: ConsoleSocket) -> None:
        self._owner = owner
        self._buffer = bytearray(_READ_BUFFER)
        self._transport: asyncio.Transport | None = None
        self._peer: Peer | None = None
        self._is_at_eof = False
        self._last_call: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        if not self._owner._admit(self):
            self._transport.write(b"this console has as many clients as it can have\r\n")
            self.close()
            return
        try:
            self._peer = self._owner._hub.attach(self)
        except StateError:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._last_call is not None:
            self._last_call.cancel()
            self._last_call = None
        self._leave()
        self._owner._discard(self)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._peer is not None:
            self._peer.input(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool:
        """A client that has nothing more to type may still read, as one does at the end of a pipe."""
        self._is_at_eof = True
        return not self.is_dead()

    def pause_writing(self) -> None:
        if self._peer is not None:
            self._peer.pause()

    def resume_writing(self) -> None:
        if self._peer is not None:
            self._peer.resume()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def pause_input(self) -> None:
        if self._transport is not None and not self._is_at_eof and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_input(self) -> None:
        if self._transport is not None and not self._is_at_eof and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        self._leave()
        if self._transport is not None and self._last_call is None:
            self._last_call = asyncio.get_running_loop().call_later(self._owner._grace, self.abort)
            self._transport.close()

    def abort(self) -> None:
        self._leave()
        if self._transport is not None:
            self._transport.abort()

    def is_dead(self) -> bool:
        """Whether the client is gone altogether, which the loop does not notice while it does not read from it."""
        if self._transport is None:
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    def _leave(self) -> None:
        if self._peer is not None:
            self._peer.detach()
            self._peer = None
