"""The script for firmware, executed as firmware does: the tables it leaves are those of direct boot, elsewhere."""

import struct

import pytest

from propolis.firmware import acpi, layout, table_loader
from propolis.firmware.board import Board

GIB = layout.GIB
PLACES = {table_loader.TABLES: 0x0F77_8000, table_loader.RSDP: 0x0F77_D014}


def board(cpus: int = 3) -> Board:
    return Board(cpus=cpus, windows=layout.firmware_windows(GIB, 40), uarts=(1, 2), pvpanic=True)


def execute(files: dict[str, bytes]) -> dict[str, bytearray]:
    """The files after every command of the script, in its order."""
    there: dict[str, bytearray] = {}
    script = files[table_loader.SCRIPT]
    assert len(script) % 128 == 0
    for at in range(0, len(script), 128):
        command = script[at : at + 128]
        (number,) = struct.unpack_from("<I", command)
        name = _name(command, 4)
        if number == 1:
            alignment, zone = struct.unpack_from("<IB", command, 60)
            assert (alignment & (alignment - 1), zone in (1, 2)) == (0, True)
            assert name not in there
            there[name] = bytearray(files[name])
        elif number == 2:
            pointee = _name(command, 60)
            offset, size = struct.unpack_from("<IB", command, 116)
            value = int.from_bytes(there[name][offset : offset + size], "little")
            assert value < len(there[pointee])
            there[name][offset : offset + size] = (value + PLACES[pointee]).to_bytes(size, "little")
        else:
            assert number == 3
            offset, start, length = struct.unpack_from("<III", command, 60)
            assert there[name][offset] == 0
            there[name][offset] = -sum(there[name][start : start + length]) & 0xFF
    return there


def _name(command: bytes, at: int) -> str:
    return command[at : at + 56].rstrip(b"\0").decode()


@pytest.mark.parametrize("cpus", [1, 3, 64])
def test_linked_tables(cpus: int) -> None:
    there = execute(table_loader.build(board(cpus)))
    base = PLACES[table_loader.TABLES]
    tables = there[table_loader.TABLES]

    def at(address: int) -> bytes:
        offset = address - base
        (length,) = struct.unpack_from("<I", tables, offset + 4)
        return bytes(tables[offset : offset + length])

    rsdp = there[table_loader.RSDP]
    assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF) == (0, 0)
    (xsdt_at,) = struct.unpack_from("<Q", rsdp, acpi.RSDP_XSDT)
    xsdt = at(xsdt_at)
    entries = struct.unpack_from("<2Q", xsdt, acpi.XSDT_ENTRIES)
    assert xsdt == acpi.xsdt(entries)
    fadt = at(entries[0])
    (facs_at, dsdt_at) = struct.unpack_from("<II", fadt, acpi.FADT_FIRMWARE_CTRL)
    assert fadt == acpi.fadt(facs_at, dsdt_at, keyboard=False)
    assert at(dsdt_at) == acpi.dsdt(board(cpus))
    assert at(entries[1]) == acpi.madt(board(cpus))
    assert facs_at % 64 == 0
    assert at(facs_at) == acpi.facs()


def test_an_os_is_told_of_all_that_firmware_may_have_given_away() -> None:
    """Firmware's 32-bit window begins where RAM ends; the range kept for ECAM is then part of it."""
    low, high = layout.firmware_windows(256 * layout.MIB, 40).mmio32, layout.firmware_windows(5 * GIB, 40).mmio64
    assert (low.base, low.end) == (256 * layout.MIB, layout.IOAPIC.base)
    assert (high.base, high.end) == (6 * GIB, 1 << 40)
    reserved = bytes.fromhex("86 09 00 01") + struct.pack("<II", layout.ECAM.base, layout.ECAM.size)
    assert reserved not in acpi.dsdt(board())
    assert reserved in acpi.dsdt(Board(cpus=1, windows=layout.device_windows(GIB, 40)))
