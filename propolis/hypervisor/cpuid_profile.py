"""A CPUID that is given leaf by leaf, in place of the host's: what it may say on this host.

The guest gets these leaves and no others, but for those that are the machine's own: its topology and its hypervisor.
"""

from __future__ import annotations

from propolis.errors import HypervisorError
from propolis.hypervisor.cpuid import CMP_LEGACY, HTT, HYPERVISOR, HYPERVISOR_LEAVES, SVM, TSC_DEADLINE, VMX, Entry

_EVERY_BIT = 0xFFFF_FFFF
_OSXSAVE = 1 << 27  # leaf 1 ECX: what the guest has switched on
_OSPKE = 1 << 4  # leaf 7 ECX

# Registers in which every bit is a feature, by leaf and sub-leaf, with the bits that count: the others are the
# machine's to set, or the guest's. Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.
_FEATURES: dict[tuple[int, int], dict[str, int]] = {
    (1, 0): {"ecx": _EVERY_BIT & ~(VMX | HYPERVISOR | TSC_DEADLINE | _OSXSAVE), "edx": _EVERY_BIT & ~HTT},
    (7, 0): {"ebx": _EVERY_BIT, "ecx": _EVERY_BIT & ~_OSPKE, "edx": _EVERY_BIT},
    (7, 1): {"eax": _EVERY_BIT, "edx": _EVERY_BIT},
    (7, 2): {"edx": _EVERY_BIT},
    (0xD, 0): {"eax": _EVERY_BIT, "edx": _EVERY_BIT},
    (0xD, 1): {"eax": _EVERY_BIT, "ecx": _EVERY_BIT, "edx": _EVERY_BIT},
    (0x8000_0001, 0): {"ecx": _EVERY_BIT & ~(SVM | CMP_LEGACY), "edx": _EVERY_BIT},
    (0x8000_0007, 0): {"edx": _EVERY_BIT},
    (0x8000_0008, 0): {"ebx": _EVERY_BIT},
    (0x8000_0021, 0): {"eax": _EVERY_BIT},
}
_ADDRESS_SIZES = 0x8000_0008  # EAX: physical bits in 7:0, linear ones in 15:8


def leaves_on(
    host: list[tuple[int, ...]], profile: list[Entry], deadline_timer: bool
) -> tuple[list[tuple[int, ...]], bool]:
    """What takes the place of the host's leaves, and of whether it has a deadline timer, for `machine_cpuid`.

    Raises HypervisorError with a line for each thing that this host cannot do.
    """
    there = {(entry.function, entry.subleaf): entry for entry in map(Entry._make, host)}
    given = {(entry.function, entry.subleaf): entry for entry in profile}
    problems = _vendor_problems(given.get((0, 0)), there.get((0, 0)))
    for place, registers in _FEATURES.items():
        if place in given:
            problems += _feature_problems(given[place], there.get(place), registers)
    has_deadline = bool((given.get((1, 0)) or _nothing(1)).ecx & TSC_DEADLINE)
    if has_deadline and not deadline_timer:
        problems.append("leaf 0x1 ecx, bit 24: this host's KVM has no TSC deadline timer")
    wanted, most = ((leaves.get((_ADDRESS_SIZES, 0)) or _nothing(0)).eax & 0xFF for leaves in (given, there))
    if wanted > most:
        problems.append(f"leaf {_ADDRESS_SIZES:#x} eax: {wanted} bits of physical address, at most {most}")
    if problems:
        raise HypervisorError("the VM's CPUID does not fit this host: " + "; ".join(problems))
    paravirtual = [entry for entry in host if entry[0] in HYPERVISOR_LEAVES]
    return [*map(tuple, profile), *paravirtual], has_deadline


def _nothing(function: int) -> Entry:
    return Entry(function, 0, 0, 0, 0, 0, 0)


def _vendor_problems(given: Entry | None, there: Entry | None) -> list[str]:
    """Processors of another vendor differ in more than CPUID says: how they call the kernel, for one."""
    if given is None or there is None or given[4:] == there[4:]:
        return []
    return [f"leaf 0x0: the vendor is {_vendor(given)!r}, this host's is {_vendor(there)!r}"]


def _vendor(entry: Entry) -> str:
    return b"".join(value.to_bytes(4, "little") for value in (entry.ebx, entry.edx, entry.ecx)).decode("latin-1")


def _feature_problems(given: Entry, there: Entry | None, registers: dict[str, int]) -> list[str]:
    problems = []
    for register, counted in registers.items():
        lacking = getattr(given, register) & counted & ~(getattr(there, register) if there is not None else 0)
        if lacking:
            bits = [str(bit) for bit in range(32) if lacking >> bit & 1]
            leaf = f"leaf {given.function:#x}" + (f"-{given.subleaf:#x}" if given.subleaf else "")
            problems.append(f"{leaf} {register}, bit{'s' * (len(bits) > 1)} {', '.join(bits)}: this host lacks it")
    return problems
