"""The CPUID of a machine: the host's, with one socket of `cpus` single-threaded cores and no nested virtualization.

Computed once when a machine is made and kept with it. Leaf numbers and fields: Intel SDM volume 2A, CPUID; AMD APM
volume 3, appendix E.
"""

from typing import Literal, NamedTuple

Interface = Literal["kvm", "bhyve", "hyper-v", "none"]

SIGNIFICANT_INDEX = 1  # the entry answers only its own sub-leaf (KVM_CPUID_FLAG_SIGNIFCANT_INDEX)

VMX = 1 << 5  # leaf 1 ECX
TSC_DEADLINE = 1 << 24
HYPERVISOR = 1 << 31
HTT = 1 << 28  # leaf 1 EDX
CMP_LEGACY = 1 << 1  # leaf 8000_0001 ECX
SVM = 1 << 2

HYPERVISOR_LEAVES = range(0x4000_0000, 0x4001_0000)
# SGX, SVM and the newer topology leaves, whose older forms below say all there is to say.
DROPPED = {0xB, 0x12, 0x1F, 0x8000_000A, 0x8000_0026}


class Entry(NamedTuple):
    """One CPUID leaf or sub-leaf."""

    function: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def machine_cpuid(host: list[tuple[int, ...]], cpus: int, interface: Interface, deadline_timer: bool) -> list[Entry]:
    """The leaves that all vCPUs share; `vcpu_cpuid` adds what differs. `host` is the back end's supported CPUID."""
    leaves = [Entry(*entry) for entry in host]
    paravirtual = next((e for e in leaves if e.function == 0x4000_0001), Entry(0x4000_0001, 0, 0, 0, 0, 0, 0))
    result = []
    for entry in leaves:
        if entry.function in HYPERVISOR_LEAVES or entry.function in DROPPED:
            continue
        result.append(_shared(entry, cpus, interface, deadline_timer))
    if any(e.function == 0 and e.eax >= 0xB for e in leaves):
        result += _extended_topology(cpus)
    return result + _hypervisor(interface, paravirtual)


def vcpu_cpuid(shared: list[Entry], index: int) -> list[tuple[int, ...]]:
    """The shared leaves with one vCPU's APIC ID in them."""
    return [tuple(_own(entry, index)) for entry in shared]


def _shared(e: Entry, cpus: int, interface: Interface, deadline_timer: bool) -> Entry:
    if e.function == 1:
        ecx = e.ecx & ~(VMX | HYPERVISOR | TSC_DEADLINE)
        ecx |= (HYPERVISOR if interface != "none" else 0) | (TSC_DEADLINE if deadline_timer else 0)
        edx = e.edx | HTT if cpus > 1 else e.edx & ~HTT
        return e._replace(ebx=e.ebx & 0xFF00_FFFF | cpus << 16, ecx=ecx, edx=edx)
    if e.function in (4, 0x8000_001D) and e.eax & 0x1F:
        # Deterministic caches: levels 1 and 2 belong to a core, level 3 to the socket.
        sharing = cpus - 1 if e.eax >> 5 & 7 >= 3 else 0
        eax = e.eax & 0x3FFF | sharing << 14
        if e.function == 4:
            eax |= (_power_of_two(cpus) - 1) << 26
        return e._replace(eax=eax)
    if e.function == 0x8000_0001:
        ecx = e.ecx & ~(SVM | CMP_LEGACY)
        return e._replace(ecx=ecx | CMP_LEGACY if cpus > 1 else ecx)
    if e.function == 0x8000_0008:
        # APIC ID size in bits, threads - 1.
        return e._replace(ecx=e.ecx & ~0xF0FF | _bits(cpus) << 12 | cpus - 1)
    return e


def _extended_topology(cpus: int) -> list[Entry]:
    """Leaf B: a core has one thread, the socket all cores."""
    return [
        Entry(0xB, 0, SIGNIFICANT_INDEX, 0, 1, 0x100, 0),
        Entry(0xB, 1, SIGNIFICANT_INDEX, _bits(cpus), cpus, 0x201, 0),
        Entry(0xB, 2, SIGNIFICANT_INDEX, 0, 0, 2, 0),
    ]


def _hypervisor(interface: Interface, paravirtual: Entry) -> list[Entry]:
    if interface == "kvm":
        return [_signature(b"KVMKVMKVM\0\0\0", 0x4000_0001), paravirtual]
    if interface == "bhyve":
        return [_signature(b"bhyve bhyve ", 0x4000_0000)]
    return []  # those of "hyper-v" are in hyperv.py


def _signature(name: bytes, last: int) -> Entry:
    ebx, ecx, edx = (int.from_bytes(name[i : i + 4], "little") for i in (0, 4, 8))
    return Entry(0x4000_0000, 0, 0, last, ebx, ecx, edx)


def _own(e: Entry, index: int) -> Entry:
    if e.function == 1:
        return e._replace(ebx=e.ebx & 0x00FF_FFFF | index << 24)
    if e.function == 0xB:
        return e._replace(edx=index)
    if e.function == 0x8000_001E:
        return e._replace(eax=index, ebx=index, ecx=0)  # one thread a core, one node
    return e


def _bits(cpus: int) -> int:
    return (cpus - 1).bit_length()


def _power_of_two(cpus: int) -> int:
    return 1 << _bits(cpus)
