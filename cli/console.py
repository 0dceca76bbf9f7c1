"""`serial`: this terminal and a VM's serial port on the server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from propolis.console.escape import parse_escape
from propolis.console.terminal import Terminal
from propolis.errors import PropolisError

if TYPE_CHECKING:
    from propolis.console.hub import Sink
    from propolis.http.client import Client
    from propolis.http.client_console import Console

    from .output import Output
    from .session import Work

RECENT = 16384  # bytes of what was printed before, unless it is said how many
PATIENCE = 600.0  # seconds for a server to come back; whoever does not want to wait leaves
_PIECE = 16384  # of what was typed: a message may not be too long
_TYPED = 65536  # what was typed and not sent yet; past it no more is read


def serial(name: str, byte_offset: int | None, escape: str, com: int) -> Work:
    """Attaches the terminal."""

    async def work(client: Client, output: Output) -> int | None:
        key = parse_escape(escape)
        from_start = byte_offset if byte_offset is not None and byte_offset >= 0 else None
        most_recent = None if from_start is not None else RECENT if byte_offset is None else -byte_offset
        terminal = Terminal(escape=key, name=name)
        async with client.serial(
            name,
            from_start=from_start,
            most_recent=most_recent,
            com=com,
            patience=PATIENCE,
            on_lost=lambda error: terminal.say(f"\r\n[{error}; connecting again]"),
            on_back=lambda: terminal.say("[connected again]"),
        ) as console:
            return await attach(terminal, console)

    return work


async def attach(terminal: Terminal, console: Console) -> int | None:
    """Until the user leaves, the console ends, or the terminal is gone; the exit status."""
    link: Link | None = None

    def connect(sink: Sink) -> Link:
        nonlocal link
        link = Link(console, sink)
        return link

    try:
        reason = await terminal.attach(connect)
    finally:
        if link is not None:
            await link.close()
    if link is not None and link.failure is not None:
        raise link.failure
    return 1 if reason == "hangup" else None


class Link:
    """Carries bytes between a terminal and a console elsewhere; to the terminal it is the console."""

    def __init__(self, console: Console, sink: Sink) -> None:
        self.failure: PropolisError | None = None
        self._console = console
        self._sink = sink
        self._typed = bytearray()
        self._has_typed = asyncio.Event()
        self._is_paused = False
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._tasks = [
            asyncio.create_task(self._receive(), name="console-output"),
            asyncio.create_task(self._transmit(), name="console-input"),
        ]

    def input(self, data: bytes) -> None:
        """Of the terminal: this was typed."""
        self._typed += data
        self._has_typed.set()
        if len(self._typed) >= _TYPED:
            self._is_paused = True
            self._sink.pause_input()

    def pause(self) -> None:
        """Of the terminal: it has enough to show for now."""
        self._may_write.clear()

    def resume(self) -> None:
        """Of the terminal: it shows more again."""
        self._may_write.set()

    def detach(self) -> None:
        """Of the terminal: it leaves."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Leave, and see both directions ended; twice is fine."""
        self.detach()
        await asyncio.wait(self._tasks)

    async def _receive(self) -> None:
        try:
            async for data in self._console:
                await self._may_write.wait()
                self._sink.write(data)
        except PropolisError as error:
            self.failure = error
        finally:
            self._sink.close()

    async def _transmit(self) -> None:
        try:
            while True:
                await self._has_typed.wait()
                self._has_typed.clear()
                data = bytes(self._typed[:_PIECE])
                await self._console.send(data)
                del self._typed[: len(data)]
                if self._typed:
                    self._has_typed.set()
                if self._is_paused and len(self._typed) < _TYPED // 2:
                    self._is_paused = False
                    self._sink.resume_input()
        except PropolisError as error:
            self.failure = error
            self._sink.close()
