"""The memory map an x86 firmware reports (ACPI 6.5 §15, "System Address Map Interfaces")."""

import struct

from msgspec import Struct

from propolis.firmware import layout

RAM = 1
RESERVED = 2

_RECORD = struct.Struct("<QQI")


class E820Entry(Struct, frozen=True):
    base: int
    length: int
    type: int


def build(memory_size: int) -> tuple[E820Entry, ...]:
    """The map for `memory_size` bytes of RAM, sorted and without overlaps.

    Of the RAM below 1 MiB only the part under the EBDA is offered: the rest is shadowed by legacy ranges in the mind
    of every OS, and its last segment holds the ACPI tables.
    """
    low, *high = layout.ram_ranges(memory_size)
    entries = [
        E820Entry(0, layout.EBDA.base, RAM),
        _reserved(layout.EBDA),
        _reserved(layout.BIOS_SEGMENT),
        E820Entry(layout.KERNEL_MIN, low.end - layout.KERNEL_MIN, RAM),
        _reserved(layout.ECAM),
        _reserved(layout.IOAPIC),
        _reserved(layout.LAPIC),
        *(E820Entry(part.base, part.size, RAM) for part in high),
    ]
    return tuple(entry for entry in entries if entry.length)


def encode(entries: tuple[E820Entry, ...]) -> bytes:
    """The 20-byte records of the zero page and of fw_cfg's `etc/e820`."""
    return b"".join(_RECORD.pack(entry.base, entry.length, entry.type) for entry in entries)


def _reserved(part: layout.Range) -> E820Entry:
    return E820Entry(part.base, part.size, RESERVED)
