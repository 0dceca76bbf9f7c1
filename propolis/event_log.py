"""What happened to a VM, for those who watch: the latest events are kept, each with a number to go on from.

Numbers grow with the VM's generations, which go on where an earlier life of the VM ended: a watcher that comes back
with the number of the last event it saw misses none that is still kept, whichever process runs the VM by then.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import NamedTuple

import msgspec

GAP = "gap"  # the kind of what takes the place of events that are no longer kept
KEPT_EVENTS = 1024
_PER_GENERATION = 1_000_000  # numbers below one generation; 9 * 10^9 generations then fit a JavaScript number


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that happened, at `time` in seconds of Unix time."""

    id: int
    time: float
    name: str
    uuid: str
    kind: str
    generation: int
    state: str | None = None
    detail: str | None = None


class Batch(NamedTuple):
    """Events in order; with `is_gap` there were others before them that are no longer kept."""

    events: list[Event]
    is_gap: bool


class EventLog:
    """The latest events of one VM."""

    def __init__(self, name: str, uuid: str, kept: int = KEPT_EVENTS) -> None:
        self._name = name
        self._uuid = uuid
        self._events: deque[Event] = deque(maxlen=kept)
        self._dropped = 0  # the number of the latest one that is no longer kept
        self._waiters: set[asyncio.Future[None]] = set()
        self.is_closed = False

    @property
    def last(self) -> int:
        """The number of the latest event, 0 where there is none yet."""
        return self._events[-1].id if self._events else self._dropped

    def add(self, kind: str, generation: int, *, state: str | None = None, detail: str | None = None) -> None:
        """Something happened just now."""
        if len(self._events) == self._events.maxlen:
            self._dropped = self._events[0].id
        number = max(self.last + 1, generation * _PER_GENERATION)
        self._events.append(
            Event(
                id=number,
                time=time.time(),
                name=self._name,
                uuid=self._uuid,
                kind=kind,
                generation=generation,
                state=state,
                detail=detail or None,
            )
        )
        self._wake()

    def after(self, number: int) -> Batch:
        """The events since the one of that number."""
        return Batch([event for event in self._events if event.id > number], number < self._dropped)

    @property
    def gap(self) -> Event:
        """Takes the place of the events that are no longer kept; its number is that of the latest of them."""
        generation = self._dropped // _PER_GENERATION
        return Event(
            id=self._dropped, time=time.time(), name=self._name, uuid=self._uuid, kind=GAP, generation=generation
        )

    async def wait(self, number: int) -> None:
        """Returns once there is an event after that number, or there will be none."""
        while self.last <= number and not self.is_closed:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def close(self) -> None:
        """There will be no other event."""
        self.is_closed = True
        self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
