from typing import Self

from propolis.backends.block._engine import Engine
from propolis.devices._polling import Polling
from propolis.devices.virtio._queue import Queue

class BlkQueue:
    def __new__(
        cls,
        queue: Queue,
        engine: Engine,
        polling: Polling,
        *,
        capacity: int,
        block_size: int,
        read_only: bool,
        serial: bytes,
        max_sectors: int,
    ) -> Self: ...
    def negotiate(self, durable: bool, discard: bool, zero: bool) -> None: ...
    def run(self, budget: int) -> int: ...
    def complete(self) -> None: ...
    def resize(self, capacity: int) -> None: ...
    @property
    def last_error(self) -> int: ...
    def stats(self) -> dict[str, int]: ...
