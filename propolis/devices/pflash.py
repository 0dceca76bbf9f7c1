"""The flash in which firmware keeps its variables, and its file."""

import asyncio
import logging
import os
from typing import TYPE_CHECKING

from propolis.devices._pflash import Flash
from propolis.devices.device import Device

if TYPE_CHECKING:
    from propolis._vmm import Vm

log = logging.getLogger(__name__)

SYNC_DELAY = 0.1  # seconds after a command until the file is synced: firmware writes a variable by many commands


class ParallelFlash(Device):
    """A CFI flash whose array is the `size` bytes of guest memory at `base`.

    The descriptor stays the caller's, open until after halt().
    """

    def __init__(self, vm: "Vm", base: int, size: int, fd: int, path: str) -> None:
        super().__init__("flash")
        self._fd = fd
        self._path = path
        self._flash = Flash(vm, vm.mailbox.register(self._on_written), base, size, fd)
        self._timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Task[None] | None = None
        self._failures = 0
        vm.mmio.add(self._flash, base, size)

    def _on_written(self, _bits: int) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SYNC_DELAY, self._sync)
        failures = self._flash.failures()
        if failures and not self._failures:  # once: a guest must not fill the log
            log.error("the guest's variables cannot be kept: path=%s", self._path)
        self._failures = failures

    def _sync(self) -> None:
        self._timer = None
        self._syncing = asyncio.ensure_future(self._write_back())

    async def _write_back(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, os.fdatasync, self._fd)
        except OSError as error:  # the guest runs on, as on a machine whose flash wears out
            log.error("the guest's variables cannot be kept: path=%s reason=%s", self._path, error.strerror)  # noqa: TRY400

    async def drained(self) -> None:
        """What the guest has written is on the disk."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._syncing is not None:
            await asyncio.wait([self._syncing])
        await self._write_back()

    def reset(self) -> None:
        self._flash.reset()

    def stats(self) -> dict[str, int]:
        """How often its file could not be written: `failed_writes`."""
        return {"failed_writes": self._flash.failures()}

    async def halt(self) -> None:
        await self.drained()
