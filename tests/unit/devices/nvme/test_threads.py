"""vCPU threads against the loop: doorbells and registers while it works, commands that change while they are read."""

import random
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from propolis.hypervisor._replay import ReplayVcpu
from tests.driver import until
from tests.nvme_driver import (
    ACQ,
    AQA,
    ASQ,
    CC,
    CSTS,
    DOORBELLS,
    ENABLE,
    ENTRY_SIZES,
    FLUSH,
    INTMS,
    OK,
    PAGE,
    READ,
    command,
)
from tests.unit.devices.nvme.disk import BLOCKS, RAM, Disk, MakeDisk

Step = tuple[object, ...]


@contextmanager
def vcpu(disk: Disk, script: list[Step], rounds: int) -> Iterator[ReplayVcpu]:
    """A vCPU that runs the script on a thread of its own."""
    processor = ReplayVcpu(disk.vm, 0, lambda bits: None, script, rounds)
    thread = threading.Thread(target=processor.run, name="vcpu-0")
    thread.start()
    processor.release()
    try:
        yield processor
    finally:
        processor.stop()
        thread.join()


@pytest.mark.parametrize("shadows", [False, True])
async def test_no_doorbell_is_lost(disk: Disk, shadows: bool) -> None:
    """Rung by a vCPU, while the loop serves the queue; shadows come in the middle."""
    pair = disk.driver.pairs[1]
    bell = disk.driver.bars[0] + DOORBELLS + 8
    for number in range(40):
        script: list[Step] = []
        for cid in range(20):
            pair.put(command(FLUSH, cid))
            script.append(("write", bell, 4, pair.tail))
        with vcpu(disk, script, 1):
            if shadows and number % 10 == 5:
                assert (await disk.driver.cast_shadows()).status == OK
                disk.driver.shadow = 0  # the driver goes on as if it had not heard of them yet
            assert sorted(done.cid for done in await pair.wait(20)) == list(range(20))


@pytest.mark.parametrize("seed", range(3))
async def test_registers_while_the_loop_works(disk: Disk, seed: int) -> None:
    """Doorbells, resets, enabling, masks and moving BARs from a vCPU, with commands in flight."""
    print(f"seed {seed}")
    dice = random.Random(seed)
    base, pair, admin = disk.driver.bars[0], disk.driver.pairs[1], disk.driver.pairs[0]
    function = 0x8000_0000 | disk.driver.slot << 11
    pieces: list[list[Step]] = [
        [("write", base + DOORBELLS + 4 * i, 4, dice.randrange(70)) for i in range(4)],
        [("write", base + DOORBELLS + 8, 4, i) for i in range(10)],
        [("write", base + CC, 4, ENTRY_SIZES), *[("read", base + CSTS, 4)] * 5],
        [("write", base + CC, 4, ENTRY_SIZES | 1 << 14)],
        [
            ("write", base + AQA, 4, 31 << 16 | 31),
            ("write", base + ASQ, 8, admin.sq),
            ("write", base + ACQ, 8, admin.cq),
            ("write", base + CC, 4, ENTRY_SIZES | ENABLE),
        ],
        [("write", base + INTMS, 4, 1), ("write", base + INTMS + 4, 4, 1)],
        [("read", base + at, 8) for at in range(0, 0x40, 8)],
        [("out", 0xCF8, 4, function | 4), ("out", 0xCFC, 2, 0), ("out", 0xCFC, 2, 6)],
        [("out", 0xCF8, 4, function | 4), ("out", 0xCFC, 2, 2), ("out", 0xCFC, 2, 6)],
    ]
    script = [step for _ in range(40) for step in dice.choice(pieces)]
    pages = disk.ram.take(8 * PAGE, PAGE)
    for cid in range(64):
        pair.memory.write(pair.sq + 64 * cid, command(READ, cid, prp1=pages + PAGE * (cid % 8), dwords=(cid, 0, 7)))
        admin.memory.write(admin.sq + 64 * (cid % 32), command(6, cid, prp1=pages, dwords=(1,)))
    with vcpu(disk, script, 40) as processor:
        await until(lambda: processor.is_done, "the end of the script", 60)
    await disk.driver.disable()
    disk.driver.write(CC, 0)
    await until(lambda: not disk.driver.status, "the end of a shutdown")
    disk.ram.next = 0x200000
    await disk.driver.begin()
    assert (await disk.driver.io(FLUSH)).status == OK
    assert disk.device.in_flight() == 0


async def test_lists_that_change_under_us(make_disk: MakeDisk) -> None:
    """The copy that was checked is the one that is used. Nothing is written beside what was asked for."""
    disk = await make_disk()
    pair, ram = disk.driver.pairs[1], disk.ram
    before = disk.image()
    page, entries = ram.take(PAGE, PAGE), ram.take(PAGE, PAGE)
    good = struct.pack("<Q", page)
    view = disk.vm.memory.view(entries, 64)
    bad = [struct.pack("<Q", value) for value in (RAM, RAM - 8, 2**64 - PAGE, 0xD000_0000, page + 4, page, 2**63)]
    stop = threading.Event()

    def meddle() -> None:
        while not stop.is_set():
            for value in bad:
                for at in range(0, 64, 8):
                    view[at : at + 8] = value
            for at in range(0, 64, 8):
                view[at : at + 8] = good

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(20):
            for cid in range(40):
                pair.put(command(READ, cid, prp1=page, prp2=entries, dwords=(0, 0, 39)))
            pair.ring()
            for done in await pair.wait(40):
                assert done.status in (OK, 4, 0x13)
    finally:
        stop.set()
        thread.join()
    view.release()
    assert disk.image() == before
    assert disk.path.stat().st_size == BLOCKS * 512
