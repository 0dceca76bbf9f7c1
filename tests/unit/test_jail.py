"""The jail, from inside: each test forks a process that enters it, as root's and as an ordinary user's child."""

import asyncio
import contextlib
import ctypes
import errno
import io
import json
import logging
import mmap
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import pytest
import uvloop

import propolis.hypervisor._kvm
import propolis.hypervisor._replay  # noqa: F401 -- a machine imports them late, and in a jail that is too late
from propolis import jail, landlock, threads
from propolis.jail import JailMode, JailSettings
from propolis.keeper import LocalKeeper
from propolis.keeper_process import die_with_parent
from propolis.lifecycle import GuestEvent, Lifecycle, Request, State
from propolis.machine import Machine
from propolis.spec import DirectBoot, FileBlock, PciPath, Spec, VirtioBlock
from tests.driver import Ram, VirtioDriver
from tests.machine import kernels
from tests.unit.test_syscall_filter import number

USER = 61_234  # nobody has it
NOBODY = 65_534
TREE = Path(__file__).resolve().parents[2]
IS_ROOT = os.geteuid() == 0
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}

libc = ctypes.CDLL(None, use_errno=True)


class Outcome(NamedTuple):
    """How a process ended: what its work returned, or the signal, or the traceback."""

    value: object
    signal: int
    error: str


class Child:
    """A forked process that does some work; its value is sent as JSON. It ends with this process, however that ends."""

    def __init__(self, work: Callable[[int], object]) -> None:
        receiving, sending = os.pipe()
        me = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(receiving)
            try:
                die_with_parent(me)
                self._send(sending, {"value": work(sending)})
            except BaseException:  # noqa: BLE001 -- whatever it is, it is told to the test and goes no further
                self._send(sending, {"error": traceback.format_exc()})
            finally:
                os._exit(0)
        os.close(sending)
        self._receiving = receiving

    @staticmethod
    def _send(fd: int, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(message).encode())

    def finish(self, within: float = 30) -> Outcome:
        """Waits for its end."""
        received = b""
        deadline = time.monotonic() + within
        with os.fdopen(self._receiving, "rb", buffering=0) as pipe:
            while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
                part = pipe.read(65536)
                if not part:
                    break
                received += part
            else:
                os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        message = json.loads(received) if received else {}
        return Outcome(message.get("value"), os.WTERMSIG(status), message.get("error", ""))


class Jails:
    """Makes processes of one kind of user and lets them do something in a jail."""

    def __init__(self, *, is_root: bool) -> None:
        self.is_root = is_root
        self.settings = JailSettings(uid=USER if is_root else None)

    def start(
        self, body: Callable[[], object], settings: JailSettings | None = None, keep: Sequence[int] = ()
    ) -> Child:
        """A process that runs `body` in a jail, with its three standard descriptors and those in `keep`."""

        def work(sending: int) -> object:
            if IS_ROOT and not self.is_root:
                become_nobody()
            jail.enter(settings or self.settings, keep=[0, 1, 2, sending, *keep])
            return body()

        return Child(work)

    def run(
        self, body: Callable[[], object], settings: JailSettings | None = None, keep: Sequence[int] = ()
    ) -> Outcome:
        """The same, to its end."""
        return self.start(body, settings, keep).finish()

    def value(
        self, body: Callable[[], object], settings: JailSettings | None = None, keep: Sequence[int] = ()
    ) -> object:
        """What `body` returns; it must."""
        outcome = self.run(body, settings, keep)
        assert outcome == Outcome(outcome.value, 0, ""), outcome.error
        return outcome.value


def become_nobody() -> None:
    """For root: an ordinary user."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    die_with_parent(os.getppid())  # the kernel forgets it when the user changes


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    """What workers inherit."""
    jail.prepare()


@pytest.fixture(params=["root", "user"])
def jails(request: pytest.FixtureRequest) -> Jails:
    """For both kinds of user, as far as this test may play them."""
    is_root = request.param == "root"
    if is_root and not IS_ROOT:
        pytest.skip("needs root")
    return Jails(is_root=is_root)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: where one reads, where one writes."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def call(name: str, *arguments: int) -> int:
    """Makes a system call; the error number that it ends with, or 0."""
    words = [ctypes.c_ulong(argument) for argument in arguments]
    return 0 if libc.syscall(ctypes.c_long(number(name)), *words) >= 0 else ctypes.get_errno()


def denied(action: Callable[[], object]) -> str:
    """The name of the error that an action ends with; "" where it does not."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


