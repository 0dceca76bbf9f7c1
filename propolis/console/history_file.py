"""A history in a file: it outlives the process that writes it, and others can read it meanwhile.

The file is a header and the space of `HistoryReader`. The writer maps it; its stores reach the file even when it is
killed between two of them. It says first what it is about to write and last that it has, so a reader that looks at both
knows what it cannot trust. Readers do not map it: the writer could shorten the file under them. What they find there is
as hostile as the guest: numbers are checked, bytes are bytes.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from propolis.console.history import KEPT_BYTES, READ_BYTES, ConsoleHistory, GapError, HistoryReader
from propolis.mapped_file import MappedFile

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

HEADER_BYTES = 4096  # the space begins on a page
_MAGIC = int.from_bytes(b"Propolh1", "little")
_FIELDS = struct.Struct("=QQQQ")  # _MAGIC, kept bytes, total, claimed
_MAX_TOTAL = 1 << 62
_TRIES = 50


def file_bytes(kept_bytes: int = KEPT_BYTES) -> int:
    """How long the file is, from the beginning."""
    return HEADER_BYTES + 2 * kept_bytes


class _Header(NamedTuple):
    total: int
    claimed: int


def _parse(raw: bytes, kept_bytes: int) -> _Header | None:
    """None where no writer of this kind has begun, or the header was tampered with."""
    if len(raw) < _FIELDS.size:
        return None
    magic, kept, total, claimed = _FIELDS.unpack_from(raw)
    if magic != _MAGIC or kept != kept_bytes or total > _MAX_TOTAL or not total <= claimed <= total + kept_bytes:
        return None
    return _Header(total, claimed)


class MappedHistory(ConsoleHistory):
    """The one writer of a history file; goes on where an earlier one ended."""

    def __init__(self, fd: int, kept_bytes: int = KEPT_BYTES) -> None:
        """Maps the file, which has `file_bytes(kept_bytes)`. The descriptor stays the caller's. Raises BackendError."""
        super().__init__(kept_bytes)
        self._file = MappedFile(fd, file_bytes(kept_bytes))
        self._fields = self._file.view[: _FIELDS.size].cast("Q")  # aligned: each is stored whole
        header = _parse(bytes(self._file.view[: _FIELDS.size]), kept_bytes)
        if header is None or header.total > _MAX_TOTAL // 2:  # which no honest writer reaches
            self._fields[0] = 0
            self._fields[1] = kept_bytes
            self._fields[2] = self._fields[3] = 0
            self._fields[0] = _MAGIC
        else:
            self._total, self._claimed = header

    def close(self) -> None:
        """Unmap the file; twice is fine."""
        self._fields.release()
        self._file.close()

    def _claim(self, end: int) -> None:
        super()._claim(end)
        self._fields[3] = self._claimed

    def _put(self, place: int, data: bytes) -> None:
        start = HEADER_BYTES + place
        self._file.view[start : start + len(data)] = data

    def _publish(self, end: int) -> None:
        super()._publish(end)
        self._fields[2] = end

    def _get(self, place: int, size: int) -> bytes:
        start = HEADER_BYTES + place
        return bytes(self._file.view[start : start + size])


class HistoryFile(HistoryReader):
    """Reads a history file, also while it is written. Context manager; every look is at the file as it is then."""

    def __init__(self, fd: int, kept_bytes: int = KEPT_BYTES) -> None:
        """Owns the descriptor."""
        super().__init__(kept_bytes)
        self._fd = fd

    def close(self) -> None:
        """Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def total_bytes(self) -> int:
        self._look()
        return self._total

    @property
    def resumes_at(self) -> int:
        self._look()
        return super().resumes_at

    def read(
        self, *, from_start: int | None = None, most_recent: int | None = None, max_bytes: int = READ_BYTES
    ) -> tuple[bytes, int]:
        """As HistoryReader; what the writer replaced meanwhile is read again."""
        for _ in range(_TRIES):
            self._look()
            data, after = super().read(from_start=from_start, most_recent=most_recent, max_bytes=max_bytes)
            # Between the start and the beginning's end nothing changes; behind that, only what is still kept is whole.
            if after <= self._kept or max(after - len(data), self._kept) >= self.resumes_at:
                return data, after
        raise GapError(from_start or 0, self.resumes_at)

    def _look(self) -> None:
        for _ in range(_TRIES):  # a number that was copied half old and half new does not fit the others
            header = _parse(os.pread(self._fd, _FIELDS.size, 0), self._kept)
            if header is not None:
                self._total, self._claimed = header
                return
        self._total = self._claimed = 0

    def _get(self, place: int, size: int) -> bytes:
        # A file that was cut short reads as zeros there, so that offsets stay what they are.
        return os.pread(self._fd, size, HEADER_BYTES + place).ljust(size, b"\0")
