"""Opens and locks disk images, outside the jail. The lock belongs to the open file, wherever its descriptor goes."""

import errno
import fcntl
import os
import struct
from pathlib import Path

from propolis.errors import BackendError, BusyError, ImageError

FLOCK = "hhqqi4x"  # struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid


def open_image(path: str, *, read_only: bool = False, what: str = "disk") -> int:
    """An open descriptor with a lock: exclusive for writing, shared for reading.

    Raises BusyError naming the holder, ImageError when there is no such image, BackendError when it cannot be opened.
    """
    flags = os.O_RDONLY if read_only else os.O_RDWR
    try:
        # Not blocking: opening a FIFO by mistake must not wait for its other end.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        kind = ImageError if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR) else BackendError
        raise kind(f"open {what} {path!r}: {error.strerror}") from error
    try:
        os.set_blocking(fd, True)
        lock_image(fd, f"{what} {path!r}", exclusive=not read_only)
    except BaseException:
        os.close(fd)
        raise
    return fd


def lock_image(fd: int, name: str, *, exclusive: bool) -> None:
    """Takes an open file description lock on the whole file. Raises BusyError naming who holds it."""
    request = struct.pack(FLOCK, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise BackendError(f"lock {name}: {error.strerror}") from error
        wanted = "writing" if exclusive else "reading"
        raise BusyError(f"{name} for {wanted}: in use by {holder(fd)}") from error


def holder(fd: int) -> str:
    """Who locks this file: "name (pid 123)". The kernel tells it only through each process's descriptors."""
    wanted = os.fstat(fd)
    processes = [process for process in Path("/proc").iterdir() if process.name.isdigit()]
    found = [f"{_program(process)} (pid {process.name})" for process in processes if _holds_lock(process, wanted)]
    return ", ".join(sorted(found)) or "a process that cannot be seen from here"


def _holds_lock(process: Path, wanted: os.stat_result) -> bool:
    try:
        for entry in (process / "fdinfo").iterdir():
            text = entry.read_text()
            if "OFDLCK" not in text and "POSIX" not in text and "FLOCK" not in text:
                continue
            if not any(_is_on(line, wanted.st_ino) for line in text.splitlines()):
                continue
            seen = (process / "fd" / entry.name).stat()
            if (seen.st_dev, seen.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    except OSError:
        pass  # it ended meanwhile, or belongs to somebody else
    return False


def _is_on(line: str, inode: int) -> bool:
    """Whether a line of fdinfo is a lock on this inode: "lock: 1: OFDLCK ADVISORY WRITE -1 fe:00:1234 0 EOF"."""
    return line.startswith("lock:") and any(field.endswith(f":{inode}") for field in line.split())


def _program(process: Path) -> str:
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
        name = os.path.basename(arguments[0]).decode(errors="replace")
        return name or (process / "comm").read_text().strip()
    except OSError:
        return "a process that has ended"
