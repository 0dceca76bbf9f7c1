"""A guest that shows something, its screen on a TCP port, and a client of it that may be as bad as it likes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING

from propolis.devices.ramfb import XRGB8888, Ramfb
from propolis.display.port import ScreenPort
from propolis.display.screen import Screen
from propolis.hypervisor._replay import ReplayVm

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator

GPA = 0x1000


class Guest:
    """Draws, and is told of keys and moves."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.vm.memory.add(0, 8 << 20)
        self.ramfb = Ramfb(self.vm.memory)
        self.keys: list[tuple[int, bool]] = []
        self.moves: list[tuple[int, int, int, int]] = []
        self.screen = Screen(
            "guest", self.ramfb, lambda *key: self.keys.append(key), lambda *move: self.moves.append(move)
        )
        self.width = self.height = 0

    def show(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.ramfb.configure(struct.pack(">QIIIII", GPA, XRGB8888, 0, width, height, 0))

    def draw(self, x: int, y: int, width: int, height: int, colour: int) -> None:
        row = colour.to_bytes(4, "little") * width
        for line in range(y, y + height):
            self.vm.memory.write(GPA + 4 * (line * self.width + x), row)

    def scribble(self, dice: random.Random) -> None:
        x, y = dice.randrange(self.width), dice.randrange(self.height)
        width, height = dice.randint(1, self.width - x), dice.randint(1, self.height - y)
        self.draw(x, y, width, height, dice.getrandbits(24))

    def picture(self) -> bytes:
        """Blue, green, red and 0 of each pixel."""
        data = bytearray(self.vm.memory.read(GPA, 4 * self.width * self.height))
        data[3::4] = bytes(self.width * self.height)
        return bytes(data)

    async def close(self) -> None:
        await self.screen.close()
        await self.ramfb.halt()
        self.vm.close()


@contextlib.asynccontextmanager
async def serve(guest: Guest, *, patience: float = 10) -> AsyncIterator[int]:
    """The TCP port where the guest's screen is shown; closes the guest too."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = ScreenPort(guest.screen, listener, patience=patience)
    number: int = listener.getsockname()[1]
    try:
        await port.open()
        yield number
    finally:
        await port.close()
        await guest.close()


class Client:
    """Speaks RFB by hand: exact messages, good and bad."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.read = reader.readexactly
        self.rest = reader.read
        self.write = writer.write
        self.drain = writer.drain
        self._writer = writer
        self.width = self.height = 0
        self.name = ""

    async def greet(self, version: bytes = b"RFB 003.008\n") -> None:
        """To the end of the handshake, without a password."""
        assert await self.read(12) == b"RFB 003.008\n"
        self.write(version)
        assert await self.read(2) == b"\1\1"
        self.write(b"\1")
        assert await self.read(4) == bytes(4)
        await self.begin()

    async def begin(self) -> None:
        self.write(b"\1")
        self.width, self.height = struct.unpack(">HH", await self.read(4))
        assert await self.read(16) == bytes.fromhex("20 18 00 01 00ff 00ff 00ff 10 08 00 000000")
        self.name = (await self.read(int.from_bytes(await self.read(4), "big"))).decode()

    def encodings(self, *wanted: int) -> None:
        self.write(struct.pack(f">BxH{len(wanted)}i", 2, len(wanted), *wanted))

    def ask(self, x: int, y: int, width: int, height: int, *, incremental: bool = True) -> None:
        self.write(struct.pack(">BBHHHH", 3, incremental, x, y, width, height))

    async def rectangles(self) -> list[tuple[int, int, int, int, int, bytes]]:
        """Of the next update: place, size, encoding, content."""
        kind, count = struct.unpack(">BxH", await self.read(4))
        assert kind == 0
        found = []
        for _ in range(count):
            x, y, width, height, encoding = struct.unpack(">HHHHi", await self.read(12))
            content = b""
            if encoding == 0:
                content = await self.read(4 * width * height)
            elif encoding > 0:
                content = await self.read(int.from_bytes(await self.read(4), "big"))
            found.append((x, y, width, height, encoding, content))
        return found

    def close(self) -> None:
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    client = Client(reader, writer)
    try:
        yield client
    finally:
        client.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
