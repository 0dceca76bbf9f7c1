"""virtio-block (virtio 1.2 §5.2): a disk of one backend, with one or more queues."""

import asyncio
import errno
import logging
import os
import struct

from propolis._vmm import Vm
from propolis.backends.block import BlockBackend, Engine
from propolis.devices._polling import Polling
from propolis.devices.virtio._blk import BlkQueue
from propolis.devices.virtio.device import VirtioDevice

log = logging.getLogger(__name__)

TYPE_BLOCK = 2
CLASS_STORAGE = 0x010000
SUBSYSTEM = 0xFFFA

# §5.2.3
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

SECTOR = 512
MAX_EXTENTS = 16  # of backends/block/_engine.pxd
SERIAL_BYTES = 20
BUDGET = 256  # requests of one queue before everybody else on the loop has a turn
AGAIN = 1  # of _blk.pxd
BROKEN = 2
POLL_US = 50
HALT_PATIENCE = 5.0  # seconds


def config_space(backend: BlockBackend, queues: int, seg_max: int) -> bytes:
    """struct virtio_blk_config of §5.2.4, up to the write-zeroes fields."""
    extent = backend.max_extent // SECTOR
    granularity = max(backend.physical_block_size, backend.block_size)
    return struct.pack(
        "<QII HBB I BBHI BBH III II B3x",
        backend.capacity // SECTOR,
        0,  # size_max: no limit, not offered
        seg_max,
        *(0, 0, 0),  # geometry, not offered
        backend.block_size,
        (granularity // backend.block_size).bit_length() - 1,
        0,
        granularity // backend.block_size,
        0,
        *(0, 0, queues),
        *((extent, MAX_EXTENTS, granularity // SECTOR) if backend.can_discard else (0, 0, 0)),
        *((extent, MAX_EXTENTS, backend.can_discard) if backend.can_zero else (0, 0, 0)),
    )


class VirtioBlk(VirtioDevice):
    """A disk. It owns the backend from the moment it is built, and closes it in halt."""

    def __init__(
        self,
        vm: Vm,
        name: str,
        backend: BlockBackend,
        *,
        queues: int = 1,
        queue_size: int = 256,
        serial: str = "",
        poll_us: int = POLL_US,
    ) -> None:
        """`poll_us` is for how long a queue that was busy is looked at before it is waited for; 0 is not at all."""
        if queue_size < 4:
            raise ValueError(f"{name}: a request needs up to 4 descriptors, a queue of {queue_size} is too small")
        features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        features |= F_RO if backend.read_only else 0
        features |= F_MQ if queues > 1 else 0
        features |= F_DISCARD if backend.can_discard and not backend.read_only else 0
        features |= F_WRITE_ZEROES if backend.can_zero and not backend.read_only else 0
        super().__init__(
            vm,
            name,
            type_id=TYPE_BLOCK,
            class_code=CLASS_STORAGE,
            subsystem=SUBSYSTEM,
            features=features,
            config=config_space(backend, queues, queue_size - 2),
            queue_sizes=[queue_size] * queues,
        )
        self.backend = backend
        self._engines: list[Engine] = [backend.engine() for _ in range(queues)]
        self._loops = [
            BlkQueue(
                queue,
                engine,
                Polling(poll_us * 1000),
                capacity=backend.capacity,
                block_size=backend.block_size,
                read_only=backend.read_only,
                serial=serial.encode("ascii", "replace")[:SERIAL_BYTES],
                max_sectors=backend.max_extent // SECTOR,
            )
            for queue, engine in zip(self.queues, self._engines, strict=True)
        ]
        self._reported = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        super().start(loop)
        for index, engine in enumerate(self._engines):
            loop.add_reader(engine.fileno(), self._on_completion, index)

    def activate(self, features: int) -> None:
        for blk in self._loops:
            blk.negotiate(not features & F_FLUSH, bool(features & F_DISCARD), bool(features & F_WRITE_ZEROES))

    def kick(self, index: int) -> None:
        result = self._loops[index].run(BUDGET)
        if result & BROKEN:
            self.broken(index, self.queues[index].failure or "")
        elif result & AGAIN:
            self.again(index)
        self._after_completions(index)

    def _on_completion(self, index: int) -> None:
        if index in self._listening and self.function.is_bus_master:
            self.kick(index)  # more is likely to come now
        else:
            self._loops[index].complete()
            self._after_completions(index)

    def _after_completions(self, index: int) -> None:
        error = self._loops[index].last_error
        if error and error != self._reported:
            self._reported = error  # once for each kind; the counters have them all
            log.warning(
                "disk error: device=%s errno=%s reason=%r",
                self.name,
                errno.errorcode.get(error, error),
                os.strerror(error),
            )
        if (self._waiters or self._is_resetting) and not self.in_flight():
            self.settled()

    def stats(self) -> dict[str, int]:
        """Counters over all queues since the device was built."""
        total: dict[str, int] = {}
        for part in (*(blk.stats() for blk in self._loops), *(queue.stats() for queue in self.queues)):
            for key, value in part.items():
                total[key] = total.get(key, 0) + value
        return total

    async def halt(self) -> None:
        await super().halt()
        try:
            async with asyncio.timeout(HALT_PATIENCE):
                await self.drained()
        except TimeoutError:
            log.error(  # noqa: TRY400 -- the traceback says nothing more
                "disk is let go with requests in flight: device=%s in_flight=%d", self.name, self.in_flight()
            )
        if self._loop is not None:
            for engine in self._engines:
                self._loop.remove_reader(engine.fileno())
        self.backend.close()
