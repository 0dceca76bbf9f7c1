"""BARs that one vCPU moves and disables while others are inside them: two real threads on the replay back end."""

import threading
import time

from propolis._interrupts import Doorbell
from propolis.devices.pci._function import PciFunction
from propolis.devices.pci.chipset import Chipset
from propolis.hypervisor._replay import ReplayVcpu, ReplayVm

FIRST, SECOND = 0xC000_0000, 0xC100_0000
ROUNDS = 20_000


def test_bars_move_under_running_vcpus() -> None:
    vm = ReplayVm()
    chipset = Chipset(vm)
    function = PciFunction(vm, "test", vendor=1, device=2)
    bell = Doorbell(vm, "bell")
    function.add_bar(0, "mmio32", 0x1000, bell)
    chipset.bus.add(function, 5)
    bar, command = 0x8000_2810, 0x8000_2804
    mover = [
        ("out", 0xCF8, 4, bar), ("out", 0xCFC, 4, FIRST), ("out", 0xCF8, 4, command), ("out", 0xCFC, 2, 2),
        ("out", 0xCF8, 4, bar), ("out", 0xCFC, 4, SECOND), ("out", 0xCF8, 4, command), ("out", 0xCFC, 2, 0),
    ]  # fmt: skip
    user = [("write", FIRST, 4, 1), ("write", SECOND + 0xFF8, 8, 1), ("read", FIRST + 2, 4), ("read", SECOND, 8)]
    vcpus = [ReplayVcpu(vm, 0, int, mover, ROUNDS), ReplayVcpu(vm, 1, int, user, 10 * ROUNDS)]
    threads = [threading.Thread(target=vcpu.run) for vcpu in vcpus]
    for thread in threads:
        thread.start()
    for vcpu in vcpus:
        vcpu.release()
    deadline = time.monotonic() + 60
    while not all(vcpu.is_done for vcpu in vcpus):
        assert time.monotonic() < deadline, "the scripts did not end"
        time.sleep(0.005)
    for vcpu, thread in zip(vcpus, threads, strict=True):
        vcpu.stop()
        thread.join(10)
        assert not thread.is_alive()
        vcpu.close()
    assert vm.mmio.mappings() == []
    function.write(0x04, 2, 2)
    assert [base for base, _, _ in vm.mmio.mappings()] == [SECOND]
