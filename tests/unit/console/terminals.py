"""A terminal on a real pty, and the person in front of it."""

import asyncio
import contextlib
import os
import pty
import termios
from collections.abc import Callable

import pytest

TIMEOUT = 20
LFLAG = 3


class Pty:
    """A terminal and the person in front of it, who reads only when asked to."""

    def __init__(self) -> None:
        self.person, self.fd = pty.openpty()
        os.set_blocking(self.person, False)
        self.before = termios.tcgetattr(self.fd)
        self.seen = bytearray()

    @property
    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.person)[LFLAG] & (termios.ICANON | termios.ECHO | termios.ISIG)

    @property
    def is_restored(self) -> bool:
        return termios.tcgetattr(self.person) == self.before

    def type(self, data: bytes) -> None:
        assert os.write(self.person, data) == len(data)

    def look(self) -> bytes:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.person, 65536):
                self.seen += data
        return bytes(self.seen)

    def hang_up(self) -> None:
        os.close(self.person)
        self.person = -1

    def close(self) -> None:
        for fd in (self.person, self.fd):
            if fd >= 0:
                os.close(fd)
        self.person = self.fd = -1


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(TIMEOUT):
            while not condition():  # noqa: ASYNC110 -- what is waited for is seen from outside only
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail(f"waited in vain: {what}")
