"""The keyboard controller with its keyboard and mouse, and bare, from the guest's side: as drivers talk to it."""

import random
from collections.abc import Iterator

import pytest

from propolis.devices.keyboard_controller import KeyboardController
from propolis.devices.power import PowerEvent
from propolis.hypervisor._replay import ReplayVm

DATA, COMMAND = 0x60, 0x64
A, LEFT_SHIFT, F7, RIGHT_CONTROL, UP, PAUSE = 0x1E, 0x2A, 0x41, 0x9D, 0xC8, 0xC6
LEFT, RIGHT, MIDDLE = 1, 2, 4


class Bench:
    """The controller and the guest's driver."""

    def __init__(self, *, has_devices: bool) -> None:
        self.vm = ReplayVm()
        self._events = PowerEvent(0)
        self.device = KeyboardController(self.vm, self.vm.mailbox.register(self._on_power), has_devices=has_devices)
        self.read = self.vm.pio.read
        self.write = self.vm.pio.write
        self.key = self.device.key
        self.move = self.device.move

    def _on_power(self, bits: int) -> None:
        self._events |= PowerEvent(bits)

    def events(self) -> PowerEvent:
        self.vm.mailbox.dispatch()
        found, self._events = self._events, PowerEvent(0)
        return found

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()

    def answers(self) -> bytes:
        found = bytearray()
        while self.read(COMMAND, 1) & 1:
            found.append(self.read(DATA, 1))
        return bytes(found)

    def mouse_answers(self) -> bytes:
        """The same, all of which has to be marked as the mouse's."""
        found = bytearray()
        while (status := self.read(COMMAND, 1)) & 1:
            assert status & 0x20
            found.append(self.read(DATA, 1))
        return bytes(found)

    def control(self, byte: int) -> None:
        self.write(COMMAND, 1, 0x60)
        self.write(DATA, 1, byte)

    def to_keyboard(self, *data: int) -> bytes:
        for byte in data:
            self.write(DATA, 1, byte)
        return self.answers()

    def to_mouse(self, *data: int) -> bytes:
        found = b""
        for byte in data:
            self.write(COMMAND, 1, 0xD4)
            self.write(DATA, 1, byte)
            found += self.mouse_answers()
        return found

    def tap(self, number: int) -> bytes:
        self.key(number, True)
        self.key(number, False)
        return self.answers()


@pytest.fixture
def bare() -> Iterator[Bench]:
    bench = Bench(has_devices=False)
    yield bench
    bench.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    """With devices; interrupts on, translation on, as firmware leaves it."""
    bench = Bench(has_devices=True)
    bench.control(0x47)
    yield bench
    bench.close()


# -- nothing plugged in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "is_reset"), [(0xFE, True), (0xF0, True), (0xFF, False), (0xFD, False)])
def test_pulse(bare: Bench, command: int, is_reset: bool) -> None:
    assert bare.read(COMMAND, 1) & 0x02 == 0  # what a reboot waits for
    bare.write(COMMAND, 1, command)
    assert bool(bare.events() & PowerEvent.RESET) == is_reset


def test_output_port(bare: Bench) -> None:
    bare.write(COMMAND, 1, 0xD0)
    assert bare.answers() == b"\xc3"
    bare.write(COMMAND, 1, 0xD1)
    bare.write(DATA, 1, 0xDF)
    bare.write(COMMAND, 1, 0xDD)
    bare.write(COMMAND, 1, 0xD0)
    assert bare.answers() == b"\xdd"
    assert not bare.events()
    bare.write(COMMAND, 1, 0xD1)
    bare.write(DATA, 1, 0xDE)
    assert bare.events() == PowerEvent.RESET


