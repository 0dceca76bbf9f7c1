"""The machine on replayed vCPUs: what the guest asks for is known in time, and what cannot start is let go."""

import asyncio
import logging
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from propolis.backends.block import nocloud
from propolis.backends.block.file import FileBackend
from propolis.devices.device import Device
from propolis.devices.virtio.blk import VirtioBlk
from propolis.errors import HypervisorError, PauseError
from propolis.firmware import layout
from propolis.keeper import LocalKeeper
from propolis.lifecycle import GuestEvent
from propolis.machine import Machine
from propolis.spec import BlobBlock, CloudInit, DirectBoot, PciPath, Pvpanic, Spec, SystemNames, VirtioBlock
from tests.unit.firmware import images

RESET_CONTROL = 0xCF9
PM1_CONTROL = 0xB004
PVPANIC = 0x505
SLEEP_S5 = 0x2000


def build(tmp_path: Path, on_event: Callable[[GuestEvent], None], cpus: int = 2) -> Machine:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(images.elf())
    spec = Spec(
        name="machine",
        cpus=cpus,
        memory_mib=16,
        boot=DirectBoot(kernel=str(kernel)),
        devices=(Pvpanic(name="panic", enable_isa=True),),
    )
    return Machine(spec, LocalKeeper(), on_event, hypervisor="replay")


def ignore(_event: GuestEvent) -> None:
    """Nobody waits for what the guest asks."""


@asynccontextmanager
async def running(tmp_path: Path, events: list[GuestEvent]) -> AsyncIterator[Machine]:
    """A machine whose vCPUs idle; the test writes ports in their place."""
    machine = build(tmp_path, events.append)
    try:
        await machine.start()
        yield machine
    finally:
        await machine.halt()


async def test_what_a_guest_asked_for_is_known_once_it_is_held(tmp_path: Path) -> None:
    """Or it would run on after its own reset when a pause and a resume follow each other at once."""
    events: list[GuestEvent] = []
    async with running(tmp_path, events) as machine:
        await machine.pause()
        machine.vm.pio.write(RESET_CONTROL, 1, 6)
        await machine.pause()  # held already: nothing here waits for the loop
        assert events == [GuestEvent.RESET]


async def test_reset_and_power_off_at_once_is_off(tmp_path: Path) -> None:
    events: list[GuestEvent] = []
    async with running(tmp_path, events) as machine:
        machine.vm.pio.write(RESET_CONTROL, 1, 6)
        machine.vm.pio.write(PM1_CONTROL, 2, SLEEP_S5)
        await machine.pause()
        assert events == [GuestEvent.POWER_OFF]


async def test_a_guest_that_panics_without_end_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once in each life of the guest: the log is no place that a guest may fill."""
    events: list[GuestEvent] = []
    caplog.set_level(logging.WARNING)
    async with running(tmp_path, events) as machine:
        for lives in (1, 2):
            for _ in range(50):
                machine.vm.pio.write(PVPANIC, 1, 1)
                await machine.pause()
            told = [record for record in caplog.records if record.name != "asyncio"]  # which tells of slow hosts
            assert len(told) == len(events) == lives
            await machine.reboot()
    assert events == [GuestEvent.PANIC] * 2


@pytest.mark.parametrize("started", [0, 1])
async def test_a_machine_whose_threads_cannot_start_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: int
) -> None:
    """The host has no thread left: that is an error of ours to report, and nothing stays behind."""
    start = threading.Thread.start
    threads: list[threading.Thread] = []

    def exhausted(self: threading.Thread) -> None:
        if len(threads) == started:
            raise RuntimeError("can't start new thread")
        threads.append(self)
        start(self)

    machine = build(tmp_path, ignore)
    monkeypatch.setattr(threading.Thread, "start", exhausted)
    with pytest.raises(HypervisorError, match=f"vCPU {started}.*can't start new thread"):
        await machine.start()
    await machine.halt()
    await machine.halt()
    assert not any(thread.is_alive() for thread in threads)


async def test_halt_while_rebooting(tmp_path: Path) -> None:
    """Whoever is cancelled in the middle of a reboot leaves a machine that can be ended."""
    machine = build(tmp_path, ignore)
    await machine.start()
    reboot = asyncio.ensure_future(machine.reboot())
    await asyncio.sleep(0)
    reboot.cancel()
    await asyncio.gather(reboot, return_exceptions=True)
    await machine.halt()


class Hung(Device):
    """A device with a request that the host does not answer until `done` is set."""

    def __init__(self) -> None:
        super().__init__("hung")
        self.done = asyncio.Event()
        self.resets = 0

    async def drained(self) -> None:
        await self.done.wait()

    def in_flight(self) -> int:
        return 0 if self.done.is_set() else 1

    def reset(self) -> None:
        self.resets += 1


async def test_a_host_that_hangs_does_not_end_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be paused or rebooted until the host answers, and runs on."""
    monkeypatch.setattr("propolis.machine.DRAIN_TIMEOUT", 0.02)
    async with running(tmp_path, []) as machine:
        hung = Hung()
        machine.devices.append(hung)
        for attempt in (machine.pause, machine.reboot):
            with pytest.raises(PauseError, match=r"hung did not finish its requests within 0\.02 s"):
                await attempt()
            assert all(vcpu.is_parked for vcpu in machine.vcpus)
            await machine.resume()
            assert not any(vcpu.is_parked for vcpu in machine.vcpus)
        assert hung.resets == 0
        hung.done.set()
        await machine.pause()
        await machine.reboot()
        assert hung.resets == 1


