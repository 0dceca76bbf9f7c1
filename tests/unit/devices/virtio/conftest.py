"""make_rig for the tests of virtio devices."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from propolis.backends._iopool import IoPool
from propolis.hypervisor._replay import ReplayVm
from tests.unit.devices.virtio.rig import Echo, MakeRig, Rig


@pytest_asyncio.fixture
async def make_rig() -> AsyncIterator[MakeRig]:
    """make_rig(device_of) -> a started Rig, stopped after the test."""
    async with AsyncExitStack() as stack:

        async def make(device_of: Callable[[ReplayVm], Any] = Echo) -> Rig:
            rig = Rig(device_of)
            rig.start()
            stack.push_async_callback(rig.stop)
            return rig

        yield make


@pytest.fixture
def pool() -> Iterator[IoPool]:
    """Two I/O threads."""
    pool = IoPool(2)
    yield pool
    assert pool.close()
