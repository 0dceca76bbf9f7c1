"""GET /events: what happens to all VMs, as server-sent events or on a websocket, with numbers to go on from.

The daemon follows the events of each worker; what a worker could not tell, its own death, comes from the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from propolis.errors import FieldError, PropolisError
from propolis.event_log import GAP, Event
from propolis.http import codec, ours

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from propolis.http.forward import Workers
    from propolis.instance import Instance
    from propolis.supervisor import Supervisor

log = logging.getLogger(__name__)

KEPT_EVENTS = 4096
KEEP_ALIVE = 15.0  # seconds without an event after which a stream shows that it still lives
PATIENCE = 30.0  # seconds for a watcher to take an event
_MAX_LINE = 65536
_RETRY = 1.0
_CLOSE_PATIENCE = 1.0


class _Told(msgspec.Struct):
    """What of a worker's event is taken over."""

    kind: str
    generation: int
    time: float
    state: str | None = None
    detail: str | None = None


class Feed:
    """The latest events of all VMs."""

    def __init__(self, supervisor: Supervisor, workers: Workers) -> None:
        self._supervisor = supervisor
        self._workers = workers
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self._last = int(time.time() * 1000)  # so that numbers grow over restarts of the daemon
        self._dropped = self._last
        self._news = asyncio.Event()
        self._is_closed = False
        self._followers: set[asyncio.Task[None]] = set()
        self._generations: dict[str, int] = {}  # the latest that was told, by UUID
        supervisor.observers.append(self._observe)

    def install(self, app: web.Application) -> None:
        """Serve /events."""
        app.router.add_get("/events", self._get)
        app.on_shutdown.append(self._on_shutdown)

    async def _on_shutdown(self, _: web.Application) -> None:
        self._is_closed = True
        self._wake()
        for task in self._followers:
            task.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)

    # -- what happens --------------------------------------------------------------------------------------------------

    def _observe(self, kind: str, instance: Instance) -> None:
        """The supervisor's word."""
        record = instance.record
        if kind == "worker":
            task = asyncio.create_task(self._follow(instance))
            self._followers.add(task)
            task.add_done_callback(self._followers.discard)
        elif kind == "ended":
            if record.generation > self._generations.get(instance.uuid, -1):  # nobody else was there to tell it
                told = _Told("state", record.generation, time.time(), record.state.value, record.detail)
                self._add(instance, told)
        else:
            self._add(instance, _Told(kind, record.generation, time.time()))
        if kind == "deleted":
            self._generations.pop(instance.uuid, None)

    def _add(self, instance: Instance, told: _Told) -> None:
        if len(self._events) == KEPT_EVENTS:
            self._dropped = self._events[0].id
        self._last += 1
        self._generations[instance.uuid] = max(told.generation, self._generations.get(instance.uuid, -1))
        self._events.append(
            Event(
                id=self._last,
                time=told.time,
                name=instance.name,
                uuid=instance.uuid,
                kind=told.kind[:100],
                generation=told.generation,
                state=told.state,
                detail=told.detail or None,
            )
        )
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _follow(self, instance: Instance) -> None:
        """A worker's own events, from its first one or, of one that was found, from where it is."""
        running = instance.running
        number = 0 if instance.record.generation <= 0 or instance.is_fresh else None
        while running is not None and instance.running is running and not self._is_closed:
            path = "/instance/events" if number is None else f"/instance/events?after={number}"
            try:
                async for line in self._workers.lines(instance, path, _MAX_LINE):
                    if line.startswith(b"id: ") and line[4:].isdigit() and len(line) < 24:
                        number = int(line[4:])
                    elif line.startswith(b"data: "):
                        self._add(instance, msgspec.json.decode(line[6:], type=_Told))
            except (PropolisError, aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
                log.debug("events break off", extra={"vm": instance.name, "reason": str(error)[:200]})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY):
                    while instance.running is running:
                        await instance.moved()

    # -- who watches ---------------------------------------------------------------------------------------------------

    async def _get(self, request: web.Request) -> web.StreamResponse:
        after = _after(request)
        # A number that is yet to come is of an earlier daemon, before the host's clock was set back.
        number = self._last if after is None else after if after <= self._last else 0
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self._websocket(request, number)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)

        async def send(event: Event) -> None:
            kind = event.kind.encode() if event.kind.isprintable() else b"other"
            await response.write(b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, kind, msgspec.json.encode(event)))

        async def keep_alive() -> None:
            await response.write(b":\n\n")

        with contextlib.suppress(TimeoutError, ConnectionError):
            await keep_alive()  # so that the head is seen before the first event
            await self._send_all(number, send, keep_alive)
        return response

    async def _websocket(self, request: web.Request, number: int) -> web.StreamResponse:
        channel = web.WebSocketResponse(timeout=_CLOSE_PATIENCE, max_msg_size=1024, compress=False)
        await channel.prepare(request)

        async def send(event: Event) -> None:
            await channel.send_str(msgspec.json.encode(event).decode())

        async def keep_alive() -> None:
            await channel.ping()

        async def listen() -> None:
            while (await channel.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY):
                pass  # a watcher has nothing to say

        listening = asyncio.create_task(listen())
        sending = asyncio.create_task(self._send_all(number, send, keep_alive))
        try:
            await asyncio.wait({listening, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (listening, sending):
                task.cancel()
            await asyncio.gather(listening, sending, return_exceptions=True)
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(2 * _CLOSE_PATIENCE):
                await channel.close(code=WSCloseCode.SERVICE_RESTART, message=b"the daemon ends")
        return channel

    async def _send_all(
        self,
        number: int,
        send: Callable[[Event], Awaitable[None]],
        keep_alive: Callable[[], Awaitable[None]],
    ) -> None:
        """Until the daemon ends. Raises TimeoutError where a watcher does not take what it is sent."""
        if number < self._dropped and number != self._last:
            async with asyncio.timeout(PATIENCE):
                await send(Event(id=self._dropped, time=time.time(), name="", uuid="", kind=GAP, generation=0))
        while not self._is_closed:
            news = self._news
            for event in [event for event in self._events if event.id > number]:
                async with asyncio.timeout(PATIENCE):
                    await send(event)
                number = event.id
            if news is not self._news:
                continue
            try:
                async with asyncio.timeout(KEEP_ALIVE):
                    await news.wait()
            except TimeoutError:
                async with asyncio.timeout(PATIENCE):
                    await keep_alive()


def _after(request: web.Request) -> int | None:
    wanted = codec.query(request, ours.EventsRequest).after
    header = request.headers.get("Last-Event-ID")
    if wanted is None and header:
        if not (header.isascii() and header.isdigit() and len(header) < 20):
            raise FieldError([("", f"Last-Event-ID {header[:100]!r} is no number of an event")])
        return int(header)
    return wanted
