"""One VM as the daemon has it, whether it runs or not: its definition, its run directory, its processes, its turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING

from propolis.errors import NotFoundError, PropolisError
from propolis.lifecycle import State
from propolis.names import clear_stale
from propolis.run_directory import RunDirectory
from propolis.state_file import StateRecord

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from propolis.running_vm import RunningVm
    from propolis.store import Definition

log = logging.getLogger(__name__)

_STOP_MARK = "asked-to-stop"


class Instance:
    """Fields are written by the room that is named beside them."""

    def __init__(self, definition: Definition, path: str) -> None:
        self.definition = definition
        self.path = path  # of its run directory
        self.turn = asyncio.Lock()  # who starts, ends or deletes it
        self.is_made = False
        self.is_deleted = False
        self.stopper: asyncio.Task[None] | None = None
        # runs
        self.directory: RunDirectory | None = None
        self.running: RunningVm | None = None
        self.is_fresh = False  # its worker was started by this daemon
        self.is_ending = False  # whoever has the turn ends its processes
        self.started_at = 0.0  # of the loop's clock
        # restarts
        self.restarts = 0
        self.failures = 0  # in a row
        self.next_start: float | None = None  # of the loop's clock
        self.restart: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def uuid(self) -> str:
        return self.definition.uuid

    @property
    def record(self) -> StateRecord:
        """The VM's last state. One that no process has had since the host started is stopped."""
        found = None if self.directory is None else self.directory.state()
        if found is not None:
            return found
        if self.running is not None or not self.is_made:
            return StateRecord(generation=0, state=State.CREATING)
        return StateRecord(generation=0, state=State.STOPPED, detail="not started since the host was")

    @property
    def is_live(self) -> bool:
        """Whether there is a worker that may yet do something for the VM."""
        return self.running is not None and not self.record.state.is_final

    @property
    def starts_again(self) -> bool:
        """Whether its restart policy is about to start it."""
        return self.restart is not None

    def refuse_deleted(self) -> None:
        """Raises NotFoundError where it is no more."""
        if self.is_deleted:
            raise NotFoundError(f"there is no VM {self.name!r}")

    def moved(self) -> Coroutine[object, object, object]:
        """To be awaited: until, from this call on, a worker has come or gone, or the VM is deleted."""
        return self._moved.wait()

    def note_move(self) -> None:
        """Wakes who awaits one."""
        self._moved.set()
        self._moved = asyncio.Event()

    # -- what lasts longer than the daemon -----------------------------------------------------------------------------

    @property
    def has_stop_mark(self) -> bool:
        """Whether somebody asked for its end, since when no policy starts it."""
        return os.path.lexists(os.path.join(self.path, _STOP_MARK))

    def set_stop_mark(self) -> None:
        """Needs the run directory."""
        assert self.directory is not None
        fd = os.open(_STOP_MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self.directory.fileno())
        os.close(fd)

    def clear_stop_mark(self) -> None:
        """Somebody wants it to run."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, _STOP_MARK))

    def let_go(self) -> None:
        """Closes what this process has of it; its processes run on."""
        if self.running is not None:
            self.running.close()
            self.running = None
        if self.directory is not None:
            self.directory.close()
            self.directory = None

    def remove_directory(self) -> None:
        """Forgets its runs, of which none is left."""
        if self.directory is not None:
            self.directory.close()
            self.directory = None
        remove_run_directory(self.path)


def remove_run_directory(path: str) -> None:
    """What is known of a VM that is no more, beside the folder of names. What cannot be removed is logged."""
    folder, name = os.path.split(path)
    clear_stale(name, os.path.dirname(folder))  # its keeper may have been killed before anybody watched it
    try:
        RunDirectory.remove(path)
    except (PropolisError, OSError) as error:
        log.warning("leftover stays", extra={"path": path, "reason": str(error)})
