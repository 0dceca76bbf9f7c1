"""The clock's own interrupts in a guest, which an operating system with an alarm to set never asks for."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from propolis.devices.rtc import MIB, RealTimeClock
from tests import rig
from tests.machine import pic
from tests.machine.guest import SLOWER

pytestmark = pytest.mark.kvm

IRQ = 8
FLAGS = 0x5040
PERIODIC, UPDATE, ANY = 0x40, 0x10, 0x80
# Register C, which acknowledges: its flags are gathered at FLAGS.
_ACKNOWLEDGE = "b0 0c e6 70 e4 71 08 06 40 50"


def put(index: int, value: int) -> str:
    """Writes one of its registers."""
    return f"b0 {index:02x} e6 70 b0 {value:02x} e6 71 "


@asynccontextmanager
async def clock(kvm_fd: int, setup: str) -> AsyncIterator[rig.OnKvm]:
    """A guest with a clock that interrupts it."""
    machine = pic.guest(kvm_fd, setup, {IRQ: _ACKNOWLEDGE})
    with machine:
        rtc = RealTimeClock(machine.vm, MIB, 0)
        rtc.start(asyncio.get_running_loop())
        try:
            yield pic.start(machine)
        finally:
            await rtc.halt()


async def interrupts(machine: rig.OnKvm, number: int) -> float:
    """Waits for so many more; how long it took."""
    start, target = time.monotonic(), pic.count(machine, IRQ) + number
    async with asyncio.timeout(20 * SLOWER):
        while pic.count(machine, IRQ) < target:  # noqa: ASYNC110 - a byte in the guest's memory: nothing announces it
            await asyncio.sleep(0.001)
    return time.monotonic() - start


def flags(machine: rig.OnKvm) -> int:
    return machine.vm.memory.read(FLAGS, 1)[0]


@pytest.mark.parametrize(("rate", "period"), [(0xD, 0.125), (0x9, 1 / 128)])
async def test_periodic_interrupts(kvm_fd: int, rate: int, period: float) -> None:
    """One in each period and no more, also where the host is late."""
    async with clock(kvm_fd, put(10, 0x20 | rate) + put(11, 0x42)) as machine:
        await interrupts(machine, 1)
        assert await interrupts(machine, 5) > 4 * period
        assert flags(machine) & (ANY | PERIODIC) == ANY | PERIODIC


async def test_update_interrupts(kvm_fd: int) -> None:
    """One when a second begins."""
    async with clock(kvm_fd, put(11, 0x12)) as machine:
        await interrupts(machine, 1)
        assert await interrupts(machine, 2) > 1
        assert flags(machine) & (ANY | UPDATE) == ANY | UPDATE


async def test_no_interrupt_without_leave(kvm_fd: int) -> None:
    """The flags rise all the same, and nobody is told."""
    async with clock(kvm_fd, put(10, 0x29) + put(11, 0x02)) as machine:
        await asyncio.sleep(0.1)
        assert pic.count(machine, IRQ) == 0
        machine.vm.pio.write(0x70, 1, 12)
        assert machine.vm.pio.read(0x71, 1) & (ANY | PERIODIC) == PERIODIC
