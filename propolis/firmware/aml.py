"""A small AML encoder: one function per ASL operator that the tables use (ACPI 6.5 §20.2 and §6.4).

Every function returns the encoded bytes of its term; terms nest by being passed on.
"""

import struct
from collections.abc import Iterable

# Object values that are one opcode
ZERO = b"\x00"
ONE = b"\x01"
LOCAL0, LOCAL1, LOCAL2 = b"\x60", b"\x61", b"\x62"
ARG0, ARG1, ARG2 = b"\x68", b"\x69", b"\x6a"

# DefOpRegion RegionSpace (§20.2.5.2)
SYSTEM_IO = 0x01
PCI_CONFIG = 0x02

# DefField FieldFlags: access type, with NoLock and Preserve (§20.2.5.2)
BYTE_ACCESS = 0x01
DWORD_ACCESS = 0x03

_NO_TARGET = ZERO  # an operator that stores its result nowhere


# Names (§20.2.2)


def name_string(name: str) -> bytes:
    """`\\`, `^` and dots as in ASL; short segments are padded with underscores."""
    path = name.lstrip("\\^")
    prefix = name[: len(name) - len(path)].encode("ascii")
    segments = [_segment(part) for part in path.split(".")] if path else []
    if not segments:
        return prefix + b"\x00"
    if len(segments) == 1:
        return prefix + segments[0]
    if len(segments) == 2:
        return prefix + b"\x2e" + b"".join(segments)
    return prefix + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def _segment(part: str) -> bytes:
    if not 1 <= len(part) <= 4 or part[0].isdigit() or not part.replace("_", "A").isalnum() or part != part.upper():
        raise ValueError(f"{part!r} is not an AML name segment")
    return part.ljust(4, "_").encode("ascii")


# Data (§20.2.3)


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned integer."""
    if value in (0, 1):
        return bytes([value])
    if value < 1 << 8:
        return struct.pack("<BB", 0x0A, value)
    if value < 1 << 16:
        return struct.pack("<BH", 0x0B, value)
    if value < 1 << 32:
        return struct.pack("<BI", 0x0C, value)
    return struct.pack("<BQ", 0x0E, value)


def string(text: str) -> bytes:
    return b"\x0d" + text.encode("ascii") + b"\x00"


def eisa_id(text: str) -> bytes:
    """`PNP0A03` as the compressed EISA identifier (§19.3.4): three letters of 5 bits, four hexadecimal digits."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return b"\x0c" + struct.pack(">HH", letters, int(text[3:], 16))


def buffer(data: bytes) -> bytes:
    return b"\x11" + _sized(integer(len(data)) + data)


def package(elements: Iterable[bytes]) -> bytes:
    terms = list(elements)
    return b"\x12" + _sized(bytes([len(terms)]) + b"".join(terms))


def _sized(body: bytes) -> bytes:
    """PkgLength and body (§20.2.4); the length counts its own bytes as well."""
    size = len(body) + 1
    if size < 1 << 6:
        return bytes([size]) + body
    for more in (1, 2, 3):
        size = len(body) + 1 + more
        if size < 1 << (4 + 8 * more):
            return bytes([more << 6 | size & 0xF]) + (size >> 4).to_bytes(more, "little") + body
    raise ValueError(f"an AML package of {len(body)} bytes does not fit its length field")


