"""Debian's OVMF as the bootrom: it starts the kernel that it is offered, and what it hands over is what Linux wants."""

from pathlib import Path

import pytest

from tests.machine.complaints import check_complaints
from tests.machine.guest import SLOWER
from tests.machine.linux import TIMEOUT, linux

pytestmark = [pytest.mark.os, pytest.mark.timeout(TIMEOUT)]

OVMF = Path("/usr/share/OVMF")
FIRMWARE = 60 * SLOWER  # seconds


BOOTROM = f"""\
bootrom = "{OVMF}/OVMF_CODE_4M.fd"
nvram = "vm.nvram"
nvram_template = "{OVMF}/OVMF_VARS_4M.fd"
"""


async def test_a_kernel_by_fw_cfg(tmp_path: Path) -> None:
    """BARs and interrupts are as the firmware assigned them, the tables as it linked them; its variables last."""
    async with linux(tmp_path, kernel="vmlinuz", main=BOOTROM) as vm:
        await vm.boot(FIRMWARE)
        await vm.login()
        assert (await vm.run("cat /sys/firmware/efi/fw_platform_size")).check() == "64\n"
        await check_complaints(vm)
        assert await vm.poweroff() == 0
    kept, template = (path.read_bytes() for path in (tmp_path / "vm.nvram", OVMF / "OVMF_VARS_4M.fd"))
    assert len(kept) == len(template)
    assert "BootOrder".encode("utf-16-le") in kept
    assert "BootOrder".encode("utf-16-le") not in template


async def test_four_processors_and_a_reboot(tmp_path: Path, rounds: int) -> None:
    if rounds <= 2:
        pytest.skip("five minutes in the lab: part of make soak")
    async with linux(tmp_path, kernel="vmlinuz", cpus=4, main=BOOTROM) as vm:
        await vm.boot(FIRMWARE)
        await vm.login()
        assert (await vm.run("nproc")).check() == "4\n"
        await vm.run("head -c 1000000 /dev/urandom > /root/data && sync")
        written = (await vm.run("sha256sum /root/data")).check()
        await check_complaints(vm)
        await vm.reboot(FIRMWARE)
        await vm.login()
        assert (await vm.run("sha256sum /root/data")).check() == written
        assert await vm.poweroff() == 0
