"""A machine that boots firmware: what its guest finds in fw_cfg, by the guest's ports."""

import struct
from pathlib import Path

import pytest

from propolis.errors import ImageError
from propolis.firmware import smbios
from propolis.keeper import LocalKeeper
from propolis.machine import Machine
from propolis.spec import BootOrder, FileBlock, FirmwareBoot, PciPath, Spec, VirtioBlock
from tests.unit.firmware import images

SELECT, DATA = 0x510, 0x511
FILE_DIR, CMDLINE_SIZE = 0x19, 0x14


def build(tmp_path: Path, *, kernel: bytes | None = None, order: BootOrder | None = None) -> Machine:
    (tmp_path / "rom").write_bytes(bytes(8192))
    (tmp_path / "disk").write_bytes(bytes(4096))
    boot = FirmwareBoot(bootrom=str(tmp_path / "rom"))
    if kernel is not None:
        (tmp_path / "kernel").write_bytes(kernel)
        boot = FirmwareBoot(bootrom=boot.bootrom, kernel=str(tmp_path / "kernel"), cmdline="quiet")
    spec = Spec(
        name="machine",
        cpus=2,
        memory_mib=16,
        boot=boot,
        devices=(VirtioBlock(name="disk", backend="disk", pci_path=PciPath(0, 4, 0)),),
        backends={"disk": FileBlock(path=str(tmp_path / "disk"))},
        boot_order=order,
    )
    return Machine(spec, LocalKeeper(), lambda _event: None, hypervisor="replay")


def read(machine: Machine, key: int, length: int) -> bytes:
    machine.vm.pio.write(SELECT, 2, key)
    return bytes(machine.vm.pio.read(DATA, 1) for _ in range(length))


def files(machine: Machine) -> dict[str, bytes]:
    """Every file, by name."""
    (count,) = struct.unpack(">I", read(machine, FILE_DIR, 4))
    directory = read(machine, FILE_DIR, 4 + 64 * count)
    entries = [struct.unpack_from(">IHxx56s", directory, 4 + 64 * index) for index in range(count)]
    return {name.rstrip(b"\0").decode(): read(machine, key, size) for size, key, name in entries}


async def test_files(tmp_path: Path) -> None:
    machine = build(tmp_path, order=BootOrder(devices=("disk",)))
    try:
        found = files(machine)
        assert {"etc/e820", "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"} <= found.keys()
        anchor, tables = found["etc/smbios/smbios-anchor"], found["etc/smbios/smbios-tables"]
        assert anchor == smbios.entry_point(0, tables)
        assert machine.identity.bytes_le in tables
        assert found["bootorder"] == b"/pci@i0cf8/scsi@4,0/disk@0,0\nHALT\0"
        assert read(machine, CMDLINE_SIZE, 4) == bytes(4)
    finally:
        await machine.halt()


async def test_without_an_order_and_with_a_kernel(tmp_path: Path) -> None:
    machine = build(tmp_path, kernel=images.bzimage())
    try:
        assert "bootorder" not in files(machine)
        assert read(machine, CMDLINE_SIZE, 4) == b"\6\0\0\0"
    finally:
        await machine.halt()


async def test_a_reboot_begins_at_the_reset_vector_again(tmp_path: Path) -> None:
    """Nothing is placed for the guest, neither at first nor then."""
    machine = build(tmp_path)
    try:
        await machine.start()
        machine.vm.memory.write(0x7000, b"what the guest has there")
        await machine.reboot()
        assert machine.vm.memory.read(0x7000, 4) == b"what"
        assert machine.vm.memory.read(0xFFFF_FFF0, 16) == bytes(16)
    finally:
        await machine.halt()


def test_a_kernel_that_firmware_could_not_start(tmp_path: Path) -> None:
    """Found when the machine is built; nothing stays open."""
    with pytest.raises(ImageError, match="kernel"):
        build(tmp_path, kernel=images.elf())
