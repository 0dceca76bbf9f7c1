"""What a guest's accesses and failures become on KVM. Tiny guests, assembled by hand."""

import os
import random
import resource
import select

import pytest

from propolis._bus import Window
from propolis._interrupts import Doorbell
from propolis.devices.pci._msix import Msix
from propolis.errors import HypervisorError
from propolis.hypervisor._kvm import KvmVcpu, KvmVm
from propolis.hypervisor.state import Registers, real_mode_registers
from tests import rig

pytestmark = pytest.mark.kvm

CODE = rig.CODE
BUFFER = 0x4000
MMIO = 0xD000_0000
DONE = 0xF5  # the port that a guest writes to when it is done
END = b"\xe6\xf5\xf4\xeb\xfd"  # out DONE, al; hlt; jmp to the hlt


def program(text: str) -> bytes:
    """Hexadecimal code; each guest ends by writing to DONE and halting."""
    return bytes.fromhex(text) + END


def run(machine: rig.OnKvm) -> Registers:
    """Runs the guest to its end; its registers then."""
    done = Doorbell(machine.vm, "done")
    machine.vm.pio.add(done, DONE, 1)
    machine.start()
    machine.spin_until("the end of the guest", lambda: done.drain() == 1 or machine.saw(rig.FAILED))
    machine.hold()
    assert not machine.saw(rig.FAILED), machine.vcpus[0].failure_text()
    return machine.vcpus[0].get_registers()


# -- ports -------------------------------------------------------------------------------------------------------------


def test_ports_of_each_width(kvm_fd: int) -> None:
    """Written bytes reach their registers and read bytes come back, little-endian; what nobody answers is all ones."""
    code = program(
        "ba 00 20"  # mov dx, 0x2000
        "66 b8 44 33 22 11 66 ef"  # mov eax, 0x11223344; out dx, eax
        "ba 04 20 66 b8 88 77 66 55 66 ef"  # 0x55667788 to 0x2004
        "ba 00 20 66 ed 66 89 c3"  # in eax, dx; mov ebx, eax
        "ba 05 20 66 31 c0 ed 66 89 c1"  # xor eax, eax; in ax, dx at 0x2005; mov ecx, eax
        "ba 07 20 66 31 c0 ec 66 89 c6"  # in al, dx at 0x2007; mov esi, eax
        "ba 00 30 66 31 c0 66 ed 66 89 c7"  # nobody: in eax, dx; mov edi, eax
        "66 31 c0 ed 66 89 c5"  # in ax, dx; mov ebp, eax
    )
    with rig.kvm(kvm_fd, code) as machine:
        msix = Msix(machine.vm, 1)
        machine.vm.pio.add(msix.table, 0x2000, 16)
        registers = run(machine)
        assert registers.rbx == 0x11223344
        assert registers.rcx == 0x6677
        assert registers.rsi == 0x55
        assert registers.rdi == 0xFFFF_FFFF
        assert registers.rbp == 0xFFFF
        assert machine.vm.pio.stats() == {"missed": 6}
        stats = machine.vcpus[0].stats()
        assert (stats["pio"], stats["mmio"], stats["failed"], stats["shutdown"]) == (7, 0, 0, 0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_string_input(kvm_fd: int, size: int, count: int) -> None:
    """`rep ins` fills exactly its count of elements; 1000 of them take several exits, none takes none."""
    opcode = {1: "f3 6c", 2: "f3 6d", 4: "66 f3 6d"}[size]
    code = program(f"fc ba 00 30 bf 00 40 b9 {count.to_bytes(2, 'little').hex()} {opcode}")  # cld; dx; di; cx
    with rig.kvm(kvm_fd, code) as machine:
        registers = run(machine)
        length = size * count
        assert machine.vm.memory.read(BUFFER, length + 16) == b"\xff" * length + bytes(16)
        assert machine.vm.pio.stats() == {"missed": length}
        assert (registers.rcx & 0xFFFF, registers.rdi & 0xFFFF) == (0, BUFFER + length)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 300])
