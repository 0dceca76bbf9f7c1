"""Power management from the guest's side: buttons, events, soft-off, the timer and the hotplug ports."""

import asyncio
import random
import time
from collections.abc import Iterator

import pytest

from propolis.devices.pm import PowerManagement
from propolis.devices.power import PowerEvent
from propolis.hypervisor._replay import ReplayVm

SCI = 9
STATUS, ENABLE, CONTROL, TIMER, GPE, HOTPLUG = 0xB000, 0xB002, 0xB004, 0xB008, 0xAFE0, 0xAE00


class Bench:
    """The block and the guest's operating system."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.events: list[PowerEvent] = []
        slot = self.vm.mailbox.register(self._on_power)
        self.pm = PowerManagement(self.vm, slot)
        self.read = self.vm.pio.read
        self.write = self.vm.pio.write

    def _on_power(self, bits: int) -> None:
        self.events.append(PowerEvent(bits))

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()

    def sci(self) -> bool:
        return self.vm.line_level(SCI)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_power_on_state(bench: Bench) -> None:
    assert bench.read(STATUS, 4) == 0
    assert bench.read(CONTROL, 2) == 1
    assert bench.read(GPE, 4) == 0
    assert bench.read(HOTPLUG, 8) == 0
    assert bench.read(0xB000 + 12, 4) == 0
    assert bench.read(0xB03F, 1) == 0
    assert bench.read(0xB040, 1) == 0xFF
    assert not bench.sci()


def test_power_button_raises_the_sci_when_enabled(bench: Bench) -> None:
    bench.pm.press_power_button()
    assert bench.read(STATUS, 2) == 0x0100
    assert not bench.sci()
    bench.write(ENABLE, 2, 0x0120)
    assert bench.sci()
    bench.write(STATUS, 2, 0x0020)  # other bits do not clear it
    assert bench.sci()
    bench.write(STATUS, 2, 0x0100)
    assert not bench.sci()
    assert bench.read(STATUS, 2) == 0
    bench.pm.press_power_button()
    assert bench.sci()
    bench.write(ENABLE, 2, 0)
    assert not bench.sci()


def test_byte_accesses(bench: Bench) -> None:
    bench.pm.press_power_button()
    bench.write(ENABLE + 1, 1, 0x01)
    assert bench.sci()
    assert bench.read(ENABLE, 4) == 0x0001_0100
    assert bench.read(STATUS, 4) == 0x0100_0100
    bench.write(STATUS, 1, 0xFF)
    assert bench.sci()
    bench.write(STATUS + 1, 1, 0x01)
    assert not bench.sci()


def test_one_wide_write_clears_and_enables(bench: Bench) -> None:
    bench.pm.press_power_button()
    bench.write(STATUS, 4, 0x0100_FFFF)
    assert bench.read(STATUS, 4) == 0x0100_0000


def test_only_enable_bits_that_exist(bench: Bench) -> None:
    bench.write(ENABLE, 2, 0xFFFF)
    assert bench.read(ENABLE, 2) == 0x0521


@pytest.mark.parametrize(("value", "is_off"), [(0x2000, True), (0x2001, True), (0x3C00, False), (0x0000, False)])
def test_soft_off(bench: Bench, value: int, is_off: bool) -> None:
    bench.write(CONTROL, 2, value)
    bench.vm.mailbox.dispatch()
    assert bench.events == ([PowerEvent.POWER_OFF] if is_off else [])
    assert bench.read(CONTROL, 2) == value & 0x1C02 | 1  # SLP_EN reads 0, SCI_EN stays


def test_soft_off_by_bytes(bench: Bench) -> None:
    bench.write(CONTROL, 1, 0x20)  # in the lower byte it is nothing
    bench.write(CONTROL + 1, 1, 0x20)
    bench.vm.mailbox.dispatch()
    assert bench.events == [PowerEvent.POWER_OFF]


def test_timer_runs_at_its_frequency(bench: Bench) -> None:
    start, first = time.monotonic(), bench.read(TIMER, 4)
    time.sleep(0.05)
    last, end = bench.read(TIMER, 4), time.monotonic()
    assert 0.049 <= (last - first) / 3579545 <= end - start
    bench.write(TIMER, 4, 0)  # read-only
    assert bench.read(TIMER, 4) >= last


def test_timer_is_32_bits(bench: Bench) -> None:
    bench.pm._pm1.advance(1300)
    assert bench.read(TIMER, 4) == pytest.approx(1300 * 3579545 - 2**32, abs=3579545)


async def test_timer_overflow_raises_the_sci(bench: Bench) -> None:
    bench.pm.start(asyncio.get_running_loop())
    assert bench.read(STATUS, 2) == 0
    bench.pm._pm1.advance(599)
    bench.write(ENABLE, 2, 1)
    assert not bench.sci()
    async with asyncio.timeout(5):
        while not bench.sci():  # noqa: ASYNC110 - the line is plain memory: nothing announces it
            await asyncio.sleep(0.01)
    assert bench.read(STATUS, 2) == 1
    bench.write(STATUS, 2, 1)
    assert not bench.sci()
    await bench.pm.halt()


def test_timer_overflow_by_polling(bench: Bench) -> None:
    bench.pm._pm1.advance(700)
    assert bench.read(STATUS, 2) == 1
    bench.write(STATUS, 2, 1)
    assert bench.read(STATUS, 2) == 0


def test_general_purpose_events(bench: Bench) -> None:
    bench.pm.raise_gpe(1)
    bench.pm.raise_gpe(15)
    assert bench.read(GPE, 2) == 0x8002
    assert not bench.sci()
    bench.write(GPE + 2, 1, 0x02)
    assert bench.sci()
    bench.write(GPE, 1, 0x02)
    assert not bench.sci()
    bench.write(GPE + 3, 1, 0x80)
    assert bench.sci()
    bench.write(GPE, 4, 0x8000_8000)  # clear and enable in one
    assert not bench.sci()
    with pytest.raises(ValueError, match="16"):
        bench.pm.raise_gpe(16)


def test_both_blocks_share_the_sci(bench: Bench) -> None:
    bench.write(ENABLE, 2, 0x0100)
    bench.write(GPE + 2, 1, 1)
    bench.pm.press_power_button()
    bench.pm.raise_gpe(0)
    bench.write(GPE, 1, 1)
    assert bench.sci()
    bench.write(STATUS, 2, 0x0100)
    assert not bench.sci()


def test_hotplug_ports(bench: Bench) -> None:
    gone: list[int] = []
    bench.pm.on_ejected = gone.append
    bench.write(GPE + 2, 1, 2)
    bench.pm.announce_hotplug(added=0x10, unwanted=0x21)
    assert bench.sci()
    assert bench.read(HOTPLUG, 4) == 0x10
    assert bench.read(HOTPLUG + 4, 4) == 0x21
    bench.write(HOTPLUG + 8, 4, 0xFFFF_FFFE)  # what nobody asked back stays
    bench.vm.mailbox.dispatch()
    assert gone == [0x20]
    assert bench.read(HOTPLUG + 4, 4) == 0x01
    assert bench.read(HOTPLUG + 8, 4) == 0


def test_a_new_device_is_told_of_once(bench: Bench) -> None:
    """A later one does not bring its bit back; bytes that were not read stay."""
    bench.pm.announce_hotplug(added=0x8010)
    assert bench.read(HOTPLUG + 4, 4) == 0
    assert bench.read(HOTPLUG, 1) == 0x10
    assert bench.read(HOTPLUG, 4) == 0x8000
    bench.pm.announce_hotplug(added=0x8000_0020)
    assert bench.read(HOTPLUG, 8) == 0x8000_0020
    assert bench.read(HOTPLUG, 4) == 0


def test_a_device_that_is_ejected_is_no_longer_new(bench: Bench) -> None:
    bench.pm.on_ejected = lambda _: None
    bench.pm.announce_hotplug(added=0x30, unwanted=0x10)
    bench.write(HOTPLUG + 8, 4, 0x10)
    bench.vm.mailbox.dispatch()
    assert bench.read(HOTPLUG, 4) == 0x20


def test_reset_is_power_on(bench: Bench) -> None:
    bench.write(ENABLE, 2, 0xFFFF)
    bench.write(GPE + 2, 2, 0xFFFF)
    bench.write(CONTROL, 2, 0x1C02)
    bench.pm.press_power_button()
    bench.pm.announce_hotplug(added=1, unwanted=2)
    assert bench.sci()
    bench.pm.reset()
    test_power_on_state(bench)


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench()
    source = random.Random(seed)
    for _ in range(2000):
        port = source.choice((0xB000, 0xAFE0, 0xAE00)) + source.randrange(-4, 0x44)
        size = source.choice((1, 2, 4, 8))
        match source.randrange(8):
            case 0 | 1 | 2:
                bench.write(port, size, source.getrandbits(64))
            case 3 | 4 | 5:
                bench.read(port, size)
            case 6:
                bench.pm.raise_gpe(source.randrange(16))
            case 7:
                bench.pm.press_power_button()
        assert bench.read(CONTROL, 2) & 0x2001 == 1
    bench.vm.mailbox.dispatch()
    bench.pm.reset()
    test_power_on_state(bench)
    bench.close()
