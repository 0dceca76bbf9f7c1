"""A VM's run directory: what is known of the VM whether its worker lives or not.

    lock       held by the keeper as long as it lives
    processes  who the keeper and the worker are
    state      the VM's last state, written by the worker
    console    what COM1 printed, written by the worker
    log        the worker's log, written by the worker
    exit       how the worker ended, written by the keeper
    http       the worker's socket

The directory belongs to the daemon's user and to nobody else. The worker has the three files that it writes mapped, and
no descriptor and no path of anything here; as it may have been taken over by its guest, all that they hold is read as
one reads what a guest sends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import struct
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from propolis.atomic_file import replace_file
from propolis.console.history import KEPT_BYTES
from propolis.console.history_file import HistoryFile, MappedHistory, file_bytes
from propolis.disk_image import FLOCK
from propolis.errors import BackendError, BusyError
from propolis.mapped_file import MappedFile
from propolis.processes import Process, boot_id
from propolis.state_file import FILE_BYTES, MAX_DETAIL, StateRecord, StateWriter, decode, printable

if TYPE_CHECKING:
    from types import TracebackType

LOG_KEPT_BYTES = 64 << 10
LOG_LINE_BYTES = 1000
MAX_WORDS = 4096

_LOCK, _PROCESSES, _STATE, _CONSOLE, _LOG, _EXIT, _SOCKET = (
    "lock", "processes", "state", "console", "log", "exit", "http",
)  # fmt: skip
_SOCKET_PATH_BYTES = 107  # sun_path of unix(7) without its NUL
_RECORD_BYTES = 64 << 10
_BACKLOG = 128
_TRIES = 5

T = TypeVar("T")


class Processes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The processes of a run, of this boot of the host."""

    boot: str
    keeper: Process
    worker: Process


class ExitRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run ended: `status` where the worker left by itself, `signal` where it was killed, or nobody saw it."""

    reason: str
    time: float
    status: int | None = None
    signal: int | None = None
    stderr: str = ""  # the last of what the worker wrote there
    keeper_died: bool = False


class RunDirectory:
    """An open run directory. Context manager."""

    def __init__(self, path: str, fd: int) -> None:
        """Use `create` or `open`. Owns the descriptor."""
        self.path = path
        self._fd = fd
        self._lock = -1

    # -- the directory -------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str) -> Self:
        """Make the directory and the files that a worker writes, with their room on the disk; keep what is there."""
        path = os.path.abspath(path)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
        except OSError as error:
            raise BackendError(f"make run directory {path!r}: {error.strerror}") from error
        directory = cls.open(path)
        try:
            for name, size in (
                (_LOCK, 0),
                (_STATE, FILE_BYTES),
                (_CONSOLE, file_bytes(KEPT_BYTES)),
                (_LOG, file_bytes(LOG_KEPT_BYTES)),
            ):
                directory._make_file(name, size)
        except BaseException:
            directory.close()
            raise
        return directory

    @classmethod
    def open(cls, path: str) -> Self:
        """Raises BackendError where there is none, or one that another user may have touched."""
        path = os.path.abspath(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise BackendError(f"open run directory {path!r}: {error.strerror}") from error
        return cls.from_fd(path, fd)

    @classmethod
    def from_fd(cls, path: str, fd: int) -> Self:
        """Takes over a descriptor. Raises BackendError as `open` does."""
        status = os.fstat(fd)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            os.close(fd)
            raise BackendError(f"open run directory {path!r}: expected a directory that is this user's alone")
        return cls(path, fd)

    @classmethod
    def remove(cls, path: str) -> None:
        """Delete it and all that is in it. Raises BusyError while a keeper lives; nothing there is fine."""
        if not os.path.lexists(path):
            return
        with cls.open(path) as directory:
            if (keeper := directory.lock_holder()) is not None:
                raise BusyError(f"remove run directory {path!r}: process {keeper} keeps its VM")
            try:
                for entry in os.scandir(directory._fd):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.name, dir_fd=directory._fd)
                    else:
                        os.unlink(entry.name, dir_fd=directory._fd)
                os.rmdir(directory.path)
            except OSError as error:
                raise BackendError(f"remove run directory {path!r}: {error.strerror}") from error

    def close(self) -> None:
        """Also of the lock, where this process has it. Twice is fine."""
        for fd in (self._fd, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock = -1

    def fileno(self) -> int:
        return self._fd

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_file(self, name: str, size: int) -> None:
        fd = self._open_file(name, os.O_RDWR | os.O_CREAT)
        try:
            if size and os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)  # of another version: nothing of it can be used
                # With its blocks: where there is no room, a store into a mapped file would kill the worker.
                os.posix_fallocate(fd, 0, size)
        except OSError as error:
            raise BackendError(f"make {name!r} in run directory {self.path!r}: {error.strerror}") from error
        finally:
            os.close(fd)

    def _open_file(self, name: str, flags: int) -> int:
        """Raises BackendError, FileNotFoundError where it is missing."""
        try:
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=self._fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BackendError(f"open {name!r} in run directory {self.path!r}: {error.strerror}") from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink > 1:
            os.close(fd)
            raise BackendError(f"open {name!r} in run directory {self.path!r}: expected a file of this user's alone")
        return fd

    # -- reading -------------------------------------------------------------------------------------------------------

    def state(self) -> StateRecord | None:
        """The last state that was written; None where none was, or nothing that makes sense."""
        try:
            fd = self._open_file(_STATE, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            for _ in range(_TRIES):  # both slots were written while they were read, or nothing ever was
                if (record := decode(os.pread(fd, FILE_BYTES, 0))) is not None:
                    return record
            return None
        finally:
            os.close(fd)

    def history(self) -> HistoryFile:
        """What COM1 printed; the caller closes it."""
        return self._history(_CONSOLE, KEPT_BYTES)

    def log(self) -> HistoryFile:
        """The worker's log, lines of UTF-8 if it is honest; the caller closes it."""
        return self._history(_LOG, LOG_KEPT_BYTES)

    def _history(self, name: str, kept_bytes: int) -> HistoryFile:
        try:
            return HistoryFile(self._open_file(name, os.O_RDONLY), kept_bytes)
        except FileNotFoundError:
            raise BackendError(f"open {name!r} in run directory {self.path!r}: it is missing") from None

    def last_log_lines(self, count: int = 20) -> list[str]:
        """The end of the log, as text that may be shown to people."""
        wanted = min(count * LOG_LINE_BYTES, LOG_KEPT_BYTES)
        with self.log() as log:
            data, _ = log.read(most_recent=wanted, max_bytes=wanted)
            is_whole = log.total_bytes <= len(data)
        lines = data.decode(errors="replace").splitlines()
        return [printable(line)[:LOG_LINE_BYTES] for line in (lines if is_whole else lines[1:])[-count:]]

    def exit_record(self) -> ExitRecord | None:
        """How the last run ended; None while it has not, or where nobody could tell."""
        record = self._read_record(_EXIT, ExitRecord)
        if record is None:
            return None
        stderr = "\n".join(map(printable, record.stderr[-MAX_WORDS:].splitlines()))
        return msgspec.structs.replace(record, reason=printable(record.reason[:MAX_DETAIL]), stderr=stderr)

    def processes(self) -> Processes | None:
        """Who the keeper and the worker of the last run are or were; None where that is not known of this boot."""
        found = self._read_record(_PROCESSES, Processes)
        if found is None or found.boot != boot_id() or min(found.keeper.pid, found.worker.pid) <= 1:
            return None
        return found

    def lock_holder(self) -> int | None:
        """The process that keeps this VM, as the kernel tells it."""
        try:
            fd = self._open_file(_LOCK, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            request = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, request))
        finally:
            os.close(fd)
        if kind == fcntl.F_UNLCK:
            return None
        if pid <= 0:
            raise BusyError(f"run directory {self.path!r} is held by a process that cannot be seen from here")
        return int(pid)

    def _read_record(self, name: str, kind: type[T]) -> T | None:
        try:
            fd = self._open_file(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(os.pread(fd, _RECORD_BYTES, 0), type=kind)
        except (ValueError, RecursionError):
            return None
        finally:
            os.close(fd)

    @property
    def socket_path(self) -> str:
        """Where the worker's socket is; valid in this process as long as this object is open."""
        path = os.path.join(self.path, _SOCKET)
        if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES:
            return path
        return f"/proc/self/fd/{self._fd}/{_SOCKET}"

    # -- the keeper's --------------------------------------------------------------------------------------------------

    def take_lock(self) -> None:
        """Keep this VM until this process ends or closes this. Raises BusyError naming who does.

        The lock is this process's alone: not its children's, and gone once it closes any descriptor of that file.
        """
        fd = self._open_file(_LOCK, os.O_RDWR)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise BusyError(f"run directory {self.path!r}: process {self.lock_holder()} keeps its VM") from error
        self._lock = fd

    def write_processes(self, keeper: Process, worker: Process) -> None:
        """Note who runs. Not on the disk: after another boot they are nobody."""
        record = Processes(boot=boot_id(), keeper=keeper, worker=worker)
        self._write_record(_PROCESSES, record, is_lasting=False)

    def write_exit(self, record: ExitRecord) -> None:
        """On the disk when this returns, and never half of it."""
        self._write_record(_EXIT, record)

    def clear_run(self) -> None:
        """A new run begins."""
        for name in (_EXIT, _PROCESSES):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

    def _write_record(self, name: str, record: msgspec.Struct, *, is_lasting: bool = True) -> None:
        try:
            replace_file(self._fd, name, msgspec.json.encode(record), is_lasting=is_lasting)
        except OSError as error:
            raise BackendError(f"write {name!r} in run directory {self.path!r}: {error.strerror}") from error

    def listen(self) -> socket.socket:
        """The worker's listening socket, in place of what an earlier worker left."""
        self.remove_socket()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before there is a name by which it could be found
            listener.bind(self.socket_path)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise BackendError(f"open the socket in run directory {self.path!r}: {error.strerror}") from error
        return listener

    def remove_socket(self) -> None:
        """Nobody listens there any more; twice is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_SOCKET, dir_fd=self._fd)

    # -- the worker's --------------------------------------------------------------------------------------------------

    def map_state(self) -> StateWriter:
        """For the worker; the caller closes it."""
        return StateWriter(self._map(_STATE, FILE_BYTES))

    def map_history(self) -> MappedHistory:
        """For the worker; the caller closes it."""
        return self._map_history(_CONSOLE, KEPT_BYTES)

    def map_log(self) -> MappedHistory:
        """For the worker; the caller closes it."""
        return self._map_history(_LOG, LOG_KEPT_BYTES)

    def _map_history(self, name: str, kept_bytes: int) -> MappedHistory:
        fd = self._open_file(name, os.O_RDWR)
        try:
            return MappedHistory(fd, kept_bytes)
        finally:
            os.close(fd)

    def _map(self, name: str, size: int) -> MappedFile:
        fd = self._open_file(name, os.O_RDWR)
        try:
            return MappedFile(fd, size)
        finally:
            os.close(fd)
