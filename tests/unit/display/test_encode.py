"""What clients are sent, decoded again by an independent decoder."""

import random
import struct
from collections.abc import Callable

import pytest

from propolis.display._encode import Format, raw, zrle
from propolis.display._surface import Surface
from propolis.hypervisor._replay import ReplayVm
from tests.unit.display.zrle import Layout, decode, decode_raw

LAYOUTS = {
    "native": Layout(),
    "rgba": Layout(red_shift=0, blue_shift=16),
    "big": Layout(is_big_endian=True),
    "upper": Layout(red_shift=24, green_shift=16, blue_shift=8),
    "upper big": Layout(is_big_endian=True, red_shift=24, green_shift=16, blue_shift=8),
    "spread": Layout(red_shift=24),
    "deep": Layout(depth=32),
    "565": Layout(16, 16, False, 31, 63, 31, 11, 5, 0),
    "565 big": Layout(16, 16, True, 31, 63, 31, 11, 5, 0),
    "332": Layout(8, 8, False, 7, 7, 3, 5, 2, 0),
}
# How many colours, in runs of about that length.
CONTENTS = ((1, 1), (2, 1), (3, 1), (9, 2), (16, 1), (17, 1), (60, 40), (127, 20), (128, 40), (5000, 1), (9000, 300))


def surface_of(picture: list[list[int]]) -> Surface:
    height, width = len(picture), len(picture[0])
    vm = ReplayVm()
    vm.memory.add(0, (width * height * 4 + 4095) // 4096 * 4096)
    vm.memory.write(0, b"".join(struct.pack(f"<{width}I", *row) for row in picture))
    surface = Surface(width, height)
    surface.refresh(vm.memory, 0, width * 4)
    vm.close()
    return surface


def noise(dice: random.Random, width: int, height: int, colours: int, run: int) -> list[list[int]]:
    """A picture of so many colours, in runs of about that length."""
    palette = [dice.getrandbits(32) for _ in range(colours)]
    flat: list[int] = []
    while len(flat) < width * height:
        flat += [dice.choice(palette)] * dice.randint(1, run)
    return [flat[row * width : (row + 1) * width] for row in range(height)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_encoding_says_what_is_there(name: str) -> None:
    layout = LAYOUTS[name]
    form = Format(*layout)
    dice = random.Random(name)
    seen: set[int] = set()
    for colours, run in CONTENTS:
        width, height = dice.randint(1, 150), dice.randint(1, 150)
        picture = noise(dice, width, height, colours, run)
        surface = surface_of(picture)
        expected = [[layout.pixel(xrgb) for xrgb in row] for row in picture]
        assert decode_raw(raw(surface, 0, 0, width, height, form), width, height, layout) == expected
        content = zrle(surface, 0, 0, width, height, form)
        found, kinds = decode(content, width, height, layout)
        assert found == expected, (colours, run)
        seen |= kinds
    assert 1 in seen
    assert any(2 <= kind <= 16 for kind in seen)
    if layout.bits > 8:
        assert {0, 128} <= seen
        assert any(kind >= 130 for kind in seen)


@pytest.mark.parametrize("encode", [raw, zrle])
def test_a_part_of_the_picture(encode: Callable[..., bytes]) -> None:
    dice = random.Random(1)
    picture = noise(dice, 200, 130, 300, 9)
    surface = surface_of(picture)
    layout = Layout()
    data = encode(surface, 70, 65, 100, 64, Format(*layout))
    expected = [[pixel & 0xFFFFFF for pixel in row[70:170]] for row in picture[65:129]]
    if encode is raw:
        assert decode_raw(data, 100, 64, layout) == expected
    else:
        assert decode(data, 100, 64, layout)[0] == expected


@pytest.mark.parametrize("place", [(-1, 0, 4, 4), (0, 0, 0, 1), (0, 0, 65, 1), (60, 60, 4, 5), (0, 1 << 32, 1, 1)])
@pytest.mark.parametrize("encode", [raw, zrle])
def test_nothing_outside_is_read(encode: Callable[..., bytes], place: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="of a surface"):
        encode(Surface(64, 64), *place, Format(*Layout()))


@pytest.mark.parametrize(
    "wrong",
    [
        Layout(bits=0), Layout(bits=7), Layout(bits=24), Layout(bits=64), Layout(red_max=0), Layout(blue_shift=32),
        Layout(red_shift=25), Layout(8, 8, False, 7, 7, 7, 6, 2, 0), Layout(16, 16, False, 65535, 63, 31, 1, 5, 0),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_formats(wrong: Layout) -> None:
    with pytest.raises(ValueError, match=r"pixels of|a colour"):
        Format(*wrong)
