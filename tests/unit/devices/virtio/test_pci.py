"""virtio-pci registers from the driver's side: discovery, status, queues, interrupts, and what is not allowed."""

import asyncio
import random
from collections.abc import Callable

import pytest

from tests.driver import (
    ACKNOWLEDGE,
    COMMON,
    DEVICE,
    DRIVER,
    DRIVER_OK,
    F_VERSION_1,
    FAILED,
    FEATURES_OK,
    FIELDS,
    ISR,
    NEEDS_RESET,
    NO_VECTOR,
    NOTIFY,
    PCI,
    VirtioDriver,
    until,
)
from tests.unit.devices.virtio.rig import HIGH_BASE, RAM, ROM_BASE, Echo, MakeRig, Rig

Step = Callable[[], object]

QUEUE_FIELDS = [name for name in FIELDS if name.startswith("queue_") and name != "queue_select"]


@pytest.fixture
async def rig(make_rig: MakeRig) -> Rig:
    rig = await make_rig()
    rig.driver.probe()
    return rig


async def works(rig: Rig) -> None:
    """The device answers a request."""
    queue = rig.driver.queues[0]
    room = rig.ram.take(4)
    queue.add([rig.ram.put(b"ping")], [(room, 4)])
    queue.kick()
    await queue.wait()
    assert rig.vm.memory.read(room, 4) == b"gnip"


async def recovers(rig: Rig) -> None:
    """After a reset it works from the start."""
    await rig.driver.reset()
    rig.driver.restart()
    await works(rig)


def queue_image(driver: VirtioDriver) -> list[int]:
    return [driver.read(name) for name in QUEUE_FIELDS]


# -- discovery ---------------------------------------------------------------------------------------------------------


async def test_identity_and_structures(rig: Rig) -> None:
    driver = rig.driver
    assert driver.config_read(0, 4) == 0x106A_1AF4  # type 42
    assert driver.config_read(8, 1) == 1
    assert [kind for kind, _ in driver.capabilities()].count(9) == 5
    assert {kind: length for kind, (_, length, _) in driver.structures.items()} == {
        COMMON: 56, NOTIFY: 4, ISR: 1, DEVICE: 20, PCI: 4,
    }  # fmt: skip
    assert driver.notify_multiplier == 4
    assert driver.offered() >> F_VERSION_1 & 1
    assert driver.read("num_queues") == 1
    assert driver.read("queue_size") == 256


async def test_registers_after_reset(rig: Rig) -> None:
    driver = rig.driver
    expected = dict.fromkeys(FIELDS, 0) | {
        "device_feature": driver.offered() & 0xFFFF_FFFF, "num_queues": 1, "queue_size": 256,
        "config_msix_vector": NO_VECTOR, "queue_msix_vector": NO_VECTOR,
    }  # fmt: skip
    await rig.driver.reset()
    assert {name: driver.read(name) for name in FIELDS} == expected
    driver.restart()
    await driver.reset()
    assert {name: driver.read(name) for name in FIELDS} == expected


async def test_reads_of_any_width_at_any_offset(rig: Rig) -> None:
    driver = rig.driver
    driver.restart()
    for kind, length in ((COMMON, 56), (DEVICE, 20)):
        base = driver.structures[kind][0]
        image = b"".join(rig.vm.mmio.read(base + i, 1).to_bytes(1, "little") for i in range(length)) + bytes(16)
        for offset in range(length + 4):
            for size in range(1, 9):
                expected = int.from_bytes(image[offset : offset + size], "little")
                assert rig.vm.mmio.read(base + offset, size) == expected, (kind, offset, size)
    await works(rig)


# -- status and features -----------------------------------------------------------------------------------------------


async def test_status_only_grows(rig: Rig) -> None:
    driver = rig.driver
    driver.negotiate()
    for value in (ACKNOWLEDGE, DRIVER, FEATURES_OK, ACKNOWLEDGE | FEATURES_OK):
        driver.write("device_status", value)
        assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    driver.write("device_status", NEEDS_RESET)  # the device's own
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    driver.write("device_status", 0x30)  # reserved
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert driver.add_status(FAILED) & FAILED
    await recovers(rig)


