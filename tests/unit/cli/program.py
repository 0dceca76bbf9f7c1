"""Runs `propolis-cli` of this tree as a process of its own, beside a server in the test's loop.

It is forked from one that has its imports behind it, which else were most of the time that these tests take.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.unit.console.terminals import Pty

TIMEOUT = 60  # seconds
TREE = Path(__file__).resolve().parents[3]


class Ended(NamedTuple):
    """A program that has run."""

    status: int
    out: str
    err: str


class Forge:
    """The process that programs are forked from."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            script = str(Path(__file__).with_name("warm.py"))
            self._process = subprocess.Popen(
                [sys.executable, script, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def fork(self, request: dict[str, object], report: socket.socket, files: tuple[int, int, int]) -> None:
        socket.send_fds(self._control, [json.dumps(request).encode()], [report.fileno(), *files])

    def close(self) -> None:
        self._control.close()
        self._process.wait(TIMEOUT)


forge: list[Forge] = []
"""The one of this run of the tests, which begins before the first of them does: see conftest.py."""


class Program:
    """One run of it, whose standard descriptors are given or pipes; it is killed at the end if it has not ended."""

    def __init__(
        self,
        *words: str,
        server: str | None = None,
        tty: Pty | None = None,
        typed: bytes = b"",
        environment: dict[str, str] | None = None,
    ) -> None:
        """`server` is the path of a unix socket; with `tty` it is in front of that."""
        self._words = [*([] if server is None else ["--url", f"unix:{server}"]), *words]
        self._tty = tty
        self._typed = typed
        # Without what would tell the program of another server.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PROPOLIS", "NO_COLOR"))}
        self._environment = kept | {"TERM": "xterm"} | (environment or {})
        self.pid = 0
        self.status: int | None = None
        self.out: asyncio.StreamReader | None = None
        self.err: asyncio.StreamReader | None = None
        self._report: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._transports: list[asyncio.ReadTransport] = []

    async def __aenter__(self) -> Self:
        ours, theirs = socket.socketpair()
        request = {"words": self._words, "environment": self._environment, "at_terminal": self._tty is not None}
        with theirs, contextlib.ExitStack() as stack:
            if self._tty is not None:
                files = (self._tty.fd,) * 3
            else:
                stdin, typing = os.pipe()
                os.write(typing, self._typed)  # as much as a pipe holds
                os.close(typing)
                out, stdout = os.pipe()
                err, stderr = os.pipe()
                files = (stdin, stdout, stderr)
                for fd in files:
                    stack.callback(os.close, fd)
                self.out, self.err = await self._read(out), await self._read(err)
            forge[0].fork(request, theirs, files)
        self._report = await asyncio.open_connection(sock=ours)
        self.pid = await self._told("pid")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            await self.wait()
        self.close_output()
        assert self._report is not None
        self._report[1].close()
        with contextlib.suppress(OSError):
            await self._report[1].wait_closed()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def close_output(self) -> None:
        """Nobody reads what it prints any more; twice is fine."""
        for transport in self._transports:
            transport.close()

    async def wait(self) -> int:
        """The exit status of a program that ends by itself; negative, the signal that ended it."""
        if self.status is None:
            self.status = await self._told("status")
        return self.status

    async def ended(self) -> Ended:
        """All that it prints until it ends."""
        assert self.out is not None
        assert self.err is not None
        async with asyncio.timeout(TIMEOUT):
            out, err = await asyncio.gather(self.out.read(), self.err.read())
        return Ended(await self.wait(), out.decode(), err.decode())

    async def _told(self, what: str) -> int:
        assert self._report is not None
        async with asyncio.timeout(TIMEOUT):
            word, value = (await self._report[0].readline()).split()
        assert word.decode() == what
        return int(value)

    async def _read(self, fd: int) -> asyncio.StreamReader:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 20)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
        )
        self._transports.append(transport)
        return reader


async def cli(
    *words: str, server: str | None = None, typed: bytes = b"", environment: dict[str, str] | None = None
) -> Ended:
    """Runs it to its end."""
    async with Program(*words, server=server, typed=typed, environment=environment) as program:
        return await program.ended()


@contextlib.asynccontextmanager
async def at_terminal(
    tty: Pty, *words: str, server: str | None = None, environment: dict[str, str] | None = None
) -> AsyncIterator[Program]:
    """Runs it in front of that terminal, in a session of its own."""
    async with Program(*words, server=server, tty=tty, environment=environment) as program:
        yield program
