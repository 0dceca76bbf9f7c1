"""A disk of ours beside QEMU's, on the same file and under the same guest, in turn."""

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.bench import block
from tests.bench.report import show

pytestmark = [pytest.mark.bench, pytest.mark.kvm, pytest.mark.program, pytest.mark.timeout(600)]

ROUNDS = 15  # short ones: what else this host does hits both alike
IMAGE = 256 << 20


class Place(NamedTuple):
    """A kind of file, and how each of the two opens it."""

    name: str
    folder: str
    ours: str
    qemu: str
    slower: int  # by how much fewer requests are measured


PLACES = (
    Place("tmpfs", "/dev/shm", "", "aio=io_uring", 1),
    Place("page cache", "", "", "aio=io_uring", 2),
)
LOADS = (  # operation, size, depth, requests, name, goal
    ("r", 4096, 1, 4_000, "4 KiB random read, depth 1", "<= 0.6"),
    ("w", 4096, 1, 4_000, "4 KiB random write, depth 1", "<= 0.6"),
    ("r", 4096, 32, 20_000, "4 KiB random read, depth 32", "<= 0.56"),
    ("w", 4096, 32, 20_000, "4 KiB random write, depth 32", "<= 0.56"),
    ("s", 131_072, 8, 1_000, "128 KiB read in order, depth 8", "<= 0.83"),
    ("t", 131_072, 8, 1_000, "128 KiB write in order, depth 8", "<= 0.83"),
)


@pytest.fixture(params=PLACES, ids=lambda place: place.name)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Place, Path]]:
    """A place, and a folder there."""
    folder = Path(tempfile.mkdtemp(dir=request.param.folder)) if request.param.folder else tmp_path
    yield request.param, folder
    shutil.rmtree(folder)


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU to compare with")
def test_beside_qemu(place: tuple[Place, Path]) -> None:
    """Time for each request: ours divided by QEMU's in the same round."""
    kind, folder = place
    image = folder / "disk.img"
    block.make_image(image, IMAGE)
    filesystem = subprocess.run(["stat", "-fc", "%T", folder], capture_output=True, text=True, check=True).stdout
    kernel = block.build_guest(folder)
    with block.ours(folder, kernel, image, kind.ours) as ours, block.qemu(folder, kernel, image, kind.qemu) as qemu:
        print(f"\n{kind.name} on {filesystem.strip()}", end="")
        for operation, size, depth, count, name, goal in LOADS:
            pairs = [
                (ours.measure(operation, size, depth, count), qemu.measure(operation, size, depth, count))
                for count in [max(depth, count // kind.slower)] * ROUNDS
            ]
            what = f"{kind.name}, {name}"
            show(f"{what}: ours", [a.microseconds for a, _ in pairs], "us")
            show(f"{what}: QEMU", [b.microseconds for _, b in pairs], "us")
            show(f"{what}: ours / QEMU", [a.microseconds / b.microseconds for a, b in pairs], "ratio", goal=goal)
            cpu = [a.host_cpu / b.host_cpu for a, b in pairs]
            show(f"{what}: CPU, ours / QEMU", cpu, "ratio")
            assert statistics.median(cpu) > 0
