"""The bootrom's place, and what firmware is offered."""

import struct
from pathlib import Path

import pytest

from propolis import offer
from propolis._memory import GuestMemory
from propolis.devices import fw_cfg
from propolis.devices.fw_cfg import FirmwareConfig
from propolis.errors import ImageError
from propolis.firmware import bootrom, layout
from propolis.firmware.board import Board
from propolis.hypervisor._replay import ReplayVm
from tests.unit.firmware import images

MIB = layout.MIB


def load(tmp_path: Path, content: bytes) -> GuestMemory:
    path = tmp_path / "OVMF.fd"
    path.write_bytes(content)
    memory = GuestMemory()
    with open(path, "rb", buffering=0) as file:
        bootrom.load(memory, file)
    return memory


@pytest.mark.parametrize("size", [4096, 3653632, 16 * MIB])
def test_its_last_byte_is_the_last_below_4_gib(tmp_path: Path, size: int) -> None:
    memory = load(tmp_path, bytes(size - 16) + b"sixteen bytes...")
    assert memory.read(0xFFFF_FFF0, 16) == b"sixteen bytes..."
    assert [region[:4] for region in memory.regions_list()] == [((1 << 32) - size, size, "anonymous", True)]


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (0, "size: the file is empty"),
        (4097, "size: 4097 bytes, expected whole pages of 4 KiB and at most 16 MiB"),
        (16 * MIB + 4096, "expected whole pages of 4 KiB and at most 16 MiB"),
    ],
)
def test_what_cannot_be_one(tmp_path: Path, size: int, problem: str) -> None:
    with pytest.raises(ImageError, match=f"bootrom '.*OVMF.fd': .*{problem}"):
        load(tmp_path, bytes(size))


def _read(vm: ReplayVm, key: int, length: int) -> bytes:
    vm.pio.write(0x510, 2, key)
    return bytes(vm.pio.read(0x511, 1) for _ in range(length))


def test_what_the_machine_is() -> None:
    vm = ReplayVm()
    config = FirmwareConfig(vm)
    board = Board(cpus=3, windows=layout.firmware_windows(4096 * MIB, 40))
    offer.offer_machine(config, 4096 * MIB, board)
    config.publish()
    assert _read(vm, fw_cfg.NB_CPUS, 2) == _read(vm, fw_cfg.MAX_CPUS, 2) == b"\3\0"
    assert _read(vm, fw_cfg.RAM_SIZE, 8) == struct.pack("<Q", 4096 * MIB)
    assert _read(vm, fw_cfg.FILE_FIRST, 40) == struct.pack("<QQIQQI", 0, 3072 * MIB, 1, 1 << 32, 1024 * MIB, 1)
    directory = _read(vm, fw_cfg.FILE_DIR, 4 + 64 * 4)
    names = [directory[4 + 64 * n + 8 : 68 + 64 * n].rstrip(b"\0").decode() for n in range(4)]
    assert names == ["etc/e820", "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"]


def test_a_kernel_is_offered_in_its_two_parts(tmp_path: Path) -> None:
    image = images.bzimage()
    (tmp_path / "kernel").write_bytes(image)
    (tmp_path / "initrd").write_bytes(b"initrd")
    vm = ReplayVm()
    config = FirmwareConfig(vm)
    with open(tmp_path / "kernel", "rb", buffering=0) as kernel, open(tmp_path / "initrd", "rb", buffering=0) as initrd:
        offer.offer_kernel(config, kernel, initrd, "console=ttyS0")
        (setup,) = struct.unpack("<I", _read(vm, fw_cfg.SETUP_SIZE, 4))
        (size,) = struct.unpack("<I", _read(vm, fw_cfg.KERNEL_SIZE, 4))
        assert (setup, setup + size) == ((image[0x1F1] + 1) * 512, len(image))
        assert _read(vm, fw_cfg.SETUP_DATA, setup) + _read(vm, fw_cfg.KERNEL_DATA, size) == image
        assert _read(vm, fw_cfg.INITRD_SIZE, 4) == b"\6\0\0\0"
        assert _read(vm, fw_cfg.INITRD_DATA, 7) == b"initrd\0"
        assert _read(vm, fw_cfg.CMDLINE_SIZE, 4) == b"\x0e\0\0\0"
        assert _read(vm, fw_cfg.CMDLINE_DATA, 15) == b"console=ttyS0\0\0"


def test_only_a_bzimage_is_offered(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(images.elf())
    with open(tmp_path / "kernel", "rb", buffering=0) as kernel, pytest.raises(ImageError, match="boot_flag"):
        offer.offer_kernel(FirmwareConfig(ReplayVm()), kernel, None, "")
