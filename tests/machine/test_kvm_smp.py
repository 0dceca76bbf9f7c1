"""Several vCPUs on KVM: INIT and SIPI, APIC identities, reset, and the CPUID that a guest sees."""

import pytest

from propolis._interrupts import Doorbell
from propolis.hypervisor._kvm import KvmVcpu, KvmVm
from propolis.hypervisor.cpuid import HYPERVISOR, SVM, VMX, Interface, machine_cpuid, vcpu_cpuid
from tests import rig
from tests.lab.probe import probe

pytestmark = pytest.mark.kvm

CODE = rig.CODE
SEEN = 0x6000  # one byte for each APIC ID

# INIT, then SIPI to 0x2000, to all but self; jmp to itself.
BROADCAST = "c7 05 00 03 e0 fe 00 45 0c 00 c7 05 00 03 e0 fe 02 46 0c 00 eb fe"
# In real mode: mov eax, 1; cpuid; shr ebx, 24; inc byte [bx + SEEN]; lock inc word [STARTED]; hlt.
IDENTIFY = "66 b8 01 00 00 00 0f a2 66 c1 eb 18 fe 87 00 60 f0 ff 06 00 50 f4 eb fd"


def boot(machine: rig.OnKvm) -> None:
    """Releases all vCPUs; vCPU 0 starts the others, each of which says who it is."""
    machine.vm.memory.write(0x2000, bytes.fromhex(IDENTIFY))
    machine.vm.memory.write(SEEN, bytes(256))
    machine.vm.memory.write(rig.STARTED, bytes(2))
    machine.vcpus[0].set_registers(rig.protected_mode(CODE))
    if machine.threads:
        machine.release()
    else:
        machine.start()
    others = len(machine.vcpus) - 1
    machine.spin_until(
        f"{others} vCPUs", lambda: int.from_bytes(machine.vm.memory.read(rig.STARTED, 2), "little") >= others
    )
    machine.hold()
    assert machine.vm.memory.read(SEEN, 256) == b"\0" + b"\1" * others + bytes(255 - others)
    assert machine.exits("failed") == machine.exits("shutdown") == 0


@pytest.mark.parametrize("cpus", [2, 3, 4, 64])
def test_init_and_sipi_start_the_other_vcpus(kvm_fd: int, cpus: int) -> None:
    """Each once, with an APIC ID of its own."""
    with rig.kvm(kvm_fd, bytes.fromhex(BROADCAST), cpus=cpus) as machine:
        boot(machine)


def test_reset_makes_the_other_vcpus_wait_again(kvm_fd: int) -> None:
    """Twenty times; what INIT and SIPI were sent to held vCPUs is gone as well."""
    with rig.kvm(kvm_fd, bytes.fromhex(BROADCAST), cpus=4) as machine:
        vm = machine.vm
        for number in range(20):
            boot(machine)
            if number % 2:
                # The others are held while vCPU 0 sends them INIT and SIPI once more.
                machine.vcpus[0].set_registers(rig.protected_mode(CODE))
                machine.vcpus[0].release()
                machine.spin_until("the second start", lambda: has_sent(machine.vcpus[0]))
                machine.hold()
            vm.reset()
            for vcpu in machine.vcpus:
                vcpu.reset()
            vm.memory.write(rig.STARTED, bytes(2))
            vm.memory.write(CODE, b"\xe6\x80\xeb\xfc")  # vCPU 0 alone: out 0x80, al; jmp
            machine.vcpus[0].set_registers(rig.real_mode(CODE))
            before = machine.vcpus[0].stats()["pio"]
            machine.release()
            machine.spin_until("exits of vCPU 0", lambda: machine.vcpus[0].stats()["pio"] > before + 200)
            machine.hold()
            assert vm.memory.read(rig.STARTED, 2) == bytes(2), "a vCPU started that nobody asked for"
            assert all(vcpu.get_registers().cs.base == 0xFFFF_0000 for vcpu in machine.vcpus[1:])
            vm.memory.write(CODE, bytes.fromhex(BROADCAST))


def has_sent(vcpu: KvmVcpu) -> bool:
    """Whether it, held for the look, is at the end of BROADCAST."""
    vcpu.hold()
    while not vcpu.is_parked:
        pass
    there = vcpu.get_registers().rip == CODE + 20
    vcpu.release()
    return there


# -- CPUID -------------------------------------------------------------------------------------------------------------

