"""A running VM holds its name: by a lock that the kernel drops with the process, so nothing stale is ever in the way.

The locked file says who holds it. A standalone VM that starts, or one of run-one, ends the standalone VM of that name;
what a server runs is for that server to end, and the daemon ends nobody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import stat
import time
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from propolis.errors import BackendError, BusyError, ConfigError
from propolis.processes import has_ended, start_time
from propolis.spec import NAME_RULE, is_name

if TYPE_CHECKING:
    from types import TracebackType

Program = Literal["standalone", "daemon", "run-one"]

_RECORD_BYTES = 1024  # always written whole, in one call, so that a reader never finds half of it
_RETRY = 0.01
_WORDS = {"standalone": "a standalone VM", "daemon": "the daemon's keeper", "run-one": "propolis-server run-one"}
_LAST_WAIT = 5.0  # seconds that the kernel may take to bury a killed process


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a name; the start time tells the process from a later one with its number."""

    pid: int
    start_time: int
    program: Program
    socket: str | None = None

    def __str__(self) -> str:
        return f"{_WORDS[self.program]}, process {self.pid}"


class NameLock:
    """A held name. Keep it as long as the VM runs, then `release` it; exec drops it, fork shares it."""

    def __init__(self, name: str, folder: int, file: int) -> None:
        self.name = name
        self._folder = folder
        self._file = file

    @classmethod
    async def acquire(
        cls,
        name: str,
        *,
        program: Program = "standalone",
        socket: str | None = None,
        grace: float = 2.0,
        folder: str | None = None,
    ) -> NameLock:
        """Take `name`, ending the standalone VM that holds it within `grace` seconds.

        That VM is asked to power off, after half the time told to end, and after all of it killed. BusyError where a
        server holds the name, this process does, or nobody that can be ended.
        """
        if not is_name(name):
            raise ConfigError(f"{name!r} cannot name a VM: expected {NAME_RULE}")
        folder_fd = _open_folder(folder or default_folder())
        try:
            file = await _take(folder_fd, name, grace)
        except BaseException:
            os.close(folder_fd)
            raise
        return cls(name, folder_fd, file)._of_this_process(program, socket)

    @classmethod
    def acquire_free(cls, name: str, *, program: Program, folder: str) -> NameLock:
        """Take `name` now, and end nobody for it: BusyError where it is held."""
        folder_fd = _open_folder(folder)
        try:
            file = _take_free(folder_fd, name)
        except BaseException:
            os.close(folder_fd)
            raise
        return cls(name, folder_fd, file)._of_this_process(program, None)

    def release(self) -> None:
        """Give the name up; twice is fine."""
        if self._file < 0:
            return
        # While it is still locked: whoever opened the file before sees that the name is no longer this file's.
        with contextlib.suppress(OSError):
            os.unlink(_file_name(self.name), dir_fd=self._folder)
        os.close(self._file)
        os.close(self._folder)
        self._file = self._folder = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _of_this_process(self, program: Program, socket: str | None) -> Self:
        """The lock, with a record of who holds it."""
        try:
            me = os.getpid()
            started = start_time(me)
            assert started is not None
            self._record(Holder(pid=me, start_time=started, program=program, socket=socket))
        except BaseException:
            self.release()
            raise
        return self

    def _record(self, holder: Holder) -> None:
        record = msgspec.json.encode(holder)
        if len(record) > _RECORD_BYTES:
            raise ConfigError(f"hold the name {self.name!r}: the path of its socket is too long")
        os.pwrite(self._file, record.ljust(_RECORD_BYTES), 0)


def default_folder() -> str:
    """Where this user's names are held."""
    user = os.geteuid()
    runtime = "/run" if user == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.path.isdir(runtime):
        return os.path.join(runtime, "propolis")
    return f"/tmp/propolis-{user}"  # noqa: S108 -- its owner and mode are checked


