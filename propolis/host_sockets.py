"""Unix sockets of the host that a VM's devices have: those that listen, and connections to others.

A worker in its jail opens nothing: its keeper listens for it, and connects where it asks for that. What it asks and is
answered goes over a pair of sockets that keep messages apart, in order: a port; a byte, with a descriptor or without.
"""

from __future__ import annotations

import array
import collections
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING

from propolis.unix_name import UnixName

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    Done = Callable[[socket.socket | None], None]

MODE = 0o660
_PORT_BYTES = 4
_WAITING = 1024  # requests that the keeper has not answered; a device has fewer connections


class HostListener:
    """A listening socket with its name, which goes when this is closed."""

    def __init__(self, path: str) -> None:
        """Raises BusyError where another program listens there, BackendError."""
        self._name = UnixName(path, "socket")
        self.socket = self._name.take_now(MODE)

    def close(self) -> None:
        """Twice is fine."""
        self.socket.close()
        self._name.release_now()


def connect(path: str) -> socket.socket:
    """A connection to who listens at `path`, which is a socket and no link to one. Never waits. Raises OSError."""
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(place).st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            made.connect(f"/proc/self/fd/{place}")
        except BaseException:
            made.close()
            raise
        return made
    finally:
        os.close(place)


def _connect(path: str, port: int) -> socket.socket | None:
    try:
        return connect(f"{path}_{port}")
    except OSError:
        return None  # nobody listens there, or not to us


class DirectConnector:
    """Connects by itself to the sockets at `path`, "_" and a port."""

    def __init__(self, path: str) -> None:
        self._path = path

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Nothing to wait for."""

    def connect(self, port: int, done: Done) -> None:
        """`done` has the connection, or None."""
        done(_connect(self._path, port))

    def close(self) -> None:
        """Nothing is open."""


class AskingConnector:
    """Has the keeper connect; answers come in the order of the questions."""

    def __init__(self, channel: socket.socket) -> None:
        """Owns the socket."""
        self._channel = channel
        channel.setblocking(False)
        self._waiting: collections.deque[Done] = collections.deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answers arrive from now on."""
        self._loop = loop
        loop.add_reader(self._channel.fileno(), self._on_answer)

    def connect(self, port: int, done: Done) -> None:
        """`done` has the connection, or None."""
        try:
            if len(self._waiting) >= _WAITING:
                raise BlockingIOError
            self._channel.send(port.to_bytes(_PORT_BYTES, "little"))
        except OSError:
            done(None)
        else:
            self._waiting.append(done)

    def _on_answer(self) -> None:
        try:
            data, found = _receive(self._channel)
        except BlockingIOError:
            return
        except OSError:
            data, found = b"", None
        if not data:
            self._end()
        elif self._waiting:
            self._waiting.popleft()(found)
        elif found is not None:
            found.close()

    def _end(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._channel.fileno())
            self._loop = None
        while self._waiting:
            self._waiting.popleft()(None)

    def close(self) -> None:
        """Whoever waits gets nothing; twice is fine."""
        if self._channel.fileno() >= 0:
            self._end()
            self._channel.close()


def _receive(channel: socket.socket) -> tuple[bytes, socket.socket | None]:
    fds = array.array("i")
    data, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_LEN(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: fds.itemsize])
    return data, socket.socket(fileno=fds[0]) if fds else None


class ConnectorServer:
    """The keeper's end: connects to `path`, "_" and a port, as often as it is asked."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._channel, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)

    def fileno(self) -> int:
        return self._channel.fileno()

    def serve(self) -> bool:
        """Answers one question; False where there will be no other."""
        found = None
        try:
            data = self._channel.recv(_PORT_BYTES)
            if len(data) != _PORT_BYTES:
                return False
            found = _connect(self._path, int.from_bytes(data, "little"))
            # Who asks and does not read the answers is not waited for.
            socket.send_fds(self._channel, [b"\1" if found else b"\0"], [found.fileno()] if found else [])
        except OSError:
            return False
        finally:
            if found is not None:
                found.close()
        return True

    def close(self) -> None:
        """Twice is fine."""
        self._channel.close()
        self.other.close()
