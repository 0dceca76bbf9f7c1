"""An NVMe controller under a driver that writes at random into queues that are well made.

What must hold: every command of a queue that stays is completed exactly once, nothing raises, the file keeps its size,
and after a reset the controller works.
"""

import asyncio
import os
import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio

from propolis.backends._iopool import IoPool
from tests.driver import until
from tests.nvme_driver import CC, DOORBELLS, ENTRY_SIZES, FLUSH, OK, PAGE, command
from tests.unit.devices.nvme.disk import BLOCKS, RAM, ROM_BASE, Disk

IO = (0, 1, 2, 5, 8, 9)
LISTS = 8 << 20  # above all queues
ADMIN = (0, 1, 2, 4, 5, 6, 8, 9, 0xA, 0x7C)


@pytest_asyncio.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    """With three I/O queues, the third of which completes in a ring of four."""
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    pool = IoPool(2)
    disk = Disk(pool, tmp_path / "disk.img", queues=4)
    await start(disk)
    yield disk
    await disk.stop()
    assert pool.close()
    assert raised == []


async def start(disk: Disk) -> None:
    disk.ram.next = 1 << 20
    await disk.driver.begin(queues=2, entries=64)
    await disk.driver.create_pair(3, 64, cq_entries=4, vector=3)


class Dice:
    """Values that are often nearly right; data goes to no memory below `low`."""

    def __init__(self, low: int) -> None:
        self.low = low
        seed = random.randrange(1 << 32)
        print("seed", seed)
        self.random = random.Random(seed)

    def address(self) -> int:
        pick = self.random
        return pick.choice(
            (
                pick.randrange(self.low, RAM) & ~0xFFF,
                pick.randrange(self.low, RAM) & ~0xFFF,
                pick.randrange(self.low, RAM) & ~3,
                pick.randrange(self.low, RAM),
                RAM - pick.randrange(3 * PAGE),
                ROM_BASE + pick.randrange(PAGE),
                0xD000_0000 + pick.randrange(0x6000),
                pick.getrandbits(64),
                2**64 - pick.randrange(1, 2 * PAGE),
                0,
            )
        )

    def word(self, *likely: int) -> int:
        pick = self.random
        return pick.choice((*likely, *likely, 0, 1, 0xFFFF_FFFF, pick.getrandbits(32), 1 << pick.randrange(32)))

    def lists(self, disk: Disk) -> None:
        """Fills some of the memory that the addresses point to with lists of addresses and descriptors."""
        pick = self.random
        at = pick.randrange(LISTS, RAM - PAGE) & ~0xFFF
        if pick.random() < 0.5:
            page = struct.pack("<512Q", *(self.address() for _ in range(512)))
        else:
            page = b"".join(
                struct.pack("<QI3xB", self.address(), self.word(512, 4096, 16, 4096 - 16), self.kind())
                for _ in range(256)
            )
        disk.vm.memory.write(at, page)

    def kind(self) -> int:
        return self.random.choice((0, 0, 0, 0x20, 0x30, 0x10, self.random.getrandbits(8)))

    def io(self, cid: int) -> bytes:
        pick = self.random
        opcode = pick.choice((*IO, *IO, pick.getrandbits(8)))
        lba = pick.choice((pick.randrange(BLOCKS), pick.randrange(BLOCKS), BLOCKS, 0, pick.getrandbits(64)))
        flags = pick.choice((0, 0, 0, 0x40, 0x40, 0x80, pick.getrandbits(8)))
        first, second = self.address(), self.address()
        if flags & 0xC0 in (0x40, 0x80):
            second = self.kind() << 56 | self.word(512, 4096, 8192)
        blocks = pick.choice((0, 7, 8, 15, 100, 2047, pick.getrandbits(16)))
        dword12 = blocks | pick.choice((0, 0, 1 << 30, 1 << 25, pick.getrandbits(32) & 0xFFFF_0000))
        dwords = (lba & 0xFFFF_FFFF, lba >> 32, dword12, *(self.word() for _ in range(3)))
        if opcode == 9:
            dwords = (self.word(0, 255), self.word(4, 4), *dwords[2:])
        nsid = pick.choice((1, 1, 1, 1, 0, 0xFFFF_FFFF, pick.getrandbits(32)))
        return command(opcode, cid, nsid=nsid, prp1=first, prp2=second, flags=flags, dwords=dwords)

    def admin(self, cid: int) -> bytes:
        pick = self.random
        opcode = pick.choice((*ADMIN, *ADMIN, 0xC, pick.getrandbits(8)))
        size = pick.choice((1, 3, 15, 63, pick.getrandbits(16)))
        number = pick.choice((0, 1, 2, 3, 4, 5, pick.getrandbits(16)))
        dwords = [self.word(size << 16 | number, number, size << 16 | pick.randrange(16)) for _ in range(6)]
        dwords[1] = self.word(number << 16 | 3, 3, 1, 1 << 16 | 1)
        return command(
            opcode,
            cid,
            nsid=pick.choice((0, 1, 0xFFFF_FFFF, pick.getrandbits(32))),
            prp1=self.address(),
            prp2=self.address(),
            flags=pick.choice((0, 0, 0, 0, pick.getrandbits(8))),
            dwords=dwords,
        )


