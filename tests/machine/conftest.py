"""What the VMs of these tests leave when they are killed, and what of the host they need."""

import os
import re
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


POOL = Path("/proc/sys/vm/nr_hugepages")
GUEST_PAGES = 32
"""Of 2 MiB: what a VM of 64 MiB needs."""


def free_huge_pages() -> int:
    found = re.search(r"^HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Huge pages for one VM: the host's own, or some added to its pool for the test. All are back afterwards."""
    free = free_huge_pages()
    if free >= GUEST_PAGES:
        yield
        assert free_huge_pages() == free
        return
    if os.geteuid() != 0:
        pytest.skip(f"this host has not {GUEST_PAGES} free huge pages (sysctl vm.nr_hugepages={GUEST_PAGES})")
    before = int(POOL.read_text())
    POOL.write_text(str(before + GUEST_PAGES))
    try:
        if (free := free_huge_pages()) < GUEST_PAGES:
            pytest.skip(f"this host's memory has no {GUEST_PAGES} huge pages in one piece, but {free}")
        yield
        assert free_huge_pages() == free
    finally:
        POOL.write_text(str(before))