@pytest.mark.parametrize("bit", [0, 27, 30, 33, 40, 63])
async def test_features_that_were_not_offered(rig: Rig, bit: int) -> None:
    driver = rig.driver
    driver.add_status(ACKNOWLEDGE | DRIVER)
    driver.accept(driver.offered() | 1 << bit)
    assert not driver.add_status(FEATURES_OK) & FEATURES_OK
    assert not driver.add_status(DRIVER_OK) & DRIVER_OK
    await recovers(rig)


async def test_a_driver_without_version_1(rig: Rig) -> None:
    driver = rig.driver
    driver.add_status(ACKNOWLEDGE | DRIVER)
    driver.accept(driver.offered() & ~(1 << F_VERSION_1))
    assert not driver.add_status(FEATURES_OK) & FEATURES_OK


async def test_features_are_fixed_after_features_ok(rig: Rig) -> None:
    driver = rig.driver
    driver.negotiate(0)
    driver.accept(driver.offered())
    driver.write("driver_feature_select", 0)
    assert driver.read("driver_feature") == 0
    driver.write("driver_feature_select", 1)
    assert driver.read("driver_feature") == 1


@pytest.mark.parametrize("select", [2, 3, 0x8000_0000, 0xFFFF_FFFF])
async def test_feature_words_that_do_not_exist(rig: Rig, select: int) -> None:
    driver = rig.driver
    driver.write("device_feature_select", select)
    assert driver.read("device_feature") == 0
    driver.write("driver_feature_select", select)
    driver.write("driver_feature", 0xFFFF_FFFF)
    assert driver.read("driver_feature") == 0
    assert driver.negotiate() & FEATURES_OK


@pytest.mark.parametrize("first", [0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER])
async def test_driver_ok_without_features_ok(rig: Rig, first: int) -> None:
    driver = rig.driver
    driver.write("device_status", first)
    driver.set_up(0)
    assert not driver.add_status(DRIVER_OK) & DRIVER_OK
    await asyncio.sleep(0.002)
    assert not rig.device.activations
    await recovers(rig)


# -- queues ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [1, 2, 12, 13, 255, 0x7FFF, 0xFFFF])
async def test_a_queue_that_does_not_exist(rig: Rig, select: int) -> None:
    driver = rig.driver
    driver.negotiate()
    driver.write("queue_select", select)
    assert queue_image(driver) == [0] * len(QUEUE_FIELDS)
    for name in QUEUE_FIELDS:
        driver.write(name, 1)
    assert queue_image(driver) == [0] * len(QUEUE_FIELDS)
    assert driver.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
    await recovers(rig)


@pytest.mark.parametrize("size", [0, 3, 255, 257, 512, 0x8000, 32769, 0xFFFF])
async def test_queue_sizes_that_are_not_allowed(rig: Rig, size: int) -> None:
    driver = rig.driver
    driver.write("queue_size", 64)
    driver.write("queue_size", size)
    assert driver.read("queue_size") == 64


@pytest.mark.parametrize("shift", [(1, 0, 0), (8, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2)])
async def test_misaligned_parts(rig: Rig, shift: tuple[int, int, int]) -> None:
    await enable(rig, [0x10000 + shift[0], 0x20000 + shift[1], 0x30000 + shift[2]])


@pytest.mark.parametrize(
    "places",
    [
        [0, 0, 0],
        [0x10000, 0x10000, 0x30000],
        [0x10000, 0x20000, 0x10FF0],
        [0x10000, 0x11000 - 2, 0x30000],
        [0x10000, 0x30000, 0x30200],
        [RAM, 0x20000, 0x30000],
        [RAM - 16, 0x20000, 0x30000],
        [0x10000, RAM - 2, 0x30000],
        [0x10000, 0x20000, RAM - 4],
        [0x10000, 0x20000, ROM_BASE],
        [HIGH_BASE + (1 << 20) - 16, 0x20000, 0x30000],
        [HIGH_BASE - 16, 0x20000, 0x30000],
        [2**64 - 16, 0x20000, 0x30000],
        [0x10000, 2**64 - 2, 0x30000],
        [0x10000, 0x20000, 2**64 - 4],
        [0xD000_0000, 0x20000, 0x30000],
        [0x10000, 0x20000, 0xFEE0_0000],
    ],
)
async def test_parts_in_the_wrong_place(rig: Rig, places: list[int], caplog: pytest.LogCaptureFixture) -> None:
    await enable(rig, places)
    assert [record.message for record in caplog.records if "needs reset" in record.message] != []