# Named objects (§20.2.5)


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return b"\x10" + _sized(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return b"\x5b\x82" + _sized(name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """`serialized` is needed where the method creates named objects: two threads in it would collide."""
    return b"\x14" + _sized(name_string(path) + bytes([arguments | serialized << 3]) + b"".join(terms))


def operation_region(path: str, space: int, offset: int, length: int) -> bytes:
    return b"\x5b\x80" + name_string(path) + bytes([space]) + integer(offset) + integer(length)


def field(region: str, access: int, *units: tuple[str, int]) -> bytes:
    """Units of (name, bits) from bit 0 of the region on."""
    body = b"".join(_segment(unit) + _field_length(bits) for unit, bits in units)
    return b"\x5b\x81" + _sized(name_string(region) + bytes([access]) + body)


def _field_length(bits: int) -> bytes:
    if bits >= 1 << 6:
        raise ValueError(f"a field of {bits} bits: only the one-byte length is written")
    return bytes([bits])


def create_dword_field(source: bytes, offset: int, path: str) -> bytes:
    return b"\x8a" + source + integer(offset) + name_string(path)


# Statements and operators (§20.2.5.3 and §20.2.5.4)


def call(path: str, *arguments: bytes) -> bytes:
    return name_string(path) + b"".join(arguments)


def if_(condition: bytes, *terms: bytes) -> bytes:
    return b"\xa0" + _sized(condition + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    return b"\xa1" + _sized(b"".join(terms))


def return_(value: bytes) -> bytes:
    return b"\xa4" + value


def store(source: bytes, target: bytes) -> bytes:
    return b"\x70" + source + target


def notify(target: str, value: bytes) -> bytes:
    return b"\x86" + name_string(target) + value


def and_(left: bytes, right: bytes, target: bytes = _NO_TARGET) -> bytes:
    return b"\x7b" + left + right + target


def or_(left: bytes, right: bytes, target: bytes = _NO_TARGET) -> bytes:
    return b"\x7d" + left + right + target


def less(left: bytes, right: bytes) -> bytes:
    return b"\x95" + left + right


# Resource descriptors (§6.4). A template is a buffer of descriptors that ends in an end tag.


def resource_template(*descriptors: bytes) -> bytes:
    return buffer(b"".join(descriptors) + b"\x79\x00")  # checksum 0: "treat as if it had succeeded" (§6.4.2.9)


def io(base: int, length: int) -> bytes:
    """A fixed 16-bit port range (§6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(number: int) -> bytes:
    """An ISA interrupt: edge, active high, exclusive (§6.4.2.1)."""
    return struct.pack("<BH", 0x22, 1 << number)


def interrupt_pci(*numbers: int) -> bytes:
    """Level-triggered, active-high, shared interrupts that the device consumes (§6.4.3.6)."""
    return struct.pack(f"<BHBB{len(numbers)}I", 0x89, 2 + 4 * len(numbers), 0b1001, len(numbers), *numbers)


INTERRUPT_NUMBER_OFFSET = 5  # of the first number in interrupt_pci()


def memory32_fixed(base: int, length: int) -> bytes:
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


# Address spaces that a bridge passes on (§6.4.3.5): producer, positive decode, both ends fixed
_WINDOW = 0b1100
_RESOURCE_MEMORY, _RESOURCE_IO, _RESOURCE_BUS = 0, 1, 2
_MEMORY_WRITABLE = 1 << 0
_MEMORY_CACHEABLE = 1 << 1
_IO_ENTIRE_RANGE = 3


def word_bus_number(first: int, last: int) -> bytes:
    return _word_window(_RESOURCE_BUS, 0, first, last)


def word_io(first: int, last: int) -> bytes:
    return _word_window(_RESOURCE_IO, _IO_ENTIRE_RANGE, first, last)


def _word_window(kind: int, flags: int, first: int, last: int) -> bytes:
    return struct.pack("<BHBBBHHHHH", 0x88, 13, kind, _WINDOW, flags, 0, first, last, 0, last - first + 1)


def dword_memory(base: int, size: int) -> bytes:
    return struct.pack(
        "<BHBBBIIIII", 0x87, 23, _RESOURCE_MEMORY, _WINDOW, _MEMORY_WRITABLE, 0, base, base + size - 1, 0, size
    )


def qword_memory(base: int, size: int) -> bytes:
    """Cacheable, which is how an OS may map the prefetchable BARs that belong into a 64-bit window."""
    flags = _MEMORY_WRITABLE | _MEMORY_CACHEABLE
    return struct.pack("<BHBBBQQQQQ", 0x8A, 43, _RESOURCE_MEMORY, _WINDOW, flags, 0, base, base + size - 1, 0, size)