# -- who it is ---------------------------------------------------------------------------------------------------------


def test_user_and_capabilities(jails: Jails, pipe: tuple[int, int]) -> None:
    """A user of its own where root makes it, no group but that one's, no capability in any set."""
    begin, go = os.pipe()
    settings = JailSettings(uid=USER, gid=USER + 1) if jails.is_root else jails.settings

    def wait() -> None:
        os.write(pipe[1], b"x")
        os.read(begin, 1)

    child = jails.start(wait, settings, keep=[begin, pipe[1]])
    os.read(pipe[0], 1)
    text = Path(f"/proc/{child.pid}/status").read_text()
    os.write(go, b"x")
    assert child.finish() == Outcome(None, 0, "")
    os.close(begin)
    os.close(go)
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    uid, gid = (USER, USER + 1) if jails.is_root else (NOBODY, NOBODY) if IS_ROOT else (os.getuid(), os.getgid())
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(gid)] * 4
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # a filter
    assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0, 0, 0, 0]
    if IS_ROOT:
        assert status["Groups"].split() == []
    if jails.is_root:
        assert int(status["CapBnd"], 16) == 0


def test_root_needs_a_user_for_the_worker() -> None:
    if not IS_ROOT:
        pytest.skip("needs root")
    for settings in (JailSettings(), JailSettings(uid=0)):
        outcome = Child(lambda sending, settings=settings: jail.enter(settings)).finish()  # type: ignore[misc]
        assert "it is started as root and has no user to become (--jail=off" in outcome.error


def test_only_root_changes_the_user() -> None:
    outcome = Jails(is_root=False).run(lambda: None, JailSettings(uid=USER))
    assert f"JailError: confine the worker: become user {USER}: only root can (--jail=off" in outcome.error


def test_what_the_host_refuses_is_named() -> None:
    """Here root without the capability to change its root directory, as in some containers."""
    if not IS_ROOT:
        pytest.skip("needs root")

    def work(sending: int) -> None:
        _deny("chroot", errno.EPERM)
        jail.enter(JailSettings(uid=USER))

    error = Child(work).finish().error
    assert "JailError: confine the worker: leave the file system: Operation not permitted (--jail=off" in error


def test_no_jail_is_no_jail(jails: Jails) -> None:
    assert jails.value(lambda: Path("/etc/passwd").read_text() != "", JailSettings(mode=JailMode.OFF)) is True


def test_what_is_missing_is_named() -> None:
    """And how to do without. Landlock is denied to this process by a filter, as on a kernel without it."""

    def work(sending: int) -> None:
        _deny("landlock_create_ruleset")
        jail.prepare.cache_clear()
        jail.enter(JailSettings(uid=USER if IS_ROOT else None))

    outcome = Child(work).finish()
    assert "JailError" in outcome.error
    assert "Landlock" in outcome.error
    assert "--jail=off" in outcome.error


