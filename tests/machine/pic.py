"""A guest in real mode that sets up both PICs, lets every interrupt through, counts them and halts in between."""

from tests import rig

HANDLER = 0x2000
READY, COUNTS = 0x5010, 0x5020

# Initialise both to vectors 0x20 and 0x28, then unmask all.
_PICS = (
    "fa b0 11 e6 20 e6 a0 b0 20 e6 21 b0 28 e6 a1 b0 04 e6 21 b0 02 e6 a1 b0 01 e6 21 e6 a1"
    "b0 fb e6 21 b0 ff e6 a1"  # only the cascade yet
    "b0 00 e6 21 e6 a1"
)
_WAIT = "fb c6 06 10 50 01 f4 eb fd"  # sti; say that it is ready; hlt; jmp to the hlt
# inc byte [COUNTS + irq]; whatever the device needs; end the interrupt at both PICs; iret.
_HANDLER = "50 fe 06 {count} 50 {serve} b0 20 e6 a0 e6 20 58 cf"


def guest(kvm_fd: int, setup: str = "", serve: dict[int, str] | None = None) -> rig.OnKvm:
    """To be started. `setup` runs before interrupts come, `serve` when the one of its number does; both may use al."""
    machine = rig.kvm(kvm_fd, bytes.fromhex(_PICS + setup + _WAIT))
    memory = machine.vm.memory
    for irq in range(16):
        handler = HANDLER + 0x40 * irq
        memory.write((0x20 + irq) * 4, handler.to_bytes(2, "little") + bytes(2))
        code = _HANDLER.format(count=f"{0x20 + irq:02x}", serve=(serve or {}).get(irq, ""))
        memory.write(handler, bytes.fromhex(code))
    return machine


def start(machine: rig.OnKvm) -> rig.OnKvm:
    """Returns once it waits for interrupts."""
    machine.start()
    machine.spin_until("the guest is ready", lambda: machine.vm.memory.read(READY, 1) == b"\1")
    return machine


def count(machine: rig.OnKvm, irq: int) -> int:
    """How many interrupts of this number there were, modulo 256."""
    return machine.vm.memory.read(COUNTS + irq, 1)[0]