async def enable(rig: Rig, places: list[int]) -> None:
    """Enabling a queue there fails with NEEDS_RESET, and a reset helps."""
    driver = rig.driver
    driver.negotiate()
    for name, place in zip(("queue_desc", "queue_driver", "queue_device"), places, strict=True):
        driver.write(name, place)
    driver.write("queue_enable", 1)
    assert driver.read("queue_enable") == 0
    assert driver.status & NEEDS_RESET
    assert not driver.add_status(DRIVER_OK) & DRIVER_OK
    await asyncio.sleep(0.002)
    assert not rig.device.activations
    driver.ram.next = 0x100000
    await recovers(rig)


async def test_a_ring_at_the_very_end_of_ram_and_in_rom(rig: Rig) -> None:
    """What the device only reads may be in ROM; a ring that just fits is fine."""
    driver = rig.driver
    driver.negotiate()
    driver.write("queue_desc", ROM_BASE)
    driver.write("queue_driver", RAM - 518)
    driver.write("queue_device", HIGH_BASE + (1 << 20) - 2056)
    driver.write("queue_enable", 1)
    assert driver.read("queue_enable") == 1
    assert not driver.status & NEEDS_RESET


@pytest.mark.parametrize("ready", [False, True])
async def test_queue_registers_are_frozen(rig: Rig, ready: bool) -> None:
    """Once the queue is enabled, and all of them once the driver is ready (CVE-2026-5747)."""
    driver = rig.driver
    driver.negotiate()
    driver.set_up(0, 16)
    if ready:
        driver.add_status(DRIVER_OK)
    before = queue_image(driver)
    for name in QUEUE_FIELDS:
        if name != "queue_msix_vector":
            for value in (0, 1, 8, 0xFFFF):
                driver.write(name, value)
    assert queue_image(driver) == before
    driver.write("queue_msix_vector", 1)  # harmless, and some drivers set it late
    assert driver.read("queue_msix_vector") == 1
    driver.add_status(DRIVER_OK)
    await works(rig)
    assert rig.device.function.stats()["ignored"] > 0


async def test_a_queue_enabled_after_driver_ok(make_rig: MakeRig) -> None:
    rig = await make_rig(lambda vm: Echo(vm, queues=2))
    driver = rig.driver
    driver.probe()
    driver.negotiate()
    driver.set_up(0)
    driver.add_status(DRIVER_OK)
    late = driver.set_up(1)
    assert driver.read("queue_enable") == 0
    late.kick()
    await works(rig)
    assert late.used_index == 0


async def test_unnatural_writes_are_ignored(rig: Rig) -> None:
    driver = rig.driver
    base = driver.structures[COMMON][0]
    driver.negotiate()
    before = [driver.read(name) for name in FIELDS]
    rig.vm.mmio.write(base + 24, 1, 8)  # half of queue_size
    rig.vm.mmio.write(base + 25, 1, 0)
    rig.vm.mmio.write(base + 24, 4, 0x0000_0008)  # size and vector at once
    rig.vm.mmio.write(base + 33, 2, 0xFFFF)
    rig.vm.mmio.write(base + 34, 4, 0xFFFF_FFFF)
    rig.vm.mmio.write(base + 20, 4, 0)  # would be a reset, were it one byte wide
    rig.vm.mmio.write(base + 20, 2, 0)
    for name in ("device_feature", "num_queues", "queue_notify_off"):
        driver.write(name, 0xFFFF)
    driver.write("config_generation", 0xFF)
    assert [driver.read(name) for name in FIELDS] == before
    rig.vm.mmio.write(base + 32, 8, 0x1162_3344_5566_7788)  # the bus makes two natural ones of it
    assert driver.read("queue_desc") == 0x1162_3344_5566_7788