def _deny(name: str, error: int = errno.ENOSYS) -> None:
    """Makes a system call fail from now on in this process."""
    import pyseccomp

    libc.prctl(38, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    program.add_rule(pyseccomp.ERRNO(error), name)
    program.load()


def test_a_process_with_threads_is_refused(jails: Jails) -> None:
    """Landlock confines one thread."""

    def work(sending: int) -> object:
        thread = threading.Thread(target=threading.Event().wait, daemon=True)
        thread.start()
        jail.enter(jails.settings)
        return None

    assert "JailError: confine the worker: it has several threads" in Child(work).finish().error


def test_limits(jails: Jails) -> None:
    settings = JailSettings(uid=jails.settings.uid, open_files=40, threads=9, file_size=1 << 20)
    which = (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC)
    limits = jails.value(lambda: [resource.getrlimit(limit) for limit in which], settings)
    assert isinstance(limits, list)
    assert limits[:3] == [[0, 0], [40, 40], [1 << 20, 1 << 20]]
    assert not jails.is_root or limits[3] == [9, 9]


def test_a_disk_is_not_extended(jails: Jails, tmp_path: Path) -> None:
    """By no way; within its size it is written to, and holes are filled and made."""
    size = 1 << 20
    with open(tmp_path / "disk", "w+b") as disk:
        disk.truncate(size)
        fd = disk.fileno()

        def write() -> list[str]:
            return [
                denied(lambda: os.pwrite(fd, b"x" * 4096, size - 4096)),
                denied(lambda: _raise(call("fallocate", fd, 3, 0, 4096))),  # PUNCH_HOLE | KEEP_SIZE
                denied(lambda: os.pwrite(fd, b"x", size)),
                denied(lambda: os.pwrite(fd, b"x", 1 << 40)),
                denied(lambda: os.ftruncate(fd, size + 1)),
                denied(lambda: _raise(call("fallocate", fd, 0, size, 4096))),
            ]

        settings = JailSettings(uid=jails.settings.uid, file_size=size)
        assert jails.value(write, settings, keep=[fd]) == ["", "", *["EFBIG"] * 4]
        assert os.fstat(fd).st_size == size


def test_threads_are_limited_where_they_are_counted_apart() -> None:
    if not IS_ROOT:
        pytest.skip("needs root")

    def spawn() -> int:
        started = 0
        with contextlib.suppress(RuntimeError):
            while started < 100:
                threading.Thread(target=threading.Event().wait, daemon=True).start()
                started += 1
        return started

    assert Jails(is_root=True).value(spawn, JailSettings(uid=USER, threads=9)) == 8


def test_descriptors_beyond_those_kept_are_closed(jails: Jails, pipe: tuple[int, int]) -> None:
    high = os.dup2(pipe[0], 700)
    try:
        found = jails.value(
            lambda: [fd for fd in range(1000) if denied(lambda: os.fstat(fd)) == ""],
            keep=[pipe[1]],
        )
    finally:
        os.close(high)
    assert isinstance(found, list)
    assert set(found) >= {0, 1, 2, pipe[1]}
    assert set(found).isdisjoint({pipe[0], 700})
    assert len(found) == 5  # and the one for the value


def test_the_parents_death_signal_is_kept(jails: Jails) -> None:
    """The kernel forgets it when the user changes: a worker must not outlive its keeper, nor a child its test."""

    def work(sending: int) -> object:
        def spin() -> None:
            os.write(sending, b'{"value": "inside"}')
            while True:
                pass

        return jails.start(spin, keep=[sending]).finish(within=60)

    child = Child(work)
    os.set_blocking(child._receiving, True)
    assert os.read(child._receiving, 100) == b'{"value": "inside"}'
    os.kill(child.pid, signal.SIGKILL)
    # The pipe ends when its last writer, the grandchild, has died.
    assert child.finish(within=10) == Outcome(None, signal.SIGKILL, "")


# -- what it is denied -------------------------------------------------------------------------------------------------

KILLED = "killed"
SPACE = bytearray(1 << 16)
"""What is tried and what becomes of it: the name of an error, or the end of the process."""
DENIED: dict[str, tuple[Callable[[], object], str]] = {
    "read a file": (lambda: os.open("/etc/passwd", os.O_RDONLY), "EACCES"),
    "read itself": (lambda: os.open("/proc/self/mem", os.O_RDWR), "EACCES"),
    "make a file": (lambda: os.open("/tmp/propolis-jail", os.O_CREAT | os.O_WRONLY), "EACCES"),
    "open a device": (lambda: os.open("/dev/kvm", os.O_RDWR), "EACCES"),
    "list a directory": (lambda: os.listdir("/"), "EACCES"),
    "look at a path": (lambda: os.stat("/etc"), "EACCES"),
    "read a link": (lambda: os.readlink("/proc/self/exe"), "EACCES"),
    "remove a file": (lambda: os.unlink("/tmp/x"), "EACCES"),
    "change a mode": (lambda: os.chmod("/tmp", 0o777), "EACCES"),
    "change directory": (lambda: os.chdir("/"), "EACCES"),
    "mount": (lambda: call("mount", 0, 0, 0, 0, 0), KILLED),
    "chroot": (lambda: os.chroot("."), KILLED),
    "execute": (lambda: os.execv("/bin/true", ["true"]), KILLED),
    "execute a descriptor": (lambda: call("execveat", 1, 0, 0, 0, 0x1000), KILLED),
    "fork": (os.fork, KILLED),
    "vfork": (lambda: call("vfork"), KILLED),
    "clone a process": (lambda: call("clone", signal.SIGCHLD, 0, 0, 0, 0), KILLED),
    "clone3": (lambda: _raise(call("clone3", 0, 0)), "ENOSYS"),
    "trace the parent": (lambda: call("ptrace", 16, os.getppid(), 0, 0), KILLED),
    "read the parent's memory": (lambda: call("process_vm_readv", os.getppid(), 0, 0, 0, 0, 0), KILLED),
    "take the parent's descriptors": (lambda: call("pidfd_getfd", 5, 0, 0), KILLED),
    "kill the parent": (lambda: os.kill(os.getppid(), 0), KILLED),
    "kill its group": (lambda: os.kill(0, 0), KILLED),
    "kill all": (lambda: os.kill(-1, 0), KILLED),
    "make a TCP socket": (socket.socket, "EACCES"),
    "make a unix socket": (lambda: socket.socket(socket.AF_UNIX), "EACCES"),
    "make a netlink socket": (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), "EACCES"),
    "make a ring": (lambda: _raise(call("io_uring_setup", 8, 0)), "ENOSYS"),
    "code in new memory": (lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC), "EACCES"),
    "code in old memory": (lambda: _raise(call("mprotect", id(SPACE) & ~4095, 4096, 4)), "EACCES"),
    "another personality": (lambda: call("personality", 0), KILLED),
    "load a BPF program": (lambda: call("bpf", 0, 0, 0), KILLED),
    "new namespaces": (lambda: call("unshare", 0x1000_0000), KILLED),
    "enter a namespace": (lambda: call("setns", 1, 0), KILLED),
    "become root": (lambda: os.setuid(0), KILLED),
    "open up to debuggers": (lambda: libc.prctl(4, 1, 0, 0, 0), KILLED),
    "raise a limit": (lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)), KILLED),
    "type into a terminal": (lambda: call("ioctl", 0, 0x5412, 0), KILLED),
    "load a module": (lambda: call("init_module", 0, 0, 0), KILLED),
    "a keyring": (lambda: call("keyctl", 0, 0, 0, 0, 0), KILLED),
    "shared memory of System V": (lambda: call("shmget", 0, 4096, 0), KILLED),
    "a userfaultfd": (lambda: call("userfaultfd", 0), KILLED),
    "performance counters": (lambda: call("perf_event_open", 0, 0, 0, 0, 0), KILLED),
    "another processor": (lambda: os.sched_setaffinity(0, {0}), "EPERM"),
    "open by handle": (lambda: call("open_by_handle_at", 0, 0, 0), KILLED),
}


