"""ramfb: what the guest may ask for, and that nothing else has any effect."""

import random
import struct

import pytest

from propolis.devices.fw_cfg import FirmwareConfig
from propolis.devices.ramfb import FILE, SIZE, XRGB8888, Mode, Ramfb
from propolis.display._surface import Surface
from propolis.hypervisor._replay import ReplayVm


def content(
    gpa: int = 0x1000, fourcc: int = XRGB8888, flags: int = 0, width: int = 64, height: int = 32, stride: int = 256
) -> bytes:
    return struct.pack(">QIIIII", gpa, fourcc, flags, width, height, stride)


def screen() -> tuple[ReplayVm, Ramfb]:
    vm = ReplayVm()
    vm.memory.add(0, 1 << 20)
    return vm, Ramfb(vm.memory)


def mode(ramfb: Ramfb) -> Mode | None:
    """As mypy cannot know it from the line before."""
    return ramfb.mode


def test_a_mode() -> None:
    vm, ramfb = screen()
    assert mode(ramfb) is None
    ramfb.configure(content())
    assert mode(ramfb) == Mode(0x1000, 64, 32, 256)
    vm.memory.write(0x1000, b"\x30\x20\x10\x00")
    surface = Surface(64, 32)
    assert ramfb.copy(surface)
    assert surface.rgb()[:4] == b"\x30\x20\x10\x00"
    assert not ramfb.copy(surface)
    assert not ramfb.copy(Surface(32, 32))
    ramfb.configure(content(stride=0))
    assert mode(ramfb) == Mode(0x1000, 64, 32, 256)
    ramfb.reset()
    assert mode(ramfb) is None
    assert ramfb.stats() == {"refused": 0}
    vm.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 0}, {"height": 0}, {"width": 65535, "height": 65535, "stride": 0}, {"width": 4097, "stride": 0},
        {"stride": 255}, {"stride": 0xFFFF_FFFF}, {"fourcc": int.from_bytes(b"XB24", "little")}, {"fourcc": 0},
        {"flags": 1}, {"gpa": (1 << 64) - 100}, {"width": 0x4000_0001, "stride": 4}, {"height": 0xFFFF_FFFF},
    ],
    ids=str,
)  # fmt: skip
def test_refused(wrong: dict[str, int]) -> None:
    vm, ramfb = screen()
    ramfb.configure(content())
    ramfb.configure(content(**wrong))
    assert mode(ramfb) is None
    assert ramfb.stats() == {"refused": 1}
    vm.close()


@pytest.mark.parametrize("size", [0, 27, 29])
def test_a_file_of_another_size(size: int) -> None:
    vm, ramfb = screen()
    ramfb.configure(bytes(size))
    ramfb.configure(b"\1" * size)
    assert mode(ramfb) is None
    vm.close()


async def test_memory_that_has_gone() -> None:
    vm, ramfb = screen()
    ramfb.configure(content())
    vm.memory.write(0x1000, b"\1\1\1\1")
    await ramfb.halt()
    assert not ramfb.copy(Surface(64, 32))
    vm.close()


def test_through_fw_cfg() -> None:
    """As firmware does it: finds the file in the directory and writes it by DMA."""
    vm, ramfb = screen()
    config = FirmwareConfig(vm)
    config.add_writable_file(FILE, SIZE, ramfb.configure)
    config.publish()
    vm.pio.write(0x510, 2, 0x19)
    directory = bytes(vm.pio.read(0x511, 1) for _ in range(4 + 64))
    size, key = struct.unpack_from(">IH", directory, 4)
    assert directory[12:].rstrip(b"\0") == b"etc/ramfb"
    assert size == SIZE
    vm.memory.write(0x8000, content())
    vm.memory.write(0x9000, struct.pack(">IIQ", key << 16 | 0x18, SIZE, 0x8000))
    vm.pio.write(0x514, 4, 0)
    vm.pio.write(0x518, 4, int.from_bytes((0x9000).to_bytes(4, "big"), "little"))
    vm.mailbox.dispatch()
    assert mode(ramfb) == Mode(0x1000, 64, 32, 256)
    vm.close()


@pytest.mark.parametrize("seed", range(5))
def test_fuzz(seed: int) -> None:
    print("seed", seed)
    dice = random.Random(seed)
    vm, ramfb = screen()
    surface = Surface(64, 32)

    def wild(usual: int, bits: int) -> int:
        return dice.choice((usual, usual, 0, 1, dice.getrandbits(bits), (1 << bits) - 1 - dice.randrange(9)))

    for _ in range(500):
        ramfb.configure(
            content(
                gpa=wild(dice.randrange(1 << 20), 64),
                fourcc=dice.choice((XRGB8888, XRGB8888, XRGB8888, dice.getrandbits(32))),
                flags=dice.choice((0, 0, 0, dice.getrandbits(32))),
                width=wild(64, 32),
                height=wild(32, 32),
                stride=wild(256, 32),
            )
        )
        if ramfb.mode is not None and ramfb.mode[1] * ramfb.mode[2] < 1 << 16:
            surface = Surface(ramfb.mode.width, ramfb.mode.height)
        ramfb.copy(surface)
    vm.close()