async def test_several_queues(make_rig: MakeRig) -> None:
    rig = await make_rig(lambda vm: Echo(vm, queues=16))
    driver = rig.driver
    driver.begin()
    assert driver.read("num_queues") == 16
    assert len({driver.queues[i].notify_address() for i in range(16)}) == 16
    for index in (11, 0, 5):
        queue = driver.queues[index]
        queue.add([rig.ram.put(b"x")], [(rig.ram.take(1), 1)])
        queue.kick()
        await queue.wait()
        assert driver.messages() == [index]


async def test_notifications_of_nothing(rig: Rig) -> None:
    """VQ 24: no queue there, not enabled, any width."""
    driver = rig.driver
    base = driver.structures[NOTIFY][0]
    for size in (1, 2, 4, 8):
        for offset in (0, 1, 3, 4, 8, 0x400, 0xFF8):
            rig.vm.mmio.write(base + offset, size, 0xFFFF_FFFF)
    driver.restart()
    for offset in (4, 8, 0xFFC):
        rig.vm.mmio.write(base + offset, 4, 0)
    await works(rig)


# -- interrupts --------------------------------------------------------------------------------------------------------


def line(rig: Rig) -> bool:
    return bool(rig.device.function.wire().state()[1])


async def test_intx_and_isr(rig: Rig) -> None:
    driver = rig.driver
    driver.restart(0, msix=False)
    await works(rig)
    assert line(rig)
    assert driver.config_read(6, 2) & 8  # Interrupt Status
    assert driver.isr() == 1
    assert not line(rig)
    assert driver.isr() == 0
    rig.device.function.set_config(0, b"new")
    assert line(rig)
    await works(rig)
    assert driver.isr() == 3
    assert not line(rig)
    assert driver.messages() == []


async def test_intx_falls_with_a_reset(rig: Rig) -> None:
    rig.driver.restart(msix=False)
    await works(rig)
    assert line(rig)
    await rig.driver.reset()
    assert not line(rig)
    assert rig.driver.isr() == 0


async def test_messages(rig: Rig) -> None:
    driver = rig.driver
    driver.restart()
    await works(rig)
    assert driver.messages() == [0]
    assert driver.isr() == 0
    assert not line(rig)
    rig.device.function.set_config(0, b"new")
    assert driver.messages() == [1]
    assert driver.isr() == 2  # §4.1.4.5.1: also with MSI-X


@pytest.mark.parametrize("vector", [2, 3, 0x7FFF, 0xFFFE])
async def test_vectors_that_do_not_exist(rig: Rig, vector: int) -> None:
    driver = rig.driver
    for name in ("config_msix_vector", "queue_msix_vector"):
        driver.write(name, 1)
        assert driver.read(name) == 1
        driver.write(name, vector)
        assert driver.read(name) == NO_VECTOR


async def test_no_vector_means_no_message(rig: Rig) -> None:
    driver = rig.driver
    driver.restart()
    driver.write("queue_select", 0)
    driver.write("queue_msix_vector", NO_VECTOR)
    driver.write("config_msix_vector", NO_VECTOR)
    await works(rig)
    rig.device.function.set_config(0, b"new")
    assert driver.messages() == []


# -- device configuration ----------------------------------------------------------------------------------------------


async def test_device_configuration_is_not_written(rig: Rig) -> None:
    driver = rig.driver
    base = driver.structures[DEVICE][0]
    for size in (1, 2, 4, 8):
        for offset in (0, 1, 7, 16, 19, 20, 21, 255, 256, 4092):
            rig.vm.mmio.write(base + offset, size, 0xFFFF_FFFF_FFFF_FFFF)
    assert bytes(driver.device_config(i, 1) for i in range(24)) == bytes(range(20)) + bytes(4)


