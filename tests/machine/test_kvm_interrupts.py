"""Interrupts that a guest receives on KVM: lines through PIC and I/O APIC, messages, and lent vectors."""

import os

import pytest

from propolis._interrupts import IrqLine, MsiVector
from propolis.errors import HypervisorError
from propolis.hypervisor.state import DescriptorTable
from tests import rig
from tests.machine import pic

pytestmark = pytest.mark.kvm

CODE = rig.CODE
COUNTER = 0x5000
IDT, GDT = 0x7000, 0x7800
HANDLER = 0x2000
VECTOR = 0x41
READY = 0x5010


@pytest.mark.parametrize("irq", [1, 3, 4, 5, 8, 10, 11, 12, 15])
def test_a_line_reaches_the_guest_through_the_pic(kvm_fd: int, irq: int) -> None:
    """One interrupt for each rising edge, on its own vector alone."""
    with pic.start(pic.guest(kvm_fd)) as machine:
        line = IrqLine(machine.vm, irq)
        for number in range(1, 11):
            line.drive(True)
            machine.spin_until(f"interrupt {number}", lambda: pic.count(machine, irq) == number)
            line.drive(False)
        assert [pic.count(machine, other) for other in range(1, 16)] == [10 * (n == irq) for n in range(1, 16)]


def test_a_line_that_moves_takes_its_level_along(kvm_fd: int) -> None:
    with pic.start(pic.guest(kvm_fd)) as machine:
        line = IrqLine(machine.vm, 10)
        line.drive(True)
        machine.spin_until("interrupt 10", lambda: pic.count(machine, 10) == 1)
        line.reroute(11)
        machine.spin_until("interrupt 11", lambda: pic.count(machine, 11) == 1)
        line.drive(False)
        line.drive(True)
        machine.spin_until("interrupt 11 again", lambda: pic.count(machine, 11) == 2)
        assert pic.count(machine, 10) == 1


def test_reset_forgets_interrupts(kvm_fd: int) -> None:
    """After a reset the PIC is as at power-on: KVM's has vector base 0 then, not what the guest set, and no mask."""
    with pic.start(pic.guest(kvm_fd)) as machine:
        memory = machine.vm.memory
        line = IrqLine(machine.vm, 5)
        line.drive(True)
        machine.spin_until("an interrupt", lambda: pic.count(machine, 5) == 1)
        machine.hold()
        machine.vm.reset()  # with the line up, and the interrupt acknowledged
        machine.vcpus[0].reset()
        memory.write(CODE, b"\xfb\xfe\x06\x00\x60\xf4\xeb\xf9")  # sti; inc byte [0x6000]; hlt; jmp to the inc
        memory.write(5 * 4, memory.read(0x25 * 4, 4))
        memory.write(0x25 * 4, bytes(4))
        machine.vcpus[0].set_registers(rig.real_mode(CODE))
        machine.release()
        machine.spin_until("the guest", lambda: memory.read(0x6000, 1) == b"\1")
        line.drive(False)
        line.drive(True)
        machine.spin_until("an interrupt at the base of power-on", lambda: pic.count(machine, 5) == 2)
        machine.spin_until("the halt's end", lambda: memory.read(0x6000, 1) == b"\2")
        machine.hold()
        assert memory.read(0x6000, 1) == b"\2"
        assert [pic.count(machine, irq) for irq in range(16)] == [2 * (irq == 5) for irq in range(16)]


# Protected mode, by the local APIC: lidt, software-enable it, then sti, say that it is ready, hlt. The handler counts,
# ends the interrupt and, since an interpreter may lack iret, goes back by itself.
LOCAL_GUEST = (
    "0f 01 1d 80 78 00 00"  # lidt [0x7880]
    "c7 05 f0 00 e0 fe ff 01 00 00"  # spurious vector 0xff, enabled
    "{setup}"
    "c6 05 10 50 00 00 01"  # ready
    "fb f4 eb fc"  # sti; hlt; jmp to the sti
)
LOCAL_HANDLER = (
    "ff 05 00 50 00 00"  # inc dword [COUNTER]
    "c7 05 b0 00 e0 fe 00 00 00 00"  # EOI
    "bc 00 80 00 00"  # mov esp, 0x8000
    "fb f4 eb fc"
)


