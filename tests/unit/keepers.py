"""Keepers with workers that do what a test says, as real processes."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from propolis import keeper_process
from propolis.keeper_process import Ends, Work
from propolis.keeper_protocol import MAX_MESSAGE, Answer, RemoteKeeper, Start, Started, StartOptions, receive
from propolis.run_directory import ExitRecord, RunDirectory
from propolis.running_vm import RunningVm
from propolis.spec import DirectBoot, FileBlock, PciPath, Spec, VirtioBlock
from tests.unit.firmware import images

TIMEOUT = 20.0


def spec(folder: Path, **changes: object) -> Spec:
    """A small VM with a disk `disk` and one that cannot be written, `cd`."""
    (folder / "kernel").write_bytes(images.elf())
    for name in ("disk", "cd"):
        (folder / name).write_bytes(bytes(4096))
    made = Spec(
        name="kept",
        cpus=1,
        memory_mib=16,
        boot=DirectBoot(kernel=str(folder / "kernel")),
        devices=(
            VirtioBlock(name="disk", backend="disk", pci_path=PciPath(0, 4, 0)),
            VirtioBlock(name="cd", backend="cd", pci_path=PciPath(0, 5, 0)),
        ),
        backends={
            "disk": FileBlock(path=str(folder / "disk")),
            "cd": FileBlock(path=str(folder / "cd"), readonly=True),
        },
    )
    return msgspec.structs.replace(made, **changes)


class Kept:
    """A keeper that was started, and what it tells its daemon."""

    def __init__(self, directory: RunDirectory, pid: int, channel: socket.socket) -> None:
        self.directory = directory
        self.pid = pid
        self._channel = channel
        self.vm: RunningVm | None = None

    def introduced(self) -> RunningVm:
        """Hears who they are, or the reason why not."""
        data, fds = receive(self._channel, 2)
        if not fds:
            msgspec.json.decode(data, type=Answer).raise_error()
        started = msgspec.json.decode(data, type=Started)
        self.vm = RunningVm(self.directory, started.keeper, fds[0], started.worker, fds[1])
        return self.vm

    def ready(self) -> None:
        """Hears that the VM was made; raises what it was that prevented it."""
        msgspec.json.decode(self._channel.recv(MAX_MESSAGE), type=Answer).raise_error()

    def nothing_more(self) -> None:
        """The keeper has let go of the daemon."""
        assert self._channel.recv(MAX_MESSAGE) == b""

    def close(self) -> None:
        self._channel.close()
        if self.vm is not None:
            self.vm.kill_all()
            self.vm.close()
        os.waitpid(self.pid, 0)


@contextmanager
def kept(directory: RunDirectory, vm: Spec, worker: Callable[[Ends], int], *, is_heard: bool = True) -> Iterator[Kept]:
    """A keeper with a worker that runs `worker`; both are gone afterwards. Without `is_heard` its daemon is gone."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.settimeout(TIMEOUT)
    assigning, assigned = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    start = Start(
        directory=directory.path, spec=vm, properties=msgspec.Raw(b"null"), options=StartOptions()
    )  # fmt: skip
    if not is_heard:
        mine.close()
    request = os.memfd_create("start")
    os.write(request, msgspec.json.encode(start))
    socket.send_fds(assigning, [b"start"], [directory.fileno(), request, its.fileno()])
    os.close(request)
    its.close()
    pid = os.fork()
    if pid == 0:
        mine.close()
        assigning.close()
        directory.close()
        keeper_process.run(assigned, Work(worker))
    assigned.close()
    assigning.close()
    one = Kept(directory, pid, mine)
    try:
        yield one
    finally:
        one.close()


def serving(action: Callable[[RemoteKeeper, Ends], object]) -> Callable[[Ends], int]:
    """A worker that is ready at once, does something, and then waits for its keeper's end."""

    def worker(ends: Ends) -> int:
        keeper = RemoteKeeper(ends.keeper)
        keeper.report_ready()
        action(keeper, ends)
        ends.keeper.settimeout(None)
        ends.keeper.recv(1)
        return 0

    return worker


def idle(ends: Ends) -> int:
    """A worker that is ready and waits."""
    return serving(lambda _keeper, _ends: None)(ends)


async def ended(vm: RunningVm) -> ExitRecord:
    """The record of its end."""
    async with asyncio.timeout(TIMEOUT):
        return await vm.wait()


def until(what: str, reached: Callable[[], bool]) -> None:
    """Waits for what only polling shows."""
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < deadline, f"missing: {what}"
        time.sleep(0.002)


def is_gone(pid: int) -> bool:
    """Also where nobody has waited for it yet."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return True
