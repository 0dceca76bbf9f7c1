"""Hold, release and stop on KVM: no wake-up is lost, and no access is left half done, whatever the guest does."""

import random
import resource
from collections.abc import Callable

import pytest

from propolis.hypervisor._kvm import KvmVcpu
from propolis.hypervisor.state import Registers
from tests import rig

pytestmark = pytest.mark.kvm

CODE = rig.CODE
MMIO = "00 00 00 d0"
COUNT = 37  # elements of a string instruction

# Every loop counts its rounds in ebx. Protected mode, 32 bits.
OUT = "e6 80 43 eb fb"  # out 0x80, al; inc ebx; jmp
IN = "e4 80 43 eb fb"  # in al, 0x80; inc ebx; jmp
STORE = f"a3 {MMIO} 43 eb f8"  # mov [MMIO], eax; inc ebx; jmp
LOAD = f"a1 {MMIO} 43 eb f8"  # mov eax, [MMIO]; inc ebx; jmp
INS = f"bf 00 40 00 00 b9 {COUNT:02x} 00 00 00 f3 6c 43 eb f1"  # mov edi; mov ecx; rep insb; inc ebx; jmp
OUTS = f"be 00 40 00 00 b9 {COUNT:02x} 00 00 00 f3 6e 43 eb f1"
PAGE_INS = "bf 00 40 00 00 b9 00 10 00 00 f3 6c 43 eb f1"  # a whole page
NO_INS = "bf 00 40 00 00 b9 00 00 00 00 f3 6c 43 e4 80 eb ef"  # none, then in al, 0x80
HLT = "f4 eb fd"  # hlt; jmp to it
BUSY = "eb fe"

SPINNING = {"out": OUT, "in": IN, "store": STORE, "load": LOAD, "ins": INS, "outs": OUTS, "page of ins": PAGE_INS,
            "no ins": NO_INS}  # fmt: skip
SILENT = {"hlt": HLT, "busy": BUSY}


def guest(kvm_fd: int, code: str, cpus: int, *, waiting: bool = False) -> rig.OnKvm:
    """A held guest whose vCPUs are all about to run the code, or all but the first to wait for a SIPI."""
    machine = rig.kvm(kvm_fd, bytes.fromhex(code), cpus=cpus)
    if waiting or cpus == 1:
        machine.start(released=False)
        machine.parked()
    else:
        rig.wake(machine)
    for vcpu in machine.vcpus[: 1 if waiting else cpus]:
        vcpu.set_registers(rig.protected_mode(CODE, rdx=0x80))
    return machine


def moved(vcpu: KvmVcpu, then: dict[str, int]) -> bool:
    """It had exits since."""
    now = vcpu.stats()
    return now["pio"] + now["mmio"] > then["pio"] + then["mmio"]


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("name", SPINNING)
def test_no_wake_up_is_lost_with_exits_in_flight(kvm_fd: int, name: str, cpus: int) -> None:
    """Every hold is answered, every release makes progress."""
    with guest(kvm_fd, SPINNING[name], cpus) as machine:
        machine.release()
        rig.sequence(machine, 100 if name != "page of ins" else 40, moved)
        machine.hold()
        assert machine.exits("failed") == machine.exits("shutdown") == 0


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("name", SILENT)
def test_no_wake_up_is_lost_without_exits(kvm_fd: int, name: str, cpus: int) -> None:
    """A halted vCPU answers, and one that never leaves the guest by itself."""
    with guest(kvm_fd, SILENT[name], cpus) as machine:
        machine.release()
        rig.sequence(machine, 150, lambda vcpu, then: not vcpu.is_parked)
        machine.hold()
        assert {vcpu.get_registers().rip for vcpu in machine.vcpus} <= {CODE, CODE + 1}


def test_no_wake_up_is_lost_while_waiting_for_sipi(kvm_fd: int) -> None:
    """Three vCPUs that were never started answer, and stay as they are."""
    with guest(kvm_fd, OUT, 4, waiting=True) as machine:
        machine.release()
        rig.sequence(machine, 200, lambda vcpu, then: moved(vcpu, then) if vcpu.index == 0 else not vcpu.is_parked)
        machine.hold()
        for vcpu in machine.vcpus[1:]:
            assert vcpu.get_registers().cs.base == 0xFFFF_0000
            assert vcpu.stats()["pio"] == 0


