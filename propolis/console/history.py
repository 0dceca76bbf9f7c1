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


def gap_note(lost: int) -> bytes:
    """What a terminal shows in the place of so many bytes."""
    return f"\r\n[{lost} bytes of console output are no longer kept]\r\n".encode()


class HistoryReader:
    """The first and the last `kept_bytes` of what was printed; together they are without a gap until both are full.

    They lie in one space of twice that size: the beginning, then a ring in which a byte at offset n is at n modulo the
    ring's size. A subclass knows where that space is.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept = kept_bytes
        self._total = 0
        self._claimed = 0  # the end of what is being written: it may have replaced what it shares the ring with

    @property
    def total_bytes(self) -> int:
        """How much was ever printed: the offset of the next byte."""
        return self._total

    @property
    def resumes_at(self) -> int:
        """The offset from which everything up to now is kept."""
        oldest = self._claimed - self._kept
        return oldest if oldest > self._kept else 0

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
        total = self._total
        start = max(0, total - most_recent) if most_recent is not None else min(from_start or 0, total)
        end = min(total, start + max_bytes)
        data = self._get(start, min(end, self._kept) - start) if start < self._kept else b""
        at = start + len(data)
        if at >= self._kept and at < end:
            if at >= self.resumes_at:
                data += self._get_ring(at, end - at)
            elif not data:
                raise GapError(start, self.resumes_at)
        return data, start + len(data)

    def _get(self, place: int, size: int) -> bytes:
        """What lies in the space of both parts."""
        raise NotImplementedError

    def _get_ring(self, offset: int, size: int) -> bytes:
        start = offset % self._kept
        first = min(size, self._kept - start)
        data = self._get(self._kept + start, first)
        return data + self._get(self._kept, size - first) if first < size else data


class ConsoleHistory(HistoryReader):
    """A history that is written here, and kept in this process."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(kept_bytes)
        self._space = bytearray()  # grows as far as it is used

    def append(self, data: bytes) -> None:
        """Add what the guest printed."""
        if len(data) <= self._kept:
            self._append(data)
            return
        for start in range(0, len(data), self._kept):
            self._append(data[start : start + self._kept])

    def _append(self, data: bytes) -> None:
        at, end = self._total, self._total + len(data)
        self._claim(end)
        if at < self._kept:
            room = self._kept - at
            self._put(at, data[:room])
            data = data[room:]
            at = self._kept
        if data:
            start = at % self._kept
            room = self._kept - start
            self._put(self._kept + start, data[:room])
            if room < len(data):
                self._put(self._kept, data[room:])
        self._publish(end)

    def _claim(self, end: int) -> None:
        """Before it is written: what this will replace is no longer kept."""
        self._claimed = max(self._claimed, end)

    def _put(self, place: int, data: bytes) -> None:
        self._space[place : place + len(data)] = data

    def _publish(self, end: int) -> None:
        """After it is written."""
        self._total = end

    def _get(self, place: int, size: int) -> bytes:
        return bytes(self._space[place : place + size])
