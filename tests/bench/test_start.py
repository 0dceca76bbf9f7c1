"""From exec to the guest's first instruction, and what a running VM takes beside its guest's memory."""

import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from propolis.firmware.layout import ram_ranges
from propolis.hypervisor._kvm import KvmVm
from tests.bench.report import show
from tests.rig import TREE

pytestmark = [pytest.mark.bench, pytest.mark.kvm]

ENTRY = 0x10_0000
# mov al, '!'; mov dx, 0x402; out dx, al; hlt; jmp to the hlt
FIRST = bytes.fromhex("b0 21 66 ba 02 04 ee f4 eb fd")
CONFIG = '[main]\nname = "bench-{pid}"\ncpus = 1\nmemory = {memory}\nkernel = "{kernel}"\n'
ROUNDS = 7


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """An ELF with a PVH entry whose first instructions write to the debug port."""
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", ENTRY)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 5, 0x1000, ENTRY, ENTRY, len(FIRST), len(FIRST), 0x1000)
    header += struct.pack("<IIQQQQQQ", 4, 4, 64 + 112, 0, 0, len(note), len(note), 4)
    image = (header + note).ljust(0x1000, b"\0") + FIRST
    path = tmp_path / "kernel"
    path.write_bytes(image)
    return path


@contextmanager
def standalone(
    directory: Path, kernel: Path, memory_mib: int
) -> Iterator[tuple["subprocess.Popen[str]", float, float]]:
    """A VM at its first instruction: the process, milliseconds from exec to that, and from the end of its imports."""
    (directory / "vm.toml").write_text(CONFIG.format(pid=os.getpid(), memory=memory_mib, kernel=kernel))
    program = "from propolis.entry import standalone; standalone()"
    command = [sys.executable, "-c", program, "--log-level", "debug", "vm.toml"]
    environment = os.environ | {"PYTHONPATH": str(TREE)}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            imported, seen = 0.0, []
            for line in process.stderr:
                now = time.perf_counter()
                seen.append(line)
                if "imports done" in line:
                    imported = now
                if "debug port: !" in line:
                    break
            else:
                pytest.fail("no first instruction:\n" + "".join(seen))
            yield process, (now - start) * 1e3, (now - imported) * 1e3
        finally:
            process.kill()


def slot_ms(kvm_fd: int, memory_mib: int) -> float:
    """What KVM takes for the slots of this much guest memory."""
    vm = KvmVm(kvm_fd)
    try:
        for ram in ram_ranges(memory_mib << 20):
            vm.memory.add(ram.base, ram.size)
        start = time.perf_counter()
        vm.map_memory()
        return (time.perf_counter() - start) * 1e3
    finally:
        vm.close()


def test_to_the_first_instruction(kvm_fd: int, tmp_path: Path, kernel: Path) -> None:
    """With a warm page cache; interleaved over the sizes of guest memory."""
    sizes = [128, 1024, 4096, 16384]
    total: dict[int, list[float]] = {size: [] for size in sizes}
    after: dict[int, list[float]] = {size: [] for size in sizes}
    slots: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size in sizes:
            with standalone(tmp_path, kernel, size) as (_, whole, beyond):
                total[size].append(whole)
                after[size].append(beyond)
            slots[size].append(slot_ms(kvm_fd, size))
    show("exec to first guest instruction, 128 MiB", total[128], "ms", goal="<= 250")
    for size in sizes:
        goal = "<= 15" if size == 128 else "no growth but the slot's"
        show(f"imports done to first guest instruction, {size} MiB", after[size], "ms", goal=goal)
        show(f"of it KVM_SET_USER_MEMORY_REGION (measured alone), {size} MiB", slots[size], "ms")


def test_a_peer(tmp_path: Path, kernel: Path) -> None:
    """QEMU's microvm with the same kernel."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64")
    command = [
        qemu, "-M", "microvm", "-accel", "kvm", "-m", "128", "-nodefaults", "-no-user-config", "-display", "none",
        "-kernel", str(kernel), "-chardev", "stdio,id=port", "-device", "isa-debugcon,iobase=0x402,chardev=port",
    ]  # fmt: skip
    results = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as peer:
            assert peer.stdout is not None
            first = peer.stdout.read(1)
            results.append((time.perf_counter() - start) * 1e3)
            peer.kill()
            if first != b"!":
                pytest.skip("QEMU's microvm does not start here")
    show("QEMU microvm: exec to first guest instruction, 128 MiB", results, "ms")


def pss_beside_the_guest(pid: int) -> float:
    """MiB. Guest memory is what is left out of core dumps and of forked children."""
    total = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
        flags = re.search(r"VmFlags:(.*)", mapping)
        size = re.search(r"\nPss: +(\d+) kB", mapping)
        if size is not None and not (flags is not None and {"dd", "dc"} <= set(flags[1].split())):
            total += int(size[1])
    return total / 1024


def test_memory_beside_the_guests(tmp_path: Path, kernel: Path) -> None:
    results = []
    for _ in range(3):
        with standalone(tmp_path, kernel, 128) as (process, _, _):
            time.sleep(0.3)
            results.append(pss_beside_the_guest(process.pid))
    show("PSS beside guest memory, 1 vCPU", results, "MiB", goal="<= 40")
