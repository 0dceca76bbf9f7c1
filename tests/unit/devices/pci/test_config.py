"""Configuration space from the guest's side: mechanism 1, BARs, INTx through PIRQ, hostile accesses."""

import random
from collections.abc import Iterator

import pytest

from propolis._bus import Window
from propolis._interrupts import Doorbell
from propolis.devices.pci._function import PciFunction
from propolis.devices.pci.bus import Windows
from propolis.devices.pci.chipset import Chipset
from propolis.errors import ConfigError
from propolis.hypervisor._replay import ReplayVm

COMMAND, STATUS, BAR0, LINE, PIN = 0x04, 0x06, 0x10, 0x3C, 0x3D
IO, MEMORY, MASTER, INTX_DISABLE = 1, 2, 4, 0x400


class Bench:
    """A chipset, one function with all kinds of BAR, and a guest."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.chipset = Chipset(self.vm)
        self.bells = {kind: Doorbell(self.vm, kind) for kind in ("io", "mmio32", "mmio64")}
        self.device = PciFunction(
            self.vm, "test", vendor=0x1AF4, device=0x1041, subsystem_vendor=0x1AF4, subsystem=1, class_code=0x020000,
            revision=1,
        )  # fmt: skip
        self.device.add_bar(0, "io", 0x40, self.bells["io"])
        self.device.add_bar(1, "mmio32", 0x1000, self.bells["mmio32"])
        self.device.add_bar(2, "mmio64", 0x4000, self.bells["mmio64"])
        self.chipset.bus.add(self.device, 5)

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()

    def address(self, offset: int, slot: int = 5, number: int = 0, bus: int = 0) -> None:
        self.vm.pio.write(0xCF8, 4, 0x8000_0000 | bus << 16 | slot << 11 | number << 8 | offset & 0xFC)

    def get(self, offset: int, size: int, slot: int = 5, number: int = 0) -> int:
        self.address(offset, slot, number)
        return self.vm.pio.read(0xCFC + (offset & 3), size)

    def put(self, offset: int, size: int, value: int, slot: int = 5, number: int = 0) -> None:
        self.address(offset, slot, number)
        self.vm.pio.write(0xCFC + (offset & 3), size, value)

    def mapped(self) -> dict[str, int]:
        found = self.vm.mmio.mappings() + self.vm.pio.mappings()
        return {name: base for base, _, name in found if name in self.bells}


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_identities(bench: Bench) -> None:
    assert bench.get(0, 4, 0) == 0x1237_8086
    assert bench.get(0x2C, 4, 0) == 0xFFFE_01DE
    assert bench.get(0x0A, 2, 0) == 0x0600
    assert bench.get(0, 4, 1) == 0x7000_8086
    assert bench.get(0x2C, 4, 1) == 0xFFFD_01DE
    assert bench.get(0x0E, 1, 1) == 0x80
    assert bench.get(0, 4, 1, 3) == 0x7113_8086
    assert bench.get(0x2C, 4, 1, 3) == 0xFFFC_01DE
    assert bench.get(0x08, 4, 1, 3) == 0x0680_0003
    assert bench.get(0x40, 4, 1, 3) == 0xB001
    assert bench.get(0x80, 1, 1, 3) == 1
    assert bench.get(0x90, 4, 1, 3) == 0xB101
    assert bench.get(LINE, 2, 1, 3) == 0x0109
    bench.put(0x82, 1, 0x02, 1)
    assert bench.get(0x82, 1, 1) == 0x02
    bench.put(0x40, 4, 0xFFFF_FFFF, 1, 3)
    bench.put(0, 4, 0, 1, 3)
    assert bench.get(0x40, 4, 1, 3) == 0xB001
    assert bench.get(0, 4, 1, 3) == 0x7113_8086


def test_mechanism_1_is_found(bench: Bench) -> None:
    """As kernels look for it: a byte to 0xCFB changes nothing, the latch keeps its enable bit."""
    bench.vm.pio.write(0xCFB, 1, 1)
    bench.vm.pio.write(0xCF8, 4, 0x8000_0000)
    assert bench.vm.pio.read(0xCF8, 4) == 0x8000_0000
    bench.vm.pio.write(0xCF8, 4, 0xFFFF_FFFF)
    assert bench.vm.pio.read(0xCF8, 4) == 0x80FF_FFFC
    bench.vm.pio.write(0xCF8, 2, 0)
    bench.vm.pio.write(0xCF9, 1, 0)
    bench.vm.pio.write(0xCFA, 2, 0)
    assert bench.vm.pio.read(0xCF8, 4) == 0x80FF_FFFC


def test_accesses_of_every_width_and_offset(bench: Bench) -> None:
    image = b"".join(bench.get(i, 1).to_bytes(1, "little") for i in range(256))
    assert image[:4] == bytes.fromhex("f41a4110")
    for offset in range(256):
        for size in (1, 2, 4):
            inside = min(size, 4 - (offset & 3))
            expected = image[offset : offset + inside]
            # Past 0xCFF nobody answers.
            assert bench.get(offset, size).to_bytes(size, "little") == expected + b"\xff" * (size - inside)


def test_an_access_that_begins_below_the_data_ports(bench: Bench) -> None:
    bench.address(0)
    assert bench.vm.pio.read(0xCFA, 4) == 0x1AF4_FFFF
    assert bench.vm.pio.read(0xCF9, 4) == 0xF4FF_FFFF
    bench.address(LINE)
    bench.vm.pio.write(0xCFB, 2, 0x5500)
    assert bench.get(LINE, 1) == 0x55
    assert bench.vm.pio.read(0xCF8, 8) >> 32 == bench.get(LINE, 4)


@pytest.mark.parametrize(
    ("slot", "number", "bus"), [(31, 0, 0), (5, 1, 0), (1, 1, 0), (0, 7, 0), (1, 0, 1), (5, 0, 255), (6, 3, 0)]
)
def test_what_is_absent_reads_ones(bench: Bench, slot: int, number: int, bus: int) -> None:
    for offset in (0, 4, 0x10, 0xFC):
        bench.address(offset, slot, number, bus)
        assert bench.vm.pio.read(0xCFC, 4) == 0xFFFF_FFFF
        bench.vm.pio.write(0xCFC, 4, 0xFFFF_FFFF)
        assert bench.vm.pio.read(0xCFC, 4) == 0xFFFF_FFFF


def test_data_ports_are_off_without_the_enable_bit(bench: Bench) -> None:
    bench.vm.pio.write(0xCF8, 4, 5 << 11)
    assert bench.vm.pio.read(0xCFC, 4) == 0xFFFF_FFFF


def test_bar_sizing(bench: Bench) -> None:
    for offset, expected in ((0x10, 0xFFFF_FFC1), (0x14, 0xFFFF_F000), (0x18, 0xFFFF_C004), (0x1C, 0xFFFF_FFFF)):
        bench.put(offset, 4, 0xFFFF_FFFF)
        assert bench.get(offset, 4) == expected
        bench.put(offset, 4, 0)
        assert bench.get(offset, 4) == (expected & 7 if offset != 0x1C else 0)
    for offset in (0x20, 0x24, 0x28, 0x30):  # no BAR 4 and 5, no expansion ROM
        bench.put(offset, 4, 0xFFFF_FFFF)
        assert bench.get(offset, 4) == 0


def test_bars_answer_where_they_are_put(bench: Bench) -> None:
    bench.put(0x10, 4, 0xC100)
    bench.put(0x14, 4, 0xC000_1000)
    bench.put(0x18, 4, 0x0000_4000)
    bench.put(0x1C, 4, 0x80)
    assert bench.mapped() == {}
    bench.put(COMMAND, 2, IO)
    assert bench.mapped() == {"io": 0xC100}
    bench.put(COMMAND, 2, IO | MEMORY)
    assert bench.mapped() == {"io": 0xC100, "mmio32": 0xC000_1000, "mmio64": 0x80_0000_4000}
    bench.vm.mmio.write(0xC000_1000, 4, 1)
    bench.vm.mmio.write(0x80_0000_7FFF, 1, 1)
    bench.vm.mmio.write(0x80_0000_8000, 1, 1)
    assert bench.bells["mmio32"].drain() == 1
    assert bench.bells["mmio64"].drain() == 1
    bench.put(0x14, 4, 0xD000_0FFF)  # moves while it is on; low bits do not exist
    assert bench.mapped()["mmio32"] == 0xD000_0000
    bench.put(0x1C, 1, 0x81)  # the halves move by themselves, even by a byte
    assert bench.mapped()["mmio64"] == 0x81_0000_4000
    bench.put(COMMAND, 1, 0)
    assert bench.mapped() == {}


@pytest.mark.parametrize("base", [0, 0xFFFF_FFFF, 0x1_0000, 0xFFC1_0000])
def test_an_io_bar_outside_the_ports_is_not_decoded(bench: Bench, base: int) -> None:
    bench.put(COMMAND, 2, IO)
    bench.put(0x10, 4, 0xC000)
    bench.put(0x10, 4, base)
    assert "io" not in bench.mapped()
    bench.put(0x10, 4, 0xFFC0)
    assert bench.mapped()["io"] == 0xFFC0


def test_bars_over_each_other_and_over_fixed_ports_are_harmless(bench: Bench) -> None:
    other = PciFunction(bench.vm, "other", vendor=1, device=2)
    bell = Doorbell(bench.vm, "other bell")
    other.add_bar(0, "mmio32", 0x1000, bell)
    bench.chipset.bus.add(other, 6)
    bench.put(0x14, 4, 0xC000_0000)
    bench.put(COMMAND, 2, IO | MEMORY)
    bench.put(0x10, 4, 0xC000_0000, 6)
    bench.put(COMMAND, 2, MEMORY, 6)
    bench.vm.mmio.write(0xC000_0000, 4, 1)
    assert (bench.bells["mmio32"].drain(), bell.drain()) == (1, 0)
    bench.put(0x14, 4, 0xC100_0000)  # the one that was hidden appears
    bench.vm.mmio.write(0xC000_0000, 4, 1)
    assert (bench.bells["mmio32"].drain(), bell.drain()) == (0, 1)
    bench.put(0x10, 4, 0xCC0)  # over the configuration ports
    assert bench.get(0, 4) == 0x1041_1AF4
    assert bench.vm.pio.read(0xCF8, 4) == 0x8000_2800


def test_writable_bits_of_the_command_register(bench: Bench) -> None:
    bench.put(COMMAND, 4, 0xFFFF_FFFF)
    assert bench.get(COMMAND, 4) == 0x0000_0547
    assert bench.device.is_bus_master is True
    bench.put(COMMAND, 2, 0)
    assert [bench.device.is_bus_master] == [False]
    bench.put(COMMAND, 2, 0xFFFF, 0)
    assert bench.get(COMMAND, 2, 0) & 0x07 == 0x06  # the bridges' are always on
    bench.put(COMMAND, 2, 0, 1)
    assert bench.get(COMMAND, 2, 1) & 0x07 == 0x07


def test_capability_list(bench: Bench) -> None:
    device = PciFunction(bench.vm, "capable", vendor=1, device=2)
    assert device.read(0x34, 1) == 0
    first = device.add_capability(0x09, bytes(range(14)))
    second = device.add_capability(0x09, b"\x01\x02\x03", b"\x00\xff\x00")
    third = device.add_msix(4, 1, 0x1000, 0x1800)
    bench.chipset.bus.add(device, 9)
    assert third.count == 4
    assert bench.get(STATUS, 1, 9) & 0x10
    assert bench.get(0x34, 1, 9) == first == 0x40
    assert bench.get(first + 1, 1, 9) == second == 0x50
    offset = bench.get(second + 1, 1, 9)
    assert bench.get(offset, 4, 9) == 0x0003_0011
    assert bench.get(offset + 4, 4, 9) == 0x1001
    assert bench.get(offset + 8, 4, 9) == 0x1801
    bench.put(second, 4, 0xFFFF_FFFF, 9)
    assert [bench.get(second + i, 1, 9) for i in range(5)] == [0x09, offset, 0x01, 0xFF, 0x03]
    with pytest.raises(ValueError, match="already"):
        device.add_capability(0x09, b"")


def test_a_full_capability_list_is_refused(bench: Bench) -> None:
    device = PciFunction(bench.vm, "full", vendor=1, device=2)
    device.add_capability(0x09, bytes(180))
    with pytest.raises(ValueError, match="full"):
        device.add_capability(0x09, bytes(20))


@pytest.mark.parametrize(
    ("index", "kind", "size"),
    [(6, "io", 16), (-1, "io", 16), (5, "mmio64", 16), (4, "mmio32", 24), (4, "mmio32", 8), (4, "rom", 16)],
)
def test_impossible_bars_are_refused(bench: Bench, index: int, kind: str, size: int) -> None:
    device = PciFunction(bench.vm, "odd", vendor=1, device=2)
    with pytest.raises(ValueError, match="odd"):
        device.add_bar(index, kind, size, Window("window"))


def test_intx_follows_the_disable_bit_and_shows_in_status(bench: Bench) -> None:
    bench.chipset.assign()
    irq = bench.get(LINE, 1)
    assert bench.get(PIN, 1) == 2  # function 0 has INTB
    assert irq == 11  # device 5 on link B
    bench.device.drive_intx(True)
    assert bench.vm.line_level(irq)
    assert bench.get(STATUS, 1) & 0x08
    bench.put(COMMAND, 2, INTX_DISABLE)
    assert not bench.vm.line_level(irq)
    assert bench.get(STATUS, 1) & 0x08
    bench.put(COMMAND, 2, 0)
    assert bench.vm.line_level(irq)
    bench.device.drive_intx(False)
    assert not bench.vm.line_level(irq)
    assert not bench.get(STATUS, 1) & 0x08


def test_pirq_routing_moves_an_asserted_line(bench: Bench) -> None:
    bench.device.drive_intx(True)
    bench.vm.take_interrupts()
    bench.put(0x61, 1, 11, 1)
    assert bench.vm.take_interrupts() == [("line", 11, 1)]
    bench.put(0x60, 4, 0x05_05_07_05, 1)  # all four at once
    assert bench.vm.take_interrupts() == [("line", 11, 0), ("line", 7, 1)]
    for invalid in (0x87, 0, 1, 2, 8, 13):
        bench.put(0x61, 1, 7, 1)
        bench.put(0x61, 1, invalid, 1)
        assert not bench.vm.line_level(7)
        assert bench.chipset.bus.router.routes()[1] == -1
    assert bench.get(0x61, 1, 1) == 13
    bench.put(0x61, 1, 0xFF, 1)
    assert bench.get(0x61, 1, 1) == 0x8F


def test_links_of_slots_and_functions(bench: Bench) -> None:
    bench.put(0x60, 4, 0x07_06_05_03, 1)
    for slot in range(8, 16):
        for number in range(8):
            function = PciFunction(bench.vm, f"f{number}", vendor=1, device=2)
            bench.chipset.bus.add(function, slot, number)
            pin = bench.get(PIN, 1, slot, number)
            assert pin == (number + 1) % 4 + 1
            function.drive_intx(True)
            assert bench.vm.take_interrupts()[-1] == ("line", (3, 5, 6, 7)[(slot + pin + 2) % 4], 1)
            function.drive_intx(False)
            bench.vm.take_interrupts()
        assert bench.get(0x0E, 1, slot) == 0x80


def test_assignment_for_direct_boot(bench: Bench) -> None:
    bench.chipset.assign()
    assert bench.mapped() == {"io": 0xC000, "mmio64": 0xC000_1000 + 0x3000, "mmio32": 0xC000_0000}
    assert bench.get(COMMAND, 2) == IO | MEMORY
    assert bench.chipset.bus.router.routes() == [10, 11, 10, 11]
    assert bench.get(LINE, 1, 1, 3) == 9
    bases = {kind: base for _, kind, _, base, _ in bench.device.bar_list()}
    assert bases["mmio64"] % 0x4000 == 0
    assert any("0.5.0 0200 1af4:1041 test INTB IRQ 11" in line for line in bench.chipset.bus.describe())


def test_assignment_spills_into_the_64_bit_window(bench: Bench) -> None:
    for slot in range(8, 11):
        function = PciFunction(bench.vm, f"big{slot}", vendor=1, device=2)
        function.add_bar(0, "mmio64", 1 << 28, Window(f"window{slot}"))
        bench.chipset.bus.add(function, slot)
    with pytest.raises(ConfigError, match="no room"):
        bench.chipset.assign()
    bench.chipset.reset()
    bench.chipset.assign(Windows(mmio64=range(1 << 38, 1 << 39)))
    bases = [bench.chipset.bus.functions[slot, 0].bar_list()[0][3] for slot in range(8, 11)]
    assert bases == [0xD000_0000, 1 << 38, (1 << 38) + (1 << 28)]


def test_reset_and_assignment_again(bench: Bench) -> None:
    bench.chipset.assign()
    before = bench.mapped()
    bench.put(COMMAND, 2, 0xFFFF)
    bench.put(0x14, 4, 0xDEAD_0000)
    bench.put(0x61, 1, 5, 1)
    bench.put(LINE, 1, 0x33)
    bench.device.drive_intx(True)
    bench.chipset.reset()
    assert bench.mapped() == {}
    assert not any(bench.vm.line_level(pin) for pin in range(24))
    assert bench.vm.pio.read(0xCF8, 4) == 0
    assert bench.get(COMMAND, 4) == 0
    assert bench.get(0x14, 4) == 0
    assert bench.get(LINE, 1) == 0
    assert bench.get(0x60, 4, 1) == 0x8080_8080
    bench.chipset.assign()
    assert bench.mapped() == before


def test_places_on_the_bus(bench: Bench) -> None:
    bus = bench.chipset.bus
    for slot, number, message in (
        (5, 0, "taken by test"),
        (7, 1, "function 0"),
        (32, 0, "expected"),
        (0, 8, "expected"),
    ):
        with pytest.raises(ConfigError, match=message):
            bus.add(PciFunction(bench.vm, "new", vendor=1, device=2), slot, number)
    bench.chipset.assign()
    bench.device.drive_intx(True)
    bus.remove(bench.device)
    assert bench.get(0, 4) == 0xFFFF_FFFF
    assert bench.mapped() == {}
    assert not any(bench.vm.line_level(pin) for pin in range(24))
    bus.add(PciFunction(bench.vm, "new", vendor=1, device=2), 5)
    assert bench.get(0, 4) == 0x0002_0001


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench()
    source = random.Random(seed)
    device = PciFunction(bench.vm, "second", vendor=3, device=4)
    window = Window("window")
    msix = device.add_msix(4, 0, 0, 0x800)
    window.add(msix.table, 0, 64)
    window.add(msix.pba, 0x800, 8)
    device.add_bar(0, "mmio64", 0x1000, window)
    bench.chipset.bus.add(device, 6)
    for _ in range(2000):
        match source.randrange(4):
            case 0:
                bench.vm.pio.write(0xCF8 + source.randrange(-3, 8), source.choice((1, 2, 4, 8)), source.getrandbits(64))
            case 1:
                offset = source.choice(
                    (4, 5, 0x10, 0x14, 0x18, 0x1C, 0x3C, 0x40, 0x42, 0x60, 0x62, source.randrange(256))
                )
                value = source.choice((0, 0xFFFF_FFFF, 0xC000_0000, 7, 0x8000, source.getrandbits(32)))
                bench.put(
                    offset, source.choice((1, 2, 4)), value, source.choice((0, 1, 5, 6)), source.choice((0, 0, 3))
                )
            case 2:
                bench.vm.pio.read(0xCF8 + source.randrange(-3, 8), source.choice((1, 2, 4, 8)))
                bench.get(source.randrange(256), source.choice((1, 2, 4)), source.randrange(8), source.randrange(8))
            case 3:
                bench.device.drive_intx(bool(source.randrange(2)))
                device.drive_intx(bool(source.randrange(2)))
                msix.trigger(source.randrange(8))
        assert len(bench.vm.mmio.mappings()) <= 3
    bench.chipset.reset()
    assert bench.mapped() == {}
    assert not any(bench.vm.line_level(pin) for pin in range(24))
    bench.chipset.assign()
    assert set(bench.mapped()) == {"io", "mmio32", "mmio64"}
    bench.close()
