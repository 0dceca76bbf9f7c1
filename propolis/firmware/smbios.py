"""SMBIOS tables: what the machine is called, its processor, caches and memory, as `dmidecode` shows them.

DMTF DSP0134, SMBIOS 3.0, whose 64-bit entry point OVMF and Linux read. Structures have the length of that version.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from propolis.firmware.layout import SMBIOS_TABLES, ram_ranges

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterable

VERSION = (3, 0)
ENTRY_POINT_SIZE = 0x18
RELEASE_DATE = "01/01/2026"  # without one, some drivers take a machine for an old one

_NONE = 0xFFFF  # a handle that is none
_NO_ERROR_INFORMATION = 0xFFFE  # §7.17.1
_UNKNOWN = 2  # in most enumerations
_OTHER = 1
_CACHE_TYPES = {"instruction": 3, "data": 4, "unified": 5}  # §7.8.5
_WRITE_BACK, _CACHE_ENABLED = 1 << 8, 1 << 7  # §7.8.1
_WAYS = {1: 3, 2: 4, 4: 5, 8: 7, 16: 8, 12: 9, 24: 10, 32: 11, 48: 12, 64: 13, 20: 14}  # §7.8.6


class Cache(Struct, frozen=True, kw_only=True):
    """One of a processor; of a level that each core has its own of, the sum."""

    level: int
    kind: Literal["instruction", "data", "unified"]
    size: int  # bytes
    ways: int = 0  # 0 where that is not known


class Processor(Struct, frozen=True, kw_only=True):
    """What CPUID says of one, as far as it is known."""

    vendor: str = ""
    name: str = ""
    signature: int = 0  # leaf 1 EAX
    features: int = 0  # and EDX
    caches: tuple[Cache, ...] = ()


class System(Struct, frozen=True, kw_only=True):
    """What the tables say; strings are ASCII, and an empty one is left out."""

    uuid: uuid.UUID
    cpus: int
    memory_size: int  # bytes
    serial_number: str = ""
    manufacturer: str = "Propolis"
    product_name: str = "Propolis VM"
    version: str = ""
    firmware_version: str = ""
    is_uefi: bool = False
    processor: Processor = Processor()


def tables(system: System) -> bytes:
    """The structures, of which the last is the end-of-table one."""
    builder = _Builder()
    _firmware(builder, system)
    _system(builder, system)
    _chassis(builder, system)
    caches = _caches(builder, system)
    _processor(builder, system, caches)
    _memory(builder, system)
    builder.add(32, struct.pack("<6xB", 0))  # §7.33: no errors in the last boot
    builder.add(127, b"")
    return bytes(builder.content)


def entry_point(address: int, content: bytes) -> bytes:
    """§5.2.2: what is searched for on 16-byte boundaries from 0xF0000 to 0xFFFFF; `content` is at `address`."""
    head = struct.pack("<5sBBBBBBxIQ", b"_SM3_", 0, ENTRY_POINT_SIZE, *VERSION, 0, 1, len(content), address)
    return head[:5] + bytes([-sum(head) & 0xFF]) + head[6:]


def pieces(system: System) -> tuple[tuple[int, bytes], ...]:
    """The tables and their entry point where an operating system finds them that no firmware has started."""
    address = SMBIOS_TABLES.base + 2 * 16  # beyond the entry point, whose place is on a 16-byte boundary
    content = tables(system)
    return (SMBIOS_TABLES.base, entry_point(address, content)), (address, content)


def processor(leaves: Iterable[tuple[int, ...]], cpus: int) -> Processor:
    """What the guest's CPUID says: (function, subleaf, flags, eax, ebx, ecx, edx) each."""
    seen = {(leaf[0], leaf[1]): leaf[3:] for leaf in leaves}
    _, ebx, ecx, edx = seen.get((0, 0), (0, 0, 0, 0))
    signature, _, _, features = seen.get((1, 0), (0, 0, 0, 0))
    name = b"".join(_bytes(*seen.get((0x8000_0002 + part, 0), ())) for part in range(3))
    caches = []
    for function in (4, 0x8000_001D):
        for subleaf in range(8):
            registers = seen.get((function, subleaf))
            if registers is not None and (cache := _cache(registers, cpus)) is not None:
                caches.append(cache)
        if caches:
            break
    return Processor(
        vendor=_text(_bytes(ebx, edx, ecx)),
        name=_text(name),
        signature=signature,
        features=features,
        caches=tuple(caches),
    )