async def test_generation(rig: Rig) -> None:
    driver = rig.driver
    start = driver.read("config_generation")
    driver.device_config(0, 4)
    assert driver.read("config_generation") == start
    for count in range(1, 300):
        rig.device.function.set_config(0, bytes([count & 0xFF]))
        assert driver.device_config(0, 1) == count & 0xFF
        assert driver.read("config_generation") == (start + count) & 0xFF


# -- the PCI configuration access capability ---------------------------------------------------------------------------


def through(driver: VirtioDriver, kind: int, offset: int, size: int, value: int | None = None, bar: int = 2) -> int:
    """An access by way of configuration space (§4.1.4.9)."""
    capability = driver.structures[PCI][2]
    if kind != PCI:
        offset += driver.structures[kind][0] - driver.bars[2]
    driver.config_write(capability + 4, 1, bar)
    driver.config_write(capability + 8, 4, offset)
    driver.config_write(capability + 12, 4, size)
    if value is None:
        return driver.config_read(capability + 16, size if size in (1, 2, 4) else 4)
    driver.config_write(capability + 16, size if size in (1, 2, 4) else 4, value)
    return 0


async def test_everything_through_configuration_space(rig: Rig) -> None:
    driver = rig.driver
    through(driver, COMMON, 20, 1, ACKNOWLEDGE)
    assert through(driver, COMMON, 20, 1) == driver.status == ACKNOWLEDGE
    assert through(driver, COMMON, 24, 2) == 256
    assert through(driver, DEVICE, 4, 4) == 0x07060504
    driver.restart(msix=False)
    queue = driver.queues[0]
    queue.add([rig.ram.put(b"x")], [(rig.ram.take(1), 1)])
    through(driver, NOTIFY, 0, 2, 0)
    await queue.wait()
    assert through(driver, ISR, 0, 1) == 1
    assert not line(rig)


@pytest.mark.parametrize(
    ("offset", "size", "bar"),
    [
        (20, 3, 2),
        (20, 0, 2),
        (20, 8, 2),
        (21, 2, 2),
        (0x4000, 4, 2),
        (0xFFFF_FFFC, 4, 2),
        (20, 1, 0),
        (20, 1, 1),
        (20, 1, 7),
    ],
)
async def test_wrong_accesses_through_configuration_space(rig: Rig, offset: int, size: int, bar: int) -> None:
    driver = rig.driver
    driver.add_status(ACKNOWLEDGE)
    through(driver, PCI, offset, size, 0, bar=bar)
    through(driver, PCI, offset, size, bar=bar)
    assert driver.status == ACKNOWLEDGE


# -- reset -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(7))
async def test_reset_at_each_step(rig: Rig, steps: int) -> None:
    driver = rig.driver
    todo: list[Step] = [
        lambda: driver.add_status(ACKNOWLEDGE),
        lambda: driver.add_status(DRIVER),
        lambda: driver.accept(driver.offered()),
        lambda: driver.add_status(FEATURES_OK),
        lambda: driver.set_up(0),
        lambda: driver.add_status(DRIVER_OK),
    ]
    for step in todo[:steps]:
        step()
    await recovers(rig)


class Slow(Echo):
    """Keeps what it takes until it is told to let go."""

    def __init__(self, vm: object) -> None:
        super().__init__(vm)  # type: ignore[arg-type]
        self.held: list[object] = []

    def kick(self, index: int) -> None:
        while (buffers := self.queues[index].take()) is not None:
            self.held.append(buffers)

    def let_go(self) -> None:
        for buffers in self.held:
            buffers.finish()  # type: ignore[attr-defined]
        self.held = []
        self.queues[0].interrupt()
        self.settled()


