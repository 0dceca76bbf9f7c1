"""One stream between a guest and a unix socket: who may send how much, and who has ended what.

Data of the guest that its peer does not take waits here, up to BUFFER bytes, which the guest is told that it may have
on the way. Data for the guest stays in the kernel's buffer until there is room in the guest's.
"""

from __future__ import annotations

import enum
import select
import socket
from typing import TYPE_CHECKING

from propolis.devices.virtio.vsock_packet import SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, Op

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

BUFFER = 64 << 10
_WORDS = 32  # of "CONNECT port\n", at most
_WRAP = 0xFFFF_FFFF
PATIENCE = 10.0  # seconds for a client to say what it wants, and for a guest to answer


class State(enum.Enum):
    """What it waits for."""

    GREETING = enum.auto()  # the client's line
    CONNECTING = enum.auto()  # somebody who listens on the host
    REQUESTED = enum.auto()  # the guest's answer
    OPEN = enum.auto()
    GONE = enum.auto()


class Connection:
    """Belongs to a device, which it tells of three things: it has something for the guest, it begins, it is over."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        state: State,
        on_ready: Callable[[Connection], None],
        on_port: Callable[[Connection, int], bool],
        on_end: Callable[[Connection, bool], None],
    ) -> None:
        """`on_port` gives a client the guest's port that it asks for; `on_end` has whether the guest is to be told."""
        self.state = state
        self.host_port = 0
        self.guest_port = 0
        self.is_queued = False  # written by: the device
        self.is_final = False  # the packet it gave last is the last one
        self._loop = loop
        self._on_ready, self._on_port, self._on_end = on_ready, on_port, on_end
        self._socket: socket.socket | None = None
        self._is_reading = self._is_writing = False
        self._answer: Op | None = None  # to be sent before anything else
        self._waiting = b""  # for the guest, where its buffer was too small
        self._outgoing = bytearray()  # of the guest, where its peer is slow
        self._host_ended = self._told_end = False
        self._guest_ended = 0  # SHUT_*
        self._owes_credit = self._asked_credit = False
        # All modulo 2^32 (§5.10.6.3).
        self._peer_alloc = self._peer_forwarded = self._sent = 0
        self._received = self.forwarded = self._told_forwarded = 0
        self._timer = None if state is State.CONNECTING else loop.call_later(PATIENCE, self.end, True)

    # -- the host's side -----------------------------------------------------------------------------------------------

    def attach(self, peer: socket.socket | None) -> None:
        """The client, or who answers the guest on the host; None where nobody does. Owns the socket."""
        if self.state is State.GONE:
            if peer is not None:
                peer.close()
            return
        if peer is None:
            self.end(True)
            return
        peer.setblocking(False)
        self._socket = peer
        if self.state is State.CONNECTING:
            self.state = State.OPEN
            self._answer = Op.RESPONSE
            self._on_ready(self)
        else:
            self._read_on()

    def _read_on(self) -> None:
        if self._socket is not None and not self._is_reading and not self._host_ended:
            self._is_reading = True
            self._loop.add_reader(self._socket.fileno(), self._on_readable)

    def _read_no_more(self) -> None:
        if self._socket is not None and self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket.fileno())

    def _on_readable(self) -> None:
        self._read_no_more()
        if self.state is State.GREETING:
            self._greet()
        else:
            self._on_ready(self)

    def _greet(self) -> None:
        """A line "CONNECT port"; what follows it is the guest's."""
        self._waiting += self._receive(_WORDS - len(self._waiting)) or b""
        line, newline, rest = self._waiting.partition(b"\n")
        if not newline:
            if self._host_ended or len(self._waiting) >= _WORDS:
                self.end(False)
            elif self.state is State.GREETING:
                self._read_on()
            return
        words = line.split()
        if len(words) != 2 or words[0] != b"CONNECT" or not words[1].isdigit() or int(words[1]) > _WRAP:
            self.end(False)
            return
        self._waiting = rest
        self.state = State.REQUESTED
        self._answer = Op.REQUEST
        if self._on_port(self, int(words[1])):
            self._on_ready(self)
        else:
            self.end(False)

    def _receive(self, limit: int) -> bytes | None:
        """None where there is nothing now, or no more."""
        assert self._socket is not None
        try:
            data = self._socket.recv(limit)
        except BlockingIOError:
            return None
        except OSError:
            self.end(True)
            return None
        if not data:
            self._host_ended = True
        return data or None

    # -- what the guest sends ------------------------------------------------------------------------------------------

    def grant(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Each packet says how much room the guest has, and how much it has taken."""
        self._peer_alloc, self._peer_forwarded = buf_alloc, fwd_cnt
        if self.state is State.OPEN and self._credit() and not self._is_reading:
            self._asked_credit = False
            self._on_ready(self)

    def accept(self) -> bool:
        """The guest answers a request; False where there was none."""
        if self.state is not State.REQUESTED or self._answer is not None:
            return False
        self._forget_timer()
        self.state = State.OPEN
        assert self._socket is not None
        try:
            self._socket.send(b"OK %d\n" % self.host_port)  # the first of all that is sent: there is room
        except OSError:
            self.end(True)
        else:
            self._on_ready(self)
        return True

    def take(self, data: bytes) -> bool:
        """Data for the host; False where there is more of it than the guest was granted."""
        if self.state is not State.OPEN or self._guest_ended & SHUT_SEND or self._answer is not None:
            return False
        if (self._received - self.forwarded & _WRAP) + len(data) > BUFFER:
            return False
        self._received = self._received + len(data) & _WRAP
        if self._outgoing:
            self._outgoing += data
            return True
        self._outgoing += data[self._send(data) :]
        self._write_on()
        return True

    def shut(self, flags: int) -> bool:
        """The guest sends or receives no more; False where nothing was begun."""
        if self.state is not State.OPEN:
            return False
        self._guest_ended |= flags & SHUT_BOTH
        if self._guest_ended & SHUT_RECEIVE:
            self._read_no_more()
        if not self._outgoing:
            self._end_writing()
        return True

    def request_credit(self) -> None:
        """The guest wants to know how much it may send."""
        self._owes_credit = True
        self._on_ready(self)

    def _send(self, data: bytes | bytearray) -> int:
        assert self._socket is not None
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.end(True)
            return len(data)
        self.forwarded = self.forwarded + sent & _WRAP
        if self.forwarded - self._told_forwarded & _WRAP >= BUFFER // 2:
            self._owes_credit = True
            self._on_ready(self)
        return sent

    def _write_on(self) -> None:
        if self._socket is not None and self._outgoing and not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _write_no_more(self) -> None:
        if self._socket is not None and self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._socket.fileno())

    def _on_writable(self) -> None:
        del self._outgoing[: self._send(self._outgoing)]
        if not self._outgoing and self.state is State.OPEN:
            self._write_no_more()
            self._end_writing()

    def _end_writing(self) -> None:
        """All that the guest sent has gone out: its end may follow."""
        if self._guest_ended == SHUT_BOTH:
            self.end(True)
        elif self._guest_ended & SHUT_SEND and self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                self.end(True)

    # -- what the guest gets -------------------------------------------------------------------------------------------

    def next(self, room: int) -> tuple[Op, int, bytes] | None:
        """The next packet, of at most `room` bytes of data: what it is, its flags and data."""
        if (answer := self._answer) is not None:
            self._answer = None
            return answer, 0, b""
        if self._is_open() and not self._guest_ended & SHUT_RECEIVE:
            if data := self._for_guest(min(room, self._credit())):
                self._sent = self._sent + len(data) & _WRAP
                return Op.RW, 0, data
            if self._is_open() and self._host_ended and not self._waiting and not self._told_end:
                self._told_end = True
                self.is_final = self._is_hung_up()
                return Op.SHUTDOWN, SHUT_BOTH if self.is_final else SHUT_SEND, b""
            if self._is_open() and not self._credit() and not self._asked_credit:
                self._asked_credit = True
                return Op.CREDIT_REQUEST, 0, b""
        if self._owes_credit and self._is_open():
            return Op.CREDIT_UPDATE, 0, b""
        return None

    def unread(self, data: bytes) -> None:
        """The guest's buffer was smaller than thought."""
        self._waiting = data + self._waiting
        self._sent = self._sent - len(data) & _WRAP

    def told(self) -> None:
        """A packet went out, and with it how much was forwarded."""
        self._told_forwarded = self.forwarded
        self._owes_credit = False

    def _for_guest(self, limit: int) -> bytes | None:
        if not limit:
            return None  # the guest's next packet may change that
        if self._waiting:
            given, self._waiting = self._waiting[:limit], self._waiting[limit:]
            return given
        if self._host_ended:
            return None
        data = self._receive(limit)
        if data is None and self._is_open():
            self._read_on()
        return data

    def _is_open(self) -> bool:
        return self.state is State.OPEN

    def _credit(self) -> int:
        return max(0, self._peer_alloc - (self._sent - self._peer_forwarded & _WRAP))

    def _is_hung_up(self) -> bool:
        """Whether the other end is closed altogether, not for writing alone."""
        assert self._socket is not None
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    # -- the end -------------------------------------------------------------------------------------------------------

    def end(self, reset: bool = False) -> None:
        """It is over; with `reset` the guest is told so. Twice is fine."""
        if self.state is State.GONE:
            return
        was, self.state = self.state, State.GONE
        self._forget_timer()
        self._read_no_more()
        self._write_no_more()
        self._outgoing.clear()
        self._waiting = b""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._on_end(self, reset and was is not State.GREETING and self._answer is not Op.REQUEST)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
