"""The last state of a VM in a file that the worker maps: it is there whenever and however the worker ends.

The file has two slots and the writer takes them in turn, so that one is whole at any time. Readers check it as what a
worker may have written that its guest took over.
"""

from __future__ import annotations

import struct
import time
import zlib
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from propolis.lifecycle import State  # noqa: TC001 -- msgspec reads it

if TYPE_CHECKING:
    from propolis.mapped_file import MappedFile

MAX_DETAIL = 2000  # characters

_SLOT_BYTES = 4096
_SLOTS = 2
FILE_BYTES = _SLOTS * _SLOT_BYTES
_HEAD = struct.Struct("=QIII")  # sequence number and size, a checksum of these two, one of what follows
_MAX_PAYLOAD = _SLOT_BYTES - _HEAD.size
_MAX_NUMBER = 1 << 48  # of sequences and generations: nobody counts so far
_MAX_TIME = 1 << 34


class StateRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published state; `time` is of the wall clock, and `paused` is what the wire's Running does not tell."""

    generation: int
    state: State
    detail: str = ""
    paused: bool = False
    time: float = 0.0


class _Slot(NamedTuple):
    sequence: int
    payload: bytes


def decode(raw: bytes) -> StateRecord | None:
    """The state in a file's content; None where there is none, or none that makes sense."""
    newest = _newest(raw)
    return None if newest is None else _record(newest)


def _newest(raw: bytes) -> _Slot | None:
    newest: _Slot | None = None
    for start in range(0, len(raw) - _SLOT_BYTES + 1, _SLOT_BYTES):
        sequence, size, head_sum, sum_ = _HEAD.unpack_from(raw, start)
        payload = raw[start + _HEAD.size : start + _HEAD.size + min(size, _MAX_PAYLOAD)]
        is_whole = head_sum == _head_sum(sequence, size) and sum_ == zlib.crc32(payload)
        if is_whole and 0 < sequence <= _MAX_NUMBER and (newest is None or sequence > newest.sequence):
            newest = _Slot(sequence, payload)
    return newest


def _head_sum(sequence: int, size: int) -> int:
    return zlib.crc32(struct.pack("=QI", sequence, size))


def _record(slot: _Slot) -> StateRecord | None:
    try:
        record = msgspec.json.decode(slot.payload, type=StateRecord)
    except (ValueError, RecursionError):
        return None
    if not 0 <= record.generation <= _MAX_NUMBER or not 0 <= record.time <= _MAX_TIME:
        return None
    return msgspec.structs.replace(record, detail=printable(record.detail[:MAX_DETAIL]))


class StateWriter:
    """Writes the states of one VM."""

    def __init__(self, file: MappedFile) -> None:
        """Owns the mapping of FILE_BYTES."""
        self._file = file
        newest = _newest(bytes(file.view))
        self.last = None if newest is None else _record(newest)
        self._sequence = 0
        if newest is not None and self.last is not None and newest.sequence < _MAX_NUMBER:
            self._sequence = newest.sequence
        else:
            self.last = None
            file.view[:] = bytes(FILE_BYTES)

    def write(self, generation: int, state: State, detail: str = "", *, paused: bool = False) -> None:
        """The VM's state from now on."""
        detail = printable(detail[:MAX_DETAIL])
        while True:
            record = StateRecord(generation=generation, state=state, detail=detail, paused=paused, time=time.time())
            payload = msgspec.json.encode(record)
            if len(payload) <= _MAX_PAYLOAD:
                break
            detail = detail[: len(detail) // 2]
        self._sequence += 1
        head = _HEAD.pack(self._sequence, len(payload), _head_sum(self._sequence, len(payload)), zlib.crc32(payload))
        start = self._sequence % _SLOTS * _SLOT_BYTES
        # The other slot stays as it is: whoever looks now, or after a kill between these bytes, sees that one.
        self._file.view[start : start + len(head) + len(payload)] = head + payload

    def close(self) -> None:
        """Twice is fine."""
        self._file.close()


def printable(text: str) -> str:
    """One line of text that does nothing to the terminal it is shown on."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)
