"""Can this host run VMs? Each thing that they need is looked at, and what is wrong comes with how to mend it.

It is a process of its own, also where the daemon is asked: what it tries, a tiny guest above all, is nothing to do in
a process that others depend on. Exit status: 0 all is well, or there are warnings only; 1 something is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import resource
import shutil
import sys
from typing import TYPE_CHECKING, Literal

import msgspec

from propolis import config, jail, landlock
from propolis.kvm_probe import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Status = Literal["ok", "warning", "error"]

_SYS_IO_URING_SETUP = 425
_ENOUGH_FILES = 4096
_LITTLE_MEMORY_MIB = 512
_SIGNS = {"ok": "ok     ", "warning": "warning", "error": "ERROR  "}


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was looked at."""

    name: str
    status: Status
    message: str
    remedy: str | None = None


class Report(msgspec.Struct, frozen=True):
    """All of them."""

    checks: list[Check]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.description = "Check whether this host can run VMs, and say how to mend what is missing."
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the daemon's configuration, for its directories")
    parser.add_argument("--json", action="store_true", help="print it for programs")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report."""
    settings = config.load(arguments.config) if arguments.config is not None else config.default_settings()
    checks = list(examine(settings))
    if arguments.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(Report(checks)), indent=2).decode() + "\n")
    else:
        for check in checks:
            sys.stdout.write(f"{_SIGNS[check.status]}  {check.name}: {check.message}\n")
            if check.remedy is not None:
                sys.stdout.write(f"           -> {check.remedy}\n")
    return int(any(check.status == "error" for check in checks))


def examine(settings: config.Settings) -> Iterator[Check]:
    """Look at everything."""
    yield _kvm()
    looks: tuple[Callable[[], Check], ...] = (_jail, _io_uring, _tun, _passt, _memory, _huge_pages, _files, _cgroup)
    for look in looks:
        try:
            yield look()
        except OSError as error:
            yield Check(look.__name__.lstrip("_"), "warning", f"cannot be looked at: {error.strerror}")
    for what, path in (("state directory", settings.state_directory), ("run directory", settings.run_directory)):
        yield _directory(what, path)


def _kvm() -> Check:
    path = "/dev/kvm"
    if not os.path.exists(path):
        remedy = "load the module kvm_intel or kvm_amd, and see that virtualization is on in the firmware's setup"
        return Check("kvm", "error", f"{path} does not exist", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return Check("kvm", "error", f"{path}: permission denied", "join its group, kvm as a rule, or run as root")
    verdict = probe(path)
    if not verdict.is_usable:
        return Check("kvm", "error", str(verdict), "see the kernel's log: dmesg | grep -i kvm")
    if not verdict.is_full:
        remedy = "this host is itself a VM that does not pass the processor on: use one that does, or the bare machine"
        return Check("kvm", "error", f"it cannot run an unmodified kernel: {verdict.reason}", remedy)
    return Check("kvm", "ok", "it runs guest kernels natively")


def _jail() -> Check:
    missing = jail.missing()
    if missing:
        return Check(
            "jail", "error", f"VMs cannot be confined: {'; '.join(missing)}", "[jail] mode = 'off' goes without"
        )
    user = "each as a user of its own" if os.geteuid() == 0 else "as this user"
    message = f"VMs are confined, {user}"
    if beyond := landlock.beyond():
        message += f"; this kernel's Landlock does not know {', '.join(beyond)}: the filter of system calls denies them"
    return Check("jail", "ok", message)


def _io_uring() -> Check:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_SYS_IO_URING_SETUP, 0, None)  # without entries: refused, one way or the other
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.EFAULT):
        return Check("io_uring", "ok", "the kernel has it")
    why = "the kernel has none" if number == errno.ENOSYS else f"refused: {os.strerror(number)}"
    return Check("io_uring", "warning", f"{why}; disks use threads", "sysctl kernel.io_uring_disabled=0")


def _tun() -> Check:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Check("tun", "warning", f"/dev/net/tun: {error.strerror}", "modprobe tun; be root for taps")
    return Check("tun", "ok", "/dev/net/tun can be opened")


def _passt() -> Check:
    if (path := shutil.which("passt")) is None:
        return Check("passt", "warning", "not installed: no network without root", "apt-get install passt")
    return Check("passt", "ok", path)


def _memory() -> Check:
    with open("/proc/meminfo", encoding="ascii") as file:
        values = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in file if line.split()[1].isdigit()}
    available, total = values.get("MemAvailable", 0), values.get("MemTotal", 0)
    message = f"{available} MiB of {total} MiB are available"
    if available < _LITTLE_MEMORY_MIB:
        return Check("memory", "warning", message, "end what needs it, or give VMs less")
    return Check("memory", "ok", message)


def _huge_pages() -> Check:
    folder = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    with open(f"{folder}/nr_hugepages", encoding="ascii") as file:
        count = int(file.read())
    with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
        mode = file.read().partition("[")[2].partition("]")[0]
    message = f"{count} pages of 2 MiB are reserved, transparent ones are {mode!r}"
    if mode == "never" and count == 0:
        remedy = "echo madvise >/sys/kernel/mm/transparent_hugepage/enabled"
        return Check("huge pages", "warning", f"{message}: guests are slower", remedy)
    return Check("huge pages", "ok", message)


def _files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _ENOUGH_FILES:
        remedy = f"ulimit -Hn {_ENOUGH_FILES}, or LimitNOFILE= in the unit"
        return Check("open files", "warning", f"at most {hard}: too few for many VMs and clients", remedy)
    return Check("open files", "ok", f"at most {hard}")


def _cgroup() -> Check:
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        remedy = "boot with systemd.unified_cgroup_hierarchy=1"
        return Check(
            "control groups", "warning", "no unified hierarchy: VMs have no limit of memory of their own", remedy
        )
    return Check("control groups", "ok", "there is a unified hierarchy")


def _directory(what: str, path: str) -> Check:
    """Whether the daemon can write there, or make it."""
    nearest = path
    while not os.path.lexists(nearest) and nearest != "/":
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        return Check(what, "error", f"{nearest}: not a directory", f"remove it, or set another {what} in [server]")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Check(what, "error", f"{nearest}: no permission to write", "chown it, or set another in [server]")
    return Check(what, "ok", path if nearest == path else f"{path} can be made")


def main() -> int:
    """For `python -m propolis.doctor`."""
    parser = argparse.ArgumentParser(prog="propolis-server doctor")
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
