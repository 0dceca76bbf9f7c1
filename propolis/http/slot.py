"""What the handlers of one VM's application share: the VM, once there is one, and the streams that end with it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from propolis.errors import AlreadyInitializedError, NoInstanceError, NotFoundError, PropolisError
from propolis.http import v5
from propolis.lifecycle import Record, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from propolis.virtual_machine import VirtualMachine

    Create = Callable[[v5.InstanceEnsureRequest], Awaitable[VirtualMachine]]


LAST_WORDS = 1.0  # seconds for a stream of a VM that is over to end by itself


class ShutdownError(PropolisError):
    """The server ends before the answer is known."""

    code = "shutdown"
    status = 503


class HistoryReader(Protocol):
    """Bytes that are kept from the first and from the latest on: a console's, or a log's."""

    @property
    def total_bytes(self) -> int: ...
    @property
    def resumes_at(self) -> int: ...
    def read(
        self, *, from_start: int | None = None, most_recent: int | None = None, max_bytes: int = 16384
    ) -> tuple[bytes, int]: ...


class Slot:
    """A place for one VM."""

    def __init__(
        self,
        vm: VirtualMachine | None,
        *,
        create: Create | None,
        log: HistoryReader | None,
        extra_fields: bool,
        console_patience: float,
    ) -> None:
        self._vm = vm
        self._create = create
        self._log = log
        self._is_creating = False
        self.extra_fields = extra_fields
        self.console_patience = console_patience
        self._streams: set[asyncio.Timeout] = set()
        self._is_ending = False

    @property
    def vm(self) -> VirtualMachine:
        """The VM, also one that is over. Raises NoInstanceError."""
        if self._vm is None:
            raise NoInstanceError("there is no VM: it has not been created")
        return self._vm

    @property
    def active(self) -> VirtualMachine:
        """The VM, unless it is gone for good."""
        vm = self.vm
        if vm.lifecycle.record.state is State.DESTROYED:
            raise NoInstanceError("there is no VM any more: it was stopped")
        return vm

    @property
    def log(self) -> HistoryReader:
        """The VM's log."""
        if self._log is None:
            raise NotFoundError("this server keeps no log for its VM")
        return self._log

    async def create(self, request: v5.InstanceEnsureRequest) -> None:
        """Makes the VM. Raises AlreadyInitializedError where there is one, unless that is over."""
        is_free = self._vm is None or self._vm.lifecycle.is_over
        if self._create is None or self._is_creating or not is_free:
            raise AlreadyInitializedError("there is a VM already")
        self._is_creating = True
        try:
            self._vm = await self._create(request)
        finally:
            self._is_creating = False

    @asynccontextmanager
    async def until_shutdown(self) -> AsyncIterator[None]:
        """What waits without end in here ends with the server, by ShutdownError."""
        try:
            async with asyncio.timeout(None) as scope:
                self._streams.add(scope)
                if self._is_ending:
                    scope.reschedule(0)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise ShutdownError("the server shuts down") from None
        finally:
            self._streams.discard(scope)

    def end_streams(self) -> None:
        """The server shuts down. Where the VM is over, streams may still end by themselves."""
        self._is_ending = True
        is_over = self._vm is not None and self._vm.lifecycle.is_over
        when = asyncio.get_running_loop().time() + LAST_WORDS if is_over else 0
        for scope in self._streams:
            if not scope.expired():
                scope.reschedule(when)

    def fill(self, vm: VirtualMachine, log: HistoryReader) -> None:
        """The VM that this place was made for before it was there."""
        self._vm = vm
        self._log = log

    def let_go(self) -> None:
        """Nothing is asked any more."""
        self._vm = self._create = self._log = None


SLOT: web.AppKey[Slot] = web.AppKey("slot", Slot)


def slot(request: web.Request) -> Slot:
    """The slot of the application that a request reached."""
    return request.app[SLOT]


def wire_state(record: Record) -> v5.InstanceState:
    """A state as 5.0.0 calls it: it has no word for a paused VM, which is Running there."""
    return v5.InstanceState.RUNNING if record.state is State.PAUSED else v5.InstanceState(record.state.value)
