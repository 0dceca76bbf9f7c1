"""Debian's stock cloud kernel from power-on to power-off."""

from pathlib import Path

import pytest

from tests.machine.linux import linux

pytestmark = [pytest.mark.os, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("kernel", "cpus"), [("vmlinux", 1), ("vmlinux", 4), ("vmlinuz", 1)])
async def test_boot_to_a_shell_and_power_off(tmp_path: Path, kernel: str, cpus: int) -> None:
    """A shell, the processors asked for, and exit status 0 after power-off."""
    async with linux(tmp_path, kernel=kernel, cpus=cpus) as vm:
        await vm.boot()
        await vm.login()
        assert (await vm.run("nproc")).check().strip() == str(cpus)
        assert await vm.poweroff() == 0


async def test_the_power_button_shuts_down(tmp_path: Path) -> None:
    """SIGTERM presses it; the guest's acpid powers off."""
    async with linux(tmp_path) as vm:
        await vm.boot()
        await vm.login()
        assert await vm.press_power_button() == 0
        assert "guest: going down" in vm.transcript


async def test_the_disk_survives_a_reboot(tmp_path: Path) -> None:
    """What was written and synced before the reboot is read back after it, with the same checksum."""
    async with linux(tmp_path) as vm:
        await vm.boot()
        await vm.login()
        await vm.run("head -c 4000000 /dev/urandom > /root/data && sync")
        before = (await vm.run("sha256sum /root/data")).check()
        await vm.reboot()
        await vm.login()
        assert (await vm.run("sha256sum /root/data")).check() == before
        assert await vm.poweroff() == 0
