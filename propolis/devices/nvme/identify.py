"""What Identify answers (NVMe 1.4 §5.15): the controller, its namespace, and what they are called."""

from __future__ import annotations

import struct
import uuid
from typing import TYPE_CHECKING

import msgspec

from propolis import __version__

if TYPE_CHECKING:
    from propolis.devices.nvme._io import Namespace

NSID = 1
EVERY_NSID = 0xFFFF_FFFF
BYTES = 4096  # of each structure
MODEL = "Propolis NVMe disk"
FIRMWARE = __version__[:8]

VENDOR = 0x01DE
IEEE_OUI = bytes.fromhex("2540a8")  # A8-40-25, lowest byte first
VERSION = 0x0001_0400
CONTROLLER_ID = 0
MDTS = 8  # 2^8 pages: MAX_BYTES of _data.pxd
ABORT_LIMIT = 3  # 0's based, as the other two
ASYNC_LIMIT = 3
ERROR_LOG_ENTRIES = 63
KELVIN = 298  # a virtual disk has no temperature, but a host wants to hear of one: 25 degrees
WARNING_KELVIN, CRITICAL_KELVIN = 343, 353

# §5.15.2.2, figure 247
OACS_DOORBELL_BUFFER = 1 << 8
OAES_NAMESPACE = 1 << 8
ONCS_COMPARE, ONCS_DATASET, ONCS_ZEROES, ONCS_SELECT = 1 << 0, 1 << 2, 1 << 3, 1 << 4
LPA_NAMESPACE_SMART, LPA_EFFECTS, LPA_EXTENDED = 1 << 0, 1 << 1, 1 << 2
CONTROLLER_TYPE_IO = 1
VWC_PRESENT = 1
VWC_EVERY_NAMESPACE = 3 << 1  # Flush of all namespaces is known
SGL_SUPPORTED = 1  # of any alignment
SMALL_QUEUE_ENTRIES = (6, 4)  # powers of two: 64 and 16 bytes

# §5.15.2.1, figure 245
NSFEAT_OPTIMAL = 1 << 4
DLFEAT_READS_ZEROES, DLFEAT_ZEROES_DEALLOCATE = 1, 1 << 3
NSATTR_WRITE_PROTECTED = 1


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """What the host calls the disk; `serial` and `model` are printable ASCII of at most 20 and 40 characters."""

    serial: str
    model: str
    identity: uuid.UUID


def _text(value: str, size: int) -> bytes:
    return value.encode("ascii", "replace")[:size].ljust(size)


def _place(fields: dict[int, bytes]) -> bytes:
    data = bytearray(BYTES)
    for offset, value in fields.items():
        data[offset : offset + len(value)] = value
    return bytes(data)


def controller(names: Names, namespace: Namespace) -> bytes:
    """The Identify Controller data structure; offsets are those of figure 247."""
    oncs = ONCS_COMPARE | ONCS_SELECT
    oncs |= ONCS_ZEROES if namespace.can_zero else 0
    oncs |= ONCS_DATASET if namespace.can_discard else 0
    entry = SMALL_QUEUE_ENTRIES[0] << 4 | SMALL_QUEUE_ENTRIES[0], SMALL_QUEUE_ENTRIES[1] << 4 | SMALL_QUEUE_ENTRIES[1]
    return _place(
        {
            0: struct.pack("<HH", VENDOR, VENDOR),
            4: _text(names.serial, 20),
            24: _text(names.model, 40),
            64: _text(FIRMWARE, 8),
            72: struct.pack("<B3sBBHI", 6, IEEE_OUI, 0, MDTS, CONTROLLER_ID, VERSION),
            92: struct.pack("<I", OAES_NAMESPACE),
            111: bytes([CONTROLLER_TYPE_IO]),
            256: struct.pack(
                "<HBBBBBBB",
                OACS_DOORBELL_BUFFER,
                ABORT_LIMIT,
                ASYNC_LIMIT,
                1 << 1 | 1,  # one firmware slot, read only
                LPA_NAMESPACE_SMART | LPA_EFFECTS | LPA_EXTENDED,
                ERROR_LOG_ENTRIES,
                0,  # power states, 0's based
                0,
            ),
            266: struct.pack("<HH", WARNING_KELVIN, CRITICAL_KELVIN),
            512: bytes(entry),
            514: struct.pack("<HIH", 0, 1, oncs),  # no MAXCMD, one namespace
            525: bytes([VWC_PRESENT | VWC_EVERY_NAMESPACE]),
            536: struct.pack("<I", SGL_SUPPORTED),
            768: f"nqn.2014-08.org.nvmexpress:uuid:{names.identity}".encode(),
            2048: struct.pack("<HBB", 0, 0, 0),  # a power state of which no consumption is reported
        }
    )


def namespace_data(namespace: Namespace, granularity: int) -> bytes:
    """The Identify Namespace data structure (figure 245); writes go best in multiples of `granularity` bytes."""
    blocks = namespace.block_count
    features = 0
    if namespace.can_discard:
        features |= DLFEAT_READS_ZEROES
        features |= DLFEAT_ZEROES_DEALLOCATE if namespace.can_zero else 0
    return _place(
        {
            0: struct.pack("<QQQ", blocks, blocks, blocks),
            24: bytes([NSFEAT_OPTIMAL]),  # NLBAF and FLBAS are 0: there is one format
            33: bytes([features]),
            64: struct.pack("<HHHH", *([max(granularity >> namespace.shift, 1) - 1] * 4)),  # NPWG, NPWA, NPDG, NPDA
            99: bytes([NSATTR_WRITE_PROTECTED if namespace.read_only else 0]),
            128: struct.pack("<HBB", 0, namespace.shift, 0),
        }
    )


def active_namespaces(above: int) -> bytes:
    """The list of active namespaces with a number larger than `above`."""
    return _place({0: struct.pack("<I", NSID)} if above < NSID else {})


def descriptors(names: Names) -> bytes:
    """The list of namespace identification descriptors: its UUID."""
    return _place({0: struct.pack("<BBH", 3, 16, 0) + uuid.uuid5(names.identity, "namespace 1").bytes})
