"""The hypervisor interfaces as guests find them, and the clock that Linux chooses then."""

import re
import time
from pathlib import Path

import pytest

from tests.machine import kernels, tiny
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


async def test_hyper_v(tmp_path: Path) -> None:
    """By name, and by an MSR that only it has: a guest without it would triple-fault there."""
    vp_index = b"\xb9\x02\x00\x00\x40\x0f\x32"  # mov ecx, 0x40000002; rdmsr
    image = kernels.kernel(
        kernels.say("[")
        + kernels.cpuid(0x4000_0000)
        + kernels.say_registers()
        + kernels.say("]")
        + vp_index
        + kernels.say("has MSRs")
        + kernels.forever(kernels.on_input(kernels.power_off()))
    )
    async with tiny.guest(tmp_path, image, main='hypervisor_interface = "hyper-v"') as vm:
        match, _ = await vm.expect(r"(?s)\[(.*)\]has MSRs", 20, "the hypervisor's name")
        await vm.send("x")
        assert await vm.exit_status() == 0
    assert match[1] == "Microsoft Hv"
