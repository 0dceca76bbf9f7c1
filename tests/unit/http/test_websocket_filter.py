"""Control frames pass and data does not, however the stream is cut."""

import random

import pytest

from propolis.http.websocket_filter import ControlFrames


def frame(opcode: int, size: int, *, is_masked: bool = True, fin: int = 0x80) -> bytes:
    bit = 0x80 if is_masked else 0
    if size < 126:
        length = bytes([bit | size])
    elif size < 65536:
        length = bytes([bit | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([bit | 127]) + size.to_bytes(8, "big")
    mask = b"\x01\x02\x03\x04" if is_masked else b""
    return bytes([fin | opcode]) + length + mask + bytes([opcode]) * size


@pytest.mark.parametrize("seed", range(20))
def test_any_stream(seed: int) -> None:
    chance = random.Random(seed)
    frames = [
        frame(
            chance.choice((0, 1, 2, 8, 9, 10)),
            chance.choice((0, 1, 125, 126, 300, 65536)),
            is_masked=chance.random() < 0.9,
        )
        for _ in range(30)
    ]
    wanted = b"".join(one for one in frames if one[0] & 0x08)
    stream, control, passed = b"".join(frames), ControlFrames(), b""
    while stream:
        cut = chance.choice((1, 2, 7, 1000, 100_000))
        passed += control.feed(stream[:cut])
        stream = stream[cut:]
    assert passed == wanted