def test_probe(bare: Bench) -> None:
    """Flush, read and write the command byte, self-test, look for a mouse port, find no device on either."""
    assert bare.answers() == b""
    assert bare.read(COMMAND, 1) & 0x10  # not locked
    bare.write(COMMAND, 1, 0x20)
    control = bare.answers()[0]
    assert control & 0x40
    bare.write(COMMAND, 1, 0xAA)
    assert bare.answers() == b"\x55"
    bare.write(COMMAND, 1, 0x60)
    bare.write(DATA, 1, 0x47)
    bare.write(COMMAND, 1, 0x20)
    assert bare.answers() == b"\x47"
    bare.write(COMMAND, 1, 0xAB)
    assert bare.answers() == b"\x00"
    bare.write(COMMAND, 1, 0xD3)
    bare.write(DATA, 1, 0x5A)
    assert bare.read(COMMAND, 1) & 0x21 == 0x01  # not from a mouse
    assert bare.answers() == b"\x5a"
    bare.write(COMMAND, 1, 0xA9)
    assert bare.answers() == b"\x01"
    bare.write(DATA, 1, 0xF2)
    assert bare.vm.line_level(1)
    assert bare.read(COMMAND, 1) & 0x41 == 0x41  # timed out
    assert bare.answers() == b"\xfe"
    assert not bare.vm.line_level(1)
    bare.write(COMMAND, 1, 0xD4)
    bare.write(DATA, 1, 0xF2)
    assert bare.vm.line_level(12)
    assert not bare.vm.line_level(1)
    assert bare.read(COMMAND, 1) & 0x61 == 0x61
    assert bare.answers() == b"\xfe"
    assert not bare.vm.line_level(12)


def test_the_queue_is_bounded_and_edges_are_kept(bare: Bench) -> None:
    bare.write(COMMAND, 1, 0x60)
    bare.write(DATA, 1, 0x01)
    for _ in range(100):
        bare.write(DATA, 1, 0xED)
    bare.vm.take_interrupts()
    assert bare.answers() == b"\xfe" * 17  # the output buffer and 16 behind it
    assert bare.vm.take_interrupts() == [("line", 1, 0), ("line", 1, 1)] * 16 + [("line", 1, 0)]
    assert bare.read(DATA, 1) == 0xFE  # an empty buffer repeats itself


def test_an_argument_that_never_comes(bare: Bench) -> None:
    bare.write(COMMAND, 1, 0x60)
    bare.write(COMMAND, 1, 0xAA)
    assert bare.answers() == b"\x55"
    bare.write(DATA, 1, 0xFF)  # is for the keyboard now
    assert bare.answers() == b"\xfe"


def test_nothing_plugged_in_has_no_input(bare: Bench) -> None:
    bare.control(0x47)
    bare.key(A, True)
    bare.move(1, 1, 0, LEFT)
    assert bare.answers() == b""


# -- keyboard ----------------------------------------------------------------------------------------------------------


def test_linux_finds_both_ports(bench: Bench) -> None:
    """i8042_check_aux: the loop echoes as from the mouse, the port tests well, its disable bit follows the commands."""
    bench.write(COMMAND, 1, 0xD3)
    bench.write(DATA, 1, 0x5A)
    assert bench.vm.line_level(12)
    assert bench.mouse_answers() == b"\x5a"
    assert not bench.vm.line_level(12)
    for byte in (0xF0, 0x56, 0xA4):  # a multiplexer would answer the last with its version
        bench.write(COMMAND, 1, 0xD3)
        bench.write(DATA, 1, byte)
        assert bench.mouse_answers() == bytes([byte])
    for test in (0xA9, 0xAB):
        bench.write(COMMAND, 1, test)
        assert bench.answers() == b"\x00"
    for command, bit in ((0xA7, 0x20), (0xA8, 0), (0xAD, 0x10), (0xAE, 0)):
        bench.write(COMMAND, 1, command)
        bench.write(COMMAND, 1, 0x20)
        assert bench.answers()[0] & 0x30 == bit


