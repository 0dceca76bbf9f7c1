"""Block backends: where the sectors of a disk come from.

A backend makes one engine for each queue of the device; the shape of engines is in _engine.pxd. FLUSH makes everything
that completed before it durable.
"""

from propolis.backends.block._engine import Engine


class BlockBackend:
    """A disk's contents, opened. The device reads the facts once, when it is built."""

    capacity: int  # bytes, whole blocks
    block_size: int = 512  # bytes; the unit of access
    physical_block_size: int = 4096
    read_only: bool = False
    can_discard: bool = False
    can_zero: bool = False
    max_extent: int = 0  # bytes of one discard or zero

    def engine(self) -> Engine:
        """A new engine; the backend closes it."""
        raise NotImplementedError

    def close(self) -> bool:
        """Lets go of everything. False while operations are in flight: then nothing they use is freed."""
        return True


__all__ = ["BlockBackend", "Engine"]