def test_string_output(kvm_fd: int, size: int, count: int) -> None:
    """`rep outs` writes each element once."""
    opcode = {1: "f3 6e", 2: "f3 6f", 4: "66 f3 6f"}[size]
    code = program(f"fc ba 00 20 be 00 40 b9 {count.to_bytes(2, 'little').hex()} {opcode}")
    with rig.kvm(kvm_fd, code) as machine:
        machine.vm.memory.write(BUFFER, random.Random(size).randbytes(size * 300))
        bell = Doorbell(machine.vm, "bell")
        machine.vm.pio.add(bell, 0x2000, 4)
        registers = run(machine)
        assert bell.drain() == count
        assert (registers.rcx & 0xFFFF, registers.rsi & 0xFFFF) == (0, BUFFER + size * count)


def test_string_output_of_values(kvm_fd: int) -> None:
    """The elements themselves, through a register that keeps the last."""
    code = program("fc ba 00 20 be 00 40 b9 07 00 66 f3 6f ba 00 20 66 ed")  # rep outsd; in eax, dx
    with rig.kvm(kvm_fd, code) as machine:
        machine.vm.memory.write(BUFFER, bytes(range(64)))
        msix = Msix(machine.vm, 1)
        machine.vm.pio.add(msix.table, 0x2000, 16)
        assert run(machine).rax == 0x1B1A1918


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_accesses_of_each_width(kvm_fd: int) -> None:
    """In 64-bit mode: 8, 4, 2 and 1 bytes, aligned, unaligned, and across the end of a region and of a page."""
    code = program(
        "48 c7 c3 00 00 00 00 bb 00 00 00 d0"  # mov rbx, MMIO
        "48 b8 88 77 66 55 44 33 22 11 48 89 03"  # mov rax, 0x1122334455667788; mov [rbx], rax
        "c7 43 08 ef be ad de"  # mov dword [rbx+8], 0xdeadbeef
        "4c 8b 03"  # mov r8, [rbx]
        "44 8b 4b 05"  # mov r9d, [rbx+5]
        "66 44 8b 53 0a"  # mov r10w, [rbx+10]
        "44 8a 5b 07"  # mov r11b, [rbx+7]
        "4c 8b 63 0c"  # mov r12, [rbx+12]: four bytes of the region, four beyond
        "4c 8b ab fc 0f 00 00"  # mov r13, [rbx+0xffc]: two pages
        "4c 8b b3 00 10 00 00"  # mov r14, [rbx+0x1000]
    )
    with rig.kvm(kvm_fd, code) as machine:
        machine.vcpus[0].set_registers(rig.long_mode(machine.vm.memory, CODE))
        msix, far = Msix(machine.vm, 1), Msix(machine.vm, 1)
        machine.vm.mmio.add(msix.table, MMIO, 16)
        machine.vm.mmio.add(far.table, MMIO + 0x1000, 16)
        registers = run(machine)
        assert registers.r8 == 0x1122334455667788
        assert registers.r9 == 0xEF112233
        assert registers.r10 & 0xFFFF == 0xDEAD
        assert registers.r11 & 0xFF == 0x11
        assert registers.r12 & 0xFFFF_FFFF in (0, 1)  # vector control
        assert registers.r12 >> 32 == 0xFFFF_FFFF
        assert registers.r13 == 0x0000_0000_FFFF_FFFF
        assert registers.r14 == 0
        assert machine.vm.mmio.stats() == {"missed": 8}


def test_what_nobody_answers(kvm_fd: int) -> None:
    """Reads as ones and swallows writes, anywhere outside RAM."""
    code = program("b8 01 00 00 00 a3 00 00 00 d0 a1 00 00 00 d0 89 c3 a0 ff ff 1f 00 89 c1")
    with rig.kvm(kvm_fd, code) as machine:
        machine.vcpus[0].set_registers(rig.protected_mode(CODE))
        registers = run(machine)
        assert (registers.rbx, registers.rcx) == (0xFFFF_FFFF, 0xFFFF_FFFF)
        assert machine.vm.mmio.stats() == {"missed": 9}


