"""The real-time clock from the guest's side: time, modes, alarm, flags, interrupts on both loops."""

import asyncio
import random
import time
from collections.abc import Iterator

import pytest

from propolis.devices import _calendar
from propolis.devices.rtc import MIB, RealTimeClock, memory_bytes
from propolis.hypervisor._replay import ReplayVm

IRQ = 8
A, B, C, D = 10, 11, 12, 13
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
SECOND_NS = 1_000_000_000
MOMENT = 1_700_000_000  # 2023-11-14 22:13:20, a Tuesday


class Bench:
    """A clock and the guest that reads it."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.rtc = RealTimeClock(self.vm, 3072 * MIB, 1024 * MIB)

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()

    def get(self, index: int) -> int:
        self.vm.pio.write(0x70, 1, index)
        return self.vm.pio.read(0x71, 1)

    def put(self, index: int, value: int) -> None:
        self.vm.pio.write(0x70, 1, index)
        self.vm.pio.write(0x71, 1, value)

    def irq(self) -> bool:
        return self.vm.line_level(IRQ)

    def registers(self) -> list[int]:
        return [self.get(index) for index in (0, 2, 4, 7, 8, 9, 0x32)]

    def set_time(self, second: int, minute: int, hour: int, day: int, month: int, year: int) -> None:
        """As a driver does: stop the clock and its divider, write, go on."""
        control, rate = self.get(B), self.get(A) & 0x7F
        self.put(B, control | SET)
        self.put(A, rate | 0x70)
        encode = int if control & BINARY else bcd
        for index, value in (
            (0, second), (2, minute), (4, hour), (7, day), (8, month), (9, year % 100), (0x32, year // 100),
        ):  # fmt: skip
            self.put(index, encode(value))
        self.put(B, control)
        self.put(A, rate)

    def stand_still(self, moment: int = 0, nanoseconds: int = 0) -> None:
        """The host's clock shows this long after MOMENT, until told otherwise."""
        self.rtc._rtc.stand_still((MOMENT + moment) * SECOND_NS + nanoseconds)

    async def interrupt(self) -> None:
        """Waits for the line, as the loop delivers it."""
        async with asyncio.timeout(5):
            while not self.irq():  # noqa: ASYNC110 - the line is plain memory: nothing announces it
                await asyncio.sleep(0.001)


def bcd(value: int) -> int:
    return value // 10 << 4 | value % 10


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_power_on_state(bench: Bench) -> None:
    assert bench.get(A) & 0x7F == 0x26
    assert bench.get(B) == H24
    assert bench.get(C) & 0x80 == 0
    assert bench.get(D) == 0x80
    assert bench.vm.pio.read(0x70, 1) == 0xFF


def test_time_is_utc_in_bcd(bench: Bench) -> None:
    bench.stand_still()
    assert bench.registers() == [0x20, 0x13, 0x22, 0x14, 0x11, 0x23, 0x20]
    assert bench.get(6) == 3
    bench.stand_still(5 * 86400 + 45, SECOND_NS - 1)
    assert bench.registers() == [0x05, 0x14, 0x22, 0x19, 0x11, 0x23, 0x20]
    assert bench.get(6) == 1


