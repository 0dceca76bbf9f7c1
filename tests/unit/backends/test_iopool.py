"""The pool: every operation comes back once with its result, whatever the file does."""

import errno
import os
import random
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis.backends._iopool import IoPool, PoolEngine
from propolis.backends.block._engine import Engine, Operation


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, random.Random(0).randbytes(1 << 20), 0)
    yield fd
    os.close(fd)


def run(engine: Engine, *operations: Operation) -> list[Operation]:
    """Starts them all and waits for the eventfd until the last is back."""
    for operation in operations:
        engine.start(operation)
    done: list[Operation] = []
    while len(done) < len(operations):
        assert select.select([engine], [], [], 10)[0], "no completion within 10 s"
        done += engine.finished()
    assert engine.pending_count == 0
    return done


def test_reads_and_writes_in_pieces(pool: IoPool, fd: int) -> None:
    engine = PoolEngine(pool, fd)
    data = random.Random(1).randbytes(10_000)
    [written] = run(engine, Operation("write", 12_345, [data[:1], data[1:4097], data[4097:]]))
    assert written.error == 0
    rooms = [bytearray(4000), bytearray(1), bytearray(5999)]
    [read] = run(engine, Operation("read", 12_345, rooms))
    assert read.error == 0
    assert b"".join(rooms) == data == os.pread(fd, 10_000, 12_345)
    assert engine.close()


def test_reading_past_the_end_is_an_error(pool: IoPool, fd: int) -> None:
    engine = PoolEngine(pool, fd)
    room = bytearray(4096)
    [partly] = run(engine, Operation("read", (1 << 20) - 100, [room]))
    assert partly.error == errno.EIO
    assert bytes(room[:100]) == os.pread(fd, 100, (1 << 20) - 100)
    [wholly] = run(engine, Operation("read", 1 << 30, [room]))
    assert wholly.error == errno.EIO
    assert engine.close()


def test_short_transfers_are_continued(pool: IoPool) -> None:
    """The kernel moves at most 0x7ffff000 bytes at once (read(2)); this is more, into one buffer many times."""
    fd = os.memfd_create("big")
    os.truncate(fd, 3 << 30)
    os.pwrite(fd, b"end", (3 << 30) - 3)
    engine = PoolEngine(pool, fd)
    room = bytearray(160 << 20)
    [read] = run(engine, Operation("read", (3 << 30) - 16 * len(room), [room] * 16))
    assert read.error == 0
    assert room[-3:] == b"end"
    assert engine.close()
    os.close(fd)


def test_errors_are_reported(pool: IoPool, fd: int, tmp_path: Path) -> None:
    reader = os.open(tmp_path / "file", os.O_RDONLY)
    engine = PoolEngine(pool, reader)
    [refused] = run(engine, Operation("write", 0, [b"x"]))
    assert (refused.error, refused.message) == (errno.EBADF, "Bad file descriptor")
    [refused] = run(engine, Operation("discard", 0, length=4096))
    assert refused.error == errno.EBADF
    [refused] = run(engine, Operation("zero", 0, length=4096))
    assert refused.error == errno.EBADF
    [refused] = run(engine, Operation("read", 1 << 63, [bytearray(1)]))
    assert refused.error == errno.EINVAL
    assert engine.close()
    os.close(reader)


def test_flush_discard_zero(pool: IoPool, fd: int) -> None:
    engine = PoolEngine(pool, fd)
    before = os.pread(fd, 1 << 20, 0)
    blocks = os.fstat(fd).st_blocks
    operations = [
        Operation("discard", 0, length=65536),
        Operation("zero", 100_000, length=33_333),
        Operation("zero", 262_144, length=65536, unmap=True, durable=True),
        Operation("flush"),
    ]
    assert [operation.error for operation in run(engine, *operations)] == [0] * 4
    expected = bytearray(before)
    for start, length in ((0, 65536), (100_000, 33_333), (262_144, 65536)):
        expected[start : start + length] = bytes(length)
    assert os.pread(fd, 2 << 20, 0) == bytes(expected)
    assert os.fstat(fd).st_blocks < blocks
    assert engine.close()


def test_zeros_are_written_where_the_file_system_cannot(pool: IoPool) -> None:
    """tmpfs has no ZERO_RANGE: more than one write of zeros, and an odd rest."""
    fd = os.memfd_create("tmpfs")
    data = random.Random(3).randbytes(4 << 20)
    os.pwrite(fd, data, 0)
    engine = PoolEngine(pool, fd)
    length = (2 << 20) + 777
    [zeroed] = run(engine, Operation("zero", 4242, length=length))
    assert zeroed.error == 0
    assert os.pread(fd, 4 << 20, 0) == data[:4242] + bytes(length) + data[4242 + length :]
    assert engine.close()
    os.close(fd)


