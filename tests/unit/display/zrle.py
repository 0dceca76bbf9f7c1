"""A decoder of ZRLE's tiles, as plain as RFC 6143 §7.7.6, and of raw pixels: they come out as integers."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """Of a pixel; the arguments of the product's Format, in its order."""

    bits: int = 32
    depth: int = 24
    is_big_endian: bool = False
    red_max: int = 255
    green_max: int = 255
    blue_max: int = 255
    red_shift: int = 16
    green_shift: int = 8
    blue_shift: int = 0

    @property
    def order(self) -> str:
        return "big" if self.is_big_endian else "little"

    @property
    def compact(self) -> tuple[int, int]:
        """Bytes of a CPIXEL, and the bits below it that are left out."""
        used = self.red_max << self.red_shift | self.green_max << self.green_shift | self.blue_max << self.blue_shift
        if self.bits != 32 or self.depth > 24:
            return self.bits // 8, 0
        if used < 1 << 24:
            return 3, 0
        return (3, 8) if used & 0xFF == 0 else (4, 0)

    def pixel(self, xrgb: int) -> int:
        """What a colour of the guest's becomes."""
        red, green, blue = xrgb >> 16 & 0xFF, xrgb >> 8 & 0xFF, xrgb & 0xFF
        return (
            (red * self.red_max + 127) // 255 << self.red_shift
            | (green * self.green_max + 127) // 255 << self.green_shift
            | (blue * self.blue_max + 127) // 255 << self.blue_shift
        )


class _Reader:
    def __init__(self, data: bytes, layout: Layout) -> None:
        self.data = data
        self.at = 0
        self._order = layout.order
        self._size, self._shift = layout.compact

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def pixel(self) -> int:
        piece = self.data[self.at : self.at + self._size]
        assert len(piece) == self._size
        self.at += self._size
        return int.from_bytes(piece, self._order) << self._shift  # type: ignore[arg-type]  # one of the two words

    def length(self) -> int:
        total = 1
        while (byte := self.byte()) == 255:
            total += 255
        return total + byte


def decode(data: bytes, width: int, height: int, layout: Layout) -> tuple[list[list[int]], set[int]]:
    """Rows of pixels, and which subencodings there were."""
    picture = [[-1] * width for _ in range(height)]
    reader = _Reader(data, layout)
    kinds = set()
    for top in range(0, height, 64):
        for left in range(0, width, 64):
            across, down = min(64, width - left), min(64, height - top)
            kind = reader.byte()
            kinds.add(kind)
            pixels = _tile(reader, kind, across, down)
            assert len(pixels) == across * down, kind
            for row in range(down):
                picture[top + row][left : left + across] = pixels[row * across : (row + 1) * across]
    assert reader.at == len(data)
    return picture, kinds


def _tile(reader: _Reader, kind: int, across: int, down: int) -> list[int]:
    count = across * down
    if kind == 0:
        return [reader.pixel() for _ in range(count)]
    if kind == 1:
        return [reader.pixel()] * count
    pixels: list[int] = []
    if kind <= 16:
        palette = [reader.pixel() for _ in range(kind)]
        bits = 1 if kind == 2 else 2 if kind <= 4 else 4
        for _ in range(down):
            row: list[int] = []
            while len(row) < across:
                byte = reader.byte()
                row += [palette[byte >> shift & ((1 << bits) - 1)] for shift in range(8 - bits, -1, -bits)][
                    : across - len(row)
                ]
            pixels += row
    elif kind == 128:
        while len(pixels) < count:
            pixel = reader.pixel()
            pixels += [pixel] * reader.length()
    else:
        assert kind >= 130
        palette = [reader.pixel() for _ in range(kind - 128)]
        while len(pixels) < count:
            index = reader.byte()
            pixels += [palette[index & 0x7F]] * (reader.length() if index & 0x80 else 1)
    return pixels


def decode_raw(data: bytes, width: int, height: int, layout: Layout) -> list[list[int]]:
    """Rows of pixels."""
    size = layout.bits // 8
    assert len(data) == width * height * size
    flat = [
        int.from_bytes(data[at : at + size], layout.order)  # type: ignore[arg-type]  # one of the two words
        for at in range(0, len(data), size)
    ]
    return [flat[row * width : (row + 1) * width] for row in range(height)]
