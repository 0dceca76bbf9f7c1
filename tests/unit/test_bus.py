"""Buses: who answers an access, how it is split, who wins an overlap, and a table that changes while vCPUs read it.

Doorbells count the writes that reach them and read as 0; an MSI-X table is memory that reads at any width.
"""

import random
import time
from collections.abc import Iterator

import pytest

from propolis._bus import Bus, Region, Window
from propolis._interrupts import Doorbell
from propolis.devices.pci._config import ConfigPorts
from propolis.devices.pci._function import PciFunction
from propolis.devices.pci._msix import Msix
from propolis.errors import HypervisorError
from propolis.hypervisor._replay import ReplayVm
from tests import rig

TOP = 1 << 64
ONES = (1 << 64) - 1


@pytest.fixture
def vm() -> Iterator[ReplayVm]:
    vm = ReplayVm()
    yield vm
    vm.close()


@pytest.fixture
def bus(vm: ReplayVm) -> Bus:
    """Physical addresses."""
    return vm.mmio


def ones(size: int) -> int:
    return (1 << 8 * size) - 1


def rung(*doorbells: Doorbell) -> list[int]:
    return [doorbell.stats()["rung"] for doorbell in doorbells]


# -- nobody there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("address", [0, 1, 0xCF8, 0xFFFF, 0x1_0000, TOP - 1, TOP - 8])
def test_an_access_that_nobody_answers(bus: Bus, address: int, size: int) -> None:
    """All ones, a dropped write, and both are counted byte by byte; also across the end of the address space."""
    assert bus.read(address, size) == ones(size)
    bus.write(address, size, 0x1122334455667788)
    assert bus.stats()["missed"] == 2 * size


@pytest.mark.parametrize("size", [0, 9, 16, 0xFFFF])
def test_an_access_has_one_to_eight_bytes(bus: Bus, size: int) -> None:
    with pytest.raises(ValueError, match="1 to 8 bytes"):
        bus.read(0, size)
    with pytest.raises(ValueError, match="1 to 8 bytes"):
        bus.write(0, size, 0)


def test_a_region_that_overrides_nothing_reads_ones(bus: Bus) -> None:
    """And is there: nothing is missed."""
    bus.add(Region(), 0x100, 8)
    assert bus.read(0x100, 8) == ONES
    bus.write(0x100, 8, 0)
    assert bus.stats()["missed"] == 0


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 8, 64, 511, 512])
def test_every_edge_of_every_region_is_found(vm: ReplayVm, bus: Bus, count: int) -> None:
    """First and last byte of each, and the bytes around it, whatever the table's length."""
    doorbells = [Doorbell(vm, f"bell {number}") for number in range(count)]
    for number in random.Random(count).sample(range(count), count):
        bus.add(doorbells[number], 0x1000 + number * 0x10, 6)
    assert bus.mappings() == [(0x1000 + number * 0x10, 6, f"bell {number}") for number in range(count)]
    for number in range(count):
        base = 0x1000 + number * 0x10
        for address in (base, base + 5):
            bus.write(address, 1, 0)
        missed = bus.stats()["missed"]
        for address in (base - 1, base + 6):
            bus.write(address, 1, 0)
        assert bus.stats()["missed"] == missed + 2
    assert rung(*doorbells) == [2] * count


def test_there_is_an_end_to_mappings(vm: ReplayVm, bus: Bus) -> None:
    """The region too many is refused, the others stay."""
    for number in range(512):
        bus.add(Doorbell(vm, str(number)), number * 8, 8)
    with pytest.raises(HypervisorError, match="one too many"):
        bus.add(Doorbell(vm, "one too many"), 512 * 8, 8)
    assert len(bus.mappings()) == 512


@pytest.mark.parametrize(("base", "length"), [(0, 1), (0, TOP - 1), (TOP - 1, 1), (TOP - 0x1000, 0x1000), (1, TOP - 1)])
def test_a_region_may_touch_the_ends_of_the_address_space(vm: ReplayVm, bus: Bus, base: int, length: int) -> None:
    bell = Doorbell(vm, "bell")
    bus.add(bell, base, length)
    bus.write(base, 1, 0)
    bus.write(base + length - 1, 1, 0)
    assert rung(bell) == [2]
    assert bus.mappings() == [(base, length, "bell")]


