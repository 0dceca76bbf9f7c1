"""An I/O pool that ends with its test."""

from collections.abc import Iterator

import pytest

from propolis.backends._iopool import IoPool


@pytest.fixture
def pool() -> Iterator[IoPool]:
    """Two threads."""
    pool = IoPool(2)
    yield pool
    assert pool.close()
