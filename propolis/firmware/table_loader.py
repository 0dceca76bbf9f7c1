"""ACPI tables as firmware takes them from fw_cfg: their contents, and a script that says how to link them.

QEMU's format, which OVMF and SeaBIOS execute: allocate a file in guest memory, add a file's address to the pointers
into it, make the checksums right. Pointers hold offsets until then, and checksums 0.
"""

import struct

from propolis.firmware import acpi, layout
from propolis.firmware.board import Board

TABLES = "etc/acpi/tables"
RSDP = "etc/acpi/rsdp"
SCRIPT = "etc/table-loader"

_ALLOCATE, _ADD_POINTER, _ADD_CHECKSUM = 1, 2, 3
_HIGH, _FSEG = 1, 2  # zones: anywhere, and where a scan for the RSDP looks
_COMMAND_SIZE = 128
_ALIGNMENT = 64


class _Blob:
    """Tables one after the other, with what is to be done to them."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.commands: list[bytes] = []

    def put(self, table: bytes, *pointers: tuple[int, int]) -> int:
        """Returns the table's offset. `pointers` are offsets in it and sizes of fields that point into the blob."""
        offset = layout.align_up(len(self.content), _ALIGNMENT)
        self.content += bytes(offset - len(self.content)) + table
        self.commands += [_add_pointer(TABLES, TABLES, offset + field, size) for field, size in pointers]
        return offset

    def put_with_checksum(self, table: bytes, *pointers: tuple[int, int]) -> int:
        offset = self.put(table, *pointers)
        self.content[offset + acpi.CHECKSUM_OFFSET] = 0
        self.commands.append(_add_checksum(TABLES, offset + acpi.CHECKSUM_OFFSET, offset, len(table)))
        return offset


def build(board: Board) -> dict[str, bytes]:
    """The three files, by name."""
    blob = _Blob()
    facs = blob.put(acpi.facs())
    dsdt = blob.put_with_checksum(acpi.dsdt(board))
    madt = blob.put_with_checksum(acpi.madt(board))
    fadt = blob.put_with_checksum(
        acpi.fadt(facs, dsdt, keyboard=board.keyboard),
        (acpi.FADT_FIRMWARE_CTRL, 4),
        (acpi.FADT_DSDT, 4),
        (acpi.FADT_X_DSDT, 8),
    )
    entries = (fadt, madt)
    xsdt = blob.put_with_checksum(
        acpi.xsdt(entries), *((acpi.XSDT_ENTRIES + 8 * index, 8) for index in range(len(entries)))
    )
    rsdp = bytearray(acpi.rsdp(xsdt))
    rsdp[acpi.RSDP_CHECKSUM] = rsdp[acpi.RSDP_EXTENDED_CHECKSUM] = 0
    script = [
        _allocate(TABLES, _ALIGNMENT, _HIGH),
        _allocate(RSDP, 16, _FSEG),
        *blob.commands,
        _add_pointer(RSDP, TABLES, acpi.RSDP_XSDT, 8),
        _add_checksum(RSDP, acpi.RSDP_CHECKSUM, 0, 20),
        _add_checksum(RSDP, acpi.RSDP_EXTENDED_CHECKSUM, 0, len(rsdp)),
    ]
    return {TABLES: bytes(blob.content), RSDP: bytes(rsdp), SCRIPT: b"".join(script)}


def _allocate(file: str, alignment: int, zone: int) -> bytes:
    return _command(struct.pack("<I56sIB", _ALLOCATE, file.encode(), alignment, zone))


def _add_pointer(file: str, pointee: str, offset: int, size: int) -> bytes:
    """Adds the address of `pointee` to the little-endian field of `size` bytes."""
    return _command(struct.pack("<I56s56sIB", _ADD_POINTER, file.encode(), pointee.encode(), offset, size))


def _add_checksum(file: str, offset: int, start: int, length: int) -> bytes:
    return _command(struct.pack("<I56sIII", _ADD_CHECKSUM, file.encode(), offset, start, length))


def _command(content: bytes) -> bytes:
    return content.ljust(_COMMAND_SIZE, b"\0")
