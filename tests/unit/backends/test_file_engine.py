"""What is done in place and what is not: with the same result."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis.backends._iopool import IoPool
from propolis.backends.block._engine import Operation
from propolis.backends.block._file_engine import KINDS, FileEngine, kind_of
from tests.unit.backends.test_iopool import run

SIZE = 4 << 20


@pytest.fixture
def content() -> bytes:
    return random.Random(5).randbytes(SIZE)


@pytest.fixture
def memory(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.pwrite(fd, content, 0)
    yield fd
    os.close(fd)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, content, 0)
    os.fsync(fd)
    yield fd
    os.close(fd)


def test_kinds(memory: int) -> None:
    assert kind_of(memory) == "memory"
    here = os.open("/proc/self/status", os.O_RDONLY)
    assert kind_of(here) == "cached"
    os.close(here)
    with pytest.raises(ValueError, match="not in tuple"):
        FileEngine(IoPool.__new__(IoPool), memory, kind="none")


def test_a_file_in_memory(pool: IoPool, memory: int, content: bytes) -> None:
    """Reads, writes and flushes never leave the thread; holes do."""
    engine = FileEngine(pool, memory, kind="memory")
    room = bytearray(8192)
    [read] = run(engine, Operation("read", 4096, [room]))
    assert read.error == 0
    assert room == content[4096 : 4096 + 8192]
    [written] = run(engine, Operation("write", 100, [b"ab", b"cd"], durable=True))
    assert written.error == 0
    assert os.pread(memory, 6, 99) == content[99:100] + b"abcd" + content[104:105]
    [flushed] = run(engine, Operation("flush"))
    assert flushed.error == 0
    assert engine.stats() == {"in_place": 3, "passed_on": 0}
    assert pool.stats()["performed"] == 0
    [discarded] = run(engine, Operation("discard", 0, length=65536))
    assert discarded.error == 0
    assert engine.stats() == {"in_place": 3, "passed_on": 1}
    assert engine.close()


def test_errors_in_place(pool: IoPool, memory: int) -> None:
    engine = FileEngine(pool, memory, kind="memory")
    [beyond] = run(engine, Operation("read", SIZE - 10, [bytearray(20)]))
    assert beyond.error == errno.EIO
    [impossible] = run(engine, Operation("write", 1 << 63, [b"x"]))
    assert impossible.error == errno.EINVAL
    assert engine.stats()["in_place"] == 2
    assert engine.close()


def test_what_is_in_the_page_cache(pool: IoPool, file: int, content: bytes) -> None:
    engine = FileEngine(pool, file, kind="cached")
    hot, cold = bytearray(65536), bytearray(65536)
    os.pread(file, 65536, 0)
    [first] = run(engine, Operation("read", 0, [hot]))
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    [second] = run(engine, Operation("read", 1 << 20, [cold]))
    assert (first.error, second.error) == (0, 0)
    assert hot == content[:65536]
    assert cold == content[1 << 20 : (1 << 20) + 65536]
    stats = engine.stats()
    assert stats["in_place"] >= 1
    assert sum(stats.values()) == 2
    [beyond] = run(engine, Operation("read", SIZE - 512, [bytearray(1024)]))
    assert beyond.error == errno.EIO
    assert engine.close()


def test_what_may_wait_for_a_disk_is_passed_on(pool: IoPool, file: int, content: bytes) -> None:
    engine = FileEngine(pool, file, kind="cached")
    done = run(
        engine,
        Operation("flush"),
        Operation("write", 0, [b"durable"], durable=True),
        Operation("zero", 4096, length=4096),
        Operation("write", 1 << 20, [content[: 2 << 20]]),  # too large to be copied here
    )
    assert [operation.error for operation in done] == [0] * 4
    assert engine.stats() == {"in_place": 0, "passed_on": 4}
    expected = b"durable" + content[7:4096] + bytes(4096) + content[8192 : 1 << 20] + content[: 2 << 20]
    assert os.pread(file, 3 << 20, 0) == expected
    assert engine.close()


def test_writes_to_a_file_system_that_cannot_say_whether_it_would_wait(pool: IoPool, file: int) -> None:
    """Whichever way they go, they arrive."""
    engine = FileEngine(pool, file, kind="cached")
    for number in range(20):
        [written] = run(engine, Operation("write", number * 512, [bytes([number]) * 512]))
        assert written.error == 0
    assert os.pread(file, 20 * 512, 0) == b"".join(bytes([number]) * 512 for number in range(20))
    assert sum(engine.stats().values()) == 20
    assert engine.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_sync", [False, True])
def test_many_of_every_kind(pool: IoPool, file: int, content: bytes, kind: str, skip_sync: bool) -> None:
    """Each comes back once, with its own result, in whatever way it was performed."""
    if kind == "direct":
        pytest.skip("needs a file that was opened so")
    engine = FileEngine(pool, file, skip_sync, kind=kind)
    dice = random.Random(6)
    model = bytearray(content)
    for _ in range(20):
        operations, expected = [], {}
        for start in dice.sample(range(0, SIZE, 65536), 12):
            length = dice.choice([1, 512, 4096, 65536])
            if dice.random() < 0.5:
                room = bytearray(length)
                operation = Operation("read", start, [room])
                expected[operation] = room, bytes(model[start : start + length])
            else:
                data = dice.randbytes(length)
                operation = Operation("write", start, [data], durable=dice.random() < 0.1)
                model[start : start + length] = data
            operations.append(operation)
        operations.append(Operation("flush"))
        assert [operation.error for operation in run(engine, *operations)] == [0] * 13
        assert all(room == wanted for room, wanted in expected.values())
    assert os.pread(file, SIZE, 0) == model
    assert engine.close()