def test_linux_probes_the_keyboard(bench: Bench) -> None:
    """atkbd: identify, LEDs off, defaults, typematic, enable; a translated identity has 41 for 83."""
    assert bench.to_keyboard(0xF2) == b"\xfa\xab\x41"
    assert bench.to_keyboard(0xED, 0x00) == b"\xfa\xfa"
    assert bench.to_keyboard(0xF6) == b"\xfa"
    assert bench.to_keyboard(0xF3, 0x00) == b"\xfa\xfa"
    assert bench.to_keyboard(0xF4) == b"\xfa"
    assert bench.tap(A) == b"\x1e\x9e"


def test_edk2_starts_the_keyboard(bench: Bench) -> None:
    """Ps2KeyboardDxe: self-test, port test, command byte, reset, scan code set 2 under translation, enable."""
    bench.write(COMMAND, 1, 0xAA)
    assert bench.answers() == b"\x55"
    bench.write(COMMAND, 1, 0xAB)
    assert bench.answers() == b"\x00"
    bench.control(0x67)
    assert bench.to_keyboard(0xFF) == b"\xfa\xaa"
    assert bench.to_keyboard(0xF0, 0x02) == b"\xfa\xfa"
    assert bench.to_keyboard(0xF4) == b"\xfa"
    assert bench.tap(UP) == b"\xe0\x48\xe0\xc8"


@pytest.mark.parametrize(
    ("scan_set", "translated", "expected"),
    [
        (2, True, "1e 9e | 2a aa | 41 c1 | e0 1d e0 9d | e0 48 e0 c8 | e1 1d 45 e1 9d c5"),
        (1, False, "1e 9e | 2a aa | 41 c1 | e0 1d e0 9d | e0 48 e0 c8 | e1 1d 45 e1 9d c5"),
        (2, False, "1c f0 1c | 12 f0 12 | 83 f0 83 | e0 14 e0 f0 14 | e0 75 e0 f0 75 | e1 14 77 e1 f0 14 f0 77"),
    ],
)
def test_scan_codes(bench: Bench, scan_set: int, translated: bool, expected: str) -> None:
    bench.control(0x47 if translated else 0x07)
    assert bench.to_keyboard(0xF0, scan_set) == b"\xfa\xfa"
    assert bench.to_keyboard(0xF0, 0) == bytes([0xFA, 0xFA, {1: 1, 2: 0x41 if translated else 2}[scan_set]])
    found = [bench.tap(key).hex(" ") for key in (A, LEFT_SHIFT, F7, RIGHT_CONTROL, UP, PAUSE)]
    assert " | ".join(found) == expected


def test_every_key_comes_through_the_translation(bench: Bench) -> None:
    """Set 2, translated, is set 1: for every key there is."""
    for number in range(256):
        prefix = b"\xe0" if number & 0x80 else b""
        code = number & 0x7F
        if number == PAUSE or code == 0:
            continue
        assert bench.tap(number) == prefix + bytes([code]) + prefix + bytes([code | 0x80]), hex(number)


def test_keyboard_commands(bench: Bench) -> None:
    bench.control(0x07)
    assert bench.to_keyboard(0xEE) == b"\xee"
    assert bench.to_keyboard(0xF2) == b"\xfa\xab\x83"
    assert bench.to_keyboard(0xFE) == b"\x83"  # resend: the last byte sent
    assert bench.to_keyboard(0xF0, 3) == b"\xfa\xfe"
    assert bench.to_keyboard(0xF8) == b"\xfa"
    assert bench.to_keyboard(0xFC, A) == b"\xfa\xfa"
    assert bench.to_keyboard(0x01) == b"\xfe"
    assert bench.to_keyboard(0xF5) == b"\xfa"
    assert bench.tap(A) == b""
    assert bench.to_keyboard(0xF4) == b"\xfa"
    assert bench.tap(A) == b"\x1c\xf0\x1c"


def test_an_answer_goes_before_keys_that_wait(bench: Bench) -> None:
    bench.key(UP, True)
    assert bench.answers() == b"\xe0\x48"
    bench.key(UP, False)
    bench.write(DATA, 1, 0xED)
    assert bench.answers() == b"\xe0\xfa\xc8"  # the first was in the output buffer already


