"""The VMs that there are, on disk: a file for each, replaced as a whole, and one daemon at a time.

A definition that cannot be read is set aside under another name and reported; the others are not touched by it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import msgspec

from propolis import spec as model
from propolis.atomic_file import HALF_WRITTEN, replace_file
from propolis.errors import BackendError, BusyError, ConfigError

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

Restart = Literal["never", "on-failure", "always"]

FORMAT = 1
MAX_FILE_BYTES = 8 << 20
_SUFFIX, _SET_ASIDE = ".json", ".unreadable"
_LOCK_BYTES = 256


class Definition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One VM as it was asked for, and how the daemon is to keep it."""

    format: int = FORMAT
    uuid: str
    created: float
    index: int  # no other VM's: for what is numbered, such as users
    spec: model.Spec
    requested: model.Spec  # without what the daemon's configuration added then
    properties: msgspec.Raw = msgspec.Raw(b"{}")  # what the API keeps of a VM beside its Spec
    autostart: bool = False
    restart: Restart = "never"

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.spec.name


class Unreadable(NamedTuple):
    """A definition that was set aside."""

    path: str
    reason: str


class _Holder(msgspec.Struct, frozen=True):
    pid: int


class Store:
    """An open state directory, locked. Its methods block as long as the disk does. Context manager."""

    def __init__(self, path: str, lock: int, folder: int) -> None:
        """Use `open`."""
        self.path = path
        self.unreadable: list[Unreadable] = []
        self._lock = lock
        self._folder = folder

    @classmethod
    def open(cls, path: str) -> Self:
        """Makes what is missing. Raises BusyError naming the daemon that has it open."""
        folder_path = os.path.join(path, "vms")
        lock = folder = -1
        try:
            os.makedirs(path, 0o700, exist_ok=True)
            lock = _lock(path)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder_path, 0o700)
                _sync_directory(path)
            folder = os.open(folder_path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            status = os.fstat(folder)
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise BackendError(f"open state directory {path!r}: expected one that only this user can write to")
            return cls(path, lock, folder)
        except BaseException as error:
            for fd in (lock, folder):
                if fd >= 0:
                    os.close(fd)
            if isinstance(error, OSError):
                raise BackendError(f"open state directory {path!r}: {error.strerror}") from error
            raise

    def close(self) -> None:
        """Let another daemon have it; twice is fine."""
        for fd in (self._folder, self._lock):
            if fd >= 0:
                os.close(fd)
        self._folder = self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self) -> dict[str, Definition]:
        """All definitions by name. What cannot be read is set aside, logged, and in `unreadable`."""
        found = {}
        uuids: dict[str, str] = {}
        indexes: dict[int, str] = {}
        for entry in sorted(os.listdir(self._folder)):
            if entry.endswith(HALF_WRITTEN):  # a write that never came to its end, so nobody was told that it had
                with contextlib.suppress(OSError):
                    os.unlink(entry, dir_fd=self._folder)
                continue
            if not entry.endswith(_SUFFIX):
                if _SET_ASIDE in entry:
                    self.unreadable.append(Unreadable(self._path(entry), "set aside earlier"))
                continue
            try:
                definition = _decode(self._read(entry), entry)
                if (other := uuids.setdefault(definition.uuid, definition.name)) != definition.name:
                    raise ValueError(f"its uuid is {other!r}'s")
                if (other := indexes.setdefault(definition.index, definition.name)) != definition.name:
                    raise ValueError(f"its index is {other!r}'s")
            except (OSError, ValueError, ConfigError) as error:
                reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
                self._set_aside(entry, reason.replace("\n", "; "))
            else:
                found[definition.name] = definition
        return found

    def save(self, definition: Definition) -> None:
        """When this returns the definition is on the disk; when it raises, what was there before still is."""
        data = msgspec.json.format(msgspec.json.encode(definition), indent=1)
        try:
            replace_file(self._folder, _file(definition.name), data)
        except OSError as error:
            raise BackendError(f"write the definition of VM {definition.name!r}: {error.strerror}") from error

    def remove(self, name: str) -> None:
        """Forget a VM; one that is not there is fine."""
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_file(name), dir_fd=self._folder)
            os.fsync(self._folder)
        except OSError as error:
            raise BackendError(f"remove the definition of VM {name!r}: {error.strerror}") from error

    def _read(self, entry: str) -> bytes:
        fd = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("it is no regular file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(fd)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
        return data

    def _set_aside(self, entry: str, reason: str) -> None:
        for number in range(1000):
            aside = f"{entry}{_SET_ASIDE}{f'.{number}' if number else ''}"
            try:
                os.stat(aside, dir_fd=self._folder, follow_symlinks=False)
            except FileNotFoundError:
                break
        else:
            aside = entry  # it stays, and is reported each time
        try:
            os.rename(entry, aside, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            os.fsync(self._folder)
        except OSError as error:
            aside = entry
            reason = f"{reason}; and it cannot be renamed: {error.strerror}"
        self.unreadable.append(Unreadable(self._path(aside), reason))
        log.error("definition set aside", extra={"file": self._path(aside), "reason": reason})

    def _path(self, entry: str) -> str:
        return os.path.join(self.path, "vms", entry)


def _lock(path: str) -> int:
    """The locked file of a state directory; the kernel drops the lock with the process."""
    fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(fd)
        os.close(fd)
        raise BusyError(f"state directory {path!r} is in use by {holder}: one daemon at a time") from None
    except BaseException:
        os.close(fd)
        raise
    record = msgspec.json.encode(_Holder(pid=os.getpid()))
    os.pwrite(fd, record.ljust(_LOCK_BYTES), 0)
    return fd


def _holder(fd: int) -> str:
    try:
        return f"propolis-server, process {msgspec.json.decode(os.pread(fd, _LOCK_BYTES, 0), type=_Holder).pid}"
    except msgspec.MsgspecError:
        return "another propolis-server"


def _decode(data: bytes, entry: str) -> Definition:
    """Raises ValueError that says what is wrong."""
    definition = msgspec.json.decode(data, type=Definition)
    if definition.format != FORMAT:
        raise ValueError(f"its format is {definition.format}, and this version reads {FORMAT}")
    if _file(definition.name) != entry or definition.requested.name != definition.name:
        raise ValueError(f"it defines {definition.name!r}")
    return definition


def _file(name: str) -> str:
    assert model.is_name(name)
    return name + _SUFFIX


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
