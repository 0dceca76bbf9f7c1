"""make_disk and disk for the tests of the NVMe controller."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from propolis.backends._iopool import IoPool
from tests.unit.devices.nvme.disk import Disk, MakeDisk


@pytest.fixture
def pool() -> Iterator[IoPool]:
    """Two I/O threads."""
    pool = IoPool(2)
    yield pool
    assert pool.close()


@pytest_asyncio.fixture
async def make_disk(pool: IoPool, tmp_path: Path) -> AsyncIterator[MakeDisk]:
    """make_disk(begin=..., **options of Disk) -> a started Disk, stopped after the test."""
    async with AsyncExitStack() as stack:

        async def make(*, begin: bool = True, msix: bool = True, entries: int = 64, **options: Any) -> Disk:
            disk = Disk(pool, tmp_path / "disk.img", **options)
            stack.push_async_callback(disk.stop)
            if begin:
                await disk.driver.begin(entries=entries, msix=msix)
            return disk

        yield make


@pytest_asyncio.fixture
async def disk(make_disk: MakeDisk) -> Disk:
    """With one I/O queue."""
    return await make_disk()