def test_many_operations_of_many_engines(pool: IoPool, fd: int) -> None:
    """Each comes back to the engine it came from, once."""
    engines = [PoolEngine(pool, fd) for _ in range(5)]
    content = os.pread(fd, 1 << 20, 0)
    rand = random.Random(4)
    expected: dict[Operation, tuple[bytearray, int]] = {}
    owned: list[set[Operation]] = [set() for _ in engines]
    for _ in range(2000):
        room, offset, index = bytearray(rand.randrange(1, 600)), rand.randrange(1 << 19), rand.randrange(5)
        operation = Operation("read", offset, [room])
        expected[operation] = room, offset
        owned[index].add(operation)
        engines[index].start(operation)
    for engine, mine in zip(engines, owned, strict=True):
        while mine:
            assert select.select([engine], [], [], 10)[0]
            for operation in engine.finished():
                mine.remove(operation)
                room, offset = expected[operation]
                assert operation.error == 0
                assert bytes(room) == content[offset : offset + len(room)]
        assert engine.close()
    assert pool.stats()["performed"] == 2000


def test_the_eventfd_rings_when_completions_begin_to_wait(pool: IoPool, fd: int) -> None:
    engine = PoolEngine(pool, fd)
    assert not select.select([engine], [], [], 0)[0]
    run(engine, *[Operation("flush") for _ in range(50)])
    assert not select.select([engine], [], [], 0.01)[0] or engine.finished() == []
    assert engine.close()


def test_an_engine_with_operations_in_flight_stays(pool: IoPool) -> None:
    """One that hangs is neither closed nor freed; its buffers stay."""
    ours, theirs = os.pipe()
    engine = PoolEngine(pool, ours)
    os.write(theirs, b"x")
    engine.start(Operation("read", 0, [bytearray(1)]))
    while not select.select([engine], [], [], 10)[0]:
        pass
    [seek] = engine.finished()
    assert seek.error == errno.ESPIPE
    operation = Operation("flush")
    engine.start(operation)
    assert not engine.close() or operation.error == 0
    with pytest.raises(ValueError, match="in flight"):
        engine.start(operation)
    while engine.pending_count:
        engine.finished()
    assert engine.close()
    os.close(ours)
    os.close(theirs)


def test_threads_are_named_and_end(tmp_path: Path) -> None:
    pool = IoPool(3)
    assert {"io-0", "io-1", "io-2"} <= {thread.name for thread in threading.enumerate()}
    assert pool.close()
    assert pool.close()
    assert pool.stats() == {"performed": 0, "threads": 0}
    for count in (0, 65, -1):
        with pytest.raises(ValueError, match="expected 1 to 64"):
            IoPool(count)


def test_closing_finishes_what_is_queued(fd: int) -> None:
    pool = IoPool(1)
    engine = PoolEngine(pool, fd)
    operations = [Operation("write", 512 * i, [bytes([i]) * 512]) for i in range(200)]
    for operation in operations:
        engine.start(operation)
    assert pool.close()
    assert len(engine.finished()) == 200
    assert {operation.error for operation in operations} == {0}
    assert engine.close()


def test_operations_that_make_no_sense(pool: IoPool) -> None:
    with pytest.raises(ValueError, match="block operation 'erase'"):
        Operation("erase")
    with pytest.raises(ValueError, match="17 buffers"):
        Operation("read", 0, [bytearray(1)] * 17)
    with pytest.raises(BufferError):
        Operation("read", 0, [b"not writable"])


def test_the_base_engine_refuses() -> None:
    engine = Engine()
    [operation] = run(engine, Operation("flush"))
    assert operation.error == errno.EOPNOTSUPP
    assert engine.close()


@pytest.mark.parametrize(("skip_sync", "result"), [(False, errno.EINVAL), (True, 0)])
def test_durability_may_be_skipped(pool: IoPool, skip_sync: bool, result: int) -> None:
    """Neither a flush nor a durable write reaches fdatasync, which /dev/null does not have."""
    fd = os.open("/dev/null", os.O_RDWR)
    engine = PoolEngine(pool, fd, skip_sync)
    done = run(engine, Operation("flush"), Operation("write", 0, [b"x"], durable=True))
    assert [operation.error for operation in done] == [result, result]
    assert engine.close()
    os.close(fd)
