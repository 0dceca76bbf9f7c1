"""What happens to the VM, as it happens: server-sent events, or a websocket with one event in each text frame.

A watcher that comes back with the number of the last event it saw, as `Last-Event-ID` or ?after=, misses none that is
still kept; where some are lost, it is told by an event of the kind "gap".
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from propolis.errors import FieldError
from propolis.http import codec, ours
from propolis.http.slot import ShutdownError, slot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from propolis.event_log import Event, EventLog

routes = web.RouteTableDef()

KEEP_ALIVE = 15.0  # seconds without an event after which a stream shows that it still lives
PATIENCE = 30.0  # seconds for a watcher to take an event
CLOSE_PATIENCE = 1.0


@routes.get("/instance/events")
async def stream(request: web.Request) -> web.StreamResponse:
    log = slot(request).vm.events
    after = _after(request)
    after = log.last if after is None else min(after, log.last)
    if request.headers.get("Upgrade", "").lower() == "websocket":
        return await _websocket(request, log, after)
    return await _server_sent(request, log, after)


def _after(request: web.Request) -> int | None:
    wanted = codec.query(request, ours.EventsRequest).after
    header = request.headers.get("Last-Event-ID")
    if wanted is None and header:
        if not (header.isascii() and header.isdigit() and len(header) < 20):
            raise FieldError([("", f"Last-Event-ID {header[:100]!r} is no number of an event")])
        return int(header)
    return wanted


async def _server_sent(request: web.Request, log: EventLog, after: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)

    async def send(event: Event) -> None:
        await response.write(_text(event))

    async def keep_alive() -> None:
        await response.write(b":\n\n")

    with contextlib.suppress(ShutdownError, TimeoutError, ConnectionError):
        await keep_alive()  # so that the headers are seen before the first event
        async with slot(request).until_shutdown():
            await _follow(log, after, send, keep_alive)
    return response


async def _websocket(request: web.Request, log: EventLog, after: int) -> web.StreamResponse:
    socket = web.WebSocketResponse(timeout=CLOSE_PATIENCE, max_msg_size=1024, compress=False)
    await socket.prepare(request)

    async def send(event: Event) -> None:
        await socket.send_str(msgspec.json.encode(event).decode())

    async def keep_alive() -> None:
        await socket.ping()

    code, reason = WSCloseCode.GOING_AWAY, "VM stopped"
    leaving = asyncio.create_task(_until_closed(socket))
    following = asyncio.create_task(_follow(log, after, send, keep_alive))
    try:
        async with slot(request).until_shutdown():
            await asyncio.wait({leaving, following}, return_when=asyncio.FIRST_COMPLETED)
    except ShutdownError:
        code, reason = WSCloseCode.SERVICE_RESTART, "the server shuts down"
    finally:
        leaving.cancel()
        following.cancel()
        results = await asyncio.gather(leaving, following, return_exceptions=True)
    if isinstance(results[1], TimeoutError):
        code, reason = WSCloseCode.TRY_AGAIN_LATER, "the client does not read"
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(2 * CLOSE_PATIENCE):
            await socket.close(code=code, message=reason.encode())
    return socket


async def _until_closed(socket: web.WebSocketResponse) -> None:
    while (await socket.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY):
        pass  # a watcher has nothing to say


async def _follow(
    log: EventLog,
    after: int,
    send: Callable[[Event], Awaitable[None]],
    keep_alive: Callable[[], Awaitable[None]],
) -> None:
    """Sends events, a gap in the place of those that are lost, until there will be no more.

    Raises TimeoutError where one is not taken in time.
    """
    while True:
        batch = log.after(after)
        if batch.is_gap:
            async with asyncio.timeout(PATIENCE):
                await send(log.gap)
        for event in batch.events:
            async with asyncio.timeout(PATIENCE):
                await send(event)
            after = event.id
        if log.is_closed and log.last <= after:
            return
        try:
            async with asyncio.timeout(KEEP_ALIVE):
                await log.wait(after)
        except TimeoutError:
            async with asyncio.timeout(PATIENCE):
                await keep_alive()


def _text(event: Event) -> bytes:
    """In the format of server-sent events; JSON has no line breaks outside its escapes."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.kind.encode(), msgspec.json.encode(event))