def test_time_follows_the_host(bench: Bench) -> None:
    before = int(time.time())
    while True:  # the registers belong together when no second ends between them
        registers = bench.registers()
        if bench.get(0) == registers[0]:
            break
    candidates = []
    for moment in range(before, int(time.time()) + 1):
        t = time.gmtime(moment)
        fields = (t.tm_sec, t.tm_min, t.tm_hour, t.tm_mday, t.tm_mon, t.tm_year % 100, t.tm_year // 100)
        candidates.append([bcd(value) for value in fields])
    assert registers in candidates


def test_nmi_bit_of_the_index_is_ignored(bench: Bench) -> None:
    bench.put(0x20 | 0x80, 0x5A)
    assert bench.get(0x20) == 0x5A


@pytest.mark.parametrize("binary", [0, BINARY])
@pytest.mark.parametrize(
    ("hour", "shown"), [(0, (12, 0)), (1, (1, 0)), (11, (11, 0)), (12, (12, 0x80)), (13, (1, 0x80)), (23, (11, 0x80))]
)
def test_twelve_hours(bench: Bench, binary: int, hour: int, shown: tuple[int, int]) -> None:
    encode = int if binary else bcd
    bench.put(B, H24 | binary)
    bench.set_time(0, 0, hour, 1, 6, 2020)
    bench.put(B, binary)
    assert bench.get(4) == encode(shown[0]) | shown[1]
    bench.put(4, encode(shown[0]) | shown[1])  # and back
    bench.put(B, H24 | binary)
    assert bench.get(4) == encode(hour)


@pytest.mark.parametrize(
    ("year", "month", "day"),
    [(1970, 1, 1), (1999, 12, 31), (2000, 2, 29), (2024, 2, 29), (2100, 2, 28), (2250, 12, 31)],
)
def test_set_time_as_a_driver_does(bench: Bench, year: int, month: int, day: int) -> None:
    bench.stand_still()
    bench.set_time(58, 59, 22, day, month, year)
    assert bench.registers() == [bcd(v) for v in (58, 59, 22, day, month, year % 100, year // 100)]


def test_date_carries_over_midnight(bench: Bench) -> None:
    bench.stand_still()
    bench.put(B, H24 | BINARY)
    bench.set_time(59, 59, 23, 28, 2, 2023)
    bench.put(0, 60)  # a second later
    assert bench.registers() == [0, 0, 0, 1, 3, 23, 20]
    bench.set_time(59, 59, 23, 28, 2, 2024)
    bench.stand_still(1)
    assert bench.registers() == [0, 0, 0, 29, 2, 24, 20]


def test_stopped_clock_shows_what_was_written(bench: Bench) -> None:
    bench.put(B, SET | H24)
    for index in (0, 2, 4, 6, 7, 8, 9, 0x32):
        bench.put(index, 0xFF)
    assert all(bench.get(index) == 0xFF for index in (0, 2, 4, 6, 7, 8, 9, 0x32))
    assert bench.get(A) & 0x80 == 0
    bench.put(B, H24)
    assert all(bench.get(index) & 0x0F <= 9 for index in (0, 2, 4, 7, 8, 9))


def test_set_bit_disables_update_interrupt(bench: Bench) -> None:
    bench.put(B, SET | UIE | AIE | H24)
    assert bench.get(B) == SET | AIE | H24


def test_set_and_clear_keeps_time(bench: Bench) -> None:
    bench.stand_still(0, SECOND_NS - 1)
    before = bench.registers()
    bench.put(B, SET | H24)
    bench.put(B, H24)
    assert bench.registers() == before
    bench.stand_still(1)
    assert bench.registers() == [before[0] + 1, *before[1:]]


def test_update_in_progress_is_seen_before_a_second(bench: Bench) -> None:
    """From 2228 us before: until then a guest that saw no update may read all registers."""
    bench.stand_still()
    bench.set_time(10, 0, 0, 1, 1, 2020)  # half a second from here to the next
    bench.get(C)
    for moment, updating, second in (
        (0, 0, 0x10),
        (SECOND_NS // 2 - 2_228_001, 0, 0x10),
        (SECOND_NS // 2 - 2_228_000, 0x80, 0x10),
        (SECOND_NS // 2 - 1, 0x80, 0x10),
        (SECOND_NS // 2, 0, 0x11),
        (SECOND_NS * 3 // 2 - 1, 0x80, 0x11),
        (SECOND_NS * 3 // 2, 0, 0x12),
    ):
        bench.stand_still(0, moment)
        assert (bench.get(A) & 0x80, bench.get(0)) == (updating, second), moment
        if moment < SECOND_NS // 2:
            assert not bench.get(C) & 0x10
    assert bench.get(C) & 0x10


def test_flags_without_interrupts(bench: Bench) -> None:
    time.sleep(0.002)
    assert bench.get(C) & 0xC0 == 0x40  # periodic at 1024 Hz, and no interrupt
    assert not bench.irq()
    bench.put(A, 0x20)
    bench.get(C)
    time.sleep(0.002)
    assert bench.get(C) & 0x40 == 0


ALARMS = {  # at 13:00:00: seconds, minutes and hours of the alarm, and whether it rings
    (0x00, 0x00, 0x13): True,
    (0xFF, 0x00, 0x13): True,
    (0xC0, 0xC0, 0xFF): True,
    (0x00, 0xFF, 0xFF): True,
    (0x01, 0xFF, 0xFF): False,
    (0x00, 0x00, 0x14): False,
    (0x60, 0xFF, 0xFF): False,
    (0xFF, 0x75, 0xFF): False,
    (0xFF, 0xFF, 0x25): False,
}


async def test_alarms() -> None:
    """All at once: each takes the half second from the setting of the clock to its next second."""
    benches = {alarm: Bench() for alarm in ALARMS}
    for alarm, bench in benches.items():
        bench.stand_still()
        bench.rtc.start(asyncio.get_running_loop())
        bench.set_time(59, 59, 12, 1, 1, 2020)
        for index, value in zip((1, 3, 5), alarm, strict=True):
            bench.put(index, value)
        bench.get(C)
        bench.put(B, H24 | AIE)
        bench.rtc._rtc.tick()  # the timer may be early
        assert not bench.irq()
        bench.stand_still(0, SECOND_NS // 2)
    for alarm, bench in benches.items():
        assert bench.registers()[:3] == [0x00, 0x00, 0x13]
        if ALARMS[alarm]:
            await bench.interrupt()
            assert bench.get(C) & 0xA0 == 0xA0
            assert not bench.irq()
        else:
            bench.rtc._rtc.tick()
            assert not bench.irq()
            assert bench.get(C) & 0x20 == 0
        await bench.rtc.halt()
        bench.close()


async def test_update_ended_interrupt(bench: Bench) -> None:
    """What a driver does to wait for the next second."""
    bench.rtc.start(asyncio.get_running_loop())
    bench.set_time(10, 0, 0, 1, 1, 2020)
    bench.get(C)
    bench.put(B, H24 | UIE)
    await bench.interrupt()
    assert bench.get(0) == 0x11
    assert bench.get(C) & 0x90 == 0x90
    assert not bench.irq()
    assert bench.get(C) & 0x80 == 0
    await bench.interrupt()
    assert bench.get(0) == 0x12
    await bench.rtc.halt()


async def test_periodic_interrupt_waits_for_the_guest(bench: Bench) -> None:
    bench.rtc.start(asyncio.get_running_loop())
    bench.put(A, 0x26)
    bench.put(B, H24 | PIE)
    for _ in range(20):
        await bench.interrupt()
        assert bench.get(C) & 0xC0 == 0xC0
    await bench.interrupt()
    bench.vm.take_interrupts()
    await asyncio.sleep(0.02)  # some twenty periods
    assert bench.vm.take_interrupts() == []
    assert bench.get(C) & 0xC0 == 0xC0  # that count as one
    await bench.rtc.halt()


async def test_periodic_rate(bench: Bench) -> None:
    bench.rtc.start(asyncio.get_running_loop())
    bench.put(A, 0x2C)  # 16 Hz
    bench.get(C)
    bench.put(B, H24 | PIE)
    start = time.monotonic()
    for _ in range(4):
        await bench.interrupt()
        bench.get(C)
    assert 3 / 16 <= time.monotonic() - start < 2
    await bench.rtc.halt()


async def test_paused_clock_interrupts_after_resume(bench: Bench) -> None:
    bench.rtc.start(asyncio.get_running_loop())
    bench.rtc.pause()
    bench.put(A, 0x28)  # 256 Hz
    bench.put(B, H24 | PIE)
    bench.get(C)  # last: an access tells of a period that has passed, whoever sleeps
    await asyncio.sleep(0.01)
    assert not bench.irq()
    bench.rtc.resume()
    await bench.interrupt()
    await bench.rtc.halt()


def test_memory_sizes(bench: Bench) -> None:
    assert bench.get(0x15) | bench.get(0x16) << 8 == 640
    assert bench.get(0x17) | bench.get(0x18) << 8 == 0xFFFF
    assert bench.get(0x30) | bench.get(0x31) << 8 == 0xFFFF
    assert bench.get(0x34) | bench.get(0x35) << 8 == (3072 - 16) * 16
    assert bench.get(0x5B) | bench.get(0x5C) << 8 | bench.get(0x5D) << 16 == 1024 * 16


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1 * MIB, 0, (640, 0, 0, 0)),
        (512 * 1024, 0, (512, 0, 0, 0)),
        (64 * MIB, 0, (640, 63 * 1024, 48 * 16, 0)),
        (65 * MIB, 0, (640, 0xFFFF, 49 * 16, 0)),
        (3 << 30, 1 << 40, (640, 0xFFFF, 3056 * 16, 0xFFFFFF)),  # one more than fits
        (3 << 30, (1 << 40) - 65536, (640, 0xFFFF, 3056 * 16, 0xFFFFFF)),
    ],
)
def test_memory_sizes_are_clamped(low: int, high: int, expected: tuple[int, ...]) -> None:
    found = memory_bytes(low, high)
    assert found[0x15] | found[0x16] << 8 == expected[0]
    assert found[0x17] | found[0x18] << 8 == expected[1]
    assert found[0x30] | found[0x31] << 8 == expected[1]
    assert found[0x34] | found[0x35] << 8 == expected[2]
    assert found[0x5B] | found[0x5C] << 8 | found[0x5D] << 16 == expected[3]


def test_reset_keeps_time_and_memory(bench: Bench) -> None:
    bench.stand_still()
    bench.set_time(0, 30, 7, 4, 7, 2031)
    bench.put(0x40, 0x77)
    bench.put(0x34, 0)
    bench.put(B, PIE | UIE | BINARY)
    bench.put(A, 0x7F)
    bench.rtc.reset()
    test_power_on_state(bench)
    assert bench.registers()[1:] == [bcd(v) for v in (30, 7, 4, 7, 31, 20)]
    assert bench.get(0x40) == 0x77
    assert bench.get(0x34) | bench.get(0x35) << 8 == (3072 - 16) * 16  # the machine's word, not the guest's
    assert not bench.irq()


def test_calendar_agrees_with_the_library() -> None:
    source = random.Random(7)
    for _ in range(5000):
        moment = source.randrange(253402300800)
        t = time.gmtime(moment)
        assert _calendar.date(moment) == (
            t.tm_year, t.tm_mon, t.tm_mday, (t.tm_wday + 1) % 7 + 1, t.tm_hour, t.tm_min, t.tm_sec,
        )  # fmt: skip
        assert _calendar.seconds(t.tm_year, t.tm_mon, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec) == moment
    for odd in ((0, 0, 0, 0, 0, 0), (16665, 255, 255, 255, 255, 255), (1969, 12, 31, 23, 59, 59)):
        assert 0 <= _calendar.seconds(*odd) <= 253402300799
    assert _calendar.date(-(2**62)) == _calendar.date(0)
    assert _calendar.date(2**62) == _calendar.date(253402300799)


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench()
    source = random.Random(seed)
    for _ in range(2000):
        port = source.choice((0x70, 0x71))
        size = source.choice((1, 1, 1, 2, 4, 8))
        if source.randrange(3):
            index = source.choice((*range(14), 0x32, source.randrange(256)))
            bench.vm.pio.write(port, size, index if port == 0x70 else source.getrandbits(64))
        else:
            bench.vm.pio.read(port, size)
    bench.rtc.reset()
    bench.get(C)
    assert not bench.irq()
    test_power_on_state(bench)
    bench.put(B, H24)
    assert all(bench.get(i) & 0x0F <= 9 and bench.get(i) >> 4 <= 9 for i in (0, 2, 4, 7, 8, 9))
    bench.close()
