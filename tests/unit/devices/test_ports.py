"""Resets, the debug console and pvpanic, from the guest's side."""

import random
from collections.abc import Iterator

import pytest

from propolis.devices.pci.chipset import Chipset
from propolis.devices.ports import DebugConsole, LegacyPorts, Pvpanic
from propolis.devices.power import PowerEvent
from propolis.hypervisor._replay import ReplayVm


class Bench:
    """The ports and the guest that pokes them."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self._events = PowerEvent(0)
        self.text = b""
        slot = self.vm.mailbox.register(self._on_power)
        self.ports = LegacyPorts(self.vm, slot)
        self.chipset = Chipset(self.vm, self.ports.reset_control)
        self.debug = DebugConsole(self.vm)
        self.debug.on_output = self._on_text
        self.pvpanic = Pvpanic(self.vm, slot)
        self.read = self.vm.pio.read
        self.write = self.vm.pio.write

    def _on_power(self, bits: int) -> None:
        self._events |= PowerEvent(bits)

    def _on_text(self, data: bytes) -> None:
        self.text += data

    def events(self) -> PowerEvent:
        self.vm.mailbox.dispatch()
        found, self._events = self._events, PowerEvent(0)
        return found

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.mark.parametrize("value", [0x04, 0x06, 0x0E])
def test_reset_control(bench: Bench, value: int) -> None:
    bench.write(0xCF9, 1, 0x02)
    assert not bench.events()
    assert bench.read(0xCF9, 1) == 0x02
    bench.write(0xCF9, 1, value)
    assert bench.events() == PowerEvent.RESET
    bench.ports.reset()
    assert bench.read(0xCF9, 1) == 0


def test_reset_control_is_not_the_configuration_address(bench: Bench) -> None:
    bench.write(0xCF8, 4, 0x8000_0600)
    bench.write(0xCF8, 2, 0x0606)
    bench.write(0xCF9, 2, 0x0606)
    assert not bench.events()
    assert bench.read(0xCF8, 4) == 0x8000_0600
    bench.write(0xCF9, 1, 0x06)
    assert bench.read(0xCF8, 4) == 0x8000_0600


def test_fast_a20(bench: Bench) -> None:
    assert bench.read(0x92, 1) == 0x02
    bench.write(0x92, 1, 0x00)
    assert bench.read(0x92, 1) == 0x00
    bench.write(0x92, 1, 0x03)
    assert bench.events() == PowerEvent.RESET
    assert bench.read(0x92, 1) == 0x02


def test_post_code(bench: Bench) -> None:
    bench.write(0x80, 1, 0xA5)
    assert bench.read(0x80, 1) == 0xA5


def test_debug_console(bench: Bench) -> None:
    assert bench.read(0x402, 1) == 0xE9
    for byte in b"SEC entry\n":
        bench.write(0x402, 1, byte)
    bench.vm.mailbox.dispatch()
    assert bench.text == b"SEC entry\n"
    for _ in range(70_000):
        bench.write(0x402, 1, 0x2E)
    for _ in range(8):
        bench.vm.mailbox.dispatch()
    assert len(bench.text) == 10 + 65536
    assert bench.debug.stats() == {"dropped": 70_000 - 65536}


def test_pvpanic(bench: Bench) -> None:
    assert bench.read(0x505, 1) == 0x03
    bench.write(0x505, 1, 0x01)
    assert bench.events() == PowerEvent.PANICKED
    bench.write(0x505, 1, 0x03)
    assert bench.events() == PowerEvent.PANICKED | PowerEvent.CRASH_LOADED
    bench.write(0x505, 1, 0xFC)
    assert not bench.events()
    assert bench.pvpanic.stats() == {"panicked": 2, "crash_loaded": 1}


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench()
    source = random.Random(seed)
    for _ in range(3000):
        port = source.choice((0x80, 0x92, 0x402, 0x505, 0xCF8, 0xCF9, 0xCFC, 0xCFF))
        size = source.choice((1, 1, 1, 2, 4, 8))
        if source.randrange(2):
            bench.write(port, size, source.getrandbits(64))
        else:
            bench.read(port, size)
    bench.vm.mailbox.dispatch()
    bench.ports.reset()
    assert bench.read(0x92, 1) == 0x02
    bench.close()
