"""The flash in which firmware keeps its variables, and its file."""

import asyncio
import logging
from typing import TYPE_CHECKING

from propolis.backends._iopool import IoPool, PoolEngine
from propolis.backends.block._engine import Operation
from propolis.devices._pflash import Flash
from propolis.devices.device import Device

if TYPE_CHECKING:
    from propolis._vmm import Vm

log = logging.getLogger(__name__)

SYNC_DELAY = 0.1  # seconds after a command until the file is synced: firmware writes a variable by many commands
HALT_PATIENCE = 5.0  # seconds for storage that hangs


class ParallelFlash(Device):
    """A CFI flash whose array is the `size` bytes of guest memory at `base`.

    The descriptor stays the caller's, open until after halt(); so does the pool, whose threads sync it.
    """

    def __init__(self, vm: "Vm", base: int, size: int, fd: int, path: str, pool: IoPool) -> None:
        super().__init__("flash")
        self._path = path
        self._flash = Flash(vm, vm.mailbox.register(self._on_written), base, size, fd)
        self._engine = PoolEngine(pool, fd)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._synced: asyncio.Future[None] | None = None  # of the sync under way
        self._failures = 0
        vm.mmio.add(self._flash, base, size)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.add_reader(self._engine.fileno(), self._on_synced)

    def _on_written(self, _bits: int) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(SYNC_DELAY, self._sync)
        failures = self._flash.failures()
        if failures and not self._failures:  # once: a guest must not fill the log
            log.error("the guest's variables cannot be kept: path=%s", self._path)
        self._failures = failures

    def _sync(self) -> None:
        assert self._loop is not None
        self._timer = None
        if self._synced is not None:  # storage is slow: what was written meanwhile comes next
            self._timer = self._loop.call_later(SYNC_DELAY, self._sync)
            return
        self._synced = self._loop.create_future()
        self._engine.start(Operation("flush"))

    def _on_synced(self) -> None:
        for operation in self._engine.finished():
            if operation.error:  # the guest runs on, as on a machine whose flash wears out
                log.error("the guest's variables cannot be kept: path=%s reason=%s", self._path, operation.message)
            assert self._synced is not None
            self._synced.set_result(None)
            self._synced = None

    async def drained(self) -> None:
        """What the guest has written is on the disk."""
        if self._loop is None:
            return  # it never ran
        if self._synced is not None:
            await asyncio.wait([self._synced])
        if self._timer is not None:
            self._timer.cancel()
        self._sync()
        if self._synced is not None:
            await asyncio.wait([self._synced])

    def reset(self) -> None:
        self._flash.reset()

    def stats(self) -> dict[str, int]:
        """How often its file could not be written: `failed_writes`."""
        return {"failed_writes": self._flash.failures()}

    async def halt(self) -> None:
        try:
            async with asyncio.timeout(HALT_PATIENCE):
                await self.drained()
        except TimeoutError:
            log.error("the guest's variables may not be kept: path=%s reason=its storage hangs", self._path)  # noqa: TRY400
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._loop is not None:
            self._loop.remove_reader(self._engine.fileno())
            self._loop = None
        self._engine.close()
