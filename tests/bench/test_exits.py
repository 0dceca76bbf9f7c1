"""What an exit costs: beside a minimal C loop around KVM_RUN, on the replay back end, and while Python is busy."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from propolis._interrupts import Doorbell
from propolis.devices.pci._msix import Msix
from tests import rig
from tests.bench.report import show

pytestmark = pytest.mark.bench

OUT = bytes.fromhex("e6 99 43 eb fb")  # out 0x99, al; inc ebx; jmp: as in kvm_loop.c
STORE = bytes.fromhex("a3 00 00 00 d0 43 eb f8")  # mov [0xd0000000], eax; inc ebx; jmp
ROUNDS = 9
SECONDS = 0.3


@pytest.fixture(scope="module")
def c_loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kvm_loop, compiled as our own C is."""
    program = tmp_path_factory.mktemp("bench") / "kvm_loop"
    source = Path(__file__).with_name("kvm_loop.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
    return program


@contextmanager
def on_core(core: int, thread: int = 0) -> Iterator[None]:
    """Pins a thread, by its kernel's number, for a while."""
    before = os.sched_getaffinity(thread)
    os.sched_setaffinity(thread, {sorted(before)[core % len(before)]})
    try:
        yield
    finally:
        os.sched_setaffinity(thread, before)


class Meter:
    """Exits per second of a running vCPU, not counting time in which its thread was ready but others had the core.

    Time in which it waits for anything else, such as the interpreter's lock, counts.
    """

    def __init__(self, machine: "rig.OnKvm") -> None:
        self.vcpu = machine.vcpus[0]
        self.thread = machine.threads[0].native_id or 0
        self.start()

    def _now(self) -> tuple[int, float]:
        waited = int(Path(f"/proc/self/task/{self.thread}/schedstat").read_text().split()[1]) / 1e9
        stats = self.vcpu.stats()
        return stats["pio"] + stats["mmio"], time.perf_counter() - waited

    def start(self) -> None:
        self._then = self._now()

    def rate(self) -> float:
        exits, at = self._now()
        return (exits - self._then[0]) / (at - self._then[1])


def run_c_loop(program: Path, name: str, exits: int, core: int) -> float:
    """Exits per second."""
    command = ["taskset", "-c", str(core), str(program), name, str(exits)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return exits / (int(ended.stdout) / 1e9)


@pytest.mark.kvm
@pytest.mark.parametrize(("name", "code"), [("pio", OUT), ("mmio", STORE)])
@pytest.mark.parametrize("claimed", [False, True], ids=["unclaimed", "claimed"])
def test_beside_a_minimal_c_loop(kvm_fd: int, c_loop: Path, name: str, code: bytes, claimed: bool) -> None:
    """Alternating rounds, both on one core and with the same guest."""
    ours, theirs = [], []
    with rig.kvm(kvm_fd, code) as machine:
        vcpu = machine.vcpus[0]
        vcpu.set_registers(rig.protected_mode(rig.CODE))
        if claimed:
            # Read-only registers: a write reaches the device and costs no call of its own.
            pending = Msix(machine.vm, 1)
            bus = machine.vm.pio if name == "pio" else machine.vm.mmio
            bus.add(pending.pba, 0x99 if name == "pio" else 0xD000_0000, 4)
        machine.start(released=False)
        core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(machine.threads[0].native_id or 0, {core})
        count = 5000
        meter = Meter(machine)
        for _ in range(ROUNDS):
            theirs.append(run_c_loop(c_loop, name, count, core))
            count = int(theirs[-1] * SECONDS)
            machine.release()
            meter.start()
            time.sleep(SECONDS)
            ours.append(meter.rate())
            machine.hold()
    kind = "claimed" if claimed else "unclaimed"
    show(f"{name} exits, {kind}", ours, "exits/s")
    show(f"{name} exits, minimal C loop", theirs, "exits/s")
    ratios = [c / p for c, p in zip(theirs, ours, strict=True)]
    show(f"{name} exit, {kind}: ours / minimal C loop", ratios, "ratio", goal="<= 1.15")


def test_replayed_exits() -> None:
    """A table of 25 regions on each bus; every exit finds one of them and reads it."""
    ports = [(0x20 + 0x40 * number, 8) for number in range(25)]
    pages = [(0xC000_0000 + 0x1_0000 * number, 0x1000) for number in range(25)]
    script: list[tuple[object, ...]] = []
    for number in range(25):
        script.append(("in", ports[number * 7 % 25][0], 1))
        script.append(("read", pages[number * 11 % 25][0] + 0x10, 4))
    rounds = 40_000
    results = []
    for _ in range(5):
        with rig.replay(script, rounds=rounds) as machine, on_core(-1):
            vcpu = machine.vcpus[0]
            for number, ((port, length), (page, size)) in enumerate(zip(ports, pages, strict=True)):
                machine.vm.pio.add(Doorbell(machine.vm, f"port {number}"), port, length)
                machine.vm.mmio.add(Doorbell(machine.vm, f"page {number}"), page, size)
            machine.start(released=False)
            machine.parked()
            os.sched_setaffinity(machine.threads[0].native_id or 0, {max(os.sched_getaffinity(0))})
            start = time.perf_counter()
            machine.release()
            while not vcpu.is_done:
                time.sleep(0.001)
            results.append((time.perf_counter() - start) / (rounds * len(script)) * 1e9)
            assert machine.vm.pio.stats() == machine.vm.mmio.stats() == {"missed": 0}
    show("replayed exit, look-up in 25 regions and read", results, "ns/exit", goal="<= 300", at="replay")


def busy(seconds: float) -> None:
    """Nothing but Python."""
    end = time.perf_counter() + seconds
    total = 0
    while time.perf_counter() < end:
        total += sum(range(100))


@pytest.mark.kvm
@pytest.mark.parametrize(("name", "code"), [("pio", OUT), ("mmio", STORE)])
def test_while_the_loop_thread_is_busy(kvm_fd: int, c_loop: Path, name: str, code: bytes) -> None:
    """The vCPU on one core, the thread of the event loop on the other: idle and busy in Python in turn.

    The C loop, beside another process that is busy in the same way, says what two busy cores cost on this machine.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    rates: dict[bool, list[float]] = {False: [], True: []}
    plain: dict[bool, list[float]] = {False: [], True: []}
    with rig.kvm(kvm_fd, code) as machine, on_core(0):
        vcpu = machine.vcpus[0]
        vcpu.set_registers(rig.protected_mode(rig.CODE))
        machine.start(released=False)
        os.sched_setaffinity(machine.threads[0].native_id or 0, {cores[-1]})
        meter = Meter(machine)
        count = 5000
        for _ in range(ROUNDS):
            for is_busy in (False, True):
                machine.release()
                meter.start()
                (busy if is_busy else time.sleep)(SECONDS)
                rates[is_busy].append(meter.rate())
                machine.hold()
            for is_busy in (False, True):
                with process_that_is_busy() if is_busy else nullcontext():
                    plain[is_busy].append(run_c_loop(c_loop, name, count, cores[-1]))
                count = int(plain[is_busy][-1] * SECONDS)
    show(f"{name} exits, loop idle", rates[False], "exits/s")
    show(f"{name} exits, loop busy in Python", rates[True], "exits/s")
    falls = [100 * (1 - b / i) for i, b in zip(rates[False], rates[True], strict=True)]
    show(f"{name} exits: fall while the loop is busy", falls, "%", goal="<= 25")
    falls = [100 * (1 - b / i) for i, b in zip(plain[False], plain[True], strict=True)]
    show(f"{name} exits of the C loop: fall beside a busy process", falls, "%")


@contextmanager
def process_that_is_busy() -> Iterator[None]:
    """Another interpreter, on this thread's core."""
    with subprocess.Popen([sys.executable, "-c", "while True: sum(range(100))"]) as process:
        time.sleep(0.05)
        try:
            yield
        finally:
            process.kill()


@pytest.mark.kvm
def test_a_doorbell_that_does_not_exit(kvm_fd: int) -> None:
    """What an ioeventfd costs the guest, by how often it rings."""
    results = []
    with rig.kvm(kvm_fd, OUT) as machine:
        bell = Doorbell(machine.vm, "bell")
        machine.vm.pio.add(bell, 0x99, 1)
        machine.vcpus[0].set_registers(rig.protected_mode(rig.CODE))
        machine.start()
        for _ in range(5):
            bell.drain()
            start = time.perf_counter()
            time.sleep(SECONDS)
            results.append((time.perf_counter() - start) / max(1, bell.drain()) * 1e6)
        assert bell.stats() == {"rung": 0}
    show("ring a doorbell by ioeventfd", results, "us")