def test_read_only_memory_is_read_directly_and_writes_are_dropped(kvm_fd: int) -> None:
    """A write arrives at the bus, where nobody is."""
    code = program("a1 00 00 10 00 89 c3 c7 05 00 00 10 00 01 00 00 00 a1 00 00 10 00")
    with rig.kvm(kvm_fd, code, read_only=(0x10_0000, 0x1000)) as machine:
        machine.vm.memory.write(0x10_0000, b"\x11\x22\x33\x44")
        machine.vcpus[0].set_registers(rig.protected_mode(CODE))
        registers = run(machine)
        assert (registers.rbx, registers.rax) == (0x44332211, 0x44332211)
        assert machine.vm.memory.read(0x10_0000, 4) == b"\x11\x22\x33\x44"
        stats = machine.vcpus[0].stats()
        assert stats["mmio"] == 1


def test_guest_writes_are_not_in_the_host_record(kvm_fd: int) -> None:
    """KVM keeps the record of those."""
    with rig.kvm(kvm_fd, program("c6 06 00 40 7f")) as machine:  # mov byte [0x4000], 0x7f
        machine.vm.memory.track_dirty()
        run(machine)
        assert machine.vm.memory.read(BUFFER, 1) == b"\x7f"
        assert machine.vm.memory.take_dirty() == []


# -- doorbells ---------------------------------------------------------------------------------------------------------

RINGS = 500


def test_a_doorbell_port_never_exits(kvm_fd: int) -> None:
    """Writes of every width ring in the kernel; a read exits and is 0."""
    code = program(
        f"b9 {RINGS.to_bytes(2, 'little').hex()} ba 00 20"  # mov cx, RINGS; mov dx, 0x2000
        "ee ef 66 ef 49 75 f9"  # out dx, al / ax / eax; dec cx; jnz
        "66 ed 66 89 c3"
    )
    with rig.kvm(kvm_fd, code) as machine:
        bell = Doorbell(machine.vm, "bell")
        machine.vm.pio.add(bell, 0x2000, 4)
        registers = run(machine)
        assert bell.drain() == 3 * RINGS
        assert bell.stats() == {"rung": 0}
        assert machine.vcpus[0].stats()["pio"] == 1
        assert registers.rbx == 0


def test_a_doorbell_in_memory_never_exits(kvm_fd: int) -> None:
    """Inside a BAR's window, at its own address alone: beside it the vCPU loop rings."""
    code = program(
        f"b9 {RINGS.to_bytes(4, 'little').hex()} bb 00 00 00 d0"  # mov ecx, RINGS; mov ebx, MMIO
        "88 43 10 66 89 43 10 89 43 10 49 75 f3"  # mov [ebx+16], al / ax / eax; dec ecx; jnz
        "89 43 12"  # mov [ebx+18], eax
    )
    with rig.kvm(kvm_fd, code) as machine:
        machine.vcpus[0].set_registers(rig.protected_mode(CODE))
        bell = Doorbell(machine.vm, "bell")
        window = Window("bar")
        window.add(bell, 0x10, 4)
        machine.vm.mmio.add(window, MMIO, 0x1000)
        run(machine)
        assert bell.drain() == 3 * RINGS + 1
        assert bell.stats() == {"rung": 1}
        assert machine.vcpus[0].stats()["mmio"] == 1


