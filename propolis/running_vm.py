"""A VM that runs in processes of its own, as the daemon sees it: found, awaited and ended, whoever started it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from propolis.processes import has_ended, parent
from propolis.run_directory import ExitRecord

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from propolis.run_directory import RunDirectory


class RunningVm:
    """The keeper and the worker of a VM, by descriptors that mean them and no later process. Context manager."""

    def __init__(
        self, directory: RunDirectory, keeper_pid: int, keeper: int, worker_pid: int | None, worker: int | None
    ) -> None:
        """Owns the two pidfds, not the directory."""
        self.run_directory = directory
        self.keeper_pid = keeper_pid
        self.worker_pid = worker_pid  # None where the keeper has none yet, or not any more
        self._keeper: int | None = keeper
        self._worker = worker

    def close(self) -> None:
        """Let go of it; the VM runs on. Twice is fine."""
        for fd in (self._keeper, self._worker):
            if fd is not None:
                os.close(fd)
        self._keeper = self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def wait(self) -> ExitRecord:
        """Until both processes have ended: how."""
        await self._end_of(self._keeper)
        self._signal(self._worker, signal.SIGKILL)  # the kernel does that, unless the worker has prevented it
        await self._end_of(self._worker)
        record = self.run_directory.exit_record()
        if record is None:
            record = ExitRecord(reason="its keeper was killed", time=time.time(), keeper_died=True)
        return record

    @staticmethod
    async def _end_of(process: int | None) -> None:
        if process is not None:
            own = os.dup(process)  # a loop knows one waiter for each descriptor
            try:
                await has_ended(own)
            finally:
                os.close(own)

    def terminate(self) -> None:
        """Have the VM ended in order, as by a hard stop: its last state is written, its clients are sent away."""
        self._signal(self._keeper, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the worker; the keeper writes that down."""
        self._signal(self._keeper if self._worker is None else self._worker, signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill both; nobody writes anything down."""
        self._signal(self._keeper, signal.SIGKILL)
        self._signal(self._worker, signal.SIGKILL)

    def _signal(self, fd: int | None, number: signal.Signals) -> None:
        if fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)


def find_running(directory: RunDirectory) -> RunningVm | None:
    """The VM that a keeper keeps in this directory, if one does.

    That is who has the directory's lock, which the kernel tells; of the worker, the keeper's note is checked.
    """
    while (pid := directory.lock_holder()) is not None:
        try:
            keeper = os.pidfd_open(pid)
        except ProcessLookupError:
            continue  # it has just ended
        if directory.lock_holder() != pid:  # and another process may have got its number before it was opened
            os.close(keeper)
            continue
        worker_pid, worker = _find_worker(directory, pid)
        return RunningVm(directory, pid, keeper, worker_pid, worker)
    return None


def _find_worker(directory: RunDirectory, keeper_pid: int) -> tuple[int, int] | tuple[None, None]:
    found = directory.processes()
    if found is None or found.keeper.pid != keeper_pid:
        return None, None
    try:
        worker = os.pidfd_open(found.worker.pid)
    except OSError:
        return None, None
    if parent(found.worker.pid) != keeper_pid or not found.worker.is_there():
        os.close(worker)
        return None, None
    return found.worker.pid, worker
