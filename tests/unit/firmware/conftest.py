"""RAM for the loaders; closing it at the end of a test fails while a loader still holds a view of it."""

from collections.abc import Iterator

import pytest

from tests.unit.firmware.images import Ram

RAM_SIZE = 8 << 20


@pytest.fixture
def ram() -> Iterator[Ram]:
    memory = Ram(RAM_SIZE)
    yield memory
    memory.close()