async def test_an_event_that_is_not_handled_ends_nothing(tmp_path: Path) -> None:
    """A bug of ours is the loop's to report; the guest is paused and rebooted all the same."""

    def on_event(event: GuestEvent) -> None:
        raise ZeroDivisionError(event)

    reported: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    machine = build(tmp_path, on_event)
    try:
        await machine.start()
        machine.vm.pio.write(RESET_CONTROL, 1, 6)
        await machine.pause()
        machine.vm.pio.write(PM1_CONTROL, 2, SLEEP_S5)
        await machine.reboot()
    finally:
        await machine.halt()
    assert [type(context["exception"]) for context in reported] == [ExceptionGroup] * 2
    reported.clear()


class Stubborn(Device):
    """A device whose end goes wrong."""

    async def halt(self) -> None:
        raise OSError("the host has gone away")


async def test_a_device_that_does_not_halt_keeps_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The others are halted, memory and files let go; the log says who it was."""
    machine = build(tmp_path, ignore)
    machine.devices.append(Stubborn("stubborn"))
    await machine.start()
    await machine.halt()
    assert "device=stubborn" in caplog.text
    assert machine.vm.memory.regions_list() == []


class Slow(Device):
    """A device that ends once another has begun to."""

    def __init__(self, name: str, mine: asyncio.Event, others: asyncio.Event) -> None:
        super().__init__(name)
        self._mine = mine
        self._others = others

    async def halt(self) -> None:
        self._mine.set()
        await self._others.wait()


async def test_devices_halt_at_once(tmp_path: Path) -> None:
    """Ten disks whose storage hangs take no longer than one."""
    machine = build(tmp_path, ignore)
    one, other = asyncio.Event(), asyncio.Event()
    machine.devices += [Slow("one", one, other), Slow("other", other, one)]
    await machine.start()
    async with asyncio.timeout(10):
        await machine.halt()


async def test_disks_that_are_in_memory(tmp_path: Path) -> None:
    """Their contents are what the spec says, and one for cloud-init cannot be written to."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(images.elf())
    spec = Spec(
        name="web",
        cpus=1,
        memory_mib=16,
        boot=DirectBoot(kernel=str(kernel)),
        devices=(
            VirtioBlock(name="blob", backend="blob", pci_path=PciPath(0, 4, 0)),
            VirtioBlock(name="seed", backend="seed", pci_path=PciPath(0, 24, 0)),
        ),
        backends={"blob": BlobBlock(content=b"x" * 1024), "seed": CloudInit(user_data="#cloud-config\n")},
    )
    machine = Machine(spec, LocalKeeper(), ignore, hypervisor="replay")
    try:
        blob, seed = (device.backend for device in machine.devices if isinstance(device, VirtioBlk))
        assert not blob.read_only
        assert seed.read_only
        assert isinstance(blob, FileBackend)
        assert isinstance(seed, FileBackend)
        assert os.pread(blob.fd, 4096, 0) == b"x" * 1024
        assert os.pread(seed.fd, 1 << 20, 0) == nocloud.volume("web", "#cloud-config\n")
    finally:
        await machine.halt()


async def test_what_the_machine_is_called(tmp_path: Path) -> None:
    """In SMBIOS tables that a kernel finds which no firmware has started, again after a reboot."""
    names = SystemNames(manufacturer="Oxide", product_name="OxVM", serial_number="", version=7)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(images.elf())
    spec = Spec(name="machine", cpus=1, memory_mib=16, boot=DirectBoot(kernel=str(kernel)), smbios=names)
    identity = uuid.UUID(int=7)
    machine = Machine(spec, LocalKeeper(), ignore, hypervisor="replay", identity=identity)
    try:
        await machine.start()
        for _ in range(2):
            memory = machine.vm.memory.read(layout.SMBIOS_TABLES.base, layout.SMBIOS_TABLES.size)
            assert memory.startswith(b"_SM3_")
            assert b"Oxide\0OxVM\x007\0\0" in memory
            assert identity.bytes_le in memory
            machine.vm.memory.write(layout.SMBIOS_TABLES.base, bytes(layout.SMBIOS_TABLES.size))
            await machine.reboot()
    finally:
        await machine.halt()


def test_a_host_that_cannot_be_a_hyper_v_says_so(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(images.elf())
    boot = DirectBoot(kernel=str(kernel))
    spec = Spec(name="machine", cpus=1, memory_mib=16, boot=boot, hypervisor_interface="hyper-v")
    with pytest.raises(HypervisorError, match="this host's KVM cannot be a Hyper-V to its guests"):
        Machine(spec, LocalKeeper(), ignore, hypervisor="replay")
