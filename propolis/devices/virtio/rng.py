"""virtio-rng (virtio 1.2 §5.4): the host's random numbers for the guest, as many each second as it may have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from propolis.devices.virtio.device import VirtioDevice

if TYPE_CHECKING:
    import asyncio

    from propolis._vmm import Vm
    from propolis.devices.virtio._queue import Buffers

TYPE_ENTROPY = 4
CLASS_OTHER = 0xFF0000
SUBSYSTEM = 0x0040 + TYPE_ENTROPY
QUEUE_SIZE = 64
MAX_BYTES = 4096  # of one request: the driver asks again for more (§5.4.6)
BUDGET = 64  # requests, and then everybody else on the loop has a turn
MIN_GRANT = 64  # bytes worth waking up for


class VirtioRng(VirtioDevice):
    """One queue of buffers to be filled. With a limit there is a bucket of one second's bytes, full at first."""

    def __init__(self, vm: Vm, name: str, *, bytes_per_second: int | None = None) -> None:
        super().__init__(
            vm,
            name,
            type_id=TYPE_ENTROPY,
            class_code=CLASS_OTHER,
            subsystem=SUBSYSTEM,
            features=0,
            config=b"",
            queue_sizes=[QUEUE_SIZE],
        )
        self._rate = bytes_per_second
        self._bucket = float(bytes_per_second or 0)
        self._filled_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._given = 0
        self._waits = 0

    def kick(self, index: int) -> None:
        if self._timer is None and (self._rate is None or not self._wait(self._rate)):
            self.answer_all(index, self._fill, BUDGET)

    def _fill(self, buffers: Buffers) -> bool:
        length = min(buffers.writable, MAX_BYTES, self._allowance())
        self._given += buffers.write(os.getrandom(length))
        buffers.finish()
        if self._rate is None:
            return True
        self._bucket -= length
        return self._bucket >= 1 or not self._wait(self._rate)

    def _allowance(self) -> int:
        """How many bytes there may be now."""
        if self._rate is None:
            return MAX_BYTES
        assert self._loop is not None
        now = self._loop.time()
        if self._filled_at is not None:
            self._bucket = min(self._rate, self._bucket + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return int(self._bucket)

    def _wait(self, rate: int) -> bool:
        """Whether the next request has to wait; it stays in the ring meanwhile."""
        grant = min(rate, MIN_GRANT)
        if self._allowance() >= grant:
            return False
        assert self._loop is not None
        self._waits += 1
        self._timer = self._loop.call_later((grant - self._bucket) / rate, self._go_on)
        return True

    def _go_on(self) -> None:
        self._timer = None
        self.again(0)

    def deactivate(self) -> None:
        self._forget_timer()

    async def halt(self) -> None:
        self._forget_timer()
        await super().halt()

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def stats(self) -> dict[str, int]:
        """Bytes given, and how often the guest had to wait for the limit."""
        return {"random_bytes": self._given, "limit_waits": self._waits, **self.queues[0].stats()}
