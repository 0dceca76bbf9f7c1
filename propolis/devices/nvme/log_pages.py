"""What Get Log Page answers (NVMe 1.4 §5.14.1)."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from propolis.devices.nvme.identify import ERROR_LOG_ENTRIES, FIRMWARE, KELVIN, NSID

if TYPE_CHECKING:
    from collections.abc import Iterable

ERROR_INFORMATION, SMART, FIRMWARE_SLOT, CHANGED_NAMESPACES, COMMAND_EFFECTS = 1, 2, 3, 4, 5

SUPPORTED = 1  # §5.14.1.5
CHANGES_CONTENT = 1 << 1
_ADMIN = (0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0x7C)
_IO = {0x00: 0, 0x01: CHANGES_CONTENT, 0x02: 0, 0x05: 0, 0x08: CHANGES_CONTENT, 0x09: CHANGES_CONTENT}

Failure = tuple[int, int, int, int, int]  # when, queue, command, status, LBA; IoQueue.recent_errors


def error_information(failures: Iterable[Failure], total: int) -> bytes:
    """The newest of `total` failed commands first (figure 193)."""
    newest = sorted(failures, reverse=True)[: ERROR_LOG_ENTRIES + 1]
    entries = (
        # The status field is a completion's, with room for its phase bit; no parameter is blamed.
        struct.pack("<QHHHHQI36x", total - index, queue, cid, status << 1, 0xFFFF, lba, NSID)
        for index, (_, queue, cid, status, lba) in enumerate(newest)
    )
    return b"".join(entries).ljust(64 * (ERROR_LOG_ENTRIES + 1), b"\0")


def smart(counters: dict[str, int], *, started: float, power_cycles: int, failures: int) -> bytes:
    """Health of a disk that does not wear out (figure 194); `started` is of the monotonic clock."""

    def units(octets: int) -> int:
        return -(-octets // 512_000)  # thousands of 512 bytes, rounded up

    numbers = (
        units(counters["bytes_read"]),
        units(counters["bytes_written"]),
        counters["reads"],
        counters["writes"],
        0,  # minutes busy
        power_cycles,
        int(time.monotonic() - started) // 3600,
        0,  # unsafe shutdowns: none that the disk would know of
        0,  # media errors
        failures,
    )
    wide = b"".join(number.to_bytes(16, "little") for number in numbers)
    return (struct.pack("<BHBBBB25x", 0, KELVIN, 100, 10, 0, 0) + wide).ljust(512, b"\0")


def firmware_slot() -> bytes:
    """One slot, which is active (figure 195)."""
    return (bytes([1, *bytes(7)]) + FIRMWARE.encode().ljust(8)).ljust(512, b"\0")


def changed_namespaces(has_changed: bool) -> bytes:
    """Those whose Identify data changed since this was last read."""
    return struct.pack("<I", NSID if has_changed else 0).ljust(4096, b"\0")


def command_effects(oncs: int) -> bytes:
    """Which commands there are; `oncs` says which of the optional ones of I/O."""
    optional = {0x05: 1 << 0, 0x09: 1 << 2, 0x08: 1 << 3}
    page = bytearray(4096)
    for opcode in _ADMIN:
        struct.pack_into("<I", page, 4 * opcode, SUPPORTED)
    for opcode, effects in _IO.items():
        if oncs & optional.get(opcode, oncs) or opcode not in optional:
            struct.pack_into("<I", page, 1024 + 4 * opcode, SUPPORTED | effects)
    return bytes(page)