async def test_every_command_is_completed_once(disk: Disk, rounds: int) -> None:
    """Queues stay as they are; what is in them does not matter."""
    dice = Dice(LISTS)
    next_cid = 0
    for _ in range(rounds):
        if dice.random.random() < 0.5 and not disk.driver.shadow:
            assert (await disk.driver.cast_shadows()).status == OK
        for _ in range(30):
            pair = disk.driver.pairs[dice.random.randint(1, 3)]
            out = set()
            dice.lists(disk)
            for _ in range(dice.random.randint(1, 40)):
                pair.put(dice.io(next_cid))
                out.add(next_cid)
                next_cid = (next_cid + 1) & 0xFFFF
            pair.ring()
            while out:
                for done in await pair.wait(1):
                    assert done.cid in out, f"{done} was not out"
                    out.remove(done.cid)
        assert disk.device.in_flight() == 0
    assert disk.path.stat().st_size == BLOCKS * 512
    await disk.driver.disable()
    await start(disk)
    assert (await disk.driver.io(FLUSH)).status == OK


async def test_anything_at_all(disk: Disk, rounds: int) -> None:
    """Admin commands, registers and doorbells too: queues go and come, the controller is reset."""
    dice = Dice(0)
    pick = dice.random
    for _ in range(rounds * 6):
        for cid in range(60):
            kind = pick.randrange(12)
            pair = disk.driver.pairs[pick.randrange(4)]
            if kind < 8:
                disk.vm.memory.write(
                    pair.sq + 64 * pick.randrange(pair.entries), dice.io(cid) if pair.number else dice.admin(cid)
                )
                disk.driver.ring(pick.randrange(4), pick.randrange(70), head=pick.random() < 0.3)
            elif kind == 8:
                disk.driver.write(pick.randrange(0x40) & ~3, pick.getrandbits(64), pick.choice((4, 8)))
            elif kind == 9:
                at = DOORBELLS + pick.choice((pick.randrange(0x3000), 4 * pick.randrange(12)))
                disk.driver.write(at, pick.choice((0, 1, pick.getrandbits(32))), pick.choice((1, 2, 4, 4, 8)))
            elif kind == 10:
                dice.lists(disk)
            elif pick.random() < 0.1:
                disk.device.pause()
                await disk.device.drained()
                disk.device.resume()
            if pick.random() < 0.2:
                await asyncio.sleep(0)
        disk.driver.config_write(4, 2, 6)
        disk.driver.write(CC, ENTRY_SIZES)
        await until(lambda: disk.driver.status & 3 == 0, "a controller that is disabled")
        # A shutdown that was asked for may still flush.
        assert not any(queue.in_flight for queue in disk.device.queues)
        await start(disk)
        assert (await disk.driver.io(FLUSH)).status == OK
        assert (await disk.read(0, 8))[0].status == OK
    assert os.stat(disk.path).st_size == BLOCKS * 512
