"""A disk under test: a machine without a processor, with one NVMe controller over a file and its driver."""

import asyncio
import os
import struct
import uuid
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

from propolis.backends._iopool import IoPool
from propolis.backends.block.file import FileBackend
from propolis.devices.nvme.identify import Names
from propolis.devices.nvme.nvme import Nvme
from propolis.devices.pci.bus import PciBus
from propolis.hypervisor._replay import ReplayVm
from tests.driver import Ram
from tests.nvme_driver import READ, WRITE, Completion, NvmeDriver

RAM = 16 << 20
ROM_BASE = 0xFFFC_0000
SLOT = 5
BLOCKS = 2048
NAMES = Names(serial="SERIAL-0", model="A disk", identity=uuid.UUID(int=7))


@cache
def content(words: int) -> bytes:
    """What is on a disk at first."""
    return struct.pack(f"<{words}Q", *(i * 0x9E37_79B9 for i in range(words)))


class Disk:
    """One controller on its bus. `vm.mailbox` is dispatched by the loop, as the machine does it."""

    def __init__(
        self,
        pool: IoPool,
        path: Path,
        *,
        read_only: bool = False,
        block_size: int = 512,
        blocks: int = BLOCKS,
        queues: int = 4,
        **backend: Any,
    ) -> None:
        self.path = path
        self.block = block_size
        if not os.access(path, os.F_OK):
            path.write_bytes(content(blocks * block_size // 8))
        self.vm = ReplayVm()
        self.vm.memory.add(0, RAM)
        self.vm.memory.add(ROM_BASE, 0x40000, read_only=True)
        self.bus = PciBus(self.vm)
        fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.backend = FileBackend(fd, pool, read_only=read_only, path=str(path), block_size=block_size, **backend)
        self.device = Nvme(self.vm, "nvme0", self.backend, names=NAMES, queues=queues)
        self.bus.add(self.device.function, SLOT)
        self.ram = Ram(self.vm, 0x1000, RAM - 0x1000)
        self.driver = NvmeDriver(self.vm, SLOT, self.ram)
        loop = asyncio.get_running_loop()
        loop.add_reader(self.vm.mailbox.fileno(), self.vm.mailbox.dispatch)
        self.device.start(loop)

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self.vm.mailbox.fileno())
        await self.device.halt()
        self.vm.close()
        # pytest keeps what a fixture returned; nothing may keep the machine's descriptors.
        del self.vm, self.bus, self.device, self.driver, self.ram, self.backend

    def image(self) -> bytes:
        return self.path.read_bytes()

    def part(self, lba: int, blocks: int) -> bytes:
        """Blocks of the file."""
        with self.path.open("rb") as image:
            image.seek(lba * self.block)
            return image.read(blocks * self.block)

    async def read(self, lba: int, blocks: int = 1, *, skew: int = 0, **fields: Any) -> tuple[Completion, bytes]:
        """By PRPs; the buffer begins `skew` bytes into a page."""
        mark = self.ram.next
        length = blocks * self.block
        at = self.ram.take(length + skew, 4096) + skew
        prp1, prp2 = self.driver.prps(at, length)
        done = await self.driver.io(READ, lba, blocks, prp1=prp1, prp2=prp2, **fields)
        data = self.vm.memory.read(at, length)
        self.ram.next = mark
        return done, data

    async def write(self, lba: int, data: bytes, *, skew: int = 0, opcode: int = WRITE, **fields: Any) -> Completion:
        """By PRPs; also for a compare."""
        mark = self.ram.next
        at = self.ram.take(len(data) + skew, 4096) + skew
        self.vm.memory.write(at, data)
        prp1, prp2 = self.driver.prps(at, len(data))
        done = await self.driver.io(opcode, lba, len(data) // self.block, prp1=prp1, prp2=prp2, **fields)
        self.ram.next = mark
        return done


MakeDisk = Callable[..., Awaitable[Disk]]