def _raise(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))


@pytest.mark.parametrize("what", DENIED)
def test_denied(jails: Jails, what: str) -> None:
    action, expected = DENIED[what]
    outcome = jails.run(lambda: denied(action))
    if expected == KILLED:
        assert outcome == Outcome(None, signal.SIGSYS, "")
    else:
        assert outcome == Outcome(expected, 0, "")


def test_in_log_mode_the_process_lives(jails: Jails) -> None:
    """What would end it is done; what is refused, and what Landlock denies, stays so."""
    settings = JailSettings(mode=JailMode.LOG, uid=jails.settings.uid)
    assert jails.value(lambda: call("personality", 0xFFFF_FFFF), settings) == 0
    assert jails.value(lambda: denied(lambda: os.open("/etc/passwd", os.O_RDONLY)), settings) == "EACCES"


# -- each wall alone ---------------------------------------------------------------------------------------------------


def _behind_landlock(body: Callable[[], object]) -> object:
    def work(sending: int) -> object:
        libc.prctl(38, ctypes.c_ulong(1), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
        landlock.restrict()
        return body()

    outcome = Child(work).finish()
    assert outcome.error == ""
    return outcome.value


def test_landlock_alone_denies_every_path(tmp_path: Path) -> None:
    """Root's too; what is open stays open, and no new name of it can be opened."""
    (tmp_path / "file").write_bytes(b"x" * 100)
    with open(tmp_path / "file", "r+b", buffering=0) as file:

        def look() -> list[str]:
            return [
                denied(lambda: os.open(tmp_path / "file", os.O_RDONLY)),
                denied(lambda: os.open(tmp_path, os.O_RDONLY)),
                denied(lambda: os.open(tmp_path / "new", os.O_CREAT | os.O_WRONLY)),
                denied(lambda: os.unlink(tmp_path / "file")),
                denied(lambda: os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)),
                denied(lambda: os.execv("/bin/true", ["true"])),
                denied(lambda: os.pwrite(file.fileno(), b"y", 0)),
                denied(lambda: os.ftruncate(file.fileno(), 50)),
            ]

        assert _behind_landlock(look) == ["EACCES"] * 6 + ["", ""]


