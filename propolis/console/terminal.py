"""This terminal as a client of a console: raw while it is attached, and as it was before whatever happens then.

Reading and writing never stop the loop. The descriptors that a program is given are shared with the shell and with
other programs, so O_NONBLOCK on them would break those; they are opened a second time instead, which makes a file
description of our own. A thread that writes was the alternative: it could not be ended while a terminal is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import socket
import stat
from typing import TYPE_CHECKING, Literal

from propolis.console.escape import DEFAULT_ESCAPE, Escapes
from propolis.console.tty_mode import RawMode
from propolis.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis.console.hub import Peer, Sink

Leave = Literal["escape", "ended", "hangup"]

_READ_BYTES = 4096
_FULL_BYTES = 65536  # written and not yet taken by the terminal: then the console is asked to wait


class Terminal:
    """A sink and source of bytes on two descriptors; `attach` runs it from connecting to leaving."""

    def __init__(
        self,
        *,
        escape: int | None = DEFAULT_ESCAPE,
        name: str = "",
        stdin: int = 0,
        stdout: int = 1,
        stderr: int = 2,
        grace: float = 1.0,
    ) -> None:
        """Without an `escape` key no key leaves; `grace` bounds how long, in seconds, the last output waits."""
        self._escape = escape
        self._name = name
        self._stdin, self._stdout, self._stderr = stdin, stdout, stderr
        self._grace = grace
        self._input: _Input | None = None
        self._output: _Output | None = None
        self._peer: Peer | None = None
        self._left: asyncio.Future[Leave] | None = None
        self._end_of_line = "\n"

    async def attach(self, connect: Callable[[Sink], Peer]) -> Leave:
        """Be a client until the escape key is pressed, the console ends or the terminal is gone; says which."""
        loop = asyncio.get_running_loop()
        self._left = loop.create_future()
        with contextlib.ExitStack() as stack:
            mode = stack.enter_context(RawMode(self._stdin))
            self._end_of_line = mode.end_of_line
            escapes = Escapes(self._escape if mode.is_raw else None)
            try:
                self._output = _Output(self._stdout, on_room=self._has_room, on_gone=self._is_gone)
            except OSError as error:
                raise BackendError(f"attach to the console: open the standard output: {error.strerror}") from error
            stack.callback(self._output.close)
            # Other input may end while its console is still read; that of a terminal ends when it hangs up.
            on_end = self._is_gone if mode.is_raw else None
            self._input = _Input(self._stdin, lambda data: self._typed(data, escapes), on_end)
            stack.callback(self._input.close)
            what = f"console of VM {self._name!r}" if self._name else "console"
            how = f"; {escapes.hint}" if escapes.hint else ""
            self.say(f"[{what}{how}]")
            peer = self._peer = connect(self)
            stack.callback(peer.detach)
            self._input.resume()
            reason = await self._left
            peer.detach()
            if reason != "hangup":
                await self._output.flush(self._grace)
                if mode.is_raw:
                    self.say("\r\n[left the console]")
            return reason

    def write(self, data: bytes) -> None:
        """Of the console: print this."""
        if self._output is not None and not self._output.write(data) and self._peer is not None:
            self._peer.pause()

    def pause_input(self) -> None:
        """Of the console: it has enough input for now."""
        if self._input is not None:
            self._input.pause()

    def resume_input(self) -> None:
        """Of the console: it takes input again."""
        if self._input is not None:
            self._input.resume()

    def close(self) -> None:
        """Of the console: it is over."""
        self._leave("ended")

    def say(self, text: str) -> None:
        """A line beside the console's output, unless the terminal is stopped: it is not worth waiting for."""
        poll = select.poll()
        with contextlib.suppress(OSError):  # no stderr, nobody to tell
            poll.register(self._stderr, select.POLLOUT)
            if poll.poll(0):
                os.write(self._stderr, f"{text}{self._end_of_line}".encode())

    def _typed(self, data: bytes, escapes: Escapes) -> None:
        passed, is_leaving = escapes.take(data)
        if passed and self._peer is not None:
            self._peer.input(passed)
        if is_leaving:
            self._leave("escape")

    def _has_room(self) -> None:
        if self._peer is not None:
            self._peer.resume()

    def _is_gone(self) -> None:
        self._leave("hangup")

    def _leave(self, reason: Leave) -> None:
        if self._left is not None and not self._left.done():
            self._left.set_result(reason)