def _open_folder(path: str) -> int:
    """The folder of names, made where it is missing; refused where another user could put a file into it."""
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)  # the daemon's socket is there too, which others may use; locks are closed to them
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise BackendError(f"open the folder of VM names {path!r}: {error.strerror}") from error
    status = os.fstat(folder)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(folder)
        raise BackendError(f"open the folder of VM names {path!r}: expected one that only this user can write to")
    return folder


def clear_stale(name: str, folder: str) -> None:
    """Removes what a killed process left of its holding `name`; one that holds it now is left alone."""
    with contextlib.suppress(BusyError, BackendError):
        NameLock.acquire_free(name, program="daemon", folder=folder).release()


def _file_name(name: str) -> str:
    return f"{name}.lock"


async def _take(folder: int, name: str, grace: float) -> int:
    """The locked file of `name`."""
    deadline = time.monotonic() + _LAST_WAIT
    while True:
        file = _open_file(folder, name)
        is_taken = False
        try:
            if _lock(file):
                # Unless its holder gave it up between our opening and locking it: then there is another by now.
                is_taken = _is_named(file, folder, name)
                if is_taken:
                    return file
                continue
            holder = _read(file)
            if holder is not None and holder.program != "standalone":
                raise BusyError(f"VM {name!r} belongs to {holder}")
            if holder is not None and holder.pid == os.getpid():
                raise BusyError(f"VM {name!r} is already run by this process")
            if holder is not None and await _end(name, holder, file, grace):
                deadline = time.monotonic() + _LAST_WAIT
            elif time.monotonic() > deadline:
                raise BusyError(f"VM {name!r} is held by a process that cannot be found; its lock names {holder}")
            else:
                # Just taken or given up, so that the record is of an earlier holder; or shared with a child of it.
                await asyncio.sleep(_RETRY)
        finally:
            if not is_taken:
                os.close(file)


def _take_free(folder: int, name: str) -> int:
    """The locked file of `name`, unless another process has it."""
    while True:
        file = _open_file(folder, name)
        is_taken = False
        try:
            if not _lock(file):
                raise BusyError(f"VM {name!r} belongs to {_read(file) or 'another process'}")
            is_taken = _is_named(file, folder, name)
            if is_taken:
                return file
        finally:
            if not is_taken:
                os.close(file)


def _open_file(folder: int, name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        file = os.open(_file_name(name), flags, 0o600, dir_fd=folder)
    except OSError as error:
        raise BackendError(f"hold the VM name {name!r}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise BackendError(f"hold the VM name {name!r}: its lock is no regular file")
    return file


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(file: int, folder: int, name: str) -> bool:
    try:
        there = os.stat(_file_name(name), dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file))


def _read(file: int) -> Holder | None:
    try:
        holder = msgspec.json.decode(os.pread(file, _RECORD_BYTES, 0), type=Holder)
    except msgspec.MsgspecError:
        return None  # nothing written yet
    return holder if holder.pid > 1 else None


async def _end(name: str, holder: Holder, file: int, grace: float) -> bool:
    """End the process that holds the lock of `file`; False where it is not the one that is recorded there."""
    try:
        process = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return False
    except OSError as error:
        if error.errno == errno.EINVAL:  # a thread's number by now
            return False
        raise BusyError(f"VM {name!r} is held by {holder}, which cannot be ended: {error.strerror}") from error
    try:
        # From here on the descriptor means one process for good. It is the recorded one if that is what has the number
        # now, and the holder if the lock is held and the record unchanged.
        if start_time(holder.pid) != holder.start_time or _read(file) != holder or _lock(file):
            fcntl.flock(file, fcntl.LOCK_UN)
            return False
        steps = ((signal.SIGTERM, grace / 2), (signal.SIGTERM, grace / 2), (signal.SIGKILL, _LAST_WAIT))
        for number, patience in steps:
            try:
                signal.pidfd_send_signal(process, number)
            except ProcessLookupError:
                return True
            except PermissionError as error:
                raise BusyError(f"VM {name!r} is held by {holder}, which cannot be ended: {error.strerror}") from error
            if await has_ended(process, patience):
                return True
        raise BusyError(f"VM {name!r} is held by {holder}, which was killed and does not end")
    finally:
        os.close(process)
