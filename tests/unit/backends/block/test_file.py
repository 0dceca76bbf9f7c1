"""Raw files as disks: what is accepted, and what is said of what is not."""

import fcntl
import os
from pathlib import Path

import pytest

from propolis.backends._iopool import IoPool
from propolis.backends.block import BlockBackend
from propolis.backends.block.file import FileBackend
from propolis.backends.block.memory import MemoryBackend
from propolis.errors import BackendError, ImageError


def opened(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def test_facts(pool: IoPool, image: Path) -> None:
    backend = FileBackend(opened(image), pool, path=str(image))
    assert (backend.capacity, backend.block_size, backend.read_only) == (1 << 20, 512, False)
    assert backend.can_discard
    assert backend.can_zero
    assert backend.max_extent > 0
    assert backend.close()
    assert backend.close()


def test_probing_changes_nothing(pool: IoPool, image: Path) -> None:
    before = os.stat(image)
    backend = FileBackend(opened(image), pool)
    after = os.stat(image)
    assert (before.st_size, before.st_blocks) == (after.st_size, after.st_blocks)
    assert backend.close()


def test_read_only_offers_nothing_that_writes(pool: IoPool, image: Path) -> None:
    backend = FileBackend(opened(image, os.O_RDONLY), pool, read_only=True)
    assert not backend.can_discard
    assert not backend.can_zero
    assert backend.close()


def test_discard_may_be_switched_off(pool: IoPool, image: Path) -> None:
    backend = FileBackend(opened(image), pool, discard=False)
    assert not backend.can_discard
    assert backend.close()


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_not_opened_for_writing(pool: IoPool, image: Path, flags: int) -> None:
    fd = opened(image, flags)
    with pytest.raises(BackendError, match=r"disk '.*disk.img': not opened for writing"):
        FileBackend(fd, pool, path=str(image))
    os.close(fd)


def test_a_file_opened_to_append(pool: IoPool, image: Path) -> None:
    fd = opened(image, os.O_RDWR | os.O_APPEND)
    with pytest.raises(BackendError, match="opened to append"):
        FileBackend(fd, pool, path=str(image))
    assert fcntl.fcntl(fd, fcntl.F_GETFD) >= 0  # still the caller's
    os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 511])
def test_smaller_than_a_sector(pool: IoPool, image: Path, size: int) -> None:
    os.truncate(image, size)
    fd = opened(image)
    with pytest.raises(ImageError, match="smaller than one block of 512 bytes"):
        FileBackend(fd, pool, path=str(image))
    os.close(fd)


def test_a_cut_off_block(pool: IoPool, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.truncate(image, 5 * 512 + 100)
    backend = FileBackend(opened(image), pool, path=str(image))
    assert backend.capacity == 5 * 512
    assert "last block is cut off" in caplog.text
    assert backend.close()


@pytest.mark.parametrize("block_size", [512, 2048, 4096])
def test_block_sizes(pool: IoPool, image: Path, block_size: int, caplog: pytest.LogCaptureFixture) -> None:
    """Of a file it is what is asked for, and only whole blocks count."""
    os.truncate(image, 5 * block_size + 511)
    backend = FileBackend(opened(image), pool, block_size=block_size)
    assert (backend.block_size, backend.capacity) == (block_size, 5 * block_size)
    assert backend.physical_block_size >= block_size
    assert "last block is cut off" in caplog.text
    assert backend.close()
    os.truncate(image, block_size - 1)
    fd = opened(image)
    with pytest.raises(ImageError, match=f"smaller than one block of {block_size} bytes"):
        FileBackend(fd, pool, block_size=block_size)
    os.close(fd)


def test_not_a_file(pool: IoPool) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(ImageError, match="neither a file nor a block device"):
        FileBackend(fd, pool, path="/dev/null")
    os.close(fd)


def test_memory(pool: IoPool) -> None:
    backend = MemoryBackend(8192, pool, contents=b"abc")
    assert backend.capacity == 8192
    assert backend.can_discard
    assert backend.close()
    with pytest.raises(BackendError, match="memory disk of 2 bytes"):
        MemoryBackend(2, pool, contents=b"abc")
    with pytest.raises(ImageError, match="smaller"):
        MemoryBackend(100, pool)


def test_the_base_backend_makes_no_engine() -> None:
    with pytest.raises(NotImplementedError):
        BlockBackend().engine()
