"""What every virtio device does on the loop: activation, kicks, reset, pause, and what happens to a broken ring."""

import asyncio
import logging
from collections.abc import Callable

from propolis._vmm import Vm
from propolis.devices.device import Device
from propolis.devices.virtio._pci import VirtioPci
from propolis.devices.virtio._queue import Buffers, Queue

log = logging.getLogger(__name__)

# Events of _registers.pxd.
ACTIVATE = 1
RESET = 2
BROKEN = 4
WAKE = 8
CONFIG = 16

DRIVER_OK = 4  # virtio 1.2 §2.1
F_RING_INDIRECT_DESC = 1 << 28  # §6
F_RING_EVENT_IDX = 1 << 29
RING_FEATURES = F_RING_INDIRECT_DESC | F_RING_EVENT_IDX

RESET_PATIENCE = 10.0  # seconds until a reset that waits for the host is worth a line in the log


class VirtioDevice(Device):
    """A virtio device behind `function`, which the machine puts on its PCI bus.

    Subclasses override activate, kick, deactivate and, where requests leave the ring for a backend, call settled() when
    the last one is back.
    """

    function: VirtioPci
    queues: list[Queue]

    def __init__(
        self,
        vm: Vm,
        name: str,
        *,
        type_id: int,
        class_code: int,
        subsystem: int,
        features: int,
        config: bytes,
        queue_sizes: list[int],
        config_mask: bytes = b"",
    ) -> None:
        super().__init__(name)
        self.function = VirtioPci(
            vm,
            name,
            type_id=type_id,
            class_code=class_code,
            subsystem=subsystem,
            features=features | RING_FEATURES,
            config=config,
            queue_sizes=queue_sizes,
            on_event=self._on_event,
            config_mask=config_mask,
        )
        self.queues = self.function.queues
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listening: list[int] = []
        self._scheduled: set[int] = set()
        self._events = 0
        self._is_active = False
        self._is_paused = False
        self._is_resetting = False
        self._was_logged = False
        self._waiters: list[asyncio.Future[None]] = []
        self._patience: asyncio.TimerHandle | None = None

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def activate(self, features: int) -> None:
        """The driver is ready with these features; queues that are `is_ready` may be used from now on."""

    def kick(self, index: int) -> None:
        """Queue `index` may hold something. Bounded work: call again() when more is left."""

    def deactivate(self) -> None:
        """Drained, and about to be reset."""

    def begin_work(self) -> None:
        """Active and not paused: kicks come from now on; listen to the backend."""

    def end_work(self) -> None:
        """Paused, reset or halted: listen to nothing."""

    def config_written(self) -> None:
        """The guest wrote device configuration."""

    def in_flight(self) -> int:
        """Chains that are not given back yet."""
        return sum(queue.in_flight_count for queue in self.queues)

    def is_listening(self, index: int) -> bool:
        """Whether queue `index` is set up, and the device works."""
        return index in self._listening

    def again(self, index: int) -> None:
        """Serves a queue once more after everybody else on the loop had a turn."""
        if self._loop is not None and index not in self._scheduled:
            self._scheduled.add(index)
            self._loop.call_soon(self._turn, index)

    def answer_all(self, index: int, answer: Callable[[Buffers], bool], budget: int) -> None:
        """Has each chain of queue `index` finished by `answer`; after `budget` of them others have a turn.

        Where that says False, what is left is for whoever said it to take up by again().
        """
        queue = self.queues[index]
        is_willing = True
        while is_willing:
            queue.hush()
            while is_willing and budget and (buffers := queue.take()) is not None:
                budget -= 1
                is_willing = answer(buffers)
            if queue.failure is not None:
                self.broken(index, queue.failure)
                break
            if not budget:
                if is_willing:
                    self.again(index)
                break
            if not queue.watch():
                break
        queue.interrupt()

    def broken(self, index: int, reason: str) -> None:
        """The guest broke a rule that leaves the queue unusable: it has to reset the device (§2.1.2)."""
        if not self._was_logged:
            self._was_logged = True
            log.warning("device needs reset: device=%s queue=%d reason=%r", self.name, index, reason)
        self.function.need_reset()

    def settled(self) -> None:
        """Nothing is in flight any more."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
        if self._is_resetting:
            self._finish_reset()

    # -- Device --------------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def pause(self) -> None:
        self._is_paused = True
        self._stop_listening()

    async def drained(self) -> None:
        while self.in_flight():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def resume(self) -> None:
        self._is_paused = False
        self._start_listening()
        self._handle_events()
        self._kick_all()

    def reset(self) -> None:
        self._events = 0
        self._stop_listening()
        self._finish_reset()

    async def halt(self) -> None:
        self._stop_listening()
        self._is_active = False
        self._is_paused = True
        self._forget_patience()

    # -- events of the transport ---------------------------------------------------------------------------------------

    def _on_event(self, bits: int) -> None:
        self._events |= bits
        if not self._is_paused:
            self._handle_events()

    def _handle_events(self) -> None:
        # An event may be older than a reset by the machine, so what the registers say decides.
        bits, self._events = self._events, 0
        if bits & BROKEN and not self._was_logged:
            self._was_logged = True
            log.warning("device needs reset: device=%s reason=%r", self.name, self.function.common.queue_failure)
        if bits & RESET and self.function.common.is_resetting:
            self._begin_reset()
        elif bits & ACTIVATE and self.function.common.device_status & DRIVER_OK and not self._is_active:
            self._is_active = True
            log.info("driver is ready: device=%s features=%#x", self.name, self.function.common.features)
            self.activate(self.function.common.features)
            self._start_listening()
        if bits & CONFIG and self._is_active:
            self.config_written()
        if bits & WAKE:
            self._kick_all()

    def _begin_reset(self) -> None:
        self._is_resetting = True
        self._is_active = False
        self._stop_listening()
        if not self.in_flight():
            self._finish_reset()
        elif self._loop is not None:
            self._patience = self._loop.call_later(RESET_PATIENCE, self._complain)

    def _complain(self) -> None:
        log.error("reset waits for the host: device=%s in_flight=%d", self.name, self.in_flight())

    def _finish_reset(self) -> None:
        self._forget_patience()
        self._is_resetting = self._is_active = self._was_logged = False
        for doorbell in self.function.doorbells:
            doorbell.drain()
        self.deactivate()
        self.function.common.finish_reset()

    def _forget_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    # -- kicks ---------------------------------------------------------------------------------------------------------

    def _start_listening(self) -> None:
        if self._loop is None or not self._is_active or self._is_paused or self._listening:
            return
        # A kick from before this moment is in the eventfd, so it is not lost.
        self._listening = [queue.index for queue in self.queues if queue.is_ready]
        for index in self._listening:
            self._loop.add_reader(self.function.doorbells[index].fileno(), self._on_doorbell, index)
        self.begin_work()

    def _stop_listening(self) -> None:
        self.end_work()
        for index in self._listening:
            if self._loop is not None:
                self._loop.remove_reader(self.function.doorbells[index].fileno())
        self._listening = []

    def _on_doorbell(self, index: int) -> None:
        self.function.doorbells[index].drain()
        self._serve(index)

    def _turn(self, index: int) -> None:
        self._scheduled.discard(index)
        self._serve(index)

    def _serve(self, index: int) -> None:
        # A function that may not reach memory leaves the ring alone; WAKE comes when it may.
        if index in self._listening and self.function.is_bus_master:
            self.kick(index)

    def _kick_all(self) -> None:
        for index in tuple(self._listening):
            self._serve(index)