def local_guest(kvm_fd: int, setup: str = "") -> rig.OnKvm:
    machine = rig.kvm(kvm_fd, bytes.fromhex(LOCAL_GUEST.format(setup=setup)))
    memory = machine.vm.memory
    gate = HANDLER.to_bytes(2, "little") + b"\x08\0\0\x8e\0\0"
    memory.write(IDT + 8 * VECTOR, gate)
    memory.write(0x7880, (8 * 256 - 1).to_bytes(2, "little") + IDT.to_bytes(4, "little"))
    memory.write(GDT, bytes(8) + bytes.fromhex("ffff0000009bcf00 ffff00000093cf00"))
    memory.write(HANDLER, bytes.fromhex(LOCAL_HANDLER))
    machine.vcpus[0].set_registers(rig.protected_mode(CODE, gdt=DescriptorTable(base=GDT, limit=23)))
    machine.start()
    machine.spin_until("the guest is ready", lambda: memory.read(READY, 1) == b"\1")
    return machine


def taken(machine: rig.OnKvm) -> int:
    return int.from_bytes(machine.vm.memory.read(COUNTER, 4), "little")


def test_a_message_reaches_the_guest(kvm_fd: int) -> None:
    with local_guest(kvm_fd) as machine:
        vector = MsiVector(machine.vm)
        vector.configure(0xFEE0_0000, VECTOR)
        for number in range(1, 21):
            vector.trigger()
            machine.spin_until(f"message {number}", lambda: taken(machine) == number)


def test_a_lent_vector_reaches_the_guest_without_us(kvm_fd: int) -> None:
    """Who holds the descriptor writes to it; a new message changes the route, not the descriptor."""
    with local_guest(kvm_fd) as machine:
        other = MsiVector(machine.vm)
        other.lend()
        vector = MsiVector(machine.vm)
        vector.configure(0xFEE0_0000, 0x30)  # nobody's
        fd = vector.lend()
        vector.configure(0xFEE0_0000, VECTOR)
        for number in range(1, 11):
            os.eventfd_write(fd, 1)
            machine.spin_until(f"message {number}", lambda: taken(machine) == number)
        vector.trigger()
        machine.spin_until("our own", lambda: taken(machine) == 11)
        assert machine.exits("pio") == machine.exits("mmio") == 0


def test_vectors_are_lent_for_as_long_as_there_are_routes(kvm_fd: int) -> None:
    """The next one is refused, and those before go on."""
    with local_guest(kvm_fd) as machine:
        vectors = [MsiVector(machine.vm) for _ in range(300)]
        lent = 0
        with pytest.raises(HypervisorError, match="route an MSI vector: No space left"):  # noqa: PT012 -- which of them?
            for vector in vectors:
                vector.configure(0xFEE0_0000, VECTOR)
                vector.lend()
                lent += 1
        assert lent > 200
        vectors[lent - 1].trigger()
        machine.spin_until("the last one's message", lambda: taken(machine) == 1)


def test_lent_vectors_that_are_gone_give_their_routes_back(kvm_fd: int) -> None:
    """A device that is unplugged and plugged in again does not use them up."""
    with local_guest(kvm_fd) as machine:
        for number in range(1, 601):
            vector = MsiVector(machine.vm)
            vector.configure(0xFEE0_0000, VECTOR)
            vector.lend()
            if number % 200 == 0:
                vector.trigger()
                machine.spin_until("its message", lambda: taken(machine) == number // 200)


# I/O APIC input 20 to VECTOR: redirection table entry 20 is registers 0x38 and 0x39.
IOAPIC = (
    "c7 05 00 00 c0 fe 39 00 00 00 c7 05 10 00 c0 fe 00 00 00 00"
    "c7 05 00 00 c0 fe 38 00 00 00 c7 05 10 00 c0 fe 41 {flags} 00 00"
)


def test_an_edge_reaches_the_guest_through_the_io_apic(kvm_fd: int) -> None:
    """On an input that no PIC has."""
    with local_guest(kvm_fd, IOAPIC.format(flags="00")) as machine:
        line = IrqLine(machine.vm, 20)
        for number in range(1, 11):
            line.drive(True)
            machine.spin_until(f"edge {number}", lambda: taken(machine) == number)
            line.drive(False)


def test_a_level_interrupts_until_it_is_low(kvm_fd: int) -> None:
    """As PCI's INTx does: two sources on one input, which falls only when both have gone."""
    with local_guest(kvm_fd, IOAPIC.format(flags="80")) as machine:
        first = IrqLine(machine.vm, 20)
        second = IrqLine(machine.vm, 20)
        first.drive(True)
        second.drive(True)
        machine.spin_until("many interrupts", lambda: taken(machine) > 20)
        first.drive(False)
        before = taken(machine)
        machine.spin_until("more interrupts", lambda: taken(machine) > before + 20)
        second.drive(False)
        machine.hold()
        machine.release()
        machine.spin_until("silence", lambda: settled(machine))


def settled(machine: rig.OnKvm) -> bool:
    """No interrupt arrives between two stops of the guest."""
    before = taken(machine)
    machine.release()
    machine.hold()
    return taken(machine) == before