def test_landlock_alone_denies_tcp() -> None:
    if landlock.abi() < 4:
        pytest.skip(f"Landlock of this kernel has ABI {landlock.abi()}; TCP comes with 4")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def look() -> list[str]:
            with socket.socket() as one, socket.socket() as other:
                return [denied(lambda: one.connect(address)), denied(lambda: other.bind(("127.0.0.1", 0)))]

        assert _behind_landlock(look) == ["EACCES", "EACCES"]


def test_landlock_alone_denies_signals_and_abstract_sockets() -> None:
    if landlock.abi() < 6:
        pytest.skip(f"Landlock of this kernel has ABI {landlock.abi()}; scopes come with 6")
    name = f"\0propolis-jail-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()

        def look() -> list[str]:
            with socket.socket(socket.AF_UNIX) as client:
                return [
                    denied(lambda: os.kill(os.getppid(), 0)),
                    denied(lambda: os.kill(os.getpid(), 0)),
                    denied(lambda: client.connect(name)),
                ]

        assert _behind_landlock(look) == ["EPERM", "", "EPERM"]


def test_root_has_no_file_system_at_all() -> None:
    """With the filter out of the way: there is not even a name to look at."""
    if not IS_ROOT:
        pytest.skip("needs root")

    def work(sending: int) -> object:
        jail._leave_file_system()
        return [denied(lambda: os.stat("/etc")), denied(lambda: os.stat("..")), denied(lambda: os.mkdir("x"))]

    assert Child(work).finish().value == ["ENOENT", "", "ENOENT"]
    assert not list(Path("/dev/shm").glob("propolis-jail-*"))


