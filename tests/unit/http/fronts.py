"""What may stand between a client and a VM, and go away: a server that is restarted, a connection that is cut."""

import asyncio
import contextlib
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from propolis.http.app import make_app, serve
from propolis.http.client_transport import OFFSET_HEADER
from tests.unit.http.serving import Served


class Front:
    """A second server of the same VM, which can be restarted: to a client it is what a daemon is."""

    def __init__(self, served: Served, path: Path) -> None:
        self._vm = served.vm
        self.path = path
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, *, is_silent: bool = False) -> None:
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        app = make_app(self._vm)
        if is_silent:
            app.on_response_prepare.append(_drop_offset)
        self._runner = await serve(app, listener)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
            self.path.unlink(missing_ok=True)


async def _drop_offset(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop(OFFSET_HEADER, None)


class Relay:
    """Passes bytes on and drops its connections when told, as a process does that is killed."""

    def __init__(self, path: Path, target: str) -> None:
        self.path = path
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        for writer in self._writers:
            if not writer.is_closing():
                writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        self._writers |= {writer, far_writer}
        self.connections += 1
        self._tasks.add(asyncio.create_task(self._pass(reader, far_writer)))
        self._tasks.add(asyncio.create_task(self._pass(far_reader, writer)))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # uvloop's word for a transport that was cut off
            while data := await reader.read(997):
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
