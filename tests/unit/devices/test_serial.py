"""The 16550A from the guest's side: registers, FIFOs, interrupts, and what a driver's probe finds."""

import asyncio
import random
from collections.abc import Iterator

import pytest

from propolis.devices.serial import PORTS, STREAM_BYTES, Serial
from propolis.hypervisor._replay import ReplayVm

BASE = 0x3F8
DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
OUT2 = 0x08
IRQ = 4


class Bench:
    """One COM1 and the guest that drives it."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.serial = Serial(self.vm, 1)
        self.printed = b""
        self.rooms = 0
        self.serial.on_output = self._on_output
        self.serial.on_input_room = self._on_room

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()

    def _on_output(self, data: bytes) -> None:
        self.printed += data

    def _on_room(self) -> None:
        self.rooms += 1

    def get(self, register: int) -> int:
        return self.vm.pio.read(BASE + register, 1)

    def put(self, register: int, value: int) -> None:
        self.vm.pio.write(BASE + register, 1, value)

    def read_all(self) -> bytes:
        found = bytearray()
        while self.get(LSR) & 1:
            found.append(self.get(DATA))
        return bytes(found)

    def irq(self) -> bool:
        return self.vm.line_level(IRQ)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_power_on_state(bench: Bench) -> None:
    assert [bench.get(r) for r in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]
    assert not bench.irq()


def test_all_four_ports_share_two_interrupts() -> None:
    vm = ReplayVm()
    ports = {number: Serial(vm, number) for number in PORTS}
    for number, (base, irq) in PORTS.items():
        vm.pio.write(base + MCR, 1, OUT2)
        vm.pio.write(base + IER, 1, 1)
        assert ports[number].feed(b"x") == 1
        assert vm.line_level(irq)
    vm.pio.read(PORTS[1][0], 1)
    assert vm.line_level(4)  # COM3 still holds the shared input
    vm.pio.read(PORTS[3][0], 1)
    assert not vm.line_level(4)


def test_output_reaches_the_loop(bench: Bench) -> None:
    for byte in b"hello\x00\xff\x1b":
        bench.put(DATA, byte)
    assert bench.printed == b""
    bench.vm.mailbox.dispatch()
    assert bench.printed == b"hello\x00\xff\x1b"


async def test_a_stream_is_gathered_and_a_character_is_not(bench: Bench) -> None:
    """Each character below is told of by itself, as to a loop that is faster than its guest."""
    pieces: list[bytes] = []
    bench.serial.on_output = pieces.append
    bench.serial.start(asyncio.get_running_loop())

    def say(text: bytes) -> None:
        for byte in text:
            bench.put(DATA, byte)
            bench.vm.mailbox.dispatch()

    await asyncio.sleep(0.01)
    say(b"login: ")
    assert pieces == [bytes([byte]) for byte in b"login: "]
    text = bytes(range(256)) * 8
    say(text)
    assert len(pieces) <= STREAM_BYTES + len(b"login: ")
    async with asyncio.timeout(10):
        while b"".join(pieces) != b"login: " + text:  # noqa: ASYNC110 -- nobody tells
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    count = len(pieces)
    say(b"x")
    assert pieces[count:] == [b"x"]


async def test_what_is_being_gathered_is_shown_when_the_machine_halts(bench: Bench) -> None:
    bench.serial.start(asyncio.get_running_loop())
    for _ in range(2):
        for byte in bytes(2 * STREAM_BYTES):
            bench.put(DATA, byte)
        bench.vm.mailbox.dispatch()
    assert len(bench.printed) == 2 * STREAM_BYTES
    await bench.serial.halt()
    assert len(bench.printed) == 4 * STREAM_BYTES
    await asyncio.sleep(0.01)
    assert len(bench.printed) == 4 * STREAM_BYTES


def test_wide_accesses_are_bytes_in_a_row(bench: Bench) -> None:
    bench.vm.pio.write(BASE + SCRATCH, 2, 0x1234)  # the second byte falls off the end
    assert bench.get(SCRATCH) == 0x34
    assert bench.vm.pio.read(BASE + LSR, 4) == 0xFF34B060


def test_a_guest_that_obeys_thre_loses_nothing(bench: Bench) -> None:
    sent = bytearray()
    source = random.Random(1)
    for _ in range(300_000):
        if not bench.get(LSR) & 0x20:
            assert not bench.get(LSR) & 0x40
            bench.vm.mailbox.dispatch()
        for _ in range(16):  # a FIFO at a time, as drivers do
            byte = source.randrange(256)
            sent.append(byte)
            bench.put(DATA, byte)
        if len(sent) > 300_000:
            break
    for _ in range(20):
        bench.vm.mailbox.dispatch()
    assert bench.printed == bytes(sent)
    assert bench.serial.stats() == {"dropped": 0, "overruns": 0}


def test_a_guest_that_ignores_thre_is_bounded_and_counted(bench: Bench) -> None:
    for _ in range(70_000):
        bench.put(DATA, 0x41)
    assert not bench.get(LSR) & 0x20
    for _ in range(10):
        bench.vm.mailbox.dispatch()
    assert len(bench.printed) == 65536
    assert bench.serial.stats()["dropped"] == 70_000 - 65536
    assert bench.get(LSR) & 0x60 == 0x60


def test_thre_interrupt_when_a_full_ring_drains(bench: Bench) -> None:
    bench.put(MCR, OUT2)
    bench.put(IER, 0x02)
    assert bench.get(IIR) == 0x02
    while bench.get(LSR) & 0x20:
        bench.put(DATA, 0x42)
    assert not bench.irq()
    bench.vm.mailbox.dispatch()
    assert bench.irq()
    assert bench.get(IIR) == 0x02
    assert not bench.irq()  # reading it was the acknowledgement


def test_thre_interrupt_of_each_character_and_of_enabling(bench: Bench) -> None:
    bench.put(MCR, OUT2)
    assert not bench.irq()
    bench.put(IER, 0x02)
    assert bench.irq()
    assert bench.get(IIR) == 0x02
    assert bench.get(IIR) == 0x01
    bench.put(DATA, 0x43)
    assert bench.irq()
    bench.put(IER, 0)
    assert not bench.irq()
    bench.put(IER, 0x02)
    assert bench.get(IIR) == 0x02  # enabling it again tells again, which Linux tests for


def test_interrupt_needs_out2(bench: Bench) -> None:
    bench.put(IER, 0x01)
    bench.serial.feed(b"a")
    assert bench.get(IIR) == 0x04
    assert not bench.irq()
    bench.put(MCR, OUT2)
    assert bench.irq()
    bench.put(MCR, OUT2 | 0x10)  # loopback forces the outputs off
    assert not bench.irq()


def test_input_without_fifo_comes_one_by_one(bench: Bench) -> None:
    bench.put(IER, 0x01)
    bench.put(MCR, OUT2)
    assert bench.serial.feed(b"abc") == 1
    assert bench.irq()
    assert bench.get(IIR) == 0x04
    assert bench.get(DATA) == ord("a")
    assert not bench.irq()
    bench.vm.mailbox.dispatch()
    assert bench.rooms == 1
    assert bench.serial.feed(b"bc") == 1
    bench.vm.mailbox.dispatch()
    assert bench.rooms == 1


@pytest.mark.parametrize(("code", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_levels_and_timeout(bench: Bench, code: int, level: int) -> None:
    bench.put(2, 0x01 | code)
    bench.put(IER, 0x01)
    bench.put(MCR, OUT2)
    assert bench.serial.feed(bytes(range(level))) == level
    assert bench.get(IIR) == 0xC4
    assert bench.irq()
    bench.get(DATA)
    if level > 1:
        assert bench.get(IIR) == 0xCC  # below the trigger level: the character timeout
        assert bench.irq()
    assert bench.read_all() == bytes(range(1, level))
    assert not bench.irq()


def test_fifo_takes_sixteen_and_asks_for_more_once(bench: Bench) -> None:
    bench.put(2, 0x01)
    assert bench.serial.feed(bytes(range(100))) == 16
    assert bench.serial.feed(b"z") == 0
    assert bench.get(LSR) == 0x61  # refused input is not an overrun
    assert bench.read_all() == bytes(range(16))
    bench.vm.mailbox.dispatch()
    assert bench.rooms == 1
    assert bench.serial.feed(b"") == 0
    bench.get(DATA)
    bench.vm.mailbox.dispatch()
    assert bench.rooms == 1


def test_fifo_control(bench: Bench) -> None:
    bench.put(2, 0xC0)  # without the enable bit nothing is programmed
    assert bench.get(IIR) == 0x01
    bench.put(2, 0x01)
    assert bench.get(IIR) == 0xC1
    bench.serial.feed(b"abc")
    bench.put(2, 0x07)
    assert bench.get(LSR) == 0x60
    bench.serial.feed(b"abc")
    bench.put(2, 0x00)  # leaving FIFO mode empties it too
    assert bench.get(LSR) == 0x60
    assert bench.get(IIR) == 0x01


def test_clearing_a_full_fifo_asks_for_input(bench: Bench) -> None:
    bench.put(2, 0x01)
    assert bench.serial.feed(bytes(17)) == 16
    bench.put(2, 0x03)
    bench.vm.mailbox.dispatch()
    assert bench.rooms == 1


@pytest.mark.parametrize("divisor", [0, 1, 12, 65535])
def test_divisor_is_only_remembered(bench: Bench, divisor: int) -> None:
    bench.put(LCR, 0x83)
    bench.put(DATA, divisor & 0xFF)
    bench.put(IER, divisor >> 8)
    assert bench.get(DATA) | bench.get(IER) << 8 == divisor
    bench.put(LCR, 0x03)
    bench.put(DATA, 0x41)
    assert bench.get(IER) == 0
    bench.vm.mailbox.dispatch()
    assert bench.printed == b"A"


def test_loopback_data_and_overrun_without_fifo(bench: Bench) -> None:
    bench.put(MCR, 0x10)
    bench.put(DATA, 0x11)
    bench.put(DATA, 0x22)
    assert bench.get(LSR) == 0x63
    assert bench.get(LSR) == 0x61  # reading cleared the overrun
    assert bench.get(DATA) == 0x22  # a lone buffer keeps the last
    bench.vm.mailbox.dispatch()
    assert bench.printed == b""


def test_loopback_overrun_keeps_a_full_fifo(bench: Bench) -> None:
    bench.put(2, 0x01)
    bench.put(MCR, 0x10)
    bench.put(IER, 0x04)
    for byte in range(20):
        bench.put(DATA, byte)
    assert bench.get(IIR) == 0xC6
    assert bench.get(LSR) == 0x63
    assert bench.get(IIR) == 0xC1
    assert bench.read_all() == bytes(range(16))
    assert bench.serial.stats()["overruns"] == 4


def test_input_waits_while_in_loopback(bench: Bench) -> None:
    bench.put(2, 0x01)
    bench.put(MCR, 0x10)
    assert bench.serial.feed(b"abc") == 0
    bench.put(MCR, 0)
    bench.vm.mailbox.dispatch()
    assert bench.rooms == 1
    assert bench.serial.feed(b"abc") == 3


def test_loopback_modem_lines_and_deltas(bench: Bench) -> None:
    bench.put(MCR, 0x10)
    assert bench.get(MSR) == 0x0B  # DSR, CTS and DCD fell
    for output, status in ((0x01, 0x22), (0x02, 0x11), (0x08, 0x88)):
        bench.put(MCR, 0x10 | output)
        assert bench.get(MSR) == status
        assert bench.get(MSR) == status & 0xF0
        bench.put(MCR, 0x10)
        assert bench.get(MSR) == status & 0x0F
    bench.put(MCR, 0x14)
    assert bench.get(MSR) == 0x40  # a ring is told of when it ends
    bench.put(MCR, 0x10)
    assert bench.get(MSR) == 0x04


def test_modem_status_interrupt_has_the_lowest_priority(bench: Bench) -> None:
    bench.put(IER, 0x0F)
    bench.put(2, 0x01)
    bench.put(MCR, 0x10)
    bench.put(LCR, 0x40)  # a break of its own
    assert bench.get(IIR) == 0xC6
    assert bench.get(LSR) == 0xF9
    assert bench.get(IIR) == 0xC4  # one character is the trigger level
    assert bench.get(DATA) == 0
    assert bench.get(IIR) == 0xC2
    assert bench.get(IIR) == 0xC0
    bench.get(MSR)
    assert bench.get(IIR) == 0xC1


def test_break_is_marked_on_its_character(bench: Bench) -> None:
    bench.put(2, 0x01)
    bench.serial.feed(b"ab")
    bench.serial.feed_break()
    bench.serial.feed(b"c")
    assert bench.get(LSR) == 0xE1  # an error somewhere in the FIFO
    bench.get(DATA)
    bench.get(DATA)
    assert bench.get(LSR) == 0xF9  # and now at its head
    assert bench.get(LSR) == 0x61
    assert bench.get(DATA) == 0
    assert bench.get(DATA) == ord("c")


def test_reset_is_power_on(bench: Bench) -> None:
    for register, value in ((IER, 0x0F), (2, 0xC1), (MCR, 0x0B), (SCRATCH, 0x55), (LCR, 0x9B), (DATA, 7)):
        bench.put(register, value)
    bench.put(LCR, 0)
    bench.put(DATA, 0x41)
    bench.serial.feed(b"abc")
    assert bench.irq()
    bench.serial.reset()
    assert not bench.irq()
    test_power_on_state(bench)
    bench.vm.mailbox.dispatch()
    assert bench.printed == b"A"  # said before the reset, still shown


async def test_halt_shows_the_rest(bench: Bench) -> None:
    bench.put(DATA, 0x41)
    await bench.serial.halt()
    assert bench.printed == b"A"


def test_probe_as_a_pc_driver_does_it(bench: Bench) -> None:
    """Presence by IER, then loopback, then the kind by FIFO bits, the size by overfilling it."""
    put, get = bench.put, bench.get
    put(IER, 0)
    bench.vm.pio.write(0x80, 1, 0)
    assert get(IER) & 0x0F == 0
    put(IER, 0x0F)
    assert get(IER) & 0x0F == 0x0F
    put(IER, 0)
    put(MCR, 0x1A)
    assert get(MSR) & 0xF0 == 0x90
    put(MCR, 0)
    put(LCR, 0xBF)  # no enhanced features behind this one: DLAB alone answers
    put(2, 0)
    put(LCR, 0)
    put(2, 0x01)
    assert get(IIR) >> 6 == 3
    put(LCR, 0x80)
    divisor = get(DATA), get(IER)
    put(LCR, 0)
    put(SCRATCH, 0xA5)
    assert get(SCRATCH) == 0xA5
    put(2, 0)
    put(2, 0x07)
    put(MCR, 0x10)
    put(LCR, 0x80)
    put(DATA, 1)
    put(IER, 0)
    put(LCR, 0x03)
    for i in range(256):
        put(DATA, i)
    count = 0
    while get(LSR) & 1 and count < 256:
        assert get(DATA) == count
        count += 1
    assert count == 16
    put(MCR, 0)
    put(LCR, 0x80)
    put(DATA, divisor[0])
    put(IER, divisor[1])
    put(LCR, 0)
    assert not bench.irq()


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench()
    source = random.Random(seed)
    for _ in range(3000):
        port = BASE + source.randrange(8)
        size = source.choice((1, 1, 1, 2, 4, 8))
        match source.randrange(6):
            case 0 | 1:
                bench.vm.pio.write(port, size, source.getrandbits(64))
            case 2 | 3:
                bench.vm.pio.read(port, size)
            case 4:
                assert 0 <= bench.serial.feed(source.randbytes(source.randrange(40))) <= 16
            case 5:
                bench.vm.mailbox.dispatch()
        pending = bench.vm.pio.read(BASE + IIR, 1)
        assert pending & 0x30 == 0
    bench.serial.reset()
    assert not bench.irq()
    assert bench.get(IIR) == 0x01


def test_a_reset_is_told(bench: Bench) -> None:
    """Before there is room again: what was typed for the guest that is gone is not for the next one."""
    assert bench.serial.feed(bytes(20)) == 1
    bench.serial.on_reset = lambda: told.append(bench.rooms)
    told: list[int] = []
    bench.serial.reset()
    bench.vm.mailbox.dispatch()
    assert (told, bench.rooms) == ([0], 1)
