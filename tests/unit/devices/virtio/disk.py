"""A disk under test: a rig with a VirtioBlk over a file, and requests as a driver sends them."""

import os
import struct
from pathlib import Path
from typing import Any

from propolis.backends._iopool import IoPool
from propolis.backends.block.file import FileBackend
from propolis.devices.virtio.blk import VirtioBlk
from propolis.hypervisor._replay import ReplayVm
from tests.driver import Buffer, DriverQueue, VirtioDriver
from tests.unit.devices.virtio.rig import MakeRig, Rig

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13  # virtio 1.2 §5.2.6
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
SECTORS = 2048


class Disk:
    """The rig, the file behind it, and one call for each request."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self.rig = rig
        self.path = path

    @property
    def driver(self) -> VirtioDriver:
        return self.rig.driver

    @property
    def device(self) -> VirtioBlk:
        device = self.rig.device
        assert isinstance(device, VirtioBlk)
        return device

    @property
    def queue(self) -> DriverQueue:
        return self.driver.queues[0]

    def send(
        self,
        kind: int,
        sector: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
        queue: int = 0,
        indirect: bool = False,
        pieces: int = 1,
    ) -> "Sent":
        """Offers and kicks one request; data is cut into that many pieces."""
        ram = self.rig.ram
        readable = [ram.put(struct.pack("<IIQ", kind, 0, sector)), *cut(ram.put(out), pieces if out else 0)]
        data = (ram.take(room), room) if room else (0, 0)
        status = ram.put(b"\xee")
        ring = self.driver.queues[queue]
        head = ring.add(readable, [*cut(data, pieces if room else 0), status], indirect=indirect)
        ring.kick()
        return Sent(self, ring, head, status[0], data)

    async def do(self, kind: int, sector: int = 0, **how: Any) -> "Sent":
        """One request, to its end."""
        ram = self.rig.ram
        mark = ram.next
        sent = self.send(kind, sector, **how)
        [(head, sent.written)] = await sent.ring.wait()
        assert head == sent.head
        sent.data = sent.read()
        sent.status = sent.read_status()
        ram.next = mark
        return sent

    def image(self) -> bytes:
        return self.path.read_bytes()


class Sent:
    def __init__(self, disk: Disk, ring: DriverQueue, head: int, status_at: int, data_at: Buffer) -> None:
        self.disk = disk
        self.ring = ring
        self.head = head
        self.status_at = status_at
        self.data_at = data_at
        self.written = 0
        self.status = 0xEE
        self.data = b""

    def read(self) -> bytes:
        return self.disk.rig.vm.memory.read(*self.data_at)

    def read_status(self) -> int:
        return self.disk.rig.vm.memory.read(self.status_at, 1)[0]


def cut(buffer: Buffer, pieces: int) -> list[Buffer]:
    """A buffer as that many neighbouring ones."""
    if not pieces:
        return []
    address, length = buffer
    size = length // pieces
    return [(address + i * size, size if i + 1 < pieces else length - i * size) for i in range(pieces)]


def extent(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


async def make_disk(
    make_rig: MakeRig,
    pool: IoPool,
    path: Path,
    *,
    read_only: bool = False,
    begin: bool = True,
    sectors: int = SECTORS,
    **options: Any,
) -> Disk:
    """A disk of pseudo-random contents, its driver ready unless told otherwise."""
    if not os.access(path, os.F_OK):
        with open(path, "xb") as image:  # noqa: ASYNC230 -- a MiB of a temporary file
            image.writelines(struct.pack("<Q", i * 0x9E37_79B9) for i in range(sectors * SECTOR // 8))

    def device_of(vm: ReplayVm) -> VirtioBlk:
        fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        backend = FileBackend(fd, pool, read_only=read_only, path=str(path))
        return VirtioBlk(vm, "disk0", backend, serial="propolis-disk-0", **options)

    disk = Disk(await make_rig(device_of), path)
    if begin:
        disk.driver.begin()
    return disk
