"""MSI-X from the guest's side: table and pending bits, masks, and vectors lent to others."""

import os
import random
import select
import threading
from collections.abc import Iterator

import pytest

from propolis._bus import Window
from propolis.devices.pci._function import PciFunction
from propolis.devices.pci._msix import Msix
from propolis.devices.pci.bus import PciBus
from propolis.hypervisor._replay import ReplayVm

BASE = 0xC000_0000
PBA = BASE + 0x800
ENABLE, FUNCTION_MASK = 0x8000, 0x4000
APIC = 0xFEE0_0000
VECTORS = 67


class Bench:
    """A function with 67 vectors at BASE, and a guest."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.bus = PciBus(self.vm)
        self.function = PciFunction(self.vm, "test", vendor=1, device=2)
        self.msix = self.function.add_msix(VECTORS, 0, 0, 0x800)
        window = Window("window")
        window.add(self.msix.table, 0, VECTORS * 16)
        window.add(self.msix.pba, 0x800, 16)
        self.function.add_bar(0, "mmio32", 0x1000, window)
        self.bus.add(self.function, 3)
        self.power_on()
        self.read = self.vm.mmio.read
        self.write = self.vm.mmio.write

    def power_on(self) -> None:
        self.function.write(0x10, 4, BASE)
        self.function.write(0x04, 2, 2)

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()

    def control(self, value: int) -> None:
        self.function.write(0x42, 2, value)

    def program(self, vector: int, masked: bool = False, address: int | None = None) -> None:
        entry = BASE + 16 * vector
        self.write(entry, 4, APIC | vector << 12 if address is None else address & 0xFFFF_FFFF)
        self.write(entry + 4, 4, 0 if address is None else address >> 32)
        self.write(entry + 8, 4, 0x20 + vector)
        self.write(entry + 12, 4, masked)

    def messages(self) -> list[int]:
        """The vectors that came, by the data we gave them."""
        found = self.vm.take_interrupts()
        assert all(kind == "msi" for kind, _, _ in found)
        return [data - 0x20 for _, _, data in found]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_power_on_state(bench: Bench) -> None:
    assert bench.function.read(0x42, 2) == VECTORS - 1
    for vector in range(VECTORS):
        assert [bench.read(BASE + 16 * vector + i, 4) for i in (0, 4, 8, 12)] == [0, 0, 0, 1]
    assert bench.read(PBA, 8) == 0
    assert bench.read(PBA + 8, 8) == 0


def test_fire(bench: Bench) -> None:
    bench.program(2)
    bench.msix.trigger(2)
    assert bench.vm.take_interrupts() == []  # MSI-X is disabled
    bench.control(ENABLE)
    assert bench.vm.take_interrupts() == []  # and was not pending
    bench.msix.trigger(2)
    assert bench.vm.take_interrupts() == [("msi", APIC | 2 << 12, 0x22)]


@pytest.mark.parametrize("vector", [VECTORS, 0xFFFF, 0xFFFF_FFFF, -1])
def test_vectors_that_do_not_exist(bench: Bench, vector: int) -> None:
    bench.control(ENABLE)
    bench.msix.trigger(vector)
    assert bench.vm.take_interrupts() == []


def test_masked_vector_is_pending_and_delivered_once(bench: Bench) -> None:
    bench.control(ENABLE)
    bench.program(66, masked=True)
    for _ in range(3):
        bench.msix.trigger(66)
    assert bench.messages() == []
    assert bench.read(PBA, 8) == 0
    assert bench.read(PBA + 8, 8) == 1 << 2
    assert bench.read(PBA + 8, 1) == 1 << 2
    bench.write(BASE + 66 * 16 + 12, 4, 0)
    assert bench.messages() == [66]
    assert bench.read(PBA + 8, 8) == 0
    bench.write(BASE + 66 * 16 + 12, 4, 1)
    bench.write(BASE + 66 * 16 + 12, 4, 0)
    assert bench.messages() == []


def test_function_mask(bench: Bench) -> None:
    bench.program(0)
    bench.program(1, masked=True)
    bench.control(ENABLE | FUNCTION_MASK)
    bench.msix.trigger(0)
    bench.msix.trigger(1)
    assert bench.read(PBA, 8) == 3
    bench.control(ENABLE)
    assert bench.messages() == [0]
    assert bench.read(PBA, 4) == 2
    bench.control(0)
    assert bench.read(PBA, 4) == 0  # nothing stays pending in a disabled function
    bench.control(ENABLE)
    bench.program(1)
    assert bench.messages() == []


def test_message_is_the_one_at_the_time_of_unmasking(bench: Bench) -> None:
    bench.control(ENABLE)
    bench.program(5, masked=True)
    bench.msix.trigger(5)
    bench.write(BASE + 5 * 16, 8, APIC | 0x7000)
    bench.write(BASE + 5 * 16 + 8, 8, 0x99)  # data, and unmasked, in one
    assert bench.vm.take_interrupts() == [("msi", APIC | 0x7000, 0x99)]
    bench.write(BASE + 5 * 16 + 8, 4, 0x9A)  # changed while unmasked
    bench.msix.trigger(5)
    assert bench.vm.take_interrupts() == [("msi", APIC | 0x7000, 0x9A)]


@pytest.mark.parametrize("address", [0, 0x1000, 0xFEC0_0000, 0xFEF0_0000, 0x1_FEE0_0000, 2**64 - 4])
def test_message_to_elsewhere_is_dropped(bench: Bench, address: int) -> None:
    bench.control(ENABLE)
    bench.program(0, address=address)
    bench.msix.trigger(0)
    assert bench.vm.take_interrupts() == []
    assert bench.msix.stats() == {"dropped": 1}


def test_table_access_sizes(bench: Bench) -> None:
    bench.write(BASE, 8, 0x1122_3344_5566_7788)
    bench.write(BASE + 8, 8, 0xFFFF_FFFE_99AA_BBCC)
    assert bench.read(BASE + 12, 4) == 0  # only the mask bit exists
    image = bytes.fromhex("8877665544332211ccbbaa99") + bytes(4)
    second = bytes(12) + b"\x01\x00\x00\x00"
    for offset in range(16):
        for size in (1, 2, 4, 8):
            assert bench.read(BASE + offset, size).to_bytes(size, "little") == (image + second)[offset : offset + size]
    for offset, size in ((0, 1), (0, 2), (1, 4), (2, 4), (4, 8), (6, 2), (12, 1), (15, 1)):
        bench.write(BASE + offset, size, 2**64 - 1)
    # Widths that the specification leaves undefined change nothing; the bus may still split one into words.
    assert bench.read(BASE, 8) == 0x1122_3344_5566_7788
    assert bench.read(BASE + 8, 4) == 0x99AA_BBCC


def test_accesses_past_the_table(bench: Bench) -> None:
    end = BASE + VECTORS * 16
    assert bench.read(end, 8) == 2**64 - 1
    bench.write(end, 8, 0)
    assert bench.read(end - 4, 8) == 0xFFFF_FFFF_0000_0001
    bench.write(end - 4, 8, 0)
    bench.write(PBA, 8, 2**64 - 1)
    assert bench.read(PBA, 8) == 0
    assert bench.read(PBA + 12, 8) == 0xFFFF_FFFF_0000_0000


def test_msix_silences_the_pin(bench: Bench) -> None:
    bench.bus.router.routes()
    bench.function.wire()
    bench.function.drive_intx(True)
    assert bench.function.read(0x06, 1) & 0x08
    bench.control(ENABLE)
    assert not bench.function.read(0x06, 1) & 0x08
    bench.control(0)
    assert bench.function.read(0x06, 1) & 0x08


def test_lent_vector_obeys_the_masks(bench: Bench) -> None:
    fd = bench.msix.lend(7)
    assert bench.msix.lend(7) == fd
    bench.control(ENABLE)
    bench.program(7)
    os.eventfd_write(fd, 1)
    assert select.select([fd], [], [], 0)[0]  # the kernel's to deliver; here nobody takes it
    bench.msix.trigger(7)
    assert os.eventfd_read(fd) == 2  # our own goes the same way
    bench.write(BASE + 7 * 16 + 12, 4, 1)
    bench.msix.trigger(7)
    assert bench.read(PBA, 8) == 1 << 7
    bench.write(BASE + 7 * 16 + 12, 4, 0)
    assert os.eventfd_read(fd) == 1


def test_reset(bench: Bench) -> None:
    bench.control(ENABLE)
    bench.program(0)
    bench.program(1, masked=True)
    bench.msix.trigger(1)
    bench.bus.reset()
    bench.power_on()
    test_power_on_state(bench)
    bench.msix.trigger(0)
    assert bench.messages() == []


@pytest.mark.parametrize("count", [0, -1, 2049])
def test_impossible_tables_are_refused(bench: Bench, count: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        Msix(bench.vm, count)


def test_mask_races_with_pending(bench: Bench) -> None:
    """Whatever the order, one that fires under a mask that is then lifted comes at least once, and nothing hangs."""
    bench.control(ENABLE)
    bench.program(0)
    rounds = 2000

    def device() -> None:
        for _ in range(rounds):
            bench.msix.trigger(0)

    thread = threading.Thread(target=device)
    thread.start()
    came = 0
    while thread.is_alive():
        bench.write(BASE + 12, 4, 1)
        bench.write(BASE + 12, 4, 0)
        came += len(bench.messages())
    thread.join()
    bench.write(BASE + 12, 4, 0)
    came += len(bench.messages())
    assert 1 <= came <= rounds
    assert bench.read(PBA, 8) == 0


@pytest.mark.parametrize("seed", range(20))
def test_fuzz(seed: int) -> None:
    print(f"seed {seed}")
    bench = Bench()
    source = random.Random(seed)
    for _ in range(3000):
        address = BASE + source.choice(
            (source.randrange(0x500), 0x800 + source.randrange(0x20), source.randrange(0x1000))
        )
        size = source.choice((1, 2, 4, 8))
        match source.randrange(4):
            case 0:
                bench.write(address, size, source.choice((0, 1, APIC, source.getrandbits(64))))
            case 1:
                bench.read(address, size)
            case 2:
                bench.msix.trigger(source.randrange(VECTORS + 4))
            case 3:
                bench.control(source.getrandbits(16))
    bench.bus.reset()
    bench.vm.take_interrupts()
    bench.power_on()
    test_power_on_state(bench)
    bench.close()