def _cache(registers: tuple[int, ...], cpus: int) -> Cache | None:
    """Deterministic cache parameters: Intel SDM volume 2A, CPUID leaf 4, which is AMD's 8000_001D."""
    eax, ebx, ecx, _ = registers
    kinds: tuple[Literal["data", "instruction", "unified"], ...] = ("data", "instruction", "unified")
    if not 1 <= eax & 0x1F <= len(kinds) or (level := eax >> 5 & 7) == 0:
        return None
    ways = (ebx >> 22) + 1
    size = ways * ((ebx >> 12 & 0x3FF) + 1) * ((ebx & 0xFFF) + 1) * (ecx + 1)
    copies = -(-cpus // ((eax >> 14 & 0xFFF) + 1))
    return Cache(level=level, kind=kinds[(eax & 0x1F) - 1], size=size * copies, ways=ways)


def _bytes(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def _text(content: bytes) -> str:
    return content.split(b"\0")[0].decode("ascii", "replace").strip()


class _Builder:
    """Structures one after the other, each with its strings; the handle of one is its type and how many there were."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._strings: list[bytes] = []
        self._count: dict[int, int] = {}

    def text(self, text: str) -> int:
        """The number by which the structure that is added next refers to a string."""
        if not text:
            return 0
        self._strings.append(text.encode("ascii", "replace").replace(b"\0", b"?"))
        return len(self._strings)

    def add(self, kind: int, body: bytes) -> int:
        """Returns the handle."""
        number = self._count[kind] = self._count.get(kind, -1) + 1
        handle = kind << 8 | number
        strings = b"".join(text + b"\0" for text in self._strings) or b"\0"
        self.content += struct.pack("<BBH", kind, 4 + len(body), handle) + body + strings + b"\0"
        self._strings.clear()
        return handle


def _firmware(builder: _Builder, system: System) -> None:
    """§7.1."""
    is_not_told, has_acpi, is_uefi, is_virtual = 1 << 3, 1 << 0, 1 << 3, 1 << 4
    builder.add(
        0,
        struct.pack(
            "<BBHBBQBBBBBB",
            builder.text(system.manufacturer),
            builder.text(system.firmware_version),
            0,  # not in a segment of its own
            builder.text(RELEASE_DATE),
            0,  # 64 KiB, as the field cannot say none
            is_not_told,
            has_acpi,
            is_virtual | (is_uefi if system.is_uefi else 0),
            *(0xFF, 0xFF, 0xFF, 0xFF),  # releases of the firmware and of an embedded controller: none
        ),
    )


def _system(builder: _Builder, system: System) -> None:
    """§7.2."""
    names = (system.manufacturer, system.product_name, system.version, system.serial_number)
    power_switch = 6
    body = bytes(map(builder.text, names)) + system.uuid.bytes_le + bytes([power_switch, 0, 0])
    builder.add(1, body)


def _chassis(builder: _Builder, system: System) -> None:
    """§7.4."""
    safe, unsecured = 3, 3
    builder.add(
        3,
        struct.pack(
            "<BBBBBBBBBIBBBBB",
            builder.text(system.manufacturer),
            _OTHER,
            builder.text(system.version),
            builder.text(system.serial_number),
            0,
            *(safe, safe, safe, unsecured),
            *(0, 0, 0, 0, 0, 0),
        ),
    )


def _caches(builder: _Builder, system: System) -> list[int]:
    """§7.8. The handles of the first cache of each of three levels."""
    handles = [_NONE] * 3
    for cache in system.processor.caches:
        size = _cache_size(cache.size)
        handle = builder.add(
            7,
            struct.pack(
                "<BHHHHHBBBB",
                builder.text(f"L{cache.level} {cache.kind}"),
                cache.level - 1 | _CACHE_ENABLED | _WRITE_BACK,
                *(size, size),
                *(1 << 1, 1 << 1),  # SRAM of an unknown type
                0,
                _UNKNOWN,
                _CACHE_TYPES[cache.kind],
                _WAYS.get(cache.ways, _UNKNOWN),
            ),
        )
        if cache.level <= len(handles) and handles[cache.level - 1] == _NONE:
            handles[cache.level - 1] = handle
    return handles


def _cache_size(size: int) -> int:
    """In KiB, or in units of 64 KiB where bit 15 says so."""
    kib = size >> 10
    return kib if kib < 1 << 15 else 1 << 15 | min(kib >> 6, 0x7FFF)


def _processor(builder: _Builder, system: System, caches: list[int]) -> None:
    """§7.5: one socket."""
    central, unknown_family, populated_and_enabled = 3, 2, 0x41
    is_64_bit, is_multi_core = 1 << 2, 1 << 3
    short = min(system.cpus, 0xFF)
    builder.add(
        4,
        struct.pack(
            "<BBBBIIBBHHHBBHHHBBBBBBHHHHH",
            builder.text("CPU 0"),
            central,
            unknown_family,
            builder.text(system.processor.vendor),
            system.processor.signature,
            system.processor.features,
            builder.text(system.processor.name),
            *(0, 0, 0, 0),  # voltage, clock and speeds: not told
            populated_and_enabled,
            _OTHER,
            *caches,
            *(0, 0, 0),
            *(short, short, short),
            is_64_bit | (is_multi_core if system.cpus > 1 else 0),
            unknown_family,
            *(system.cpus, system.cpus, system.cpus),
        ),
    )


def _memory(builder: _Builder, system: System) -> None:
    """§7.17, §7.18 and §7.20: one array of one device, mapped in one range or two."""
    board, system_memory, no_correction = 3, 3, 3
    kib, mib = system.memory_size >> 10, system.memory_size >> 20
    is_large = kib >= 1 << 31
    array = builder.add(
        16,
        struct.pack(
            "<BBBIHHQ",
            *(board, system_memory, no_correction),
            1 << 31 if is_large else kib,
            _NO_ERROR_INFORMATION,
            1,
            system.memory_size if is_large else 0,
        ),
    )
    dimm, ram, other_detail, extended = 9, 7, 1 << 1, 0x7FFF
    builder.add(
        17,
        struct.pack(
            "<HHHHHBBBBBHHBBBBBIHHHH",
            *(array, _NO_ERROR_INFORMATION, 0xFFFF, 0xFFFF),
            min(mib, extended),
            dimm,
            0,
            builder.text("DIMM 0"),
            0,
            *(ram, other_detail, 0),
            *(0, 0, 0, 0),
            0,
            mib if mib >= extended else 0,
            *(0, 0, 0, 0),
        ),
    )
    for part in ram_ranges(system.memory_size):
        builder.add(19, struct.pack("<IIHBQQ", part.base >> 10, (part.end >> 10) - 1, array, 1, 0, 0))
