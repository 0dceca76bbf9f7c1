"""The only task that changes a VM's state: requests and guest events go in, states come out.

    CREATING -> STARTING -> RUNNING <-> PAUSED
                               |  ^
                               v  |
                            REBOOTING
    any of these -> STOPPING -> STOPPED (the guest powered off, or somebody stopped it)
    any of these -> FAILED (the hypervisor or a device cannot go on; `detail` says why)

STOPPED and FAILED are final; where a VM is gone for good once it has stopped, DESTROYED follows on STOPPED. What a
request may do in which state is a pure function, `admit`. A stop waits for nothing: what is under way is given up.

A machine that cannot be brought to rest, because the host's storage hangs, runs on, and whoever asked is told. Only a
guest that asked for a reset may not run on: a processor after a triple fault cannot, and one that wrote the reset
register expects not to. It stays REBOOTING until the storage answers or somebody stops the VM: failing the VM would
gain nothing, since the host's requests use guest memory until they return.
"""

import asyncio
import enum
import logging
from collections.abc import Callable, Coroutine
from typing import NamedTuple, Protocol

from propolis.errors import PauseError, PropolisError, StateError

log = logging.getLogger(__name__)


class State(enum.Enum):
    CREATING = "Creating"
    STARTING = "Starting"
    RUNNING = "Running"
    PAUSED = "Paused"
    REBOOTING = "Rebooting"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    FAILED = "Failed"
    DESTROYED = "Destroyed"

    @property
    def is_final(self) -> bool:
        return self in (State.STOPPED, State.FAILED, State.DESTROYED)


class Request(enum.Enum):
    """What the outside asks for."""

    RUN = "run"
    PAUSE = "pause"
    REBOOT = "reboot"
    POWER_BUTTON = "press the power button"
    STOP = "stop"


class GuestEvent(enum.Enum):
    """What the guest, or the hypervisor on its behalf, reports."""

    RESET = "reset"
    TRIPLE_FAULT = "triple fault"
    POWER_OFF = "power off"
    FAILURE = "failure"
    PANIC = "panic"  # the guest says that its kernel panicked: it runs on, or asks for a reset by itself


class Record(NamedTuple):
    """A published state. `generation` grows by one with each publication, repeated states included."""

    generation: int
    state: State
    detail: str = ""


class Verdict(enum.Enum):
    ACCEPT = enum.auto()
    IGNORE = enum.auto()  # it is so already, or will be


class Machine(Protocol):
    """What the lifecycle needs of a machine; each method runs on the loop."""

    async def start(self) -> None: ...
    async def pause(self) -> None: ...
    async def resume(self) -> None: ...
    async def reboot(self) -> None: ...
    async def halt(self) -> None: ...
    def press_power_button(self) -> None: ...
    def failure_text(self) -> str: ...


_ALIVE = {State.STARTING, State.RUNNING, State.PAUSED, State.REBOOTING}
_OPPOSITE = {Request.RUN: Request.PAUSE, Request.PAUSE: Request.RUN}
_RESETS = {GuestEvent.RESET, GuestEvent.TRIPLE_FAULT}
_ENDS = {GuestEvent.FAILURE, GuestEvent.POWER_OFF}


def admit(state: State, pending: frozenset[Request], request: Request) -> Verdict:
    """Whether a request may be queued now. Raises StateError with the reason when not."""
    if request is Request.STOP:
        return Verdict.IGNORE if state.is_final or Request.STOP in pending else Verdict.ACCEPT
    if state.is_final or state is State.STOPPING or Request.STOP in pending:
        raise StateError(f"cannot {request.value}: the VM is {state.value.lower() if state.is_final else 'stopping'}")
    if request is Request.RUN:
        running = state in _ALIVE and state is not State.PAUSED and Request.PAUSE not in pending
        return Verdict.IGNORE if running or Request.RUN in pending else Verdict.ACCEPT
    if state is State.CREATING:
        raise StateError(f"cannot {request.value}: the VM has not been started")
    if request is Request.REBOOT and state is State.STARTING:
        raise StateError("cannot reboot: the VM is starting")
    if request is Request.PAUSE:
        paused = state is State.PAUSED and Request.RUN not in pending
        return Verdict.IGNORE if paused or Request.PAUSE in pending else Verdict.ACCEPT
    if state is State.PAUSED or Request.PAUSE in pending:
        raise StateError(f"cannot {request.value}: the VM is paused")
    if request in pending or (request is Request.REBOOT and state is State.REBOOTING):
        return Verdict.IGNORE
    return Verdict.ACCEPT