# For each of ebp pairs at esi: mov eax, [esi]; mov ecx, [esi+4]; cpuid; to edi: eax, ebx, ecx, edx; then out DONE, al.
ASK = "8b 06 8b 4e 04 0f a2 89 07 89 5f 04 89 4f 08 89 57 0c 83 c6 08 83 c7 10 4d 75 e5 e6 f5 f4 eb fd"
QUESTIONS, ANSWERS = 0x1_0000, 0x2_0000
OSXSAVE, OSPKE = 1 << 27, 1 << 4
Masks = dict[tuple[int, int], tuple[int, ...]]  # (leaf, sub-leaf): bits of eax, ebx, ecx and edx
ALL = 0xFFFF_FFFF
# What follows the vCPU's control registers and MSRs.
MSR_DEPENDENT: Masks = {
    (1, 0): (0, 0, OSXSAVE | 1 << 3, 1 << 9),
    (7, 0): (0, 0, OSPKE, 0),
    (0xD, 0): (0, ALL, 0, 0),
    (0xD, 1): (0, ALL, 0, 0),
    (0x8000_0001, 0): (0, 0, 0, 1 << 9),
}
# A nested KVM that runs guest user mode natively shows the real processor's features, whatever the table says.
FEATURES: Masks = {
    (1, 0): (0, 0, ~(VMX | HYPERVISOR), ALL),
    (7, 0): (0, ALL, ALL, ALL),
    (7, 1): (ALL, 0, 0, 0),
    (0xD, 1): (ALL, 0, 0, 0),
}


def ask(kvm_fd: int, cpus: int, interface: Interface, wanted: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """What the last vCPU's cpuid instruction answers."""
    with rig.kvm(kvm_fd, bytes.fromhex(ASK), cpus=cpus, interface=interface) as machine:
        memory = machine.vm.memory
        for number, (leaf, subleaf) in enumerate(wanted):
            memory.write(QUESTIONS + 8 * number, leaf.to_bytes(4, "little") + subleaf.to_bytes(4, "little"))
        done = Doorbell(machine.vm, "done")
        machine.vm.pio.add(done, 0xF5, 1)
        if cpus > 1:
            rig.wake(machine)
        else:
            machine.start(released=False)
        last = machine.vcpus[-1]
        last.set_registers(rig.protected_mode(CODE, rsi=QUESTIONS, rdi=ANSWERS, rbp=len(wanted)))
        last.release()
        machine.spin_until("the answers", lambda: done.drain() == 1)
        machine.hold()
        raw = memory.read(ANSWERS, 16 * len(wanted))
    words = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
    return [tuple(words[at : at + 4]) for at in range(0, len(words), 4)]


@pytest.mark.parametrize("interface", ["kvm", "bhyve", "none"])
@pytest.mark.parametrize("cpus", [1, 4])
def test_the_guest_sees_the_machines_cpuid(kvm_fd: int, cpus: int, interface: Interface) -> None:
    """Every leaf of the table, bit for bit but for those that follow control registers."""
    vm = KvmVm(kvm_fd)
    shared = machine_cpuid(vm.supported_cpuid(), cpus, interface, vm.has_deadline_timer())
    vm.close()
    table = vcpu_cpuid(shared, cpus - 1)
    answers = ask(kvm_fd, cpus, interface, [(entry[0], entry[1]) for entry in table])
    nothing: tuple[int, ...] = (0, 0, 0, 0)
    for entry, answer in zip(table, answers, strict=True):
        key = (entry[0], entry[1])
        free = MSR_DEPENDENT.get(key, nothing)
        if not probe().is_full:
            free = tuple(a | b for a, b in zip(free, FEATURES.get(key, nothing), strict=True))
        expected = tuple(value & ~bits for value, bits in zip(entry[3:], free, strict=True))
        got = tuple(value & ~bits for value, bits in zip(answer, free, strict=True))
        assert got == expected, f"leaf {entry[0]:#x}.{entry[1]}"


@pytest.mark.parametrize("interface", ["kvm", "bhyve", "none"])
def test_what_the_guest_is_offered(kvm_fd: int, interface: Interface) -> None:
    """No nested virtualization; the hypervisor it asked for, or none at all."""
    leaf1, extended, hypervisor = ask(kvm_fd, 2, interface, [(1, 0), (0x8000_0001, 0), (0x4000_0000, 0)])
    assert leaf1[1] >> 24 == 1  # APIC ID
    assert leaf1[2] & VMX == 0
    assert extended[2] & SVM == 0
    assert bool(leaf1[2] & HYPERVISOR) == (interface != "none")
    name = b"".join(word.to_bytes(4, "little") for word in hypervisor[1:])
    if interface == "none":
        assert name not in (b"KVMKVMKVM\0\0\0", b"bhyve bhyve ")
    else:
        assert name == {"kvm": b"KVMKVMKVM\0\0\0", "bhyve": b"bhyve bhyve "}[interface]
