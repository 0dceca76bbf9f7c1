"""Confines a worker, before its first guest instruction, to what it holds already.

A user of its own, no capabilities, no new privileges, limits, no path that can be opened (Landlock), and few system
calls (seccomp), fewer still for threads that run a guest or its I/O. What a worker may use it gets as open descriptors.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import functools
import logging
import os
import resource
import time
from typing import TYPE_CHECKING

import msgspec

from propolis import landlock, syscall_filter, threads
from propolis.errors import JailError

if TYPE_CHECKING:
    from collections.abc import Collection

log = logging.getLogger(__name__)

# linux/prctl.h
_SET_PDEATHSIG, _GET_PDEATHSIG = 1, 2
_SET_DUMPABLE = 4
_CAPBSET_DROP = 24
_SET_NO_NEW_PRIVS, _GET_NO_NEW_PRIVS = 38, 39
_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION = 0x2008_0522  # linux/capability.h: of 64 bits

_TEMPORARY = ("/dev/shm", "/tmp")  # noqa: S108 -- the name in it cannot be guessed, and is taken only if nobody has it
_WITHOUT = "--jail=off runs VMs unconfined"
_BEYOND_DESCRIPTORS = 1 << 30

_libc = ctypes.CDLL(None, use_errno=True)


class JailMode(enum.Enum):
    """What becomes of a call that no worker makes."""

    ON = "on"  # it ends the process
    LOG = "log"  # it is done, and the kernel's log names it: to find out what is missing
    OFF = "off"  # there is no jail at all


class JailSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one worker is confined."""

    mode: JailMode = JailMode.ON
    uid: int | None = None
    """The user that the worker becomes; needed where it is started as root, and only there."""
    gid: int | None = None
    """Its group; where it is None, the number of the user."""
    open_files: int = 1024
    threads: int = 512
    """How many, where the worker has a user of its own."""
    core_size: int = 0
    """Largest core file in bytes. A worker that may leave one may also be looked into by others of its user."""
    file_size: int | None = None
    """How far a file may be extended, in bytes, guest memory of a memfd too; None for the file system's limit alone."""


def missing() -> list[str]:
    """What this host lacks for a jail, for people; nothing where it has it all."""
    found = [syscall_filter.why_missing()]
    if not landlock.abi():
        found.append(f"Landlock: {landlock.why_missing()}")
    if _libc.prctl(_GET_NO_NEW_PRIVS, *_longs(0, 0, 0, 0)) < 0:
        found.append("no_new_privs: this kernel has none (Linux 3.5 or later)")
    return [what for what in found if what is not None]


@functools.cache
def prepare() -> None:
    """Does, once, what workers that are forked from this process would do each, or could not do any more inside.

    Raises JailError where no worker could be confined.
    """
    lacks = missing()
    if lacks:
        raise JailError(f"no worker can be confined here: {'; '.join(lacks)} ({_WITHOUT})")
    for kind in syscall_filter.KINDS:
        syscall_filter.compiled(kind, syscall_filter.KILL_PROCESS)
    # A thread that ends while the interpreter does is unwound by this library, which libc opens at that moment.
    try:
        ctypes.CDLL("libgcc_s.so.1")
    except OSError as error:
        raise JailError(f"load libgcc_s.so.1: {error}") from error
    time.localtime()  # libc reads the time zone now


def close_descriptors(keep: Collection[int]) -> None:
    """Closes every descriptor but these."""
    low = 0
    for fd in [*sorted(set(keep)), _BEYOND_DESCRIPTORS]:
        if low < fd:  # an empty range that ends at 0 would be all there is
            os.closerange(low, fd)
        low = fd + 1


def enter(settings: JailSettings, keep: Collection[int] | None = None) -> None:
    """Confines this process, for good. It has one thread; of its descriptors those in `keep` stay, or all for None.

    Raises JailError naming what is missing or refused: the process is in no state to be used then.
    """
    if settings.mode is JailMode.OFF:
        return
    prepare()
    try:
        _enter(settings, keep)
    except JailError as error:
        raise JailError(f"confine the worker: {error} ({_WITHOUT})") from error


