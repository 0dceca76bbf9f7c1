"""The messages of RFB 3.8 (RFC 6143) and of the extensions spoken here, and how long each is."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from propolis.display._encode import Format
from propolis.errors import PropolisError

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION = b"RFB 003.008\n"
VERSION_BYTES = 12
MAX_CUT_TEXT = 1 << 20  # bytes that a client may put on the clipboard, which no guest gets


class ProtocolError(PropolisError):
    """A client says what it may not."""

    code = "rfb"


class Security(IntEnum):
    """§7.1.2."""

    NONE = 1


class ClientMessage(IntEnum):
    """§7.5, and the rfbproto community's 255."""

    SET_PIXEL_FORMAT = 0
    SET_ENCODINGS = 2
    UPDATE_REQUEST = 3
    KEY = 4
    POINTER = 5
    CUT_TEXT = 6
    QEMU = 255


class Encoding(IntEnum):
    """§7.7 and §7.8, and QEMU's."""

    RAW = 0
    ZLIB = 6
    ZRLE = 16
    DESKTOP_SIZE = -223
    QEMU_EXTENDED_KEY = -258


class Region(NamedTuple):
    """A rectangle of the screen."""

    x: int
    y: int
    width: int
    height: int

    def union(self, other: Region) -> Region:
        """The smallest that holds both."""
        x, y = min(self.x, other.x), min(self.y, other.y)
        right = max(self.x + self.width, other.x + other.width)
        bottom = max(self.y + self.height, other.y + other.height)
        return Region(x, y, right - x, bottom - y)


_PIXEL_FORMAT = struct.Struct(">BBBBHHHBBB3x")
_UPDATE_REQUEST = struct.Struct(">BHHHH")
_KEY = struct.Struct(">B2xI")
_POINTER = struct.Struct(">BHH")
_EXTENDED_KEY = struct.Struct(">HII")
_RECTANGLE = struct.Struct(">HHHHi")

UPDATE_REQUEST_BYTES = _UPDATE_REQUEST.size
KEY_BYTES = _KEY.size
POINTER_BYTES = _POINTER.size
EXTENDED_KEY_BYTES = _EXTENDED_KEY.size
PIXEL_FORMAT_BYTES = _PIXEL_FORMAT.size

NATIVE = _PIXEL_FORMAT.pack(32, 24, 0, 1, 255, 255, 255, 16, 8, 0)


def version(data: bytes) -> int:
    """The minor version that both speak: 3, 7 or 8 (§7.1.1). Raises ProtocolError."""
    if len(data) != VERSION_BYTES or data[:8] != b"RFB 003." or data[11:] != b"\n" or not data[8:11].isdigit():
        raise ProtocolError(f"no version of RFB that is spoken here: {data!r}")
    minor = int(data[8:11])
    return 8 if minor >= 8 else 7 if minor == 7 else 3


def pixel_format(data: bytes) -> Format:
    """Raises ProtocolError for a format that pixels cannot be sent in."""
    bits, depth, is_big_endian, is_true_colour, *colours = _PIXEL_FORMAT.unpack(data)
    if not is_true_colour:
        raise ProtocolError("colour maps are not spoken here")
    try:
        return Format(bits, depth, bool(is_big_endian), *colours)
    except ValueError as error:
        raise ProtocolError(str(error)) from error


def encodings(data: bytes) -> tuple[int, ...]:
    """In the client's order of preference."""
    return struct.unpack(f">{len(data) // 4}i", data)


def update_request(data: bytes) -> tuple[bool, Region]:
    """Whether only changes are wanted, and of what."""
    incremental, x, y, width, height = _UPDATE_REQUEST.unpack(data)
    return bool(incremental), Region(x, y, width, height)


def key(data: bytes) -> tuple[bool, int]:
    """Whether it is pressed, and its keysym."""
    is_press, keysym = _KEY.unpack(data)
    return bool(is_press), keysym


def extended_key(data: bytes) -> tuple[bool, int, int]:
    """Whether it is pressed, its keysym, and the key's number."""
    is_press, keysym, number = _EXTENDED_KEY.unpack(data)
    return bool(is_press), keysym, number


def pointer(data: bytes) -> tuple[int, int, int]:
    """Which buttons are down, and where it is."""
    buttons, x, y = _POINTER.unpack(data)
    return buttons, x, y


def security_types(offered: Iterable[Security]) -> bytes:
    """§7.1.2."""
    types = bytes(offered)
    return bytes([len(types)]) + types


def refusal(reason: str) -> bytes:
    """What follows a count or a result that says no."""
    text = reason.encode()
    return len(text).to_bytes(4, "big") + text


def server_init(width: int, height: int, name: str) -> bytes:
    """§7.3.2."""
    return struct.pack(">HH", width, height) + NATIVE + refusal(name)


def update(rectangles: int) -> bytes:
    """The head of a FramebufferUpdate (§7.6.1)."""
    return struct.pack(">BxH", 0, rectangles)


def rectangle(region: Region, encoding: Encoding) -> bytes:
    """The head of a rectangle."""
    return _RECTANGLE.pack(*region, encoding)