async def test_a_reset_waits_for_what_is_in_flight(make_rig: MakeRig) -> None:
    rig = await make_rig(Slow)
    driver = rig.driver
    driver.begin()
    queue = driver.queues[0]
    for _ in range(3):
        queue.add([rig.ram.put(b"x")], [])
    queue.kick()
    await until(lambda: len(rig.device.held) == 3, "the requests")
    driver.write("device_status", 0)
    await asyncio.sleep(0.005)
    status = driver.status
    assert status & DRIVER_OK
    # Meanwhile nothing else counts.
    driver.write("device_status", 0)
    driver.write("device_status", ACKNOWLEDGE)
    driver.write("queue_size", 8)
    driver.write("queue_select", 7)
    assert driver.status == status
    assert driver.read("queue_select") == 0
    rig.device.let_go()
    assert driver.status == 0
    assert rig.device.deactivations == 1


async def test_activation_and_reset_before_the_loop_looks(rig: Rig) -> None:
    driver = rig.driver
    driver.restart()
    driver.write("device_status", 0)
    assert driver.status != 0  # the loop has not run
    await until(lambda: driver.status == 0, "status 0")
    assert not rig.device.activations
    driver.restart()
    await works(rig)


async def test_pause_keeps_events_for_resume(rig: Rig) -> None:
    rig.device.pause()
    rig.driver.restart()
    queue = rig.driver.queues[0]
    queue.add([rig.ram.put(b"x")], [])
    queue.kick()
    await asyncio.sleep(0.005)
    assert not rig.device.activations
    await rig.device.drained()
    rig.device.resume()
    await queue.wait()


async def test_machine_reset_forgets_old_events(rig: Rig) -> None:
    rig.device.pause()
    rig.driver.restart()  # DRIVER_OK is in the mailbox when the machine is reset
    await rig.device.drained()
    rig.bus.reset()
    rig.device.reset()
    rig.device.resume()
    await asyncio.sleep(0.005)
    assert not rig.device.activations
    rig.driver.place_bars()
    rig.driver.restart()
    await works(rig)


async def test_bars_may_move_while_it_runs(rig: Rig) -> None:
    driver = rig.driver
    driver.restart()
    await works(rig)
    for base in (0xD100_0000, 0xE000_0000):
        driver.config_write(4, 2, 0x4)
        driver.config_write(0x18, 4, base)
        driver.config_write(4, 2, 0x6)
        shift = base - driver.bars[2]
        driver.bars[2] = base
        driver.structures = {
            kind: (start + shift if kind != PCI else 0, length, offset)
            for kind, (start, length, offset) in driver.structures.items()
        }
        await works(rig)


# -- fuzz --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
async def test_fuzzed_registers(make_rig: MakeRig, seed: int) -> None:
    """Any accesses, with some sense in them so that they get somewhere; then a reset makes it work."""
    print(f"seed {seed}")
    rand = random.Random(seed)
    rig = await make_rig(lambda vm: Echo(vm, queues=3))
    driver = rig.driver
    driver.probe()
    pages = [driver.structures[kind][0] for kind in (COMMON, DEVICE, NOTIFY, ISR)]
    for _ in range(3000):
        choice = rand.randrange(10)
        if choice < 3:
            name = rand.choice(list(FIELDS))
            value = rand.choice([0, 1, 2, 4, 8, 15, 64, 0xFFFF, 0x10000 * rand.randrange(200), rand.getrandbits(64)])
            driver.write(name, value & ((1 << 8 * FIELDS[name][1]) - 1))
        elif choice < 5:
            rig.vm.mmio.write(
                rand.choice(pages) + rand.randrange(80), rand.randrange(1, 9), rand.getrandbits(rand.choice([1, 8, 64]))
            )
        elif choice < 7:
            rig.vm.mmio.read(rand.choice(pages) + rand.randrange(4096), rand.randrange(1, 9))
        elif choice == 7:
            through(
                driver,
                PCI,
                rand.choice([20, 22, 24, 0x2000, rand.getrandbits(32)]),
                rand.randrange(5),
                rand.getrandbits(8),
            )
        elif choice == 8 and driver.status == 0:
            driver.negotiate()
            for index in range(3):
                driver.ram.next = 0x10000 + 0x4000 * index
                driver.set_up(index)
            driver.add_status(DRIVER_OK)
        else:
            await asyncio.sleep(0)
    await driver.reset()
    driver.ram.next = 0x100000
    driver.place_bars()
    driver.restart()
    await works(rig)