def _enter(settings: JailSettings, keep: Collection[int] | None) -> None:
    if _thread_count() != 1:
        raise JailError("it has several threads, and most of this confines one")
    is_root = os.geteuid() == 0
    if is_root and not settings.uid:
        raise JailError("it is started as root and has no user to become")
    if not is_root and settings.uid not in (None, os.geteuid()):
        raise JailError(f"become user {settings.uid}: only root can")
    if keep is not None:
        close_descriptors(keep)
    if is_root:
        _leave_file_system()
    _limit(settings, has_own_user=is_root)
    parent_death_signal = ctypes.c_int()
    _prctl("ask for the parent's death signal", _GET_PDEATHSIG, ctypes.addressof(parent_death_signal))
    _drop_bounding_set()
    if is_root:
        assert settings.uid is not None
        _become(settings.uid, settings.uid if settings.gid is None else settings.gid)
    _drop_capabilities()
    # The kernel forgets it when the user changes.
    _prctl("keep the parent's death signal", _SET_PDEATHSIG, parent_death_signal.value)
    _prctl("give up new privileges", _SET_NO_NEW_PRIVS, 1)
    _prctl("be closed to debuggers", _SET_DUMPABLE, int(settings.core_size > 0))
    landlock.restrict()
    otherwise = syscall_filter.LOG if settings.mode is JailMode.LOG else syscall_filter.KILL_PROCESS
    programs = {kind: syscall_filter.compiled(kind, otherwise) for kind in syscall_filter.KINDS}

    def confine_thread(kind: str) -> None:
        try:
            syscall_filter.load(programs[kind])
        except JailError:
            log.critical("a thread cannot be confined: kind=%s", kind, exc_info=True)
            os.abort()  # before it touches anything of the guest's

    syscall_filter.load(programs["worker"])
    threads.before_each(confine_thread)


def _thread_count() -> int:
    """Of the whole process, not only those that Python started."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError as error:
        raise JailError(f"count its threads: {error.strerror}") from error


def _leave_file_system() -> None:
    """Makes an empty directory that no longer exists the root: Landlock hides no names and no attributes."""
    place = next(filter(os.path.isdir, _TEMPORARY), "/")
    folder = f"{place}/propolis-jail-{os.urandom(8).hex()}"
    try:
        os.mkdir(folder, 0o700)
        os.chdir(folder)
        os.rmdir(folder)
        os.chroot(".")
    except OSError as error:
        raise JailError(f"leave the file system: {error.strerror}") from error


def _limit(settings: JailSettings, *, has_own_user: bool) -> None:
    limits = {resource.RLIMIT_CORE: settings.core_size, resource.RLIMIT_NOFILE: settings.open_files}
    if settings.file_size is not None:
        limits[resource.RLIMIT_FSIZE] = settings.file_size
    if has_own_user:
        limits[resource.RLIMIT_NPROC] = settings.threads
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _become(uid: int, gid: int) -> None:
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise JailError(f"become user {uid}, group {gid}: {error.strerror}") from error
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3 or os.getgroups():
        raise JailError(f"become user {uid}, group {gid}: the kernel did something else")


def _drop_bounding_set() -> None:
    """Where that is allowed; no_new_privs makes it an extra."""
    capability = 0
    while _libc.prctl(_CAPBSET_DROP, *_longs(capability, 0, 0, 0)) == 0:
        capability += 1
    if ctypes.get_errno() not in (errno.EINVAL, errno.EPERM):  # after the last one; without CAP_SETPCAP
        raise JailError(f"drop capability {capability} from the bounding set: {os.strerror(ctypes.get_errno())}")


def _drop_capabilities() -> None:
    _prctl("clear the ambient capabilities", _CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32
    if _libc.capset(header, nothing) < 0:
        raise JailError(f"drop all capabilities: {os.strerror(ctypes.get_errno())}")
    left = (ctypes.c_uint32 * 6)()
    if _libc.capget(header, left) < 0 or any(left):
        raise JailError("drop all capabilities: the kernel left some")


def _longs(*values: int) -> list[ctypes.c_ulong]:
    return [ctypes.c_ulong(value) for value in values]


def _prctl(what: str, option: int, value: int) -> None:
    if _libc.prctl(option, *_longs(value, 0, 0, 0)) < 0:
        raise JailError(f"{what}: {os.strerror(ctypes.get_errno())}")
