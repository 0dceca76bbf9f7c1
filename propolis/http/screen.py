"""The screen: a picture of it, and RFB on a websocket for who looks at it, types and points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import WSCloseCode, WSMsgType, web

from propolis.display.session import Session
from propolis.http.slot import ShutdownError, slot
from propolis.http.websocket_close import CLOSE_PATIENCE, close

if TYPE_CHECKING:
    from propolis.display.screen import Screen

routes = web.RouteTableDef()

MAX_MESSAGE = 1 << 20  # bytes of one message from a client: RFB's are cut into such as the client likes


@routes.get("/instance/screenshot")
async def get_picture(request: web.Request) -> web.Response:
    picture = await slot(request).active.screen.png()
    return web.Response(body=picture, content_type="image/png", headers={"Cache-Control": "no-store"})


@routes.get("/instance/vnc")
async def show(request: web.Request) -> web.StreamResponse:
    here = slot(request)
    screen: Screen = here.active.screen
    socket = web.WebSocketResponse(
        protocols=("binary",), timeout=CLOSE_PATIENCE, max_msg_size=MAX_MESSAGE, compress=False
    )
    await socket.prepare(request)
    session = Session(screen, _Stream(socket), patience=here.console_patience)
    try:
        async with here.until_shutdown():
            reason = await session.run()
        code = WSCloseCode.GOING_AWAY if screen.closed.is_set() else WSCloseCode.POLICY_VIOLATION
    except ShutdownError:
        code, reason = WSCloseCode.SERVICE_RESTART, "the server shuts down"
    await close(request, socket, code, reason)
    return socket


class _Stream:
    """Bytes over messages of a websocket, which begin and end anywhere."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._came = bytearray()
        self._goes: list[bytes] = []

    async def readexactly(self, count: int) -> bytes:
        while len(self._came) < count:
            message = await self._socket.receive()
            if message.type is not WSMsgType.BINARY:
                raise EOFError
            self._came += message.data
        data = bytes(self._came[:count])
        del self._came[:count]
        return data

    def write(self, data: bytes) -> None:
        self._goes.append(data)

    async def drain(self) -> None:
        data = b"".join(self._goes)
        self._goes.clear()
        await self._socket.send_bytes(data)
