"""A history in a file: as one in memory, whoever looks, whenever the writer is killed, whatever somebody put there."""

import os
import random
import signal
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from propolis.console.history import ConsoleHistory, GapError
from propolis.console.history_file import HEADER_BYTES, HistoryFile, MappedHistory, file_bytes
from propolis.errors import BackendError


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "console", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, file_bytes(4096))
    yield fd
    os.close(fd)


def reader(fd: int, kept: int) -> HistoryFile:
    return HistoryFile(os.dup(fd), kept)


def everything(history: ConsoleHistory | HistoryFile, piece: int) -> list[object]:
    """What reads from every offset give."""
    found: list[object] = [history.total_bytes, history.resumes_at]
    for start in range(history.total_bytes + 2):
        try:
            found.append(history.read(from_start=start, max_bytes=piece))
        except GapError as gap:
            found.append(gap.resumes_at)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_like_one_in_memory(fd: int, seed: int) -> None:
    """To its writer, to others, and to the next writer."""
    rng = random.Random(seed)
    kept = rng.randrange(1, 40)
    memory = ConsoleHistory(kept)
    mapped = MappedHistory(fd, kept)
    for _ in range(rng.randrange(20)):
        data = rng.randbytes(rng.randrange(0, 3 * kept))
        memory.append(data)
        mapped.append(data)
        if rng.randrange(4) == 0:
            mapped.close()
            mapped = MappedHistory(fd, kept)
    piece = rng.randrange(1, 100)
    with closing(mapped), reader(fd, kept) as other:
        assert everything(mapped, piece) == everything(other, piece) == everything(memory, piece)


def test_nothing_yet(fd: int) -> None:
    with reader(fd, 16) as other:
        assert other.read(from_start=0) == (b"", 0)
        assert other.total_bytes == other.resumes_at == 0


def test_a_writer_that_was_killed_in_the_middle(fd: int) -> None:
    """What it had begun to replace is a gap, for readers and for the next writer, until that has written on."""
    mapped = MappedHistory(fd, 16)
    mapped.append(b"0123456789abcdef" * 3)
    mapped._claim(53)  # as an append of 5 does first
    mapped._put(16, b"XX")
    mapped.close()
    with reader(fd, 16) as other, closing(MappedHistory(fd, 16)) as again:
        for history in (other, again):
            assert (history.total_bytes, history.resumes_at) == (48, 37)
            with pytest.raises(GapError):
                history.read(from_start=36)
            assert history.read(from_start=37) == (b"56789abcdef", 48)
        again.append(b"new")
        assert other.resumes_at == 37
        again.append(b"and on")
        assert (other.resumes_at, other.read(from_start=41)) == (41, (b"9abcdefnewand on", 57))


def test_readers_never_see_what_is_half_written(fd: int, rounds: int) -> None:
    """A process that writes as fast as it can, and is killed: each byte that was read is the one of its offset."""
    kept = 4096
    data = bytes(offset * 7 % 251 for offset in range(251 * 64))  # repeats itself each 251 bytes
    for _ in range(rounds):
        os.ftruncate(fd, 0)
        os.ftruncate(fd, file_bytes(kept))
        child = os.fork()
        if child == 0:
            mapped = MappedHistory(fd, kept)
            sizes = random.Random(0)
            while True:
                start = mapped.total_bytes % 251
                mapped.append(data[start : start + sizes.randrange(3000)])
        gaps = reads = 0
        try:
            with reader(fd, kept) as other:
                rng = random.Random(1)
                while reads < 2000 and gaps < 1_000_000:
                    if reads == 1000 or gaps == 20_000:  # a writer may be so fast that most reads come too late
                        os.kill(child, signal.SIGKILL)
                    total = other.total_bytes
                    try:
                        got, after = other.read(from_start=max(0, total - rng.randrange(2 * kept)), max_bytes=kept)
                    except GapError:
                        gaps += 1
                        continue
                    start = (after - len(got)) % 251
                    assert got == data[start : start + len(got)]
                    reads += len(got) > 0
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert reads == 2000


@pytest.mark.parametrize("seed", range(20))
def test_hostile_content(fd: int, seed: int) -> None:
    """Any bytes in the file, and one that is cut short, are read as something; and written over."""
    rng = random.Random(seed)
    kept = 64
    for _ in range(50):
        os.ftruncate(fd, file_bytes(kept))
        magic = int.from_bytes(b"Propolh1", "little")
        numbers = [rng.choice([0, 1, kept, 2 * kept, 1 << 62, (1 << 64) - 1, rng.randrange(300)]) for _ in range(3)]
        header = rng.choice([rng.randbytes(32), struct.pack("=4Q", magic, kept, *numbers[:2])])
        os.pwrite(fd, header + rng.randbytes(300), 0)
        with reader(fd, kept) as other:
            if rng.randrange(2):
                os.ftruncate(fd, rng.choice([0, 10, HEADER_BYTES, HEADER_BYTES + kept]))
            assert 0 <= other.total_bytes <= 1 << 62
            for start in (0, 10, kept, 100, 1 << 61, 1 << 63):
                try:
                    got, after = other.read(from_start=start, max_bytes=30)
                    assert len(got) <= 30
                    assert after - len(got) == min(start, other.total_bytes)
                except GapError as gap:
                    resumes_at = gap.resumes_at
                    assert start < resumes_at <= other.total_bytes
            os.ftruncate(fd, file_bytes(kept))
            with closing(MappedHistory(fd, kept)) as mapped:
                before = mapped.total_bytes
                mapped.append(b"goes on")
                assert other.read(from_start=before) == (b"goes on", before + 7)


def test_a_file_too_short_is_refused(fd: int) -> None:
    os.ftruncate(fd, 100)
    with pytest.raises(BackendError, match="it has 100"):
        MappedHistory(fd, 16)


def test_a_mapped_file_has_no_descriptor(fd: int) -> None:
    """Or who took the process over could fill the disk."""
    before = set(os.listdir("/proc/self/fd"))
    with closing(MappedHistory(fd, 16)):
        assert set(os.listdir("/proc/self/fd")) == before