def test_a_doorbell_moves_with_its_bar(kvm_fd: int) -> None:
    """And rings nowhere after it is discarded."""
    code = program("bb 00 00 00 d0 89 03 89 83 00 10 00 00")  # mov [MMIO], eax; mov [MMIO + 0x1000], eax
    with rig.kvm(kvm_fd, code) as machine:
        machine.vcpus[0].set_registers(rig.protected_mode(CODE))
        gone, moved = Doorbell(machine.vm, "gone"), Doorbell(machine.vm, "moved")
        machine.vm.mmio.add(gone, MMIO, 4)
        machine.vm.mmio.add(moved, MMIO + 0x2000, 4)
        machine.vm.mmio.discard(gone)
        machine.vm.mmio.add(moved, MMIO + 0x1000, 4)
        run(machine)
        assert (gone.drain(), moved.drain()) == (0, 1)
        assert machine.vm.mmio.stats() == {"missed": 4}
        assert machine.vcpus[0].stats()["mmio"] == 1


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_triple_fault_is_a_shutdown(kvm_fd: int) -> None:
    """An invalid instruction without anybody to handle it."""
    with rig.kvm(kvm_fd, bytes.fromhex("0f0b")) as machine:
        machine.vcpus[0].set_registers(rig.protected_mode(CODE))
        machine.start()
        machine.until("a shutdown", lambda: machine.saw(rig.SHUTDOWN | rig.PARKED))
        assert machine.vcpus[0].stats()["shutdown"] == 1


def test_code_outside_memory_is_a_failure(kvm_fd: int) -> None:
    """KVM cannot fetch it; there are no bytes to show, but registers."""
    with rig.kvm(kvm_fd, bytes.fromhex("b8 00 00 00 f0 ff e0")) as machine:  # mov eax, 0xf0000000; jmp eax
        vcpu = machine.vcpus[0]
        vcpu.set_registers(rig.protected_mode(CODE))
        machine.start()
        machine.until("a failure", lambda: machine.saw(rig.FAILED | rig.PARKED))
        assert vcpu.failure_text() == "KVM internal error: emulation failed"
        assert vcpu.instruction_bytes() == b""
        assert vcpu.get_registers().rip == 0xF000_0000
        assert vcpu.stats()["failed"] == 1


def test_an_instruction_that_kvm_cannot_emulate_is_a_failure(kvm_fd: int) -> None:
    """x87 on device memory: the message can name the instruction."""
    code = bytes.fromhex("d9 05 00 00 00 d0 90 90")  # fld dword [MMIO]
    with rig.kvm(kvm_fd, code) as machine:
        vcpu = machine.vcpus[0]
        vcpu.set_registers(rig.protected_mode(CODE))
        machine.start()
        machine.until("a failure", lambda: machine.saw(rig.FAILED | rig.PARKED))
        assert vcpu.failure_text() == "KVM internal error: emulation failed"
        assert vcpu.instruction_bytes().startswith(code)
        assert len(vcpu.instruction_bytes()) == 15
        assert vcpu.get_registers().rip == CODE


def test_instruction_bytes_end_with_their_page(kvm_fd: int) -> None:
    with rig.kvm(kvm_fd) as machine:
        machine.vm.memory.write(0x1FFA, b"abcdef")
        machine.vcpus[0].set_registers(rig.real_mode(0x1FFA))
        assert machine.vcpus[0].instruction_bytes() == b"abcdef"


