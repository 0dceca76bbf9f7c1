"""Between the guest's serial port and everybody who watches it.

A client is an offset into the history. It is sent what lies between that and the end whenever it can take it, so it
sees every byte once, and one that does not read costs nothing and delays nobody: the guest only ever appends.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from propolis.console.history import READ_BYTES, ConsoleHistory, GapError, gap_note
from propolis.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

INPUT_BYTES = 65536  # what clients typed and the guest has not taken yet; past it they are not read from
_INPUT_PIECE = 256  # a UART takes 16 at a time: passing on all that waits would copy it each time
_PUMP_BYTES = 65536  # what one client is sent before others have their turn


class Sink(Protocol):
    """One who watches a console, as the console sees it."""

    def write(self, data: bytes) -> None:
        """Send this on; never blocks. A sink that has enough says so by its peer's `pause`."""

    def pause_input(self) -> None:
        """Deliver no more input until `resume_input`."""

    def resume_input(self) -> None:
        """Deliver input again."""

    def close(self) -> None:
        """The console is over: finish sending what was written, then go."""


class Peer(Protocol):
    """A console, as one who watches it sees it: the hub of a VM here, or a connection to one elsewhere."""

    def input(self, data: bytes) -> None:
        """Type this."""

    def pause(self) -> None:
        """Write no more until `resume`."""

    def resume(self) -> None:
        """Write again."""

    def detach(self) -> None:
        """Leave; twice is fine."""


class ConsoleHub:
    """One serial port's output for all its clients, and their input for it."""

    def __init__(self, history: ConsoleHistory, on_input: Callable[[bytes], int]) -> None:
        """`on_input` is given what was typed and returns how many bytes of it the guest's port took."""
        self.history = history
        self._on_input = on_input
        self._input = bytearray()
        self._input_is_paused = False
        self._clients: dict[Client, None] = {}  # in the order of their coming
        self._is_closing = False
        self._all_done: asyncio.Future[None] | None = None

    @property
    def clients(self) -> int:
        return len(self._clients)

    @property
    def waiting_input(self) -> int:
        """How many typed bytes the guest has not taken yet."""
        return len(self._input)

    def feed(self, data: bytes) -> None:
        """The guest printed this."""
        if not data:
            return
        before = self.history.total_bytes
        self.history.append(data)
        for client in tuple(self._clients):
            client.follow(data, before)

    def attach(self, sink: Sink, start: int | None = 0, *, on_gap: Callable[[int], None] | None = None) -> Client:
        """Send `sink` the output from offset `start` on, and all that follows; only what follows where it is None.

        The first byte is sent once the loop runs again: by then the sink knows its peer and can pause it. Where output
        is no longer kept, `on_gap` is given the offset at which it goes on; without it a note is written in its place.
        """
        if self._is_closing:
            raise StateError("attach to the console: it is closed")
        end = self.history.total_bytes
        client = Client(self, sink, end if start is None else min(start, end), on_gap)
        self._clients[client] = None
        if self._input_is_paused:
            sink.pause_input()
        client.start()
        return client

    def input_ready(self) -> None:
        """The guest's port has room again."""
        while self._input:
            piece = bytes(self._input[:_INPUT_PIECE])
            taken = self._on_input(piece)
            del self._input[:taken]
            if taken < len(piece):
                break
        self._steer_input()

    def discard_input(self) -> None:
        """Forget what was typed and not taken: its reader was reset."""
        self._input.clear()
        self._steer_input()

    async def close(self, grace: float = 1.0) -> None:
        """Wait up to `grace` seconds for clients that read to have everything, then send all away."""
        self._is_closing = True
        self._input.clear()
        if any(client.is_behind for client in self._clients):
            self._all_done = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(grace):
                    await self._all_done
            except TimeoutError:
                pass  # those who are still behind do not read
            finally:
                self._all_done = None
                self._end_clients()
        self._end_clients()

    def _end_clients(self) -> None:
        for client in tuple(self._clients):
            client.end()

    def _type(self, data: bytes) -> None:
        if self._is_closing:
            return
        self._input += data
        self.input_ready()

    def _steer_input(self) -> None:
        waiting = len(self._input)
        if not self._input_is_paused and waiting >= INPUT_BYTES:
            self._input_is_paused = True
            for client in tuple(self._clients):
                client.sink.pause_input()
        elif self._input_is_paused and waiting <= INPUT_BYTES // 2:
            self._input_is_paused = False
            for client in tuple(self._clients):
                client.sink.resume_input()

    def _forget(self, client: Client) -> None:
        self._clients.pop(client, None)
        self._look_done()

    def _look_done(self) -> None:
        done = self._all_done
        if done is not None and not done.done() and not any(client.is_behind for client in self._clients):
            done.set_result(None)


class Client:
    """A sink's place in the output of a hub; what the sink holds as its peer."""

    def __init__(self, hub: ConsoleHub, sink: Sink, offset: int, on_gap: Callable[[int], None] | None) -> None:
        self.sink = sink
        self._hub = hub
        self._offset = offset
        self._on_gap = on_gap
        self._is_paused = False
        self._is_attached = True
        self._turn: asyncio.Handle | None = None

    @property
    def offset(self) -> int:
        """The next byte that it will be sent."""
        return self._offset

    @property
    def is_behind(self) -> bool:
        return self._offset < self._hub.history.total_bytes

    def input(self, data: bytes) -> None:
        if self._is_attached:
            self._hub._type(data)

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self.pump()

    def detach(self) -> None:
        if self._is_attached:
            self._is_attached = False
            if self._turn is not None:
                self._turn.cancel()
            self._hub._forget(self)

    def end(self) -> None:
        """The hub is closing."""
        if self._is_attached:
            self.detach()
            self.sink.close()

    def start(self) -> None:
        self._turn = asyncio.get_running_loop().call_soon(self.pump)

    def follow(self, data: bytes, before: int) -> None:
        """New output that began at offset `before`: sent as it is to a client that has all the rest."""
        if self._offset == before and not self._is_paused and self._is_attached and len(data) <= READ_BYTES:
            self._offset += len(data)
            self.sink.write(data)
        elif self._turn is None:
            self.pump()

    def pump(self) -> None:
        """Send from the history until the sink has enough, all is sent, or others have waited long enough."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        budget = _PUMP_BYTES
        while self.is_behind and not self._is_paused and self._is_attached:
            if budget <= 0:
                self.start()
                return
            try:
                data, after = self._hub.history.read(from_start=self._offset)
            except GapError as gap:
                if self._on_gap is not None:
                    self._offset = gap.resumes_at
                    self._on_gap(gap.resumes_at)
                    continue
                data, after = gap_note(gap.resumes_at - self._offset), gap.resumes_at
            self._offset = after
            budget -= len(data)
            self.sink.write(data)
        self._hub._look_done()
