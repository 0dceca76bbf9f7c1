"""fw_cfg: what firmware asks the VMM for: processors, memory, tables, boot order, and a kernel to start.

QEMU's specification "Firmware Configuration Device". Everything is added while the machine is built; files appear in
the directory in the order in which they were added.
"""

import struct
from typing import TYPE_CHECKING

from propolis.devices._fw_cfg import DmaPort, Selector, SelectorPort
from propolis.devices.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO

    from propolis._vmm import Vm

SELECTOR_PORT, DMA_PORT = 0x510, 0x514

SIGNATURE = 0x00
ID = 0x01
UUID = 0x02
RAM_SIZE = 0x03
NB_CPUS = 0x05
KERNEL_SIZE = 0x08
INITRD_SIZE = 0x0B
MAX_CPUS = 0x0F
KERNEL_DATA = 0x11
INITRD_DATA = 0x12
CMDLINE_SIZE = 0x14
CMDLINE_DATA = 0x15
SETUP_SIZE = 0x17
SETUP_DATA = 0x18
FILE_DIR = 0x19
FILE_FIRST = 0x20

_TRADITIONAL, _DMA = 1, 2
_ENTRY = struct.Struct(">IHxx56s")
MAX_FILE_NAME = 55


class FirmwareConfig(Device):
    """The device at 0x510. `publish` once, after the last file."""

    def __init__(self, vm: "Vm") -> None:
        super().__init__("fw_cfg")
        self._selector = Selector(vm, vm.mailbox.register(self._on_written))
        self._directory: list[tuple[str, int]] = []
        self._on_write: dict[int, Callable[[bytes], None]] = {}
        self.add(SIGNATURE, b"QEMU")
        self.add(ID, struct.pack("<I", _TRADITIONAL | _DMA))
        vm.pio.add(SelectorPort(self._selector), SELECTOR_PORT, 2)
        vm.pio.add(DmaPort(self._selector), DMA_PORT, 8)

    def add(self, key: int, content: bytes) -> None:
        """An item that has a key of its own instead of a name."""
        self._selector.add(key, content)

    def add_open_file(self, key: int, file: "FileIO", start: int, size: int) -> None:
        """An item that is read from a file when the guest asks for it; the file stays open with this device."""
        self._selector.add_file(key, file, start, size)

    def add_file(self, name: str, content: bytes) -> None:
        """A file that the guest finds by its name."""
        self._selector.add(self._list(name, len(content)), content)

    def add_writable_file(self, name: str, size: int, on_write: "Callable[[bytes], None]") -> None:
        """A file of zeros that the guest writes; `on_write` then has all of it, on the loop thread.

        What the guest writes in quick succession may arrive as one. After a reset the file is zeros again.
        """
        key = self._list(name, size)
        self._selector.add(key, bytes(size), writable=True)
        self._on_write[key] = on_write

    def publish(self) -> None:
        """Makes the directory: before this no file is found."""
        entries = b"".join(
            _ENTRY.pack(size, FILE_FIRST + index, name.encode()) for index, (name, size) in enumerate(self._directory)
        )
        self.add(FILE_DIR, struct.pack(">I", len(self._directory)) + entries)

    def _list(self, name: str, size: int) -> int:
        assert len(name.encode()) <= MAX_FILE_NAME
        assert name not in (other for other, _ in self._directory)
        self._directory.append((name, size))
        return FILE_FIRST + len(self._directory) - 1

    def _on_written(self, _bits: int) -> None:
        for key, content in self._selector.take_written():
            self._on_write[key](content)

    def reset(self) -> None:
        self._selector.reset()