class _Input:
    """Reads a descriptor whenever the loop finds something there, until its end."""

    def __init__(self, fd: int, on_data: Callable[[bytes], None], on_end: Callable[[], None] | None) -> None:
        self._on_data = on_data
        self._on_end = on_end
        self._is_reading = False
        self._turn: asyncio.Handle | None = None
        self._loop = asyncio.get_running_loop()
        try:
            kind = os.fstat(fd).st_mode
            self._fd = _open_again(fd, os.O_RDONLY)
        except OSError:  # there is no stdin
            self._fd = -1
            return
        # A regular file or /dev/null is always ready and cannot be waited for.
        self._is_always_ready = stat.S_ISREG(kind) or (stat.S_ISCHR(kind) and not os.isatty(fd))

    def resume(self) -> None:
        if self._fd < 0 or self._is_reading:
            return
        self._is_reading = True
        if self._is_always_ready:
            self._turn = self._loop.call_soon(self._read)
        else:
            self._loop.add_reader(self._fd, self._read)

    def pause(self) -> None:
        if not self._is_reading:
            return
        self._is_reading = False
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        else:
            self._loop.remove_reader(self._fd)

    def close(self) -> None:
        self.pause()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # a terminal that hung up, or one that we are in the background of
            data = b""
        if not data:
            self.close()
            if self._on_end is not None:
                self._on_end()
            return
        if self._is_always_ready:
            self._turn = self._loop.call_soon(self._read)
        self._on_data(data)


class _Output:
    """Writes to a descriptor as far as it takes, and the rest once it takes more."""

    def __init__(self, fd: int, *, on_room: Callable[[], None], on_gone: Callable[[], None]) -> None:
        self._on_room = on_room
        self._on_gone = on_gone
        self._waiting = bytearray()
        self._is_gone = False
        self._is_full = False
        self._flushed: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._fd = -1
        self._write: Callable[[memoryview | bytearray | bytes], int]
        if stat.S_ISSOCK(os.fstat(fd).st_mode):  # cannot be opened again, but asked each time not to block
            self._socket = socket.socket(fileno=os.dup(fd))
            self._fd = self._socket.fileno()
            self._write = functools.partial(_send, self._socket)
        else:
            self._fd = _open_again(fd, os.O_WRONLY)
            self._write = functools.partial(os.write, self._fd)

    def write(self, data: bytes) -> bool:
        """Take all of `data`; False when that was enough for now."""
        if self._is_gone:
            return True
        if not self._waiting:
            data = data[self._try(data) :]
            if not data or self._is_gone:
                return True
            self._loop.add_writer(self._fd, self._go_on)
        self._waiting += data
        self._is_full = len(self._waiting) >= _FULL_BYTES
        return not self._is_full

    async def flush(self, grace: float) -> None:
        """Wait until all is written, `grace` seconds at most."""
        if not self._waiting:
            return
        self._flushed = self._loop.create_future()
        with contextlib.suppress(TimeoutError):  # a terminal that is stopped does not get the rest
            async with asyncio.timeout(grace):
                await self._flushed

    def close(self) -> None:
        if self._waiting:
            self._loop.remove_writer(self._fd)
            self._waiting.clear()
        if self._socket is not None:
            self._socket.close()
        elif self._fd >= 0:
            os.close(self._fd)
        self._socket, self._fd = None, -1
        self._is_gone = True  # its number may be another file's soon

    def _go_on(self) -> None:
        del self._waiting[: self._try(self._waiting)]
        if self._is_gone:
            self._waiting.clear()
        if not self._waiting:
            self._loop.remove_writer(self._fd)
            if self._flushed is not None and not self._flushed.done():
                self._flushed.set_result(None)
        if self._is_full and len(self._waiting) < _FULL_BYTES // 2:
            self._is_full = False
            self._on_room()

    def _try(self, data: bytes | bytearray) -> int:
        try:
            return self._write(data)
        except BlockingIOError:
            return 0
        except OSError:  # a pipe without a reader, a terminal that hung up, a full disk
            self._is_gone = True
            self._on_gone()
            return 0


def _send(connection: socket.socket, data: memoryview | bytearray | bytes) -> int:
    return connection.send(data, socket.MSG_DONTWAIT)


def _open_again(fd: int, direction: int) -> int:
    """A descriptor for the same file whose O_NONBLOCK is ours alone."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        flags = direction | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # a terminal may be another user's, as after su
            return os.open(f"/proc/self/fd/{fd}", flags)
        with contextlib.suppress(OSError):  # but anybody may open his own
            os.tcgetpgrp(fd)  # fails of a terminal that is not the one which /dev/tty means to us
            return os.open("/dev/tty", flags)
    # A regular file does not block, and opened again it would be written from its beginning. Of what is left, a read
    # when something is there does not block either; a write to such a terminal may, for as long as it is stopped.
    return os.dup(fd)