@pytest.mark.parametrize(("base", "length"), [(0, 0), (0x1000, 0), (TOP - 1, 2), (2, TOP - 1), (TOP - 0x1000, 0x1001)])
def test_a_region_without_length_or_that_wraps_is_refused(vm: ReplayVm, bus: Bus, base: int, length: int) -> None:
    with pytest.raises(HypervisorError):
        bus.add(Doorbell(vm, "bell"), base, length)
    assert bus.mappings() == []


def test_an_access_does_not_wrap_into_low_addresses(vm: ReplayVm, bus: Bus) -> None:
    """Whatever an 8-byte access at the last byte means, it does not harm: each byte goes where its address says."""
    low, high = Doorbell(vm, "low"), Doorbell(vm, "high")
    bus.add(low, 0, 1)
    bus.add(high, TOP - 1, 1)
    bus.write(TOP - 1, 8, 0)
    assert rung(high, low) == [1, 1]
    assert bus.stats()["missed"] == 6


# -- splitting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(vm: ReplayVm, bus: Bus) -> int:
    """Where an MSI-X table of two entries answers: 0x00, 0x01, ... as the address says, reserved bits as the device."""
    msix = Msix(vm, 2)
    bus.add(msix.table, 0x2000, 32)
    for offset in (0, 16):
        bus.write(0x2000 + offset, 8, int.from_bytes(bytes(range(offset, offset + 8)), "little"))
        bus.write(0x2008 + offset, 4, int.from_bytes(bytes(range(offset + 8, offset + 12)), "little"))
    return 0x2000


def content(bus: Bus) -> bytes:
    return b"".join(bus.read(0x2000 + offset, 1).to_bytes(1, "little") for offset in range(32))


@pytest.mark.parametrize("size", range(1, 9))
def test_a_read_of_any_width_at_any_offset(bus: Bus, table: int, size: int) -> None:
    """Yields the same bytes as single reads do, inside the region, and ones outside."""
    memory = b"\xff" * 8 + content(bus) + b"\xff" * 8
    assert memory[8:20] == bytes(range(12))
    for offset in range(-8, 32):
        expected = int.from_bytes(memory[8 + offset : 8 + offset + size], "little")
        assert bus.read(table + offset, size) == expected, hex(offset)


def test_a_write_reaches_a_region_whole_where_it_fits(bus: Bus, table: int) -> None:
    """The device takes aligned words of four and eight bytes alone, so these were not split, and the others were."""
    before = content(bus)
    bus.write(table + 1, 4, ONES)
    bus.write(table + 4, 3, ONES)  # 2 + 1
    bus.write(table, 1, ONES)
    assert content(bus) == before
    bus.write(table, 7, 0x77665544332211)  # 4 + 2 + 1
    assert content(bus)[:8] == bytes.fromhex("11223344") + before[4:8]
    bus.write(table, 8, 0x8877665544332211)
    assert content(bus)[:8] == bytes.fromhex("1122334455667788")


@pytest.mark.parametrize(
    ("size", "parts"), [(1, [1]), (2, [1]), (3, [2]), (4, [1]), (5, [2]), (6, [2]), (7, [3]), (8, [1])]
)
def test_an_access_is_split_into_powers_of_two(vm: ReplayVm, bus: Bus, size: int, parts: list[int]) -> None:
    bell = Doorbell(vm, "bell")
    bus.add(bell, 0x100, 16)
    bus.write(0x100, size, 0)
    assert rung(bell) == parts


def test_an_access_across_regions_reaches_each(vm: ReplayVm, bus: Bus) -> None:
    """And the gap between them is missed."""
    first, second, third = (Doorbell(vm, name) for name in ("first", "second", "third"))
    bus.add(first, 0x100, 3)  # 0x100 + 0x102
    bus.add(second, 0x103, 1)
    bus.add(third, 0x106, 64)
    bus.write(0x100, 8, 0)
    assert rung(first, second, third) == [2, 1, 1]
    assert bus.stats()["missed"] == 2
    assert bus.read(0x100, 8) == 0x0000_FFFF_0000_0000
    assert bus.stats()["missed"] == 4