def _in_thread(kind: str, action: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        found: list[str] = []
        threads.start(kind, "one", lambda: found.append(denied(action))).join()
        return found

    return run


def test_threads_that_run_no_python_may_do_less(jails: Jails, tmp_path: Path) -> None:
    """The pool syncs the disk and no vCPU does; the loop takes descriptors from a socket, neither does."""

    def receive() -> None:
        one, other = socket.socketpair()
        other.send(b"x")
        one.recvmsg(1)

    assert jails.value(lambda: denied(receive)) == ""
    with open(tmp_path / "file", "wb") as file:

        def sync() -> None:
            os.fdatasync(file.fileno())

        assert jails.value(_in_thread("io", sync), keep=[file.fileno()]) == [""]
        assert jails.run(_in_thread("vcpu", sync), keep=[file.fileno()]).signal == signal.SIGSYS
    for kind in ("io", "vcpu"):
        pair = socket.socketpair()
        with pair[0], pair[1]:
            pair[1].send(b"x")
            outcome = jails.run(_in_thread(kind, lambda: pair[0].recvmsg(1)), keep=[pair[0].fileno()])
            assert outcome.signal == signal.SIGSYS


# -- a worker taken over -----------------------------------------------------------------------------------------------

SECRET = b"what another VM keeps on its disk"
RAW = """
def raw(name, *arguments):
    words = [ctypes.c_ulong(argument) for argument in arguments]
    return libc.syscall(ctypes.c_long(number(name)), *words)
"""
ATTEMPTS = {
    "open it": "return open(path, 'rb').read()",
    "open it from its folder": "return os.read(os.open('other', os.O_RDONLY, dir_fd=folder), 100)",
    "leave its folder": "return os.read(os.open('../../../../../' + path, os.O_RDONLY, dir_fd=folder), 100)",
    "open it anew": "return open(f'/proc/{victim}/fd/{disk}', 'rb').read()",
    "open it by another call": "return os.read(raw('openat2', folder, id(path), 0, 24), 100)",
    "give it another name": "os.link(path, '/tmp/mine'); return open('/tmp/mine', 'rb').read()",
    "make it the own disk": "os.rename(path, own_path); return os.pread(own, 100, 0)",
    "read on, past the own disk": "return os.pread(own, 1 << 20, 0) + os.pread(own, 100, 1 << 40)",
    "open the disk below": "return open('/dev/vda', 'rb').read(1 << 20)",
    "read the victim's memory": "return open(f'/proc/{victim}/mem', 'rb').read(100)",
    "trace the victim": "return [raw('ptrace', 16, victim, 0, 0), os.waitpid(victim, 0)]",
    "copy the victim's memory": "return raw('process_vm_readv', victim, 0, 1, 0, 1, 0)",
    "take the victim's descriptor": "return os.read(raw('pidfd_getfd', os.pidfd_open(victim), disk, 0), 100)",
    "let cat read it": "import subprocess; return subprocess.check_output(['cat', path])",
    "become cat": "os.execv('/bin/cat', ['cat', path])",
    "do it in a child": "return os.fork()",
    "do it in a thread": """
        found = []
        thread = threading.Thread(target=lambda: found.append(open(path).read()))
        thread.start()
        thread.join()
        return found
    """,
    "let the kernel read it": "return raw('io_uring_setup', 8, id(path))",
    "open it by its number": "return raw('open_by_handle_at', folder, 0, 0)",
    "ask who can": "s = socket.socket(socket.AF_UNIX); s.connect('/run/somebody'); return s.recv(100)",
    "run code of its own": "return mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    "see another file system": "return [raw('unshare', 0x1002_0000), raw('mount', 0, 0, 0, 0, 0), open(path).read()]",
    "become root again": "os.setresuid(0, 0, 0); return open(path).read()",
    "end its keeper": "os.kill(os.getppid(), 9); return open(path).read()",
    "end the victim": "os.kill(victim, 9); return open(path).read()",
    "undo the filter": "libc.prctl(22, 0); return open(path).read()",
}


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that everybody may read and write: what keeps one VM from another here is the jail alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


class Victim:
    """Another worker, with its disk open."""

    def __init__(self, jails: Jails, path: Path) -> None:
        path.write_bytes(SECRET + bytes(4096))
        path.chmod(0o666)
        self.disk = os.open(path, os.O_RDWR)
        self._end = os.pipe()
        ready = os.pipe()

        def wait() -> bool:
            os.write(ready[1], b"x")
            return os.read(self._end[0], 1) == b"" and SECRET in os.pread(self.disk, 100, 0)

        self.child = jails.start(wait, keep=[self.disk, self._end[0], ready[1]])
        os.read(ready[0], 1)
        for fd in (*ready, self._end[0]):
            os.close(fd)

    def ends_well(self) -> bool:
        """Lets it end; whether nobody did that before."""
        os.close(self._end[1])
        os.close(self.disk)
        return self.child.finish() == Outcome(True, 0, "")


def _attempt(text: str, values: dict[str, object]) -> str:
    """Runs any Python; what comes of it as text."""
    names: dict[str, object] = {**globals(), **values}
    exec(RAW + "def attempt():\n" + textwrap.indent(textwrap.dedent(text), "    "), names)
    try:
        return repr(names["attempt"]())  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001 -- as the test of an attempt needs it
        return repr(error)


@pytest.mark.parametrize("what", ATTEMPTS)
def test_a_worker_taken_over_reads_no_other_disk(jails: Jails, shared_folder: Path, what: str) -> None:
    """Whoever runs code of their own in a worker gets nothing of another VM's, and both keepers live on."""
    own_path, path = shared_folder / "own", shared_folder / "other"
    own_path.write_bytes(bytes(1 << 20))
    own_path.chmod(0o666)
    victim = Victim(jails, path)
    own, folder = os.open(own_path, os.O_RDWR), os.open(shared_folder, os.O_RDONLY)
    values = {
        "own": own,
        "own_path": str(own_path),
        "path": str(path),
        "folder": folder,
        "victim": victim.child.pid,
        "disk": victim.disk,
    }
    try:
        outcome = jails.run(lambda: _attempt(ATTEMPTS[what], values), keep=[own, folder])
    finally:
        os.close(own)
        os.close(folder)
    assert victim.ends_well()
    assert SECRET.decode() not in str(outcome.value)
    assert outcome.error == ""
    assert path.read_bytes() == SECRET + bytes(4096)


def test_the_same_without_a_jail(jails: Jails, shared_folder: Path) -> None:
    """The attempts are good ones."""
    path = shared_folder / "other"
    victim = Victim(jails, path)
    values = {"path": str(path), "victim": victim.child.pid, "disk": victim.disk}
    off = JailSettings(mode=JailMode.OFF)
    for what in ("open it", "let cat read it", "do it in a thread"):
        assert SECRET.decode() in str(jails.run(lambda: _attempt(ATTEMPTS[what], values), off).value)
    assert victim.ends_well()


# -- what it does all the same -----------------------------------------------------------------------------------------


def test_python_works(jails: Jails, capfd: pytest.CaptureFixture[str]) -> None:
    """Tracebacks without their source, logs in local time, threads, signals, memory."""

    def live() -> object:
        log = logging.getLogger("jailed")
        handler = logging.StreamHandler(io.TextIOWrapper(FileIO(2, "w", closefd=False), write_through=True))
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        try:
            int("x")
        except ValueError:
            log.exception("a log record")
        for _ in range(20):
            threading.Thread(target=lambda: [bytearray(1 << 20) for _ in range(5)]).start()
        threading.Thread(target=lambda: 1 // 0).start()
        os.kill(os.getpid(), 0)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.raise_signal(signal.SIGUSR1)
        return [time.strftime("%Z"), os.urandom(4) != os.urandom(4), mmap.mmap(-1, 1 << 20)[5]]

    assert jails.value(live) == [time.strftime("%Z"), True, 0]
    written = capfd.readouterr().err
    assert "a log record" in written
    assert "ValueError: invalid literal" in written


def test_the_interpreter_ends_with_busy_threads(jails: Jails) -> None:
    """libc unwinds them then, with a library that it opens at that moment."""
    program = textwrap.dedent(
        f"""
        import os, threading
        from propolis import jail
        from propolis.keeper_process import die_with_parent
        from tests.unit.test_jail import become_nobody
        die_with_parent(os.getppid())
        if {IS_ROOT and not jails.is_root}:
            become_nobody()
        jail.enter(jail.JailSettings(uid={jails.settings.uid}))
        def spin():
            while True:
                pass
        for _ in range(4):
            threading.Thread(target=spin, daemon=True).start()
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=TREE, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


class Handed(LocalKeeper):
    """A keeper's side inside the jail: everything was opened before."""

    def __init__(self, kernel: Path, disk: Path) -> None:
        keeper = LocalKeeper()
        self.kvm = keeper.open_hypervisor()
        self.kernel = keeper.open_image(str(kernel), "kernel")
        self.disk = keeper.open_disk(str(disk), read_only=False)

    def descriptors(self) -> list[int]:
        return [self.kvm, self.kernel.fileno(), self.disk]

    def close(self) -> None:
        self.kernel.close()
        os.close(self.kvm)
        os.close(self.disk)

    def open_hypervisor(self) -> int:
        return self.kvm

    def open_image(self, path: str, what: str) -> FileIO:
        return self.kernel

    def open_disk(self, path: str, *, read_only: bool) -> int:
        return self.disk


class Life:
    """A VM in a jailed process, through all of its life."""

    def __init__(self, keeper: Handed, backing: str) -> None:
        spec = Spec(
            name="jailed",
            cpus=2,
            memory_mib=64,
            memory_backing=backing,  # type: ignore[arg-type]
            boot=DirectBoot(kernel="kernel"),
            devices=(VirtioBlock(name="disk", backend="disk", pci_path=PciPath(0, 4, 0)),),
            backends={"disk": FileBlock(path="disk")},
        )
        self.machine = Machine(spec, keeper, self._report)
        self.lifecycle = Lifecycle(self.machine)
        self.output = b""
        self._moved = asyncio.Event()
        self.machine.board.serial_ports[1].on_output = self._on_output

    def _report(self, event: GuestEvent) -> None:
        self.lifecycle.report(event)

    def _on_output(self, data: bytes) -> None:
        self.output += data
        self._moved.set()

    async def says(self, text: bytes) -> None:
        """Waits for the next words of the guest."""
        async with asyncio.timeout(20):
            while text not in self.output:
                self._moved.clear()
                await self._moved.wait()
        self.output = self.output.partition(text)[2]

    async def becomes(self, state: State) -> None:
        """Waits for a state."""
        async with asyncio.timeout(20):
            while self.lifecycle.record.state is not state:
                await self.lifecycle.wait_for(self.lifecycle.record.generation + 1)

    async def use_disk(self) -> bytes:
        """As the guest's driver would: reads a block and writes it to the next one."""
        vm = self.machine.vm
        driver = VirtioDriver(vm, 4, Ram(vm, 0x100_0000, 1 << 20))
        driver.begin(msix=False)
        queue = driver.queues[0]
        data, status = driver.ram.take(512), driver.ram.take(1)
        for operation, sector in ((0, 0), (1, 1), (4, 0)):  # read, write, flush
            head = driver.ram.put(struct.pack("<IIQ", operation, 0, sector))
            buffers = [] if operation == 4 else [(data, 512)]
            if operation == 0:
                queue.add([head], [*buffers, (status, 1)])
            else:
                queue.add([head, *buffers], [(status, 1)])
            queue.kick()
            await queue.wait()
            assert vm.memory.read(status, 1) == b"\0"
        return vm.memory.read(data, 512)

    async def run(self) -> object:
        """Runs, pauses, runs on, reads its disk, is reset by itself and by the host, and powers off."""
        loop = asyncio.get_running_loop()
        ended = loop.create_task(self.lifecycle.run())
        self.lifecycle.request(Request.RUN)
        await self.says(b"ready")
        self.lifecycle.request(Request.PAUSE)
        await self.becomes(State.PAUSED)
        self.lifecycle.request(Request.RUN)
        await self.becomes(State.RUNNING)
        read = await self.use_disk()
        com1 = self.machine.board.serial_ports[1]
        com1.feed(b"R")
        await self.says(b"ready")
        self.lifecycle.request(Request.REBOOT)
        await self.says(b"ready")
        com1.feed(b"T")  # a triple fault is a reset too
        await self.says(b"ready")
        self.lifecycle.request(Request.POWER_BUTTON)
        record = await ended
        await self.machine.halt()
        return [record.state.value, read.hex(), await loop.run_in_executor(None, os.getppid)]


@pytest.mark.kvm
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_a_vm_lives_its_life(jails: Jails, tmp_path: Path, loop: str, backing: str) -> None:
    """On both loops, with disk I/O by the pool, through reset, reboot and triple fault to its end."""
    (tmp_path / "kernel").write_bytes(kernels.monitor())
    block = os.urandom(512)
    (tmp_path / "disk").write_bytes(block + bytes(1 << 20))
    keeper = Handed(tmp_path / "kernel", tmp_path / "disk")

    def live() -> object:
        async def inside() -> object:
            return await Life(keeper, backing).run()

        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            return runner.run(inside())

    try:
        value = jails.value(live, keep=keeper.descriptors())
    finally:
        keeper.close()
    assert value == ["Stopped", block.hex(), os.getpid()]
    assert (tmp_path / "disk").read_bytes()[:1024] == block + block


@pytest.mark.parametrize("loop", LOOPS)
def test_it_serves_http_and_websockets(jails: Jails, loop: str) -> None:
    """On a socket that was handed to it: requests, websockets, clients that vanish, an end by signal."""
    from aiohttp import WSMsgType, web

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/socket"
        listener.bind(path)
        listener.listen()

        async def serve() -> list[object]:
            async def echo(request: web.Request) -> web.StreamResponse:
                messages = web.WebSocketResponse()
                await messages.prepare(request)
                async for message in messages:
                    if message.type is WSMsgType.BINARY:
                        await messages.send_bytes(message.data)
                return messages

            async def fail(request: web.Request) -> web.StreamResponse:
                raise ValueError("as a handler may")

            async def double(request: web.Request) -> web.StreamResponse:
                return web.Response(body=2 * await request.read())

            application = web.Application(client_max_size=1 << 22)
            application.add_routes([web.get("/echo", echo), web.get("/fail", fail), web.put("/double", double)])
            ended = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
            runner = web.AppRunner(application, shutdown_timeout=1)
            await runner.setup()
            await web.SockSite(runner, listener).start()
            os.write(ready[1], b"x")
            await ended.wait()
            await runner.cleanup()
            return ["ended"]

        def live() -> object:
            with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                return runner.run(serve())

        ready = os.pipe()
        child = jails.start(live, keep=[listener.fileno(), ready[1]])
        os.read(ready[0], 1)
        for fd in ready:
            os.close(fd)
        asyncio.run(_use(path))
        os.kill(child.pid, signal.SIGTERM)
        assert child.finish() == Outcome(["ended"], 0, "")


async def _use(path: str) -> None:
    import aiohttp

    async with aiohttp.ClientSession("http://worker", connector=aiohttp.UnixConnector(path)) as client:
        async with client.get("/fail") as reply:
            assert reply.status == 500
        async with client.put("/double", data=bytes(1 << 20)) as reply:
            assert await reply.read() == bytes(2 << 20)
        for _ in range(20):
            async with client.ws_connect("/echo") as messages:
                await messages.send_bytes(bytes(100_000))
                assert (await messages.receive_bytes()) == bytes(100_000)
        for _ in range(5):
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(b"GET /echo HTTP/1.1\r\n")
            writer.transport.abort()
