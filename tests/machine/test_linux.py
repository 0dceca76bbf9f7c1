"""Debian's stock cloud kernel from power-on to power-off: the quick start, reboots, the power button, its disk."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.machine.complaints import check_complaints
from tests.machine.daemon_guest import daemon_linux
from tests.machine.guest import Guest
from tests.machine.linux import TIMEOUT, linux

pytestmark = [pytest.mark.os, pytest.mark.timeout(TIMEOUT)]

MIB = 1 << 20


async def test_the_quick_start_with_interrupt_lines(tmp_path: Path) -> None:
    """As the README has it, with Debian's image as it is: the daemon, propolis-cli and curl.

    Without MSI the guest's disk interrupts through PIRQ, link device and I/O APIC.
    """
    async with daemon_linux(tmp_path, kernel="vmlinuz", cmdline="console=ttyS0 quiet pci=nomsi") as vm:
        await vm.boot()
        await vm.becomes("Running")
        await vm.login()
        assert (await vm.run("nproc")).check().strip() == "1"
        await vm.run("dd if=/dev/urandom of=/root/data bs=64k count=16 conv=fsync && echo 3 >/proc/sys/vm/drop_caches")
        (await vm.run("sha256sum /root/data")).check()
        line = (await vm.run("grep virtio /proc/interrupts")).check()
        found = re.fullmatch(r" *(\d+): +(\d+) +IO-APIC +(\d+)-fasteoi +virtio0\n", line)
        assert found, line
        assert found[1] == found[3]
        assert int(found[1]) in (5, 10, 11)
        assert int(found[2]) > 20
        assert "DisINTx-" in (await vm.run("lspci -vv -s 4.0 2>/dev/null")).check()
        await check_complaints(vm)
        assert await vm.poweroff() == 0
        assert json.loads(await vm.curl("/instances/linux"))["instance"]["state"] == "Stopped"
        history = json.loads(await vm.curl("/instances/linux/serial/history?from_start=0"))
        assert b"login: " in bytes(history["data"])
        await vm.curl("/instances/linux", "-X", "DELETE")
        assert json.loads(await vm.curl("/instances"))["instances"] == []


async def test_reboots_and_the_power_button(tmp_path: Path, rounds: int) -> None:
    """What was synced before is read back after each reboot; the VMM keeps its size; SIGTERM presses the button."""
    async with linux(tmp_path) as vm:
        await vm.boot()
        await vm.login()
        await vm.run("head -c 2000000 /dev/urandom > /root/data && sync")
        written = (await vm.run("sha256sum /root/data")).check()
        sizes = []
        for _ in range(rounds):
            await vm.reboot()
            await vm.login()
            assert (await vm.run("sha256sum /root/data")).check() == written
            sizes.append(resources(vm))
        descriptors, threads, memory = zip(*sizes, strict=True)
        assert len(set(descriptors)) == 1, sizes
        assert len(set(threads)) == 1, sizes
        assert max(memory) - memory[0] < 2 * MIB, sizes
        await check_complaints(vm)
        assert await vm.press_power_button() == 0
        assert "guest: going down" in vm.transcript


def resources(vm: Guest) -> tuple[int, int, int]:
    """Descriptors, threads, and the VMM's memory beside the guest's: PSS of all mappings below 16 MiB."""
    assert vm.process is not None
    process = Path(f"/proc/{vm.process.pid}")
    memory = 0
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", (process / "smaps").read_text(), flags=re.MULTILINE)[1:]:
        numbers = {name: int(kib) << 10 for name, kib in re.findall(r"^(Size|Pss): +(\d+) kB", mapping, re.MULTILINE)}
        if numbers["Size"] < 16 * MIB:
            memory += numbers["Pss"]
    return len(os.listdir(process / "fd")), len(os.listdir(process / "task")), memory
