"""A control group for each VM, below one that was delegated to the daemon: limits of its own, and an end of its own.

Only the unified hierarchy (cgroup v2) is used. Where there is none, or no part of it is the daemon's, VMs run without
limits and in the daemon's own group: find() says so in the log and returns None. Nothing here waits.
Documentation/admin-guide/cgroup-v2.rst; systemd.resource-control(5) for what "delegated" means.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import stat
from typing import TYPE_CHECKING

import msgspec

from propolis.errors import BackendError, BusyError
from propolis.spec import is_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)

VARIABLE = "PROPOLIS_CGROUP"  # the environment's word for the delegated group, as /proc/PID/cgroup has it
CONTROLLERS = ("cpu", "memory", "pids")

_REST = "rest"  # the leaf of those that are no VM's
_PREFIX = "vm-"  # no name of a VM is taken for a file of the kernel's
_MIB = 1 << 20


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of one VM may use together; None leaves it to the kernel, that is, without a limit."""

    memory_bytes: int | None = None
    """Beyond it, after reclaim, the VM's processes are killed, together, and nobody else's."""
    processes: int | None = None
    """Processes and threads."""
    cpu_weight: int | None = None
    """1 to 10000 where others compete for the same CPUs; the kernel's own is 100."""


def memory_limit(guest_bytes: int, *, files_in_memory: int = 0) -> int:
    """A limit that a VM with so much RAM never reaches by itself.

    Beside RAM there are page tables of the host's and the guest's view (8 bytes for 4 KiB each, and as much for the
    index of shared memory), the programs, and buffers. `files_in_memory` are bytes of disks on a tmpfs: what a guest
    writes there stays in memory and is counted as the VM's. Caches of other disks are reclaimed first.
    """
    return guest_bytes + guest_bytes // 64 + 128 * _MIB + files_in_memory


def bytes_in_memory(paths: Iterable[str], mountinfo: str = "/proc/self/mountinfo") -> int:
    """How much of these files is in memory for good, once written: the size of those on a tmpfs or ramfs."""
    devices = {mount.device for mount in _mounts(mountinfo) if mount.kind in ("tmpfs", "ramfs", "devtmpfs")}
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):  # whoever opens it says what is wrong with it
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode) and status.st_dev in devices:
                total += status.st_size
    return total


class VmGroup:
    """The control group of one VM. Its keeper writes itself into cgroup.procs at `path`; all that it starts follows."""

    def __init__(self, name: str, path: str, controllers: frozenset[str]) -> None:
        self.name = name
        self.path = path
        self._controllers = controllers

    def set_limits(self, limits: Limits) -> None:
        """Sets those whose controller there is."""
        if "memory" in self._controllers:
            self._write("memory.max", _or_max(limits.memory_bytes))
            self._write("memory.oom.group", "1")  # a VM without its helper, or half a helper, is of no use
        if "pids" in self._controllers:
            self._write("pids.max", _or_max(limits.processes))
        if "cpu" in self._controllers:
            self._write("cpu.weight", str(limits.cpu_weight or 100))

    def add(self, pid: int) -> None:
        """Moves a process, with all its threads, here."""
        self._write("cgroup.procs", str(pid))

    def processes(self) -> list[int]:
        """Who is in it; nobody where it is gone. A process of another PID namespace is 0."""
        try:
            return [int(line) for line in self._read("cgroup.procs").split()]
        except FileNotFoundError:
            return []

    def has_processes(self) -> bool:
        """Whether one is in it that still runs."""
        return self._counter("cgroup.events", "populated") > 0

    def oom_kills(self) -> int:
        """How many processes were killed because the group was at its limit of memory, or the host out of it."""
        return self._counter("memory.events", "oom_kill")

    def kill(self) -> None:
        """SIGKILL for every process in it."""
        try:
            self._write("cgroup.kill", "1")
        except BackendError:  # Linux before 5.14
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def remove(self) -> bool:
        """Removes it; False while a process is in it."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise BackendError(f"remove the control group of VM {self.name!r}: {error.strerror}") from error
        return True

    def _counter(self, file: str, key: str) -> int:
        with contextlib.suppress(OSError):  # gone, or without the controller
            for line in self._read(file).splitlines():
                word, _, value = line.partition(" ")
                if word == key:
                    return int(value)
        return 0

    def _read(self, file: str) -> str:
        with open(f"{self.path}/{file}", encoding="ascii") as opened:
            return opened.read()

    def _write(self, file: str, value: str) -> None:
        try:
            _write(f"{self.path}/{file}", value)
        except OSError as error:
            raise BackendError(
                f"control group of VM {self.name!r}: write {value} to {file}: {error.strerror}"
            ) from error


class Subtree:
    """The group that is the daemon's to divide, with the controllers that it may use there."""

    def __init__(self, path: str, controllers: frozenset[str]) -> None:
        self.path = path
        self.controllers = controllers

    def make(self, name: str, limits: Limits) -> VmGroup:
        """A new group for a VM. BusyError where there is one with processes in it, BackendError where it can't be."""
        group = self._group(name)
        if not group.remove():
            holders = ", ".join(map(str, group.processes()))
            raise BusyError(
                f"the control group of VM {name!r} still has processes: {holders or 'of another namespace'}"
            )
        try:
            os.mkdir(group.path, 0o755)
        except OSError as error:
            raise BackendError(f"make a control group for VM {name!r}: {error.strerror}") from error
        try:
            group.set_limits(limits)
        except BackendError:
            group.remove()
            raise
        return group

    def open(self, name: str) -> VmGroup | None:
        """The group that a VM has already."""
        group = self._group(name)
        return group if os.path.isdir(group.path) else None

    def groups(self) -> list[VmGroup]:
        """All that there are, with VMs in them or not."""
        found = (entry.name for entry in os.scandir(self.path) if entry.name.startswith(_PREFIX))
        return [self._group(name.removeprefix(_PREFIX)) for name in sorted(found)]

    def sweep(self) -> None:
        """Removes the groups that VMs left behind."""
        for group in self.groups():
            group.remove()

    def _group(self, name: str) -> VmGroup:
        if not is_name(name):
            raise BackendError(f"make a control group for VM {name!r}: that is no name")
        return VmGroup(name, f"{self.path}/{_PREFIX}{name}", self.controllers)