def test_a_disabled_keyboard_keeps_its_keys(bench: Bench) -> None:
    bench.write(COMMAND, 1, 0xAD)
    bench.key(A, True)
    assert bench.answers() == b""
    assert not bench.vm.line_level(1)
    bench.write(COMMAND, 1, 0xAE)
    assert bench.vm.line_level(1)
    assert bench.answers() == b"\x1e"


def test_interrupts_are_as_the_command_byte_says(bench: Bench) -> None:
    bench.control(0x44)
    bench.key(A, True)
    bench.write(COMMAND, 1, 0xD4)
    bench.write(DATA, 1, 0xF2)
    assert not bench.vm.line_level(1)
    bench.control(0x47)
    assert bench.vm.line_level(1)
    assert not bench.vm.line_level(12)
    assert bench.read(DATA, 1) == 0x1E
    assert not bench.vm.line_level(1)
    assert bench.vm.line_level(12)
    assert bench.mouse_answers() == b"\xfa\x00"


def test_no_key_is_stuck_however_slow_the_guest(bench: Bench) -> None:
    """Presses are lost when nobody reads, releases of what was told are not."""
    bench.control(0x07)
    dice = random.Random(8042)
    for _ in range(5000):
        bench.key(dice.randrange(256), dice.random() < 0.7)
    for number in range(256):
        bench.key(number, False)
    assert bench.device.stats()["dropped"] > 0
    down: set[tuple[bool, int]] = set()
    data = bench.answers()
    assert 200 < len(data) <= 257
    extended = released = False
    for byte in data.replace(bytes.fromhex("e11477e1f014f077"), b""):
        if byte == 0xE0:
            extended = True
        elif byte == 0xF0:
            released = True
        else:
            (down.discard if released else down.add)((extended, byte))
            extended = released = False
    assert not down
    assert bench.tap(A) == b"\x1c\xf0\x1c"


def test_a_release_without_its_press_is_not_told(bench: Bench) -> None:
    bench.key(A, False)
    assert bench.answers() == b""
    bench.key(A, True)
    assert bench.to_keyboard(0xFF) == b"\x1e\xfa\xaa"
    bench.key(A, False)
    assert bench.answers() == b""


# -- mouse -------------------------------------------------------------------------------------------------------------


def test_linux_probes_the_mouse(bench: Bench) -> None:
    """psmouse: identify, reset, then knocks until the wheel shows; sets it up and enables it."""
    assert bench.to_mouse(0xF2) == b"\xfa\x00"
    assert bench.to_mouse(0xFF) == b"\xfa\xaa\x00"
    assert bench.to_mouse(0xE8, 0, 0xE8, 0, 0xE8, 0, 0xE9) == b"\xfa" * 7 + b"\x00\x00\x64"  # no Synaptics
    assert bench.to_mouse(0xF3, 200, 0xF3, 200, 0xF3, 80, 0xF2) == b"\xfa" * 7 + b"\x00"  # no Explorer
    assert bench.to_mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF2) == b"\xfa" * 7 + b"\x03"
    assert bench.to_mouse(0xF3, 100, 0xE8, 3, 0xE6, 0xEA, 0xF4) == b"\xfa" * 7
    bench.move(3, -2, 1, LEFT)
    assert bench.vm.line_level(12)
    assert bench.mouse_answers() == b"\x29\x03\xfe\x01"


def test_moves_add_up_and_buttons_do_not(bench: Bench) -> None:
    assert bench.to_mouse(0xF4) == b"\xfa"
    bench.move(0, 0, 0, 0)
    assert bench.mouse_answers() == b""
    bench.move(10, 0, 0, 0)
    bench.move(300, -1, 0, 0)
    bench.move(0, 0, 0, LEFT)
    bench.move(0, 0, 0, 0)
    bench.move(-4, 0, 0, RIGHT | MIDDLE)
    found = bench.mouse_answers()
    # The first packet was on its way when the second move came: 10 of 310, then what is left.
    assert [found[at : at + 3].hex() for at in range(0, len(found), 3)] == [
        "080a00", "28ffff", "082d00", "090000", "080000", "1efc00",
    ]  # fmt: skip


