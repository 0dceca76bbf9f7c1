"""The hypervisor interfaces as Linux finds them, and the clock it chooses then."""

import re
import time
from pathlib import Path

import pytest

from tests.machine.clocks import check_clocks, clocksource
from tests.machine.complaints import check_complaints
from tests.machine.linux import TIMEOUT, linux

pytestmark = [pytest.mark.os, pytest.mark.timeout(TIMEOUT)]

HYPERVISOR = "grep -c '^flags.* hypervisor' /proc/cpuinfo; dmesg | grep -c 'Hypervisor detected'"


async def test_no_interface_and_memory_above_4_gib(tmp_path: Path) -> None:
    """The guest takes this for hardware; its memory goes round the hole below 4 GiB."""
    async with linux(tmp_path, memory_mib=4096, main='hypervisor_interface = "none"') as vm:
        await vm.boot()
        await vm.login()
        assert (await vm.run(HYPERVISOR)).output.split() == ["0", "0"]
        assert await clocksource(vm) in ("tsc", "acpi_pm")
        await check_clocks(vm, time.time)
        total = re.search(r"MemTotal: +(\d+) kB", (await vm.run("cat /proc/meminfo")).check())
        assert total
        assert 3800 << 10 < int(total[1]) <= 4096 << 10
        usable = re.findall(
            r"\[mem (0x\w+)-(0x\w+)\] usable\n", (await vm.run("dmesg | grep BIOS-e820.*usable")).check()
        )
        assert [(int(first, 0), int(last, 0) + 1) for first, last in usable] == [
            (0, 0x9FC00),
            (1 << 20, 3 << 30),
            (4 << 30, 5 << 30),
        ]
        await check_complaints(vm)
        assert await vm.poweroff() == 0


async def test_bhyve_interface(tmp_path: Path) -> None:
    """A hypervisor, but none whose clock this Linux knows."""
    async with linux(tmp_path, cpus=2, main='hypervisor_interface = "bhyve"') as vm:
        await vm.boot()
        await vm.login()
        assert (await vm.run("nproc")).check().strip() == "2"
        assert (await vm.run(HYPERVISOR)).output.split() == ["2", "0"]
        assert await clocksource(vm) in ("tsc", "acpi_pm")
        await check_clocks(vm, time.time)
        await check_complaints(vm)
        assert await vm.poweroff() == 0
