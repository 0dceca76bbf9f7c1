"""What changed, by tiles, and for whom."""

import random

import pytest

from propolis.display._surface import SIDE, Surface, View
from propolis.hypervisor._replay import ReplayVm

WIDTH, HEIGHT = 200, 150  # 4 by 3 tiles, the last ones cut
STRIDE = 1024
ALL = (0, 0, WIDTH, HEIGHT)


class Bench:
    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.vm.memory.add(0, 1 << 20)
        self.surface = Surface(WIDTH, HEIGHT)
        self.view = View(self.surface)

    def draw(self, x: int, y: int, pixel: int = 0xFFFFFF) -> None:
        self.vm.memory.write(y * STRIDE + x * 4, pixel.to_bytes(4, "little"))

    def look(self) -> bool:
        return self.surface.refresh(self.vm.memory, 0, STRIDE)

    def send(self, *region: int) -> list[tuple[int, int, int, int]]:
        found = self.view.unsent(*(region or ALL))
        for rectangle in found:
            self.view.note_sent(*rectangle)
        return found


def test_only_what_changed_is_sent_and_once() -> None:
    bench = Bench()
    assert bench.send() == [(0, 0, 200, 64), (0, 64, 200, 64), (0, 128, 200, 22)]
    assert bench.send() == []
    assert not bench.look()
    bench.draw(199, 149)
    bench.draw(0, 0)
    bench.draw(64, 0)
    assert bench.look()
    assert bench.send() == [(0, 0, 128, 64), (192, 128, 8, 22)]
    assert bench.send() == []
    assert not bench.look()
    bench.vm.close()


def test_each_client_has_its_own_view() -> None:
    bench = Bench()
    other = View(bench.surface)
    bench.send()
    bench.draw(100, 100)
    bench.look()
    assert bench.send() == [(64, 64, 64, 64)]
    assert other.unsent(*ALL) == [(0, 0, 200, 64), (0, 64, 200, 64), (0, 128, 200, 22)]
    bench.vm.close()


def test_regions() -> None:
    bench = Bench()
    assert bench.send(70, 70, 1, 1) == [(64, 64, 64, 64)]
    assert bench.send(0, 64, 200, 64) == [(0, 64, 64, 64), (128, 64, 72, 64)]
    bench.view.forget(130, 70, 10, 10)
    assert bench.send(0, 64, 200, 64) == [(128, 64, 64, 64)]
    for outside in ((200, 0, 10, 10), (0, 0, 0, 5), (65535, 65535, 65535, 65535), (-5, 0, 10, 10)):
        assert bench.view.unsent(*outside) == []
        bench.view.forget(*outside)
        bench.view.note_sent(*outside)
    bench.vm.close()


@pytest.mark.parametrize("stride", [0, 799, 1 << 40])
def test_memory_that_is_not_there_changes_nothing(stride: int) -> None:
    bench = Bench()
    bench.draw(0, 0)
    assert not bench.surface.refresh(bench.vm.memory, 0, stride)
    for gpa in ((1 << 20) - 4, 1 << 30, (1 << 64) - 8):
        assert not bench.surface.refresh(bench.vm.memory, gpa, STRIDE)
    end = STRIDE * (HEIGHT - 1) + WIDTH * 4
    assert not bench.surface.refresh(bench.vm.memory, (1 << 20) - end + 4, STRIDE)
    bench.vm.memory.write((1 << 20) - 4, b"\1\2\3\4")
    assert bench.surface.refresh(bench.vm.memory, (1 << 20) - end, STRIDE)
    assert bench.surface.rgb()[-4:] == b"\1\2\3\4"
    bench.vm.close()


@pytest.mark.parametrize("size", [(0, 1), (1, 0), (SIDE + 1, 1), (1, SIDE + 1), (-1, 5)])
def test_impossible_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a screen of"):
        Surface(*size)


def test_what_was_sent_is_what_is_there() -> None:
    """A client that gets every rectangle has the guest's picture, however drawing, looking and sending mix."""
    dice = random.Random(5)
    bench = Bench()
    client = bytearray(WIDTH * HEIGHT * 4)
    for _ in range(300):
        for _ in range(dice.randrange(4)):
            bench.draw(dice.randrange(WIDTH), dice.randrange(HEIGHT), dice.getrandbits(32))
        if dice.random() < 0.5:
            bench.look()
        region = (dice.randrange(WIDTH), dice.randrange(HEIGHT), dice.randrange(WIDTH), dice.randrange(HEIGHT))
        picture = bench.surface.rgb()
        for x, y, width, height in bench.send(*(ALL if dice.random() < 0.3 else region)):
            for row in range(y, y + height):
                at = (row * WIDTH + x) * 4
                client[at : at + width * 4] = picture[at : at + width * 4]
    bench.look()
    picture = bench.surface.rgb()
    for x, y, width, height in bench.send():
        for row in range(y, y + height):
            at = (row * WIDTH + x) * 4
            client[at : at + width * 4] = picture[at : at + width * 4]
    assert bytes(client) == picture
    assert picture == b"".join(bench.vm.memory.read(row * STRIDE, WIDTH * 4) for row in range(HEIGHT))
    bench.vm.close()