def test_mouse_commands(bench: Bench) -> None:
    assert bench.to_mouse(0xE8, 3, 0xF3, 40, 0xE7, 0xF4) == b"\xfa" * 6
    assert bench.to_mouse(0xE9) == b"\xfa\x30\x03\x28"
    assert bench.to_mouse(0xF5, 0xE6, 0xF0) == b"\xfa" * 3
    assert bench.to_mouse(0xE9) == b"\xfa\x40\x03\x28"
    bench.move(5, 6, 0, MIDDLE)
    assert bench.mouse_answers() == b""  # remote: only when asked
    assert bench.to_mouse(0xEB) == b"\xfa\x0c\x05\x06"
    assert bench.to_mouse(0xEB) == b"\xfa\x0c\x00\x00"
    assert bench.to_mouse(0xE9)[1] == 0x42
    assert bench.to_mouse(0xEE, 0xF4, 0x17, 0xEC) == b"\xfa\xf4\x17\xfa"
    assert bench.to_mouse(0xE8, 4) == b"\xfa\xfe"
    assert bench.to_mouse(0xF3, 0) == b"\xfa\xfe"
    assert bench.to_mouse(0xFE) == b"\xfe"
    assert bench.to_mouse(0x00) == b"\xfe"
    assert bench.to_mouse(0xF6, 0xE9) == b"\xfa\xfa\x02\x02\x64"


def test_a_packet_under_way_is_no_reply(bench: Bench) -> None:
    assert bench.to_mouse(0xF4) == b"\xfa"
    bench.move(1, 1, 0, 0)
    assert bench.read(DATA, 1) == 0x08
    assert bench.read(DATA, 1) == 0x01
    assert bench.to_mouse(0xF2) == b"\x01\xfa\x00"  # the first of it was in the output buffer already


def test_a_slow_guest_costs_nothing(bench: Bench) -> None:
    assert bench.to_mouse(0xF4) == b"\xfa"
    for step in range(10_000):
        bench.move(1 << 30, -(1 << 30), 0, step & 7)
    bench.move(0, 0, 0, 0)
    packets = bench.mouse_answers()
    assert len(packets) % 3 == 0
    assert len(packets) < 300_000
    assert packets[-3] & 7 == 0


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_devices", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_fuzz(seed: int, has_devices: bool) -> None:
    print(f"seed {seed}")
    bench = Bench(has_devices=has_devices)
    dice = random.Random(seed)
    for _ in range(4000):
        kind = dice.randrange(8)
        if kind == 0:
            bench.key(dice.randrange(256), dice.random() < 0.5)
        elif kind == 1:
            x, y, wheel = (dice.randint(-(1 << 31), (1 << 31) - 1) for _ in range(3))
            bench.move(x, y, wheel, dice.randrange(256))
        elif kind < 4:
            bench.read(dice.choice((DATA, COMMAND)), dice.choice((1, 1, 2, 4, 8)))
        else:
            byte = dice.choice((0xD4, 0x60, 0xF4, 0xF3, 200, 100, 80, 0xEB, dice.randrange(256)))
            bench.write(dice.choice((DATA, COMMAND)), 1, byte)
    bench.events()
    bench.device.reset()
    assert bench.answers() == b""
    assert not bench.vm.line_level(1)
    assert not bench.vm.line_level(12)
    if has_devices:
        bench.control(0x47)
        assert bench.to_keyboard(0xF2) == b"\xfa\xab\x41"
        assert bench.to_mouse(0xF2) == b"\xfa\x00"
    bench.close()
