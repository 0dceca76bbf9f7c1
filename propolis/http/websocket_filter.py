"""What a client that may only read sends on a websocket: its control frames, RFC 6455 §5.5, without its data."""

from __future__ import annotations

_CONTROL = 0x08  # bit of the opcode
_MASKED = 0x80
_LENGTHS = {126: 2, 127: 8}


class ControlFrames:
    """Reads a stream of frames, in pieces of any size, and passes on the control frames."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0  # bytes of the present frame that are still to come
        self._is_passed = False

    def feed(self, data: bytes) -> bytes:
        """The part of this that is passed on."""
        passed = bytearray()
        at = 0
        while at < len(data):
            if self._left == 0:
                self._head.append(data[at])
                at += 1
                self._begin(passed)
                continue
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            if self._is_passed:
                passed += piece
        return bytes(passed)

    def _begin(self, passed: bytearray) -> None:
        """A frame, once its head is there up to its length."""
        head = self._head
        if len(head) < 2:
            return
        length = head[1] & 0x7F
        more = _LENGTHS.get(length, 0)
        if len(head) < 2 + more:
            return
        if more:
            length = int.from_bytes(head[2 : 2 + more], "big")
        self._left = length + (4 if head[1] & _MASKED else 0)
        self._is_passed = bool(head[0] & _CONTROL)
        if self._is_passed:
            passed += head
        head.clear()
