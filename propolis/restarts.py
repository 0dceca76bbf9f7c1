"""The restart policy: which VMs are started once more after their end, and how much later."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from propolis.errors import PropolisError
from propolis.lifecycle import State
from propolis.state_file import StateRecord

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from propolis.background import Background
    from propolis.instance import Instance

log = logging.getLogger(__name__)

FIRST_DELAY, LAST_DELAY = 1.0, 300.0  # seconds between an end and the next start
STEADY_SECONDS = 60.0  # a run that lasted so long was no failure to start


class Restarts:
    """Of all VMs."""

    def __init__(
        self, start: Callable[[Instance], Awaitable[None]], background: Background, first_delay: float = FIRST_DELAY
    ) -> None:
        """`start` has a VM run, by who has its turn."""
        self._start = start
        self._background = background
        self._first_delay = first_delay

    def follow_policy(self, instance: Instance, last: StateRecord) -> None:
        """After the end of a run, or of an attempt at one."""
        policy = instance.definition.restart
        wanted = last.state is State.FAILED or (policy == "always" and last.state is State.STOPPED)
        if policy == "never" or not wanted or instance.has_stop_mark or instance.is_deleted:
            return
        delay = min(self._first_delay * 2**instance.failures, LAST_DELAY)
        instance.failures += 1
        self.start_after(instance, delay)

    def note_run(self, instance: Instance, seconds: float) -> None:
        """How long a run has lasted."""
        if seconds >= STEADY_SECONDS:
            instance.failures = 0

    def start_after(self, instance: Instance, delay: float) -> None:
        """In a task of its own; in place of what was planned."""
        self.cancel(instance)
        instance.next_start = asyncio.get_running_loop().time() + delay
        instance.restart = self._background.spawn(self._start_again(instance, delay))

    def cancel(self, instance: Instance) -> None:
        """What is planned is not done; from within the task that does it, of no effect."""
        if instance.restart is not None and instance.restart is not asyncio.current_task():
            instance.restart.cancel()
            instance.restart = None
            instance.next_start = None
            instance.note_move()

    async def _start_again(self, instance: Instance, delay: float) -> None:
        me = asyncio.current_task()
        await asyncio.sleep(delay)
        problem: PropolisError | None = None
        async with instance.turn:
            if instance.restart is not me:
                return
            try:
                if instance.running is None:
                    instance.restarts += 1
                    await self._start(instance)
                    log.info("started", extra={"vm": instance.name, "after_seconds": delay})
            except PropolisError as error:
                problem = error
            instance.restart = None
            instance.next_start = None
        instance.note_move()
        if problem is not None:
            log.error("not started", extra={"vm": instance.name, "reason": str(problem)})
            if instance.running is None:
                self.follow_policy(instance, StateRecord(generation=0, state=State.FAILED, detail=str(problem)))
