"""What a console printed since the VM was made: the beginning and the end of it are kept, what lies between is lost.

Every byte has an absolute offset, so a reader can come back later and go on where it was.
"""

from __future__ import annotations

from propolis.errors import PropolisError

KEPT_BYTES = 1 << 20
READ_BYTES = 16384


class GapError(PropolisError):
    """An offset whose byte is no longer kept; `resumes_at` is the first one after it that is."""

    code = "expired_range"
    status = 400

    def __init__(self, offset: int, resumes_at: int) -> None:
        super().__init__(f"console output at offset {offset} is no longer kept: it goes on at {resumes_at}")
        self.offset = offset
        self.resumes_at = resumes_at


class ConsoleHistory:
    """The first and the last `kept_bytes` of a console; together they are without a gap until both are full."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept = kept_bytes
        self._total = 0
        self._beginning = bytearray()
        # A byte at offset n is at n modulo the ring's size, from the first byte that the beginning has no room for.
        self._ring = bytearray()

    @property
    def total_bytes(self) -> int:
        """How much was ever printed: the offset of the next byte."""
        return self._total

    @property
    def resumes_at(self) -> int:
        """The offset from which everything up to now is kept."""
        oldest = self._total - self._kept
        return oldest if oldest > len(self._beginning) else 0

    def append(self, data: bytes) -> None:
        """Add what the guest printed."""
        room = self._kept - len(self._beginning)
        self._total += len(data)
        if room > 0:
            self._beginning += data[:room]
            data = data[room:]
        if not data:
            return
        if not self._ring:
            self._ring = bytearray(self._kept)
        data = data[-self._kept :]
        start = (self._total - len(data)) % self._kept
        first = data[: self._kept - start]
        self._ring[start : start + len(first)] = first
        if len(first) < len(data):
            self._ring[: len(data) - len(first)] = data[len(first) :]

    def read(
        self, *, from_start: int | None = None, most_recent: int | None = None, max_bytes: int = READ_BYTES
    ) -> tuple[bytes, int]:
        """Bytes from an offset, or the latest ones; with the offset just after them, from which to read on.

        A read ends where a gap begins; one that begins in it is a GapError. Past the end there is nothing, yet.
        """
        if (from_start is None) == (most_recent is None):
            raise ValueError("a read of the console's history begins at from_start or at most_recent, one of them")
        if min(from_start or 0, most_recent or 0, max_bytes) < 0:
            raise ValueError("a read of the console's history has no negative offset or size")
        start = max(0, self._total - most_recent) if most_recent is not None else min(from_start or 0, self._total)
        data = bytes(self._beginning[start : start + max_bytes])
        at = start + len(data)
        if at >= len(self._beginning) and len(data) < max_bytes and at < self._total:
            if at >= self.resumes_at:
                data += self._read_ring(at, min(self._total - at, max_bytes - len(data)))
            elif not data and max_bytes:
                raise GapError(start, self.resumes_at)
        return data, start + len(data)

    def _read_ring(self, offset: int, size: int) -> bytes:
        start = offset % self._kept
        data = bytes(self._ring[start : start + size])
        return data + bytes(self._ring[: size - len(data)]) if len(data) < size else data
