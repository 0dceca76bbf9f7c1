"""What the VMs of these tests leave when they are killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis.names import default_folder
from tests.machine.tiny import NAME


@pytest.fixture(scope="session", autouse=True)
def names() -> Iterator[None]:
    """A killed VM's lock is gone, but not the file that was locked."""
    yield
    for path in Path(default_folder()).glob(f"{NAME}*.lock"):
        path.unlink()
