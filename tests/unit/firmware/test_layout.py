"""The guest-physical layout and the memory map made from it."""

import itertools
import struct

import pytest

from propolis.errors import ConfigError
from propolis.firmware import e820, layout
from propolis.firmware.layout import GIB, MIB, Range

SIZES = [1 * MIB, 2 * MIB, 128 * MIB, 3 * GIB - 4096, 3 * GIB, 3 * GIB + 4096, 16 * GIB, 900 * GIB]


def test_ram_is_split_at_3_gib() -> None:
    assert layout.ram_ranges(128 * MIB) == (Range(0, 128 * MIB),)
    assert layout.ram_ranges(3 * GIB) == (Range(0, 3 * GIB),)
    assert layout.ram_ranges(16 * GIB) == (Range(0, 3 * GIB), Range(4 * GIB, 13 * GIB))


@pytest.mark.parametrize("size", [0, -4096, 1 * MIB - 4096, 128 * MIB + 1])
def test_odd_memory_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="memory"):
        layout.ram_ranges(size)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_overlaps(size: int) -> None:
    ranges = [
        *layout.ram_ranges(size),
        layout.MMIO32,
        layout.ECAM,
        layout.IOAPIC,
        layout.LAPIC,
        layout.mmio64_window(size, 46),
    ]
    ranges.sort(key=lambda part: part.base)
    for before, after in itertools.pairwise(ranges):
        assert before.end <= after.base


def test_boot_structures_do_not_overlap() -> None:
    page = layout.PAGE_SIZE
    ranges = [
        Range(0x1000, layout.BOOT_STACK_TOP - 0x1000),
        Range(layout.GDT, page),
        Range(layout.ZERO_PAGE, page),
        Range(layout.PVH_START_INFO, page),
        Range(layout.PML4, page),
        Range(layout.PDPT, page),
        Range(layout.PAGE_DIRECTORIES, 4 * page),
        layout.CMDLINE,
        layout.EBDA,
        layout.ACPI_TABLES,
        layout.SMBIOS_TABLES,
    ]
    for before, after in itertools.pairwise(ranges):
        assert before.end <= after.base
    assert ranges[-1].end <= layout.KERNEL_MIN


@pytest.mark.parametrize("phys_bits", range(36, 53))
@pytest.mark.parametrize("size", [128 * MIB, 16 * GIB, 48 * GIB])
def test_64_bit_window_stays_within_the_address_width(size: int, phys_bits: int) -> None:
    window = layout.mmio64_window(size, phys_bits)
    assert window.base >= max(layout.ram_ranges(size)[-1].end, 4 * GIB)
    assert window.base % GIB == 0
    assert window.size >= GIB
    assert window.end <= 1 << phys_bits


def test_64_bit_window_avoids_the_hypertransport_range() -> None:
    window = layout.mmio64_window(900 * GIB, 48)
    assert window.end == layout.HYPERTRANSPORT.base


@pytest.mark.parametrize(("size", "phys_bits"), [(128 * GIB, 36), (512 * GIB, 39), (128 * MIB, 35), (128 * MIB, 64)])
def test_64_bit_window_without_room_is_refused(size: int, phys_bits: int) -> None:
    with pytest.raises(ConfigError):
        layout.mmio64_window(size, phys_bits)


@pytest.mark.parametrize("size", SIZES)
def test_e820_is_sorted_and_covers_the_ram(size: int) -> None:
    entries = e820.build(size)
    for before, after in itertools.pairwise(entries):
        assert before.base + before.length <= after.base
    usable = sum(entry.length for entry in entries if entry.type == e820.RAM)
    assert usable == size - (layout.KERNEL_MIN - layout.EBDA.base)
    for entry in entries:
        assert entry.length > 0
        inside = any(p.base <= entry.base and entry.base + entry.length <= p.end for p in layout.ram_ranges(size))
        assert inside or entry.type == e820.RESERVED


def test_e820_reserves_what_direct_boot_and_devices_use() -> None:
    reserved = {(entry.base, entry.length) for entry in e820.build(128 * MIB) if entry.type == e820.RESERVED}
    assert reserved == {
        (0x9_FC00, 0x400),
        (0xF_0000, 0x1_0000),
        (0xE000_0000, 256 * MIB),
        (0xFEC0_0000, 0x1000),
        (0xFEE0_0000, 0x1000),
    }


def test_e820_records() -> None:
    raw = e820.encode(e820.build(128 * MIB))
    assert len(raw) == 20 * 7
    assert struct.unpack_from("<QQI", raw, 0) == (0, 0x9_FC00, 1)