def _refuse(done: asyncio.Future[None], error: PropolisError) -> None:
    """Tells whoever waits; nobody may."""
    if not done.done():
        done.set_exception(error)
        done.exception()  # looked at: asyncio does not report it


class Lifecycle:
    """Owns the state of one machine. `run` is the task; the other methods may be called from anywhere on the loop."""

    def __init__(
        self,
        machine: Machine,
        *,
        reboot_ends: bool = False,
        is_destroyed: bool = False,
        first_generation: int = 0,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        """With `reboot_ends` a reset by the guest ends the VM; with `is_destroyed` DESTROYED follows on STOPPED.

        `on_record` is told of every record, the first included, before whoever waits for it.
        """
        self._machine = machine
        self._reboot_ends = reboot_ends
        self._is_destroyed = is_destroyed
        self._on_record = on_record
        self._requests: dict[Request, asyncio.Future[None]] = {}  # in order, each once, until it is done
        self._events: set[GuestEvent] = set()
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._under_way: asyncio.Timeout | None = None  # what was asked for, as long as a stop may end it
        self.record = Record(first_generation, State.CREATING)
        self.is_over = False  # there will be no other record
        self.rebooted = False  # whether a guest reset was what ended it
        self.reboots = 0
        if on_record is not None:
            on_record(self.record)

    def request(self, request: Request) -> None:
        """Queues a request. Raises StateError, which has the present state, when that does not admit it."""
        try:
            verdict = admit(self.record.state, frozenset(self._requests), request)
        except StateError as error:
            error.state = self.record.state.value
            raise
        if verdict is not Verdict.ACCEPT:
            return
        opposite = _OPPOSITE.get(request, request)
        if overtaken := self._requests.pop(opposite, None):  # the last word counts
            _refuse(overtaken, StateError(f"cannot {opposite.value}: {request.value} was asked for after it"))
        self._requests[request] = asyncio.get_running_loop().create_future()
        self._wake.set()
        if request is Request.STOP and self._under_way is not None:
            self._under_way.reschedule(0)  # long past: given up as soon as the loop runs

    async def perform(self, request: Request) -> None:
        """Queues a request and returns once it is done.

        Raises StateError when it is not admitted, is overtaken by its opposite or the VM ends first, PauseError when it
        could not be done in time.
        """
        self.request(request)
        if done := self._requests.get(request):
            await asyncio.shield(done)  # others may wait for the same

    def report(self, event: GuestEvent) -> None:
        """A guest event; several of a kind before it is served count once. A panic changes no state."""
        if event is GuestEvent.PANIC:
            return
        self._events.add(event)
        self._wake.set()

    async def wait_for(self, generation: int) -> Record:
        """The present record, once its generation is at least this one, or there will be no other."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.record.generation >= generation or self.is_over)
        return self.record

    async def run(self) -> Record:
        """Serves requests and events until the VM is over; returns the last record, for the caller to tell."""
        try:
            while not self.record.state.is_final:
                await self._wake.wait()
                self._wake.clear()
                await self._serve()
        except PropolisError as error:
            await self._fail(str(error))
        except BaseException:
            # Cancelled, or a bug of ours: the machine is ended all the same, and the caller sees why.
            await self._machine.halt()
            raise
        finally:
            for request, done in self._requests.items():
                if request is Request.STOP:
                    done.set_result(None)
                else:
                    _refuse(done, StateError(f"cannot {request.value}: the VM has ended"))
        if not self.is_over:
            await self._publish(State.DESTROYED, self.record.detail)
        return self.record

    async def _serve(self) -> None:
        while not self.record.state.is_final:
            if GuestEvent.FAILURE in self._events:
                await self._fail(self._machine.failure_text())
            elif GuestEvent.POWER_OFF in self._events:
                await self._stop("the guest powered off")
            elif self._events & _RESETS and self.record.state is not State.PAUSED:
                await self._unless_stopped(self._guest_reset())
            elif Request.STOP in self._requests:
                await self._stop("stopped")
            elif self._requests:
                request, done = next(iter(self._requests.items()))
                try:
                    if not await self._unless_stopped(self._obey(request)):
                        _refuse(done, StateError(f"cannot {request.value}: the VM is stopping"))
                except PauseError as error:
                    log.error("cannot %s: %s", request.value, error)  # noqa: TRY400 -- the traceback says nothing more
                    await self._run_on(f"cannot {request.value}: {error}")
                    _refuse(done, error)
                if not done.done():
                    done.set_result(None)
                if self._requests.get(request) is done:
                    del self._requests[request]
            else:
                return

    async def _guest_reset(self) -> None:
        cause = "triple fault" if GuestEvent.TRIPLE_FAULT in self._events else "guest"
        self._events -= _RESETS
        if self._reboot_ends:
            self.rebooted = True
            await self._stop("the guest rebooted")
            return
        while True:
            try:
                await self._reboot(cause)
            except PauseError as error:
                log.error("the guest's reset waits: %s", error)  # noqa: TRY400 -- the traceback says nothing more
                if Request.STOP in self._requests or self._events & _ENDS:
                    self._events -= _RESETS
                    return
                cause = str(error)
            else:
                return

    async def _run_on(self, detail: str) -> None:
        """After a pause that failed: the guest is held, and what it did was not changed."""
        if not self._events & _RESETS:  # it asked for one before it was held: that comes next
            await self._machine.resume()
            await self._publish(State.RUNNING, detail)

    async def _obey(self, request: Request) -> None:
        state = self.record.state
        if request is Request.RUN and state is State.CREATING:
            await self._publish(State.STARTING)
            await self._machine.start()
            await self._publish(State.RUNNING)
        elif request is Request.RUN and state is State.PAUSED:
            if self._events & _RESETS:  # asked for before the guest was held: it must not run on
                await self._guest_reset()
            else:
                await self._machine.resume()
                await self._publish(State.RUNNING)
        elif request is Request.PAUSE and state is State.RUNNING:
            await self._machine.pause()
            await self._publish(State.PAUSED)
        elif request is Request.REBOOT and state is State.RUNNING:
            await self._reboot("request")
        elif request is Request.POWER_BUTTON and state is State.RUNNING:
            self._machine.press_power_button()

    async def _reboot(self, cause: str) -> None:
        await self._publish(State.REBOOTING, cause)
        await self._machine.reboot()
        self._events -= _RESETS  # asked for before the reset, and thereby answered
        self.reboots += 1
        await self._publish(State.RUNNING)

    async def _unless_stopped(self, work: Coroutine[object, object, None]) -> bool:
        """Whether it was done: it is given up where somebody stops the VM meanwhile, who waits for nothing."""
        try:
            async with asyncio.timeout(None) as scope:
                self._under_way = scope
                await work
        except TimeoutError:
            if not scope.expired():
                raise
            return False
        finally:
            self._under_way = None
        return True

    async def _stop(self, detail: str) -> None:
        self._under_way = None  # as it is what ends the VM
        await self._publish(State.STOPPING, detail)
        await self._machine.halt()
        await self._publish(State.STOPPED, detail)

    async def _fail(self, detail: str) -> None:
        try:
            await self._machine.halt()
        except PropolisError as error:
            # Final all the same: whoever waits must hear of it.
            detail = detail if str(error) in detail else f"{detail}; {error}"
        await self._publish(State.FAILED, detail)

    async def _publish(self, state: State, detail: str = "") -> None:
        self.record = Record(self.record.generation + 1, state, detail)
        self.is_over = state.is_final and not (self._is_destroyed and state is State.STOPPED)
        log.info("state %s%s", state.value, f": {detail}" if detail else "")
        if self._on_record is not None:
            self._on_record(self.record)
        async with self._changed:
            self._changed.notify_all()
