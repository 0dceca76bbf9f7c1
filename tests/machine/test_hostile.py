"""Guests that do one thing without end: the VM stays under control, its log short, its memory what it was."""

import asyncio
import re
import signal
from pathlib import Path

import pytest

from tests.machine import tiny
from tests.machine.guest import SLOWER
from tests.machine.kernels import COM1, RESET_CONTROL, TRIPLE_FAULT, forever, kernel, out8

pytestmark = [pytest.mark.kvm, pytest.mark.program]

RTC, KEYBOARD, A20, DEBUG, PVPANIC = 0x70, 0x64, 0x92, 0x402, 0x505
CONFIG, CONFIG_DATA = 0xCF8, 0xCFC


def _out32(port: int, value: int) -> bytes:
    return b"\x66\xba" + port.to_bytes(2, "little") + b"\xb8" + value.to_bytes(4, "little") + b"\xef"


def _move_bars() -> bytes:
    """BARs of the disk at 0.4.0 to many places, over memory and the interrupt controllers too, decoded and not."""
    code = b""
    for index in range(6):
        for place in (0, 0xFFFF_FFFF, 0x1000, 0xFEC0_0000, 0xFEE0_0000, 0xC000_0000, 0xB001):
            code += _out32(CONFIG, 0x8000_2010 + 4 * index) + _out32(CONFIG_DATA, place)
            for command in (7, 0):
                code += _out32(CONFIG, 0x8000_2004) + _out32(CONFIG_DATA, command)
    return code


def _clock() -> bytes:
    """The fastest periodic interrupt, and each acknowledged at once."""
    return out8(RTC, 10) + out8(RTC + 1, 0x23) + out8(RTC, 11) + out8(RTC + 1, 0x72) + out8(RTC, 12) + b"\xec"


STORMS = {
    "reset": forever(out8(RESET_CONTROL, 6)),
    "reset by the keyboard": forever(out8(KEYBOARD, 0xFE)),
    "triple fault": TRIPLE_FAULT,
    "output": forever(out8(COM1, 0x41)),
    "debug output": forever(out8(DEBUG, 0x41)),
    "panics": forever(out8(PVPANIC, 3)),
    "clock": forever(_clock()),
    "BARs": forever(_move_bars()),
    "all but resets": forever(out8(COM1, 0x42) + out8(DEBUG, 0x43) + out8(PVPANIC, 1) + _clock()),
}
MORE = '[dev.panic]\ndriver = "qemu-pvpanic"\nenable_isa = true\n' + tiny.disk("disk.raw")


def _memory(pid: int) -> int:
    """KiB that only this process has."""
    found = re.search(r"^Pss_Anon:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.parametrize("name", STORMS)
async def test_a_storm_is_weathered(tmp_path: Path, name: str) -> None:
    """The console answers, two signals end the VM soon, and what the guest did cost neither log nor memory."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    async with tiny.guest(tmp_path, kernel(STORMS[name]), more=MORE) as vm:
        assert vm.process is not None
        await asyncio.sleep(1 * SLOWER)  # the storm itself
        before = _memory(vm.process.pid)
        descriptors = _descriptors(vm.process.pid)
        await asyncio.sleep(0.5 * SLOWER)
        _, writer = await asyncio.wait_for(vm.connect(), 5 * SLOWER)
        writer.close()
        await writer.wait_closed()
        assert _memory(vm.process.pid) < before + 6 * 1024
        vm.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)  # or both would be one
        assert _descriptors(vm.process.pid) <= descriptors + 1
        vm.process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(vm.process.wait(), 5 * SLOWER)
        assert status == 128 + signal.SIGTERM
    assert len(tiny.log(vm).splitlines()) <= 1, tiny.log(vm)[:2000]
