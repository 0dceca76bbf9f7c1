"""What the VMM has for firmware: the items of fw_cfg."""

import struct
from io import FileIO

from propolis.devices import fw_cfg
from propolis.firmware import e820, linux, smbios, table_loader
from propolis.firmware.board import Board
from propolis.firmware.image import ImageFile
from propolis.firmware.layout import ram_ranges


def offer_machine(config: fw_cfg.FirmwareConfig, memory_size: int, board: Board) -> None:
    """Processors, memory and ACPI tables."""
    for key in (fw_cfg.NB_CPUS, fw_cfg.MAX_CPUS):
        config.add(key, struct.pack("<H", board.cpus))
    config.add(fw_cfg.RAM_SIZE, struct.pack("<Q", memory_size))
    ram = tuple(e820.E820Entry(part.base, part.size, e820.RAM) for part in ram_ranges(memory_size))
    config.add_file("etc/e820", e820.encode(ram))
    for name, content in table_loader.build(board).items():
        config.add_file(name, content)


def offer_smbios(config: fw_cfg.FirmwareConfig, system: smbios.System) -> None:
    """SMBIOS tables, which firmware puts into memory."""
    content = smbios.tables(system)
    config.add_file("etc/smbios/smbios-anchor", smbios.entry_point(0, content))
    config.add_file("etc/smbios/smbios-tables", content)


def offer_kernel(config: fw_cfg.FirmwareConfig, kernel: FileIO, initrd: FileIO | None, cmdline: str) -> None:
    """A bzImage for firmware to start. Raises ImageError."""
    image = ImageFile("kernel", kernel)
    setup = linux.setup_size(image)
    size = image.size - setup
    for key, content in ((fw_cfg.SETUP_SIZE, setup), (fw_cfg.KERNEL_SIZE, size)):
        config.add(key, struct.pack("<I", content))
    config.add_open_file(fw_cfg.SETUP_DATA, kernel, 0, setup)
    config.add_open_file(fw_cfg.KERNEL_DATA, kernel, setup, size)
    if initrd is not None:
        size = ImageFile("initrd", initrd).size
        config.add(fw_cfg.INITRD_SIZE, struct.pack("<I", size))
        config.add_open_file(fw_cfg.INITRD_DATA, initrd, 0, size)
    line = cmdline.encode() + b"\0"
    config.add(fw_cfg.CMDLINE_SIZE, struct.pack("<I", len(line)))
    config.add(fw_cfg.CMDLINE_DATA, line)