def find(wanted: str | None = None, *, proc: str = "/proc/self") -> Subtree | None:
    """The delegated group, made ready; None, and a line in the log, where there is none.

    It is the one named by `wanted` or else by PROPOLIS_CGROUP; without either, the group that this process is in, if
    whoever manages groups here has handed it over. Processes in it move to a leaf: an inner group has none.
    """
    wanted = wanted or os.environ.get(VARIABLE) or None
    try:
        return _find(wanted, proc)
    except _NoSubtreeError as error:
        log.log(
            logging.WARNING if wanted else logging.INFO,
            "VMs get no control groups of their own, and no limits: %s",
            error,
        )
        return None


class _NoSubtreeError(Exception):
    """Why there is none."""


def _find(wanted: str | None, proc: str) -> Subtree:
    root = next((mount.point for mount in _mounts(f"{proc}/mountinfo") if mount.is_unified), None)
    if root is None:
        raise _NoSubtreeError("no cgroup2 file system is mounted")
    own = _own_path(f"{proc}/cgroup")
    if wanted is not None:
        path = os.path.normpath(f"{root}/{wanted}")
        if not os.path.isfile(f"{path}/cgroup.procs"):
            raise _NoSubtreeError(f"there is no control group {wanted} below {root}")
    elif own is None:
        raise _NoSubtreeError(f"this process is in no control group of {root}")
    else:
        path = os.path.normpath(f"{root}/{own}")
        if not _is_delegated(path):
            raise _NoSubtreeError(f"{own} is not delegated (Delegate=yes, or {VARIABLE} names one that is)")
    if not os.access(path, os.W_OK):
        raise _NoSubtreeError(f"{path} is not writable")
    try:
        _empty_into_leaf(path)
        controllers = _enable(path)
    except OSError as error:
        raise _NoSubtreeError(f"{path}: {error.strerror}") from error
    missing = [name for name in CONTROLLERS if name not in controllers]
    if missing:
        log.warning("VMs are not limited in %s: the controller is not there: path=%s", ", ".join(missing), path)
    return Subtree(path, controllers)


def _own_path(file: str) -> str | None:
    with contextlib.suppress(OSError), open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.startswith("0::/"):
                return line[3:].rstrip("\n")
    return None


def _is_delegated(path: str) -> bool:
    for attribute in ("user.delegate", "trusted.delegate"):  # systemd since 251; before, and for root only
        with contextlib.suppress(OSError):
            if os.getxattr(path, attribute) == b"1":
                return True
    with contextlib.suppress(OSError):
        return os.geteuid() != 0 and os.stat(path).st_uid == os.geteuid()
    return False


def _empty_into_leaf(path: str) -> None:
    with open(f"{path}/cgroup.procs", encoding="ascii") as file:
        # 0 is a process of another PID namespace; written, it would mean this one.
        pids = [pid for pid in file.read().split() if pid != "0"]
    if not pids:
        return
    leaf = f"{path}/{_REST}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(leaf)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            _write(f"{leaf}/cgroup.procs", pid)


def _enable(path: str) -> frozenset[str]:
    with open(f"{path}/cgroup.controllers", encoding="ascii") as file:
        available = file.read().split()
    enabled = set()
    for controller in CONTROLLERS:
        if controller in available:
            _write(f"{path}/cgroup.subtree_control", f"+{controller}")
            enabled.add(controller)
    return frozenset(enabled)


def _write(path: str, value: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, value.encode())
    finally:
        os.close(file)


def _or_max(value: int | None) -> str:
    return "max" if value is None else str(value)


class _Mount(msgspec.Struct, frozen=True):
    device: int
    root: str
    point: str
    kind: str

    @property
    def is_unified(self) -> bool:
        return self.kind == "cgroup2" and self.root == "/"


def _mounts(path: str) -> Iterator[_Mount]:
    """proc_pid_mountinfo(5): fields, any number of optional ones, a dash, the type."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split(" ")
            major, _, minor = fields[2].partition(":")
            kind = fields[fields.index("-", 6) + 1]
            yield _Mount(os.makedev(int(major), int(minor)), _plain(fields[3]), _plain(fields[4]), kind)


def _plain(field: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(octal, character)
    return field
