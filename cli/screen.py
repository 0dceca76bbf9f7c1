"""`screenshot` and `vnc`: what a VM's screen shows, and a way to it for programs that speak RFB."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

import aiohttp

from propolis.errors import ConfigError, PropolisError

from .output import fail

if TYPE_CHECKING:
    from propolis.http.client import Client

    from .output import Output
    from .session import Work

HOST = "127.0.0.1"
_PIECE = 65536


def screenshot(name: str, path: str | None) -> Work:
    """Writes a PNG file; "-" is standard output."""

    async def work(client: Client, output: Output) -> None:
        picture = await client.screenshot(name)
        if path == "-":
            sys.stdout.buffer.write(picture)
            sys.stdout.buffer.flush()
            return
        where = path or f"{name}.png"
        _write(where, picture)
        if not output.is_quiet:
            output.line(where)

    return work


def _write(path: str, content: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"write {path!r}: {error.strerror or error}") from error


def vnc(name: str, port: int) -> Work:
    """Passes what comes to a port of this machine on to the VM's screen, until the program is ended."""

    async def work(client: Client, output: Output) -> None:
        await client.screenshot(name)  # whether there is a screen at all
        clients: set[asyncio.Task[None]] = set()

        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(_bridge(client, name, reader, writer))
            clients.add(task)
            task.add_done_callback(clients.discard)

        try:
            server = await asyncio.start_server(begin, HOST, port)
        except OSError as error:
            raise ConfigError(f"listen on {HOST}:{port}: {error.strerror or error}") from error
        try:
            output.line(f"{HOST}:{server.sockets[0].getsockname()[1]}")
            await server.serve_forever()
        finally:
            for task in clients:
                task.cancel()
            if clients:
                await asyncio.wait(clients)

    return work


async def _bridge(client: Client, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one side has enough; what goes wrong is said, and other clients go on."""
    try:
        async with client.screen(name) as websocket:
            ways = [asyncio.create_task(way) for way in (_inward(reader, websocket), _outward(websocket, writer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
    except PropolisError as error:
        fail(str(error))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _inward(reader: asyncio.StreamReader, websocket: aiohttp.ClientWebSocketResponse) -> None:
    while data := await reader.read(_PIECE):
        await websocket.send_bytes(data)


async def _outward(websocket: aiohttp.ClientWebSocketResponse, writer: asyncio.StreamWriter) -> None:
    async for message in websocket:
        if message.type is aiohttp.WSMsgType.BINARY:
            writer.write(message.data)
            await writer.drain()
