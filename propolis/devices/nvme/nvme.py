"""An NVMe controller as a device of its machine: its life, and who serves its queues when.

disabled -> (CC.EN) -> enabled -> (CC.EN cleared, all in flight back) -> disabled
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING

from propolis.backends.block._engine import Operation
from propolis.devices._polling import Polling
from propolis.devices.device import Device
from propolis.devices.nvme import events
from propolis.devices.nvme._controller import NvmeFunction
from propolis.devices.nvme._io import IoQueue, Namespace
from propolis.devices.nvme.admin import ENTRY_SIZES_MASK, MIN_ENTRIES, Admin
from propolis.devices.nvme.features import Features
from propolis.devices.nvme.log_pages import ERROR_INFORMATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from propolis._vmm import Vm
    from propolis.backends.block import BlockBackend
    from propolis.devices.nvme.identify import Names
    from propolis.devices.nvme.log_pages import Failure

log = logging.getLogger(__name__)

# Events of _doorbells.pxd.
ENABLE, DISABLE, SHUTDOWN, ROOM, WAKE, BAD_DOORBELL, BAD_VALUE = 1, 2, 4, 8, 16, 32, 64

CC_ENABLE = 1
CC_SHUTDOWN = 3 << 14
CC_NVM_COMMANDS = 0x3FF0  # MPS, AMS and CSS: of each we have what 0 stands for
BUDGET = 256  # commands of one queue before everybody else on the loop has a turn
AGAIN = 1  # of _io.pxd
POLL_US = 50
ADMIN_ERRORS = 16  # the last ones are kept
RESET_PATIENCE = 10.0  # seconds until a reset that waits for the host is worth a line in the log
HALT_PATIENCE = 5.0


class Nvme(Device):
    """A disk. It owns the backend from the moment it is built, and closes it in halt."""

    def __init__(
        self, vm: Vm, name: str, backend: BlockBackend, *, names: Names, queues: int = 1, poll_us: int = POLL_US
    ) -> None:
        """`queues` is how many pairs there are for I/O.

        `poll_us` is for how long a queue that was busy is looked at before it is waited for; 0 is not at all.
        """
        super().__init__(name)
        self.backend = backend
        self.names = names
        self.granularity = max(backend.physical_block_size, backend.block_size)
        self.started = time.monotonic()
        self.power_cycles = 1
        self.function = NvmeFunction(vm, name, queues=queues + 1, on_event=self._on_event)
        self.namespace = Namespace(
            capacity=backend.capacity,
            block_size=backend.block_size,
            read_only=backend.read_only,
            can_zero=backend.can_zero,
            can_discard=backend.can_discard,
            max_extent=backend.max_extent,
        )
        self._engines = [backend.engine() for _ in range(queues)]
        self.queues = [
            IoQueue(self.function.doorbells, number, engine, Polling(poll_us * 1000), self.namespace)
            for number, engine in enumerate(self._engines, 1)
        ]
        self._control = backend.engine()  # for flushes that no I/O queue asked for
        self._flushes: dict[Operation, Callable[[int], None]] = {}
        self._features = Features(queues, queues + 1)
        self._admin = Admin(self, self._features)
        self._admin_failures: deque[Failure] = deque(maxlen=ADMIN_ERRORS)
        self._admin_failed = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled: set[int] = set()
        self._events = 0
        self._is_enabled = False
        self._is_listening = False
        self._is_paused = False
        self._is_resetting = False
        self._is_shutting_down = False
        self._reported = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._patience: asyncio.TimerHandle | None = None

    # -- Device --------------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        for number, engine in enumerate(self._engines, 1):
            loop.add_reader(engine.fileno(), self._on_completion, number)
        loop.add_reader(self._control.fileno(), self._on_flushed)

    def pause(self) -> None:
        self._is_paused = True
        self._stop_listening()

    async def drained(self) -> None:
        while self.in_flight():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def in_flight(self) -> int:
        return sum(queue.in_flight for queue in self.queues) + self._control.pending_count

    def resume(self) -> None:
        self._is_paused = False
        self._start_listening()
        self._handle_events()
        self.kick_all()

    def reset(self) -> None:
        self._events = 0
        self._stop_listening()
        self._disable()
        self.function.registers.power_on()
        self.power_cycles += 1

    async def halt(self) -> None:
        self._stop_listening()
        self._is_enabled = False
        self._is_paused = True
        self._forget_patience()
        try:
            async with asyncio.timeout(HALT_PATIENCE):
                await self.drained()
        except TimeoutError:
            log.error(  # noqa: TRY400 -- the traceback says nothing more
                "disk is let go with requests in flight: device=%s in_flight=%d", self.name, self.in_flight()
            )
        if self._loop is not None:
            for engine in (*self._engines, self._control):
                self._loop.remove_reader(engine.fileno())
        self.backend.close()

    def stats(self) -> dict[str, int]:
        total = self.io_counters()
        total["interrupts"] = self._admin.interrupts
        total["admin_commands"] = self._admin.served
        total["errors"] += self._admin_failed
        doorbells, registers = self.function.doorbells.stats(), self.function.registers.stats()
        total["ignored"] = doorbells["ignored"] + registers["ignored"]
        total["doorbells"] = doorbells["rung"]
        return total

    def resize(self, capacity: int) -> None:
        """The backend has another size now, in bytes; the host is told if it wants to be."""
        self.namespace.resize(capacity)
        self._admin.namespace_changed()

    # -- events of the registers ---------------------------------------------------------------------------------------

    def _on_event(self, bits: int) -> None:
        self._events |= bits
        if not self._is_paused:
            self._handle_events()

    def _handle_events(self) -> None:
        # An event may be older than a reset by the machine, so what the registers say decides.
        bits, self._events = self._events, 0
        if bits & DISABLE and self._is_enabled:
            self._begin_reset()
        if bits & (ENABLE | DISABLE):
            self._follow_enable()
        if bits & SHUTDOWN and self.function.registers.configuration & CC_SHUTDOWN and not self._is_resetting:
            self._begin_shutdown()
        if bits & (BAD_DOORBELL | BAD_VALUE) and self._is_enabled:
            information = events.INVALID_DOORBELL if bits & BAD_DOORBELL else events.INVALID_VALUE
            self._admin.report(events.ERROR, information, ERROR_INFORMATION)
        if bits & ROOM:
            for number in range(1, len(self.queues) + 1):
                self._on_completion(number)
        if bits & (ROOM | WAKE):
            self.kick_all()

    def _follow_enable(self) -> None:
        """Enables the controller if that is what CC says, or finishes a reset that had nothing to reset."""
        if self._is_enabled or self._is_resetting:
            return
        registers = self.function.registers
        configuration, *sizes, asq, acq = registers.admin_queues()
        if not configuration & CC_ENABLE:
            registers.finish_disable()  # also of a controller that failed to be enabled
            return
        registers.finish_disable()
        self._is_enabled = True
        try:
            if configuration & CC_NVM_COMMANDS or min(sizes) < MIN_ENTRIES:
                raise ValueError(f"CC {configuration:#x}, admin queues of {sizes} entries")
            self._admin.create((asq, sizes[0]), (acq, sizes[1]))
        except ValueError as error:
            log.warning("controller cannot be enabled: device=%s reason=%r", self.name, str(error))
            registers.set_fatal()
            return
        log.info("controller is enabled: device=%s", self.name)
        self._start_listening()
        registers.set_ready()

    @property
    def entry_sizes(self) -> int:
        """CC.IOCQES and CC.IOSQES, where they are in CC."""
        return self.function.registers.configuration & ENTRY_SIZES_MASK

    def _begin_reset(self) -> None:
        self._is_resetting = True
        self._stop_listening()
        for queue in self.queues:
            queue.stop()
        if not self.in_flight():
            self._finish_reset()
        elif self._loop is not None:
            self._patience = self._loop.call_later(RESET_PATIENCE, self._complain)

    def _complain(self) -> None:
        log.error("reset waits for the host: device=%s in_flight=%d", self.name, self.in_flight())

    def _finish_reset(self) -> None:
        self._disable()
        self.function.registers.finish_disable()
        self._follow_enable()

    def _disable(self) -> None:
        """Lets go of all queues; nothing is in flight."""
        self._forget_patience()
        self._is_enabled = self._is_resetting = self._is_shutting_down = False
        for queue in self.queues:
            queue.destroy()
        self._admin.destroy()
        self._features.reset()
        self.namespace.write_cache = True
        self.function.doorbells.forget_shadows()

    def _forget_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    # -- shutdown, §7.6.2 ----------------------------------------------------------------------------------------------

    def _begin_shutdown(self) -> None:
        """Takes no more commands; what was written goes to stable storage, and the host hears of it."""
        self._is_shutting_down = True
        self._stop_listening()
        if not self.in_flight():
            self._finish_shutdown()

    def _finish_shutdown(self) -> None:
        self.flush(self._on_shut_down)

    def _on_shut_down(self, _: int) -> None:
        # Also where the flush failed: a host that shuts down has no use for the error, and it is in the log.
        if self._is_shutting_down:
            self._is_shutting_down = False
            self.function.registers.set_shut_down()

    # -- the backend ---------------------------------------------------------------------------------------------------

    def flush(self, done: Callable[[int], None]) -> None:
        """Flushes the disk; `done` gets 0 or the errno."""
        operation = Operation("flush")
        self._flushes[operation] = done
        self._control.start(operation)

    def _on_flushed(self) -> None:
        for operation in self._control.finished():
            self._note(operation.error)
            self._flushes.pop(operation)(operation.error)
        self._after_completions()

    def _on_completion(self, number: int) -> None:
        if self._is_listening and self.function.is_bus_master:
            self._serve(number)  # there is room for another command now, and more is likely to come
        else:
            self.queues[number - 1].complete()
            self._after_queue(number)

    def _after_queue(self, number: int) -> None:
        queue = self.queues[number - 1]
        self._note(queue.last_error)
        if not queue.in_flight:
            self._admin.queue_drained(number)
            self._after_completions()

    def _after_completions(self) -> None:
        if not (self._waiters or self._is_resetting or self._is_shutting_down) or self.in_flight():
            return
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._is_resetting:
            self._finish_reset()
        elif self._is_shutting_down:
            self._finish_shutdown()

    def _note(self, error: int) -> None:
        if error and error != self._reported:
            self._reported = error  # once for each kind; the counters have them all
            name, reason = errno.errorcode.get(error, error), os.strerror(error)
            log.warning("disk error: device=%s errno=%s reason=%r", self.name, name, reason)

    # -- doorbells -----------------------------------------------------------------------------------------------------

    def _start_listening(self) -> None:
        if self._loop is None or not self._is_enabled or self._is_paused or self._is_listening:
            return
        # A doorbell from before this moment is in the eventfd, so it is not lost.
        self._is_listening = True
        for number in range(len(self.queues) + 1):
            self._loop.add_reader(self.function.doorbells.fileno(number), self._on_doorbell, number)

    def _stop_listening(self) -> None:
        if self._is_listening and self._loop is not None:
            for number in range(len(self.queues) + 1):
                self._loop.remove_reader(self.function.doorbells.fileno(number))
        self._is_listening = False

    def _on_doorbell(self, number: int) -> None:
        self.function.doorbells.drain(number)
        self._serve(number)

    def _turn(self, number: int) -> None:
        self._scheduled.discard(number)
        self._serve(number)

    def _again(self, number: int) -> None:
        """Serves a queue once more after everybody else on the loop had a turn."""
        if self._loop is not None and number not in self._scheduled:
            self._scheduled.add(number)
            self._loop.call_soon(self._turn, number)

    def _serve(self, number: int) -> None:
        # A function that may not reach memory leaves the queues alone; WAKE comes when it may.
        if not self._is_listening or not self.function.is_bus_master:
            return
        if number == 0:
            if self._admin.serve():
                self._again(0)
            return
        if self.queues[number - 1].run(BUDGET) & AGAIN:
            self._again(number)
        self._after_queue(number)

    def kick_all(self) -> None:
        """Serves every queue, whether or not it was asked for."""
        for number in range(len(self.queues) + 1):
            self._serve(number)

    # -- what log pages tell -------------------------------------------------------------------------------------------

    def io_counters(self) -> dict[str, int]:
        """Counters over all I/O queues since the device was built."""
        total: dict[str, int] = {}
        for queue in self.queues:
            for key, value in queue.stats().items():
                total[key] = total.get(key, 0) + value
        return total

    def admin_failed(self, cid: int, status: int) -> None:
        self._admin_failed += 1
        self._admin_failures.append((time.monotonic_ns(), 0, cid, status, 0))

    def failures(self) -> Iterator[Failure]:
        """The last commands that failed, of all queues, in no order."""
        yield from self._admin_failures
        for queue in self.queues:
            yield from queue.recent_errors()

    @property
    def failure_count(self) -> int:
        return self._admin_failed + sum(queue.error_count for queue in self.queues)
