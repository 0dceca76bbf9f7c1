"""Workers behind their keepers, in their jail, with tiny guests on KVM: what they leave, however they end."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

import aiohttp
import pytest

from propolis.keeper_protocol import StartOptions
from propolis.lifecycle import State
from propolis.run_directory import RunDirectory
from propolis.spec import DirectBoot, MemoryBacking, Spec
from propolis.zygote import Zygote
from tests.machine import kernels
from tests.machine.guest import SLOWER
from tests.unit.keepers import ended
from tests.unit.test_zygote import JAIL, PROPERTIES, client

if TYPE_CHECKING:
    from propolis.running_vm import RunningVm

pytestmark = [pytest.mark.kvm, pytest.mark.program]

SOON = 20 * SLOWER
GREETING = b"ready\r\n"


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(str(tmp_path / "run")) as directory:
        yield directory


class Guest:
    """A VM with the monitor kernel, started."""

    def __init__(
        self, zygote: Zygote, directory: RunDirectory, folder: Path, memory_backing: MemoryBacking = "anonymous"
    ) -> None:
        self._zygote = zygote
        self._directory = directory
        kernel = folder / "kernel"
        kernel.write_bytes(kernels.monitor())
        self._spec = Spec(
            name="guest",
            cpus=2,
            memory_mib=64,
            memory_backing=memory_backing,
            boot=DirectBoot(kernel=str(kernel)),
        )
        self.vm: RunningVm

    async def __aenter__(self) -> Self:
        self.vm = await self._zygote.start_vm(self._directory, self._spec, PROPERTIES, StartOptions(jail=JAIL))
        async with client(self._directory) as session, session.put("/instance/state", json="Run") as reply:
            assert reply.status == 204
        return self

    async def __aexit__(self, *_: object) -> None:
        self.vm.kill_all()
        await ended(self.vm)
        self.vm.close()

    async def prints(self, text: bytes, start: int = 0) -> int:
        """Waits for output after an offset; the offset after it."""
        deadline = time.monotonic() + SOON
        with self._directory.history() as history:
            while True:
                data, _ = history.read(from_start=start)
                if (at := data.find(text)) >= 0:
                    return start + at + len(text)
                assert time.monotonic() < deadline, f"missing on the console: {text!r}; there is {data!r}"
                await asyncio.sleep(0.01)

    async def type(self, keys: bytes) -> None:
        """On its console."""
        async with client(self._directory) as session, session.ws_connect("/instance/serial") as console:
            await console.send_bytes(keys)
            while (await console.receive(SOON)).type is aiohttp.WSMsgType.BINARY:
                pass  # until the guest has what it needs to end


async def test_a_guest_that_powers_off(directory: RunDirectory, tmp_path: Path) -> None:
    async with await Zygote.spawn() as zygote, Guest(zygote, directory, tmp_path) as guest:
        await guest.prints(GREETING)
        await guest.type(b"hello P")
        assert (await ended(guest.vm)).status == 0
    record = directory.state()
    assert record is not None
    assert (record.state, record.detail) == (State.STOPPED, "the guest powered off")
    with directory.history() as history:
        assert history.read(from_start=0)[0].endswith(b"hello ")


async def test_a_guest_that_kvm_cannot_run(directory: RunDirectory, tmp_path: Path) -> None:
    """The reason is there when the worker is not."""
    async with await Zygote.spawn() as zygote, Guest(zygote, directory, tmp_path) as guest:
        await guest.prints(GREETING)
        await guest.type(b"F")
        assert (await ended(guest.vm)).status == 1
    record = directory.state()
    assert record is not None
    assert record.state is State.FAILED
    assert "code=d9 05" in record.detail
    assert any("code=d9 05" in line for line in directory.last_log_lines())


async def test_a_worker_that_is_killed(directory: RunDirectory, tmp_path: Path) -> None:
    """All its guest printed is there, and the next one's output goes on behind it."""
    async with await Zygote.spawn() as zygote:
        async with Guest(zygote, directory, tmp_path) as guest:
            first = await guest.prints(GREETING)
            assert guest.vm.worker_pid is not None
            os.kill(guest.vm.worker_pid, signal.SIGKILL)
            record = await ended(guest.vm)
            assert (record.signal, record.reason) == (signal.SIGKILL, "the worker was killed by SIGKILL")
        before = directory.state()
        assert before is not None
        assert before.state is State.RUNNING
        async with Guest(zygote, directory, tmp_path) as guest:
            await guest.prints(GREETING, first)
            after = directory.state()
            assert after is not None
            assert after.generation > before.generation


@pytest.mark.usefixtures("huge_pages")
async def test_huge_pages_come_back(directory: RunDirectory, tmp_path: Path) -> None:
    """From a jailed worker that is killed while its guest runs in them; the fixture looks whether they are back."""
    async with await Zygote.spawn() as zygote, Guest(zygote, directory, tmp_path, "hugetlb") as guest:
        await guest.prints(GREETING)
        assert guest.vm.worker_pid is not None
        assert "KernelPageSize:     2048 kB\n" in _mappings(guest.vm.worker_pid)
        os.kill(guest.vm.worker_pid, signal.SIGKILL)
        await ended(guest.vm)


async def test_an_idle_worker_needs_little_memory(directory: RunDirectory, tmp_path: Path) -> None:
    """Of its own: pages of the zygote are there once, however many VMs share them."""
    async with await Zygote.spawn() as zygote, Guest(zygote, directory, tmp_path) as guest:
        await guest.prints(GREETING)
        assert guest.vm.worker_pid is not None
        own = sum(_private_kib(pid, guest_mib=64) for pid in (guest.vm.keeper_pid, guest.vm.worker_pid))
        assert own <= 12 << 10


def _mappings(pid: int) -> str:
    return Path(f"/proc/{pid}/smaps").read_text()


def _private_kib(pid: int, guest_mib: int) -> int:
    """What a process has written to and is nobody else's, guest RAM left out; pages of files are everybody's."""
    total = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Size":
            size = int(value.split()[0])
        elif name == "Private_Dirty" and size < guest_mib << 9:
            total += int(value.split()[0])
    return total