def test_wider_accesses_than_a_region_takes_are_split(bus: Bus) -> None:
    """The plain region takes single bytes: eight of them."""
    narrow = Window("narrow")
    narrow.add(Region(), 0, 8)
    bus.add(narrow, 0x100, 8)
    assert bus.read(0x100, 8) == ONES
    assert bus.read(0x101, 2) == 0xFFFF


# -- adding, moving, removing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "length"), [(0x100, 8), (0xFF, 2), (0x107, 8), (0x102, 1), (0, 0x1000), (0x100, 1)])
def test_what_is_taken_is_not_given_again(vm: ReplayVm, bus: Bus, base: int, length: int) -> None:
    bus.add(Doorbell(vm, "here"), 0x100, 8)
    with pytest.raises(HypervisorError, match="late overlaps another device"):
        bus.add(Doorbell(vm, "late"), base, length)
    assert bus.mappings() == [(0x100, 8, "here")]


def test_a_removed_region_no_longer_answers(vm: ReplayVm, bus: Bus) -> None:
    bell = Doorbell(vm, "bell")
    bus.add(bell, 0x100, 8)
    bus.discard(bell)
    bus.discard(bell)
    bus.write(0x100, 1, 0)
    assert rung(bell) == [0]
    assert bus.mappings() == []
    bus.add(Doorbell(vm, "next"), 0x100, 8)


def test_the_bus_keeps_its_regions(vm: ReplayVm, bus: Bus) -> None:
    """A region without a name of its own in Python lives as long as it answers."""
    bus.add(Doorbell(vm, "nameless"), 0x100, 8)
    for _ in range(1000):
        bytearray(256)
    bus.write(0x100, 8, 0)
    assert bus.mappings() == [(0x100, 8, "nameless")]


def test_port_and_memory_buses_are_apart(vm: ReplayVm) -> None:
    bell = Doorbell(vm, "bell")
    vm.pio.add(bell, 0x100, 8)
    vm.mmio.write(0x100, 1, 0)
    assert rung(bell) == [0]
    assert (vm.pio.name, vm.mmio.name) == ("port", "physical address")


# -- rank: whose range it is when the guest lets BARs overlap ----------------------------------------------------------


def function(vm: ReplayVm, name: str, size: int = 0x1000) -> PciFunction:
    made = PciFunction(vm, name, vendor=0x1AF4, device=0x1000)
    made.add_bar(0, "mmio32", size, Doorbell(vm, name))
    made.attach(1, 0, 0)
    made.write(0x04, 2, 2)  # decode memory
    return made


def places(vm: ReplayVm) -> dict[str, int]:
    return {name: base for base, _, name in vm.mmio.mappings()}


def test_the_older_rank_wins_and_the_other_waits(vm: ReplayVm) -> None:
    """One that was placed first keeps its range; the other answers as soon as the range is free."""
    first, second = function(vm, "first"), function(vm, "second")
    first.write(0x10, 4, 0xC000_0000)
    second.write(0x10, 4, 0xC000_0000)
    assert places(vm) == {"first": 0xC000_0000}
    first.write(0x10, 4, 0xD000_0000)
    assert places(vm) == {"second": 0xC000_0000, "first": 0xD000_0000}
    first.write(0x10, 4, 0xC000_0000)  # its rank is by age, not by who was here last
    assert places(vm) == {"first": 0xC000_0000}
    first.write(0x04, 2, 0)
    assert places(vm) == {"second": 0xC000_0000}
    first.write(0x04, 2, 2)  # and lost when it stops to decode
    assert places(vm) == {"second": 0xC000_0000}
    second.write(0x10, 4, 0xE000_0000)
    assert places(vm) == {"first": 0xC000_0000, "second": 0xE000_0000}


def test_a_bar_over_a_fixed_device_does_not_answer(vm: ReplayVm) -> None:
    """Nor does it disturb that device, partly over it or around it."""
    vm.mmio.add(Doorbell(vm, "fixed"), 0xC000_0800, 0x100)
    moving = function(vm, "moving", 0x1000)
    for base in (0xC000_0000, 0xD000_0000, 0xC000_0000):
        moving.write(0x10, 4, base)
        expected = {"fixed": 0xC000_0800} | ({"moving": base} if base == 0xD000_0000 else {})
        assert places(vm) == expected


