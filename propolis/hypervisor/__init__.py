"""Hypervisor back ends: KVM on Linux, replay everywhere, bhyve on illumos.

A back end is a subclass each of `Vm` and `Vcpu` with the names below, which are only what every hypervisor can do: what
one lacks is emulated inside it. `machine.py` sees nothing else of a hypervisor.
"""

from typing import TYPE_CHECKING

from propolis.errors import HypervisorError

if TYPE_CHECKING:
    from propolis.hypervisor._kvm import KvmVcpu, KvmVm
    from propolis.hypervisor._replay import ReplayVcpu, ReplayVm

    MachineVm = KvmVm | ReplayVm
    MachineVcpu = KvmVcpu | ReplayVcpu

VM_NAMES = (
    "create_vcpu", "max_vcpus", "has_deadline_timer", "supported_cpuid", "supported_hyperv",
    "map_memory", "add_interrupt_controllers", "inject_nmi", "reset", "close",
)  # fmt: skip
VCPU_NAMES = (
    "set_cpuid", "reset", "get_registers", "set_registers", "instruction_bytes", "failure_text", "close",
)  # fmt: skip


def open_vm(backend: str, kvm_fd: int = -1) -> "MachineVm":
    """A new VM of the back end "kvm", on an open /dev/kvm, or "replay". Raises HypervisorError."""
    if backend == "kvm":
        from propolis.hypervisor._kvm import KvmVm

        return KvmVm(kvm_fd)
    if backend == "replay":
        from propolis.hypervisor._replay import ReplayVm

        return ReplayVm()
    raise HypervisorError(f"hypervisor {backend!r}: expected kvm or replay")