ILLEGAL = {
    "paging without protection": {"cr0": 0x8000_0010},
    "not write-through without cache disable": {"cr0": 0x2000_0011},
    "reserved bits of CR4": {"cr4": 1 << 40},
    "reserved bits of EFER": {"efer": 1 << 40},
    "long mode without PAE": {"cr0": 0x8000_0011, "efer": 0x500},
    "long mode active without paging": {"efer": 0x500},
    "an address beyond the processor": {"cr0": 0x8000_0011, "cr4": 0x20, "efer": 0x500, "cr3": 1 << 60},
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_impossible_state_is_refused_or_fails(kvm_fd: int, name: str) -> None:
    """By KVM when it is set, or when it is entered; never a hang."""
    with rig.kvm(kvm_fd, END) as machine:
        vcpu = machine.vcpus[0]
        try:
            vcpu.set_registers(rig.protected_mode(CODE, **ILLEGAL[name]))
        except HypervisorError as error:
            assert str(error) == "set the system registers: Invalid argument"  # noqa: PT017 -- or it fails below
            return
        done = Doorbell(machine.vm, "done")
        machine.vm.pio.add(done, DONE, 1)
        machine.start()
        ready, _, _ = select.select([machine.vm.mailbox.fileno(), done.fileno()], [], [], 20)
        assert ready, "an end of any kind"
        machine.hold()


def vcpu_descriptor(index: int) -> int:
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == f"anon_inode:kvm-vcpu:{index}":
                return int(name)
        except FileNotFoundError:
            pass
    raise AssertionError("no vCPU descriptor")


def test_a_vcpu_that_can_never_be_entered_again_parks(kvm_fd: int) -> None:
    """KVM_RUN fails at once, also when it is asked to exit immediately: a broken VM, or a descriptor that is none."""
    with rig.kvm(kvm_fd, b"\xeb\xfe") as machine:
        vcpu = machine.vcpus[0]
        machine.start()
        machine.hold()
        fd = vcpu_descriptor(0)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, fd, inheritable=False)
        os.close(null)
        machine.events[0].clear()
        machine.release()
        machine.until("a failure", lambda: machine.saw(rig.FAILED | rig.PARKED))
        assert vcpu.failure_text() == "KVM_RUN failed: Inappropriate ioctl for device"
        assert vcpu.stats()["failed"] == 1
        for count in (2, 3):
            machine.events[0].clear()
            machine.release()
            machine.until("the next failure", lambda: machine.saw(rig.FAILED | rig.PARKED))
            assert vcpu.stats()["failed"] == count


def test_a_closed_vcpu_is_harmless(kvm_fd: int) -> None:
    """Late commands, and a thread that starts after all."""
    with rig.kvm(kvm_fd, END) as machine:
        vcpu = machine.vcpus[0]
        vcpu.close()
        vcpu.close()
        vcpu.hold()
        vcpu.release()
        with pytest.raises(HypervisorError, match="read the registers: Bad file descriptor"):
            vcpu.get_registers()
        machine.start()
        machine.until("a failure", lambda: machine.saw(rig.FAILED | rig.PARKED))


def test_a_vcpu_that_kvm_refuses_leaves_nothing(kvm_fd: int) -> None:
    """Twice the same, and one too far."""
    with rig.kvm(kvm_fd) as machine:
        for index in (0, 1 << 20):
            with pytest.raises(HypervisorError, match=f"create vCPU {index}"):
                KvmVcpu(machine.vm, index, print)
        machine.vm.pio.add(Doorbell(machine.vm, "bell"), 0x80, 1)


def test_what_is_no_kvm_is_refused() -> None:
    with open("/dev/null") as null, pytest.raises(HypervisorError, match="API version: Inappropriate ioctl"):
        KvmVm(null.fileno())


# -- power-on ----------------------------------------------------------------------------------------------------------


def test_the_registers_at_power_on(kvm_fd: int) -> None:
    """As the manual says, and as the neutral form gives them back."""
    with rig.kvm(kvm_fd, cpus=2) as machine:
        at_reset = machine.vcpus[1].get_registers()
        expected = real_mode_registers()
        assert (at_reset.rip, at_reset.cs.base, at_reset.cs.selector) == (0xFFF0, 0xFFFF_0000, 0xF000)
        assert (at_reset.cr0, at_reset.rflags, at_reset.efer) == (expected.cr0, expected.rflags, 0)
        for name in ("rax", "rbx", "rcx", "rsi", "rdi", "rsp", "rbp", "r8", "r15", "cr2", "cr3", "cr4"):
            assert getattr(at_reset, name) == 0, name
        for registers in (at_reset, rig.real_mode(0x1234, rax=1), rig.protected_mode(7, r15=(1 << 64) - 1)):
            machine.vcpus[1].set_registers(registers)
            assert machine.vcpus[1].get_registers() == registers


