"""One port of a virtio console: the client on its unix socket, and what waits for it and for the guest."""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

    from propolis.devices.virtio._queue import Buffers

log = logging.getLogger(__name__)

PIECE = 4096  # read from a client at once
MAX_WRITE = 1 << 20  # of one of the guest's buffers, of which drivers make none so long
_NO_DESCRIPTORS = 1.0  # seconds until a client is accepted again


class Port:
    """`queue` is where the guest receives, the one after it where it sends."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        queue: int,
        again: Callable[[int], None],
        on_client: Callable[[Port], None],
    ) -> None:
        """`again` has a queue served once more; `on_client` hears that a client came or went."""
        self.queue = queue
        self.bytes_in = self.bytes_out = self.dropped = 0
        self._loop = loop
        self._listener = listener
        self._again = again
        self._on_client = on_client
        self._client: socket.socket | None = None
        self._is_listening = self._is_reading = self._is_writing = False
        self._is_open = False  # by a program of the guest
        self._may_have_data = False
        self._waiting = b""  # for the guest, whose buffer was too small
        self._outgoing = b""  # of the guest, at most one buffer
        self._retry: asyncio.TimerHandle | None = None

    @property
    def has_client(self) -> bool:
        return self._client is not None

    # -- clients -------------------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Clients are welcome."""
        self._retry = None
        if not self._is_listening:
            self._is_listening = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _listen_no_more(self) -> None:
        if self._is_listening:
            self._is_listening = False
            self._loop.remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        """One client at a time: another is sent away, unless the one before is gone, which nobody may have noticed."""
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("no client is accepted: reason=%r", error.strerror)
            self._listen_no_more()
            self._retry = self._loop.call_later(_NO_DESCRIPTORS, self.listen)
            return
        if self._client is not None:
            if not self._is_gone():
                client.close()
                return
            self._lose()
        client.setblocking(False)
        self._client = client
        self._on_client(self)
        self._read_on()

    def _lose(self) -> None:
        """The client is gone, and what was for it is dropped."""
        self._read_no_more()
        self._write_no_more()
        self.dropped += len(self._outgoing)
        self._outgoing = b""
        self._may_have_data = False
        assert self._client is not None
        self._client.close()
        self._client = None
        self._on_client(self)
        self._again(self.queue + 1)

    def close(self) -> None:
        """Twice is fine."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._listen_no_more()
        self._read_no_more()
        self._write_no_more()
        if self._client is not None:
            self._client.close()
            self._client = None

    # -- to the guest --------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """A program of the guest reads it."""
        self._is_open = True

    def shut(self) -> None:
        """None does any more: its client waits, and nothing of what was for the last program is for the next."""
        self._is_open = False
        self._waiting = b""

    @property
    def is_readable(self) -> bool:
        """Whether there may be something for the guest."""
        return self._is_open and (bool(self._waiting) or self._may_have_data)

    def receive(self) -> bytes | None:
        """What the client sent, or None where there is nothing now."""
        if self._waiting:
            data, self._waiting = self._waiting, b""
            return data
        assert self._client is not None
        try:
            data = self._client.recv(PIECE)
        except BlockingIOError:
            self._may_have_data = False
            self._read_on()
            return None
        except OSError:
            data = b""
        if not data:
            self._lose()
            return None
        self.bytes_in += len(data)
        return data

    def put_back(self, data: bytes) -> None:
        """There was no room for this."""
        self._waiting = data

    def _read_on(self) -> None:
        if self._client is not None and not self._is_reading:
            self._is_reading = True
            self._loop.add_reader(self._client.fileno(), self._on_readable)

    def _read_no_more(self) -> None:
        if self._client is not None and self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._client.fileno())

    def _on_readable(self) -> None:
        self._read_no_more()
        self._may_have_data = True
        self._again(self.queue)

    def _is_gone(self) -> bool:
        """Whether the client closed its end."""
        assert self._client is not None
        poll = select.poll()
        poll.register(self._client.fileno(), 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    # -- from the guest ------------------------------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether the client took what it was given before."""
        return not self._outgoing

    def take(self, buffers: Buffers) -> bool:
        """A buffer of the guest; False where the next one has to wait."""
        data = buffers.read(MAX_WRITE)
        self.dropped += buffers.readable - len(data)
        buffers.finish()
        if self._client is None:
            self.dropped += len(data)
            return True
        self.bytes_out += len(data)
        self._outgoing = data
        self._flush()
        return not self._outgoing

    def _flush(self) -> None:
        assert self._client is not None
        try:
            self._outgoing = self._outgoing[self._client.send(self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            self._lose()
            return
        if self._outgoing and not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._client.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        self._flush()
        if not self._outgoing:
            self._write_no_more()
            self._again(self.queue + 1)

    def _write_no_more(self) -> None:
        if self._client is not None and self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._client.fileno())
