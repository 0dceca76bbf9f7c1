"""Registers, doorbells and the controller's life, from the driver's side; and what a hostile one writes there."""

import asyncio
import random
import struct

import pytest

from tests.driver import until
from tests.nvme_driver import (
    ACQ,
    AQA,
    ASQ,
    ASYNC_EVENT,
    CAP,
    CC,
    CSTS,
    DOORBELLS,
    ENABLE,
    ENTRY_SIZES,
    FATAL,
    FLUSH,
    INTMC,
    INTMS,
    NORMAL_SHUTDOWN,
    NSSR,
    OK,
    PAGE,
    READ,
    READY,
    SHUTDOWN_DONE,
    SHUTDOWN_STATUS,
    VS,
    WRITE,
    Completion,
    command,
)
from tests.unit.devices.nvme.disk import RAM, ROM_BASE, Disk, MakeDisk


async def test_what_the_registers_say(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    assert driver.config_read(0, 4) == 0x0000_01DE
    assert driver.config_read(8, 4) >> 8 == 0x01_0802
    assert driver.read(CAP, 8) == 1 << 37 | 120 << 24 | 1 << 16 | 0xFFFF
    assert driver.read(VS) == 0x1_0400
    assert driver.read(CC) == driver.read(CSTS) == driver.read(AQA) == 0
    driver.write(ASQ, 0x1_2345_6789_AFFF, 8)
    driver.write(ACQ, 0x5000)
    driver.write(ACQ + 4, 7)
    driver.write(AQA, 0xFFFF_FFFF)
    assert driver.read(ASQ, 8) == 0x1_2345_6789_A000
    assert driver.read(ACQ, 8) == 0x7_0000_5000
    assert driver.read(AQA) == 0x0FFF_0FFF
    assert driver.read(ASQ + 4) == 0x1_2345
    driver.write(INTMS, 0xF0)
    driver.write(INTMC, 0x30)
    assert driver.read(INTMS) == driver.read(INTMC) == 0xC0


async def test_registers_of_every_width_and_place(make_disk: MakeDisk) -> None:
    """Reads past the end are 0, what is not a register does not change, and nothing happens."""
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    dice = random.Random(1)
    whole = b"".join(driver.read(at).to_bytes(4, "little") for at in range(0, 0x40, 4))
    for size in (1, 2, 4, 8):
        for at in range(0x40):
            assert driver.read(at, size).to_bytes(size, "little") == (whole + bytes(8))[at : at + size]
        for at in (*range(0x1C), *range(0x1D, 0x24), *range(0x38, 0x1100)):
            # Neither the interrupt masks nor CC in their own size, which have tests of their own.
            if size >= 4 and at in (INTMS, INTMC, CC):
                continue
            driver.write(at, dice.getrandbits(8 * size), size)
    assert b"".join(driver.read(at).to_bytes(4, "little") for at in range(0, 0x40, 4)) == whole
    assert driver.read(0x3FFC) == driver.read(DOORBELLS) == 0
    driver.write(NSSR, 0x4E56_4D65)  # a subsystem reset, which CAP does not offer
    await asyncio.sleep(0.002)
    assert driver.read(CSTS) == 0
    assert disk.device.stats()["ignored"] > 1000


async def test_reset_and_again(disk: Disk) -> None:
    for round_ in range(3):
        await disk.driver.disable()
        assert disk.driver.read(CSTS) == 0
        assert disk.driver.read(AQA) == 31 << 16 | 31  # §7.3.2: these stay
        await disk.driver.begin(queues=round_ + 1, msix=round_ != 1)
        done, data = await disk.read(3, 4, number=round_ + 1)
        assert (done.status, data) == (OK, disk.part(3, 4))


async def test_toggled_without_waiting(disk: Disk) -> None:
    """EN off and on within one look of the loop is a reset all the same."""
    disk.driver.write(CC, ENTRY_SIZES)
    disk.driver.prepare()
    disk.driver.write(CC, ENTRY_SIZES | ENABLE)
    await asyncio.sleep(0.005)
    await until(lambda: disk.driver.status == READY, "CSTS.RDY")
    assert not disk.device.queues[0].exists
    await disk.driver.create_pair(1, 16)
    assert (await disk.driver.io(FLUSH)).status == OK


# -- 69, 70 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 30, 63])
async def test_disabled_with_commands_in_flight(disk: Disk, in_flight: int) -> None:
    for round_ in range(5):
        pair = disk.driver.pairs[1]
        pages = disk.ram.take(in_flight * PAGE, PAGE)
        for i in range(in_flight):
            pair.put(command(READ, i, prp1=pages + i * PAGE, dwords=(8 * i, 0, 7)))
        pair.ring()
        if round_ % 2:
            await until(pair.poll, "the first completion")
        await disk.driver.disable()
        # Nothing is written to guest memory any more: what it frees now, it may use for something else.
        assert disk.device.in_flight() == 0
        disk.vm.memory.write(pages, b"\xaa" * PAGE * in_flight)
        await asyncio.sleep(0.001)
        assert disk.vm.memory.read(pages, PAGE * in_flight) == b"\xaa" * PAGE * in_flight
        disk.ram.next = 0x20000
        await disk.driver.begin()
        assert (await disk.driver.io(FLUSH)).status == OK


async def test_bad_admin_queues_are_fatal(disk: Disk) -> None:
    """And a reset with good ones helps."""
    for aqa, asq, acq in (
        (0, 0x10000, 0x20000),
        (0x001F_0000, 0x10000, 0x20000),
        (0x0000_001F, 0x10000, 0x20000),
        (0x001F_001F, RAM, 0x20000),
        (0x001F_001F, 0x10000, RAM),
        (0x001F_001F, 0xD000_0000, 0x20000),
        (0x001F_001F, 0x10000, 0xD000_0000),
        (0x001F_001F, 0x10000, ROM_BASE),
        (0x001F_001F, 2**64 - PAGE, 0x20000),
        (0x0FFF_0FFF, RAM - PAGE, 0x20000),  # 256 KiB are not there
        (0x0FFF_0FFF, 0x10000, RAM - PAGE),
    ):
        await disk.driver.disable()
        disk.driver.write(AQA, aqa)
        disk.driver.write(ASQ, asq, 8)
        disk.driver.write(ACQ, acq, 8)
        disk.driver.write(CC, ENTRY_SIZES | ENABLE)
        await until(lambda: disk.driver.status & FATAL, "CSTS.CFS")
        assert not disk.driver.status & READY
        disk.driver.ring(0, 1)
        disk.driver.write(CC, ENTRY_SIZES)
        await until(lambda: disk.driver.status == 0, "no CSTS.CFS")
        await disk.driver.begin()
        assert (await disk.driver.io(FLUSH)).status == OK


async def test_the_largest_admin_queue(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    disk.driver.place_bars()
    await disk.driver.enable(4096)
    assert (await disk.driver.identify(1))[0] == OK


async def test_page_sizes_command_sets_and_arbitrations_that_there_are_not(disk: Disk) -> None:
    await disk.driver.disable()
    for bits in (1 << 7, 0xF << 7, 1 << 4, 6 << 4, 7 << 4, 1 << 11, 7 << 11):
        disk.driver.write(CC, ENTRY_SIZES | ENABLE | bits)
        await until(lambda: disk.driver.status & FATAL, "CSTS.CFS")
        disk.driver.write(CC, 0)
        await until(lambda: disk.driver.status == 0, "no CSTS.CFS")


async def test_they_do_not_change_while_it_is_enabled(disk: Disk) -> None:
    disk.driver.write(CC, ENTRY_SIZES | ENABLE | 0x3FF0)
    assert disk.driver.read(CC) == ENTRY_SIZES | ENABLE
    disk.driver.write(AQA, 0)
    disk.driver.write(ASQ, 0x5000, 8)
    assert (disk.driver.read(AQA), disk.driver.read(ASQ, 8)) == (31 << 16 | 31, disk.driver.pairs[0].sq)
    assert (await disk.driver.io(FLUSH)).status == OK


# -- shutdown ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NORMAL_SHUTDOWN, 2 << 14])
async def test_shutdown(disk: Disk, kind: int) -> None:
    pair = disk.driver.pairs[1]
    at, _ = disk.ram.put(b"x" * 4096, PAGE)
    for i in range(20):
        pair.put(command(WRITE, i, prp1=at, dwords=(8 * i, 0, 7)))
    pair.ring()
    await until(lambda: disk.device.stats()["requests"], "the first request")
    disk.driver.write(CC, ENTRY_SIZES | ENABLE | kind)
    await until(lambda: disk.driver.status & SHUTDOWN_STATUS == SHUTDOWN_DONE, "CSTS.SHST")
    assert disk.device.in_flight() == 0
    await disk.driver.disable()
    assert disk.driver.status == 0
    await disk.driver.begin()
    assert (await disk.driver.io(FLUSH)).status == OK


async def test_shutdown_of_one_that_is_not_enabled(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    disk.driver.place_bars()
    disk.driver.write(CC, NORMAL_SHUTDOWN)
    await until(lambda: disk.driver.status == SHUTDOWN_DONE, "CSTS.SHST")


async def test_reset_during_shutdown(disk: Disk) -> None:
    for _ in range(5):
        disk.driver.write(CC, ENTRY_SIZES | ENABLE | NORMAL_SHUTDOWN)
        await disk.driver.disable()
        assert disk.driver.status == 0
        await disk.driver.begin()
        assert (await disk.driver.io(FLUSH)).status == OK


# -- 71 ----------------------------------------------------------------------------------------------------------------


async def test_doorbells_that_mean_nothing(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    for number in (0, 1, 16, 17, 1000, 1535):  # before there is anything
        driver.ring(number, 0)
        driver.ring(number, 1, head=True)
    driver.prepare()
    driver.pairs[0].put(command(0x06, 5, dwords=(1,)))
    driver.ring(0, 1)  # before RDY
    await driver.enable()
    await asyncio.sleep(0.005)
    assert driver.pairs[0].poll() == []
    ignored = disk.device.stats()["ignored"]
    for offset, size in ((0, 8), (0, 2), (0, 1), (1, 4), (2, 2), (4, 8), (6, 4)):
        driver.write(DOORBELLS + offset, 1, size)
    assert disk.device.stats()["ignored"] >= ignored + 7
    await asyncio.sleep(0.005)
    assert driver.pairs[0].poll() == []
    assert (await driver.identify(1))[0] == OK


async def event(disk: Disk) -> Completion:
    """The answer to an Asynchronous Event Request that waits."""
    return (await disk.driver.pairs[0].wait(1))[0]


async def test_bad_doorbells_are_events(disk: Disk) -> None:
    driver = disk.driver
    driver.pairs[0].submit(ASYNC_EVENT)
    driver.ring(1, 64)  # the queue has 64 entries
    assert (await event(disk)).result == 0x01_01_00  # error, invalid value, the error log
    driver.pairs[0].submit(ASYNC_EVENT)
    for value in (64, 65, 0xFFFF, 0x1_0000, 0xFFFF_FFFF):
        driver.ring(1, value)
        driver.ring(1, value, head=True)
    await asyncio.sleep(0.005)
    assert driver.pairs[0].poll() == []  # not twice before the log was read
    assert (await driver.log_page(1, 64))[0] == OK
    driver.ring(7, 0)
    [late] = driver.pairs[0].done.values() or [await event(disk)]
    assert late.result == 0x01_00_00  # error, a queue that does not exist
    assert (await driver.io(FLUSH)).status == OK


async def test_a_head_that_is_not_in_the_queue_is_no_room(make_disk: MakeDisk) -> None:
    """A host that says it has read what is not there yet gets nothing overwritten."""
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    await driver.enable()
    pair = await driver.create_pair(1, 16, cq_entries=4)
    for cid in range(10):
        pair.put(command(FLUSH, cid))
    pair.ring()
    await until(lambda: pair.memory.read(pair.cq + 46, 1)[0] & 1, "three completions")
    await asyncio.sleep(0.002)
    seen = pair.memory.read(pair.cq, 64)
    pair.driver.ring(1, 0, head=True)  # nothing was read
    await asyncio.sleep(0.002)
    assert pair.memory.read(pair.cq, 64) == seen
    assert sorted(done.cid for done in await pair.wait(10)) == list(range(10))


# -- interrupts --------------------------------------------------------------------------------------------------------


async def test_the_interrupt_pin(make_disk: MakeDisk) -> None:
    disk = await make_disk(msix=False)
    wire = disk.device.function.wire()
    pair = disk.driver.pairs[1]
    assert not wire.state()[1]
    pair.submit(FLUSH)
    await until(lambda: wire.state()[1], "the pin")
    disk.driver.write(INTMS, 1)
    assert not wire.state()[1]
    disk.driver.write(INTMC, 1)
    assert wire.state()[1]
    assert len(pair.poll()) == 1
    assert not wire.state()[1]
    pair.submit(FLUSH)
    await until(lambda: wire.state()[1], "the pin")
    disk.driver.config_write(4, 2, 0x406)  # Interrupt Disable
    assert not wire.state()[1]
    disk.driver.config_write(4, 2, 0x006)
    assert wire.state()[1]
    await disk.driver.disable()
    assert not wire.state()[1]


async def test_a_queue_without_interrupts_is_silent(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    driver.enable_msix()
    await driver.enable()
    pair = await driver.create_pair(1, 16, vector=1)
    assert (await driver.admin(0x00, dwords=(1,))).status == OK
    assert (await driver.admin(0x04, dwords=(1,))).status == OK
    pair.memory.write(pair.cq, bytes(16 * 16))
    assert (await driver.admin(0x05, prp1=pair.cq, dwords=(15 << 16 | 1, 1 << 16 | 1))).status == OK
    assert (await driver.admin(0x01, prp1=pair.sq, dwords=(15 << 16 | 1, 1 << 16 | 1))).status == OK
    driver.messages()
    assert (await driver.io(FLUSH)).status == OK
    assert driver.messages() == []


# -- 83: shadow doorbells ----------------------------------------------------------------------------------------------


async def test_shadow_doorbells(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    driver.enable_msix()
    await driver.enable()
    assert (await driver.cast_shadows()).status == OK
    pair = await driver.create_pair(1, 16, vector=1)
    for number in range(100):
        done, data = await disk.read(number % 64, 4)
        assert (done.status, data) == (OK, disk.part(number % 64, 4))
    # While it is at work, it need not be told.
    before = pair.rung
    for _ in range(20):
        for _ in range(15):
            pair.submit(FLUSH)
        assert len(await pair.wait(15)) == 15
    assert 20 <= pair.rung - before < 300
    assert (await driver.identify(1))[0] == OK
    await driver.disable()
    await driver.begin()
    assert (await driver.io(FLUSH)).status == OK


async def test_a_full_completion_queue_with_shadows(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    await driver.enable()
    assert (await driver.cast_shadows()).status == OK
    pair = await driver.create_pair(1, 64, cq_entries=3)
    for cid in range(60):
        pair.put(command(FLUSH, cid))
    pair.ring()
    assert sorted(done.cid for done in await pair.wait(60)) == list(range(60))


async def test_shadows_come_while_queues_are_at_work(disk: Disk) -> None:
    """What was said by doorbells before is not lost, whatever is in the pages."""
    pair = disk.driver.pairs[1]
    for _ in range(5):
        assert (await disk.driver.io(FLUSH)).status == OK
    for _ in range(30):
        pair.submit(FLUSH)
    assert (await disk.driver.cast_shadows()).status == OK
    for _ in range(30):
        pair.submit(FLUSH)
    assert len(await pair.wait(60)) == 60
    assert (await disk.driver.io(FLUSH)).status == OK


async def test_shadows_in_bad_memory(disk: Disk) -> None:
    good = disk.ram.take(PAGE, PAGE)
    for shadow, events in (
        (good + 4, good), (good, good + 8), (good, good), (RAM, good), (good, RAM), (good, ROM_BASE), (ROM_BASE, good),
        (disk.driver.bars[0], good), (good, disk.driver.bars[0]), (2**64 - PAGE, good), (0, 2**63),
    ):  # fmt: skip
        assert (await disk.driver.admin(0x7C, prp1=shadow, prp2=events)).status == 2
    assert (await disk.driver.io(FLUSH)).status == OK


async def test_nonsense_in_the_shadows(disk: Disk) -> None:
    assert (await disk.driver.cast_shadows()).status == OK
    pair, driver = disk.driver.pairs[1], disk.driver
    for value in (64, 0xFFFF, 0xFFFF_FFFF, 0x8000_0000):
        for at in (8, 12):
            pair.memory.write(driver.shadow + at, struct.pack("<I", value))
            disk.device.kick_all()
        await asyncio.sleep(0.001)
    assert pair.poll() == []
    await driver.disable()
    await driver.begin()
    assert (await driver.io(FLUSH)).status == OK


# -- the machine's side ------------------------------------------------------------------------------------------------


async def test_pause_drains_and_resume_catches_up(disk: Disk) -> None:
    pair = disk.driver.pairs[1]
    for _ in range(20):
        pair.submit(FLUSH)
    disk.device.pause()
    await disk.device.drained()
    assert disk.device.in_flight() == 0
    done = len(pair.poll())
    for _ in range(10):
        pair.submit(FLUSH)
    await asyncio.sleep(0.005)
    assert pair.poll() == []
    disk.driver.write(CC, ENTRY_SIZES | ENABLE | NORMAL_SHUTDOWN)
    disk.device.resume()
    await until(lambda: disk.driver.status & SHUTDOWN_STATUS == SHUTDOWN_DONE, "CSTS.SHST")
    assert done <= 20


async def test_paused_and_resumed(disk: Disk) -> None:
    pair = disk.driver.pairs[1]
    for _ in range(20):
        pair.submit(FLUSH)
    for _ in range(10):
        disk.device.pause()
        await disk.device.drained()
        disk.device.resume()
        await asyncio.sleep(0)
    assert len(await pair.wait(20)) == 20


async def test_machine_reset(disk: Disk) -> None:
    for _ in range(20):
        disk.driver.pairs[1].submit(FLUSH)
    disk.device.pause()
    await disk.device.drained()
    disk.bus.reset()
    disk.device.reset()
    disk.device.resume()
    disk.driver.place_bars()
    assert [disk.driver.read(at) for at in (CC, CSTS, AQA, ASQ, ACQ)] == [0] * 5
    await disk.driver.begin()
    assert (await disk.driver.io(FLUSH)).status == OK


async def test_halt_with_commands_in_flight(disk: Disk) -> None:
    for _ in range(30):
        disk.driver.pairs[1].submit(FLUSH)
    await until(lambda: disk.device.stats()["requests"], "the first request")
    await disk.device.halt()
    assert disk.device.in_flight() == 0


async def test_without_bus_mastering_the_queues_are_left_alone(disk: Disk) -> None:
    disk.driver.config_write(4, 2, 2)
    pair = disk.driver.pairs[1]
    pair.submit(FLUSH)
    await asyncio.sleep(0.005)
    assert pair.poll() == []
    disk.driver.config_write(4, 2, 6)
    assert len(await pair.wait(1)) == 1