def test_reset_brings_power_on_back_twenty_times(kvm_fd: int) -> None:
    """Registers, local APIC and interrupt controllers; nothing grows."""
    # Every run changes the PIC's mask, the APIC's spurious vector, a segment, rsp and memory.
    code = program("b0 5a e6 21 8c c8 8e d0 bc 34 12 66 b8 01 00 00 00 0f a2 fe 06 00 40")
    with rig.kvm(kvm_fd, code, cpus=4) as machine:
        vm = machine.vm
        vcpu = machine.vcpus[0]
        for vcpu in machine.vcpus:
            vcpu.reset()
        power_on = [vcpu.get_registers() for vcpu in machine.vcpus]
        first = machine.vcpus[0]
        done = Doorbell(vm, "done")
        vm.pio.add(done, DONE, 1)
        first.set_registers(rig.real_mode(CODE))
        machine.start()
        grown = []
        for number in range(1, 21):
            machine.spin_until("the end of the guest", lambda: done.drain() == 1)
            machine.hold()
            assert vm.memory.read(BUFFER, 1) == bytes([number])
            assert first.get_registers() != power_on[0]
            vm.reset()
            for vcpu in machine.vcpus:
                vcpu.reset()
            assert [vcpu.get_registers() for vcpu in machine.vcpus] == power_on
            first.set_registers(rig.real_mode(CODE))
            grown.append((len(os.listdir("/proc/self/fd")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
            machine.release()
        assert grown[0][0] == grown[-1][0]
        assert grown[-1][1] - grown[4][1] < 1024, "KiB"
        assert machine.exits("failed") == machine.exits("shutdown") == 0


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        pytest.param(0x2FF, 0xC06, id="MTRR default type"),
        pytest.param(0x200, 0xC000_0006, id="MTRR base"),
        pytest.param(0x201, 0x800, id="MTRR mask"),
        pytest.param(0x250, 0x0606_0606, id="fixed MTRR"),
        pytest.param(0x277, 0x0007_0606, id="PAT"),
        pytest.param(0x174, 0x1234, id="SYSENTER"),
        pytest.param(0x402, 0x1234, id="machine check address, first bank"),
        pytest.param(0x427, 0x1234, id="machine check miscellaneous, tenth bank"),
    ],
)
def test_reset_takes_msrs_back(kvm_fd: int, msr: int, value: int) -> None:
    """Also those that KVM does not list, as it does not list MTRRs: the next kernel finds none of the last one's."""
    code = (
        b"\xb9" + msr.to_bytes(4, "little") + bytes.fromhex("0f 32 a3 00 40 00 00")  # rdmsr; mov [0x4000], eax
        + b"\xb8" + value.to_bytes(4, "little") + bytes.fromhex("0f 30")  # wrmsr
        + bytes.fromhex("0f 32 a3 04 40 00 00 e6") + bytes([DONE]) + bytes.fromhex("f4 eb fd")
    )  # fmt: skip
    with rig.kvm(kvm_fd, code) as machine:
        vm, vcpu = machine.vm, machine.vcpus[0]
        done = Doorbell(vm, "done")
        vm.pio.add(done, DONE, 1)
        machine.start(released=False)
        machine.parked()
        found = []
        for _ in range(2):
            vcpu.set_registers(rig.protected_mode(CODE))
            vcpu.release()
            machine.spin_until("the end of the guest", lambda: done.drain() == 1)
            machine.hold()
            assert vm.memory.read(0x4004, 4) == value.to_bytes(4, "little")
            found.append(vm.memory.read(0x4000, 4))
            vcpu.reset()
        assert found[0] == found[1] != vm.memory.read(0x4004, 4)
        assert machine.exits("failed") == machine.exits("shutdown") == 0