def test_random_moves_equal_a_plain_model(vm: ReplayVm) -> None:
    """Eight BARs of several sizes: the table always holds, in order of rank, what overlaps nothing older."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    sizes = [0x1000, 0x1000, 0x2000, 0x4000, 0x1000, 0x8000, 0x2000, 0x1000]
    functions = [function(vm, str(number), size) for number, size in enumerate(sizes)]
    wanted: list[tuple[int, int]] = []  # (function, base) in order of rank
    for _ in range(3000):
        number = dice.randrange(len(sizes))
        size = sizes[number]
        if dice.random() < 0.3:
            functions[number].write(0x04, 2, 0)
            wanted = [wish for wish in wanted if wish[0] != number]
        else:
            base = 0xC000_0000 + dice.randrange(0x10) * 0x1000 // size * size
            functions[number].write(0x10, 4, base)
            functions[number].write(0x04, 2, 2)
            if any(wish[0] == number for wish in wanted):
                wanted = [(n, base if n == number else b) for n, b in wanted]
            else:
                wanted.append((number, base))
        expected: list[tuple[int, int, str]] = []
        for n, b in wanted:
            if all(b + sizes[n] <= other or other + length <= b for other, length, _ in expected):
                expected.append((b, sizes[n], str(n)))
        assert vm.mmio.mappings() == sorted(expected)


# -- windows -----------------------------------------------------------------------------------------------------------


def test_a_window_shows_its_parts(vm: ReplayVm, bus: Bus) -> None:
    """Each at its offset; reads between them are ones, writes dropped, and neither counts as missed."""
    window = Window("bar")
    first, second = Doorbell(vm, "first"), Doorbell(vm, "second")
    window.add(second, 0x20, 8)
    window.add(first, 0x0, 4)
    bus.add(window, 0x5000, 0x1000)
    assert bus.read(0x5000, 8) == 0xFFFF_FFFF_0000_0000
    assert bus.read(0x5FFF, 1) == 0xFF
    assert bus.stats()["missed"] == 0
    bus.write(0x5000, 8, 0)
    bus.write(0x501E, 4, 0)  # two bytes before, two into it
    bus.write(0x5027, 2, 0)
    bus.write(0x5028, 8, 0)
    assert rung(first, second) == [1, 2]
    assert bus.mappings() == [(0x5000, 0x1000, "bar")]


@pytest.mark.parametrize(("offset", "length"), [(0x10, 4), (0x0F, 2), (0x13, 1), (0, 0x40), (0x11, 1)])
def test_parts_do_not_overlap(vm: ReplayVm, offset: int, length: int) -> None:
    window = Window("bar")
    window.add(Doorbell(vm, "here"), 0x10, 4)
    window.add(Doorbell(vm, "behind"), 0x14, 4)
    window.add(Doorbell(vm, "before"), 0x08, 8)
    with pytest.raises(HypervisorError, match="late overlaps another part"):
        window.add(Doorbell(vm, "late"), offset, length)
    vm.mmio.add(window, 0x5000, 0x1000)  # and those that were there are where they were
    assert vm.mmio.read(0x5006, 8) == 0x0000_0000_0000_FFFF
    assert vm.mmio.read(0x500E, 8) == 0
    assert vm.mmio.read(0x5014, 8) == 0xFFFF_FFFF_0000_0000


def test_a_window_refuses_what_it_has_no_room_for(vm: ReplayVm) -> None:
    window = Window("bar")
    with pytest.raises(HypervisorError, match="no room"):
        window.add(Doorbell(vm, "none"), 0, 0)
    with pytest.raises(HypervisorError, match="no room"):
        window.add(Doorbell(vm, "wraps"), TOP - 1, 2)
    for number in range(24):
        window.add(Doorbell(vm, str(number)), number, 1)
    with pytest.raises(HypervisorError, match="no room"):
        window.add(Doorbell(vm, "late"), 24, 1)


# -- a table that changes under its readers ----------------------------------------------------------------------------


def test_look_ups_go_on_while_the_table_changes(vm: ReplayVm) -> None:
    """The loop thread adds and discards regions while two vCPUs read: fixed neighbours always answer, and right."""
    fixed = 0x2000
    script = [("read", fixed, 8), ("read", fixed + 8, 4), ("read", 0x1000, 8), ("read", fixed + 0x40, 8)]
    with rig.replay(script, script, rounds=1 << 40) as machine:
        mmio = machine.vm.mmio
        msix = Msix(machine.vm, 1)
        mmio.add(msix.table, fixed, 16)
        mmio.write(fixed, 8, 0x1122334455667788)
        mmio.write(fixed + 8, 4, 0x99AABBCC)
        moving = [Doorbell(machine.vm, str(number)) for number in range(8)]
        machine.start()
        seed = random.randrange(1 << 32)
        print("seed", seed)
        dice = random.Random(seed)
        placed: set[int] = set()
        machine.spin_until("a whole round of each", lambda: all(v.stats()["mmio"] > 8 for v in machine.vcpus))
        for count in range(40_000):
            number = dice.randrange(8)
            if number in placed:
                mmio.discard(moving[number])
                placed.remove(number)
            else:
                mmio.add(moving[number], 0x1000 + 8 * number if number < 4 else 0x2040 + 8 * number, 8)
                placed.add(number)
            if count % 2000 == 0:
                machine.hold()
                for vcpu in machine.vcpus:
                    results = vcpu.results()
                    assert results[:2] == [0x1122334455667788, 0x99AABBCC]
                    # Bytes that nobody answers are looked up one by one: the region may come in between.
                    assert isinstance(results[2], int)
                    assert set(results[2].to_bytes(8, "little")) <= {0, 0xFF}
                machine.release()
        machine.spin_until("many rounds", lambda: all(v.stats()["mmio"] > 10_000 for v in machine.vcpus))
        machine.hold()
        assert len(mmio.mappings()) == 1 + len(placed)


def test_vcpus_move_bars_while_others_read() -> None:
    """BAR writes run on vCPU threads: two of them move a BAR each, over each other, while two more read there."""

    def move(slot: int, base: int) -> list[tuple[object, ...]]:
        address = 0x8000_0000 | slot << 11
        return [("out", 0xCF8, 4, address | 0x10), ("out", 0xCFC, 4, base)]

    def toggle(slot: int) -> list[tuple[object, ...]]:
        address = 0x8000_0000 | slot << 11
        return [("out", 0xCF8, 4, address | 0x04), ("out", 0xCFC, 2, 0), ("out", 0xCFC, 2, 2)]

    # One vCPU writes through CF8 and CFC; they are one pair of ports for the machine.
    mover = [*move(1, 0xC000_0000), *move(2, 0xC000_0000), *toggle(1), *move(1, 0xC000_1000), *move(2, 0xC000_1000)]
    reader = [("read", 0xC000_0000, 8), ("read", 0xC000_1000, 8), ("write", 0xC000_0FFC, 8, 0)]
    with rig.replay(mover, reader, reader, rounds=1 << 40) as machine:
        vm = machine.vm
        ports = ConfigPorts()
        vm.pio.add(ports, 0xCF8, 8)
        functions = []
        for slot in (1, 2):
            made = PciFunction(vm, f"slot {slot}", vendor=0x1AF4, device=0x1000)
            made.add_bar(0, "mmio32", 0x1000, Doorbell(vm, f"slot {slot}"))
            made.attach(slot, 0, 0)
            made.write(0x04, 2, 2)
            ports.install(slot, 0, made)
            functions.append(made)
        machine.start()
        machine.spin_until("the mover's writes", lambda: machine.vcpus[0].stats()["pio"] > 20_000)
        while machine.vcpus[1].stats()["mmio"] < 10_000:
            time.sleep(0.001)
        machine.hold()
        for vcpu in machine.vcpus[1:]:
            for value in vcpu.results():
                assert isinstance(value, int)
                assert set(value.to_bytes(8, "little")) <= {0, 0xFF}
        names = [name for _, _, name in vm.mmio.mappings()]
        assert len(names) == len(set(names))
        assert set(names) <= {"slot 1", "slot 2"}