@pytest.mark.parametrize("name", SILENT)
def test_no_wake_up_needs_room_for_a_signal(kvm_fd: int, name: str) -> None:
    """The user's queue of pending signals may be full: only standard signals still get through then."""
    limits = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    with guest(kvm_fd, SILENT[name], 2) as machine:
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, limits[1]))
        try:
            machine.release()
            rig.sequence(machine, 20, lambda vcpu, then: not vcpu.is_parked)
            machine.hold()
        finally:
            resource.setrlimit(resource.RLIMIT_SIGPENDING, limits)


@pytest.mark.parametrize("code", [OUT, IN, LOAD, INS, HLT, BUSY])
def test_no_stop_is_lost(kvm_fd: int, code: str) -> None:
    """At any moment of a thread's life, after any commands."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    for _ in range(20):
        with guest(kvm_fd, code, 2, waiting=dice.random() < 0.3) as machine:
            if dice.random() < 0.8:
                machine.release()
            for _ in range(dice.randrange(6)):
                vcpu = dice.choice(machine.vcpus)
                dice.choice((vcpu.hold, vcpu.release))()
            for vcpu in machine.vcpus:
                vcpu.stop()
            machine.until("both threads ended", lambda: machine.saw(rig.ENDED, 0) and machine.saw(rig.ENDED, 1))


# -- what a held vCPU's registers say ----------------------------------------------------------------------------------


def single(at: int) -> Callable[[Registers], int]:
    """Accesses that a loop of one access (at CODE, `at` bytes long) and `inc ebx` has completed."""
    return lambda r: r.rbx + (r.rip == CODE + at)


def string(length: int) -> Callable[[Registers], int]:
    """The same for a string instruction at CODE + 10."""

    def completed(r: Registers) -> int:
        inside = {CODE + 10: length - r.rcx, CODE + 12: length}
        return r.rbx * length + inside.get(r.rip, 0)

    return completed


@pytest.mark.parametrize(
    ("code", "completed", "width"),
    [
        (OUT, single(2), 1),
        (IN, single(2), 1),
        (STORE, single(5), 4),
        (LOAD, single(5), 4),
        (INS, string(COUNT), 1),
        (OUTS, string(COUNT), 1),
        (PAGE_INS, string(4096), 1),
    ],
    ids=["out", "in", "store", "load", "ins", "outs", "page of ins"],
)
def test_hold_leaves_no_access_half_done(
    kvm_fd: int, code: str, completed: Callable[[Registers], int], width: int
) -> None:
    """Every access that the bus saw is one that the guest's registers have completed, and the other way round."""
    with guest(kvm_fd, code, 1) as machine:
        vcpu = machine.vcpus[0]
        bus = machine.vm.mmio if "d0" in code else machine.vm.pio
        for _ in range(150):
            before = vcpu.stats()
            machine.release()
            machine.spin_until("exits", lambda: moved(vcpu, before))
            machine.hold()
            registers = vcpu.get_registers()
            assert completed(registers) * width == bus.stats()["missed"]
            vcpu.set_registers(registers)  # what a snapshot would bring back goes on from here


@pytest.mark.parametrize("code", [IN, LOAD])
def test_a_read_arrives_whole(kvm_fd: int, code: str) -> None:
    """After the reading instruction its register holds what was read."""
    length = 2 if code is IN else 5
    clearing = "b8 00 00 00 00 " + code.rsplit(" ", 3)[0] + f" eb {(256 - 7 - length):02x}"
    expected = 0xFF if code is IN else 0xFFFF_FFFF
    seen = set()
    with guest(kvm_fd, clearing, 1) as machine:
        vcpu = machine.vcpus[0]
        for _ in range(200):
            before = vcpu.stats()
            machine.release()
            machine.spin_until("exits", lambda: moved(vcpu, before))
            machine.hold()
            registers = vcpu.get_registers()
            seen.add(registers.rip - CODE)
            if registers.rip == CODE + 5:
                assert registers.rax == 0
            elif registers.rip == CODE + 5 + length:
                assert registers.rax == expected
    assert seen <= {0, 5, 5 + length}
