"""KVM as a Hyper-V, for guests that know that one: the CPUID leaves by which it says so.

Hypervisor Top-Level Functional Specification 6.0b, §2.4. KVM answers the MSRs behind them once the guest's CPUID has
the interface's signature.
"""

from __future__ import annotations

from typing import Literal

from propolis.errors import HypervisorError
from propolis.hypervisor.cpuid import Entry

Feature = Literal["reference_tsc"]

VENDOR, INTERFACE, VERSION, FEATURES, HINTS, LIMITS = range(0x4000_0000, 0x4000_0006)
SIGNATURE = b"Microsoft Hv"
HV_1 = int.from_bytes(b"Hv#1", "little")

# Privileges of FEATURES EAX.
REFERENCE_COUNTER = 1 << 1
HYPERCALL_MSRS = 1 << 5
VP_INDEX = 1 << 6
REFERENCE_TSC = 1 << 9
_ALWAYS = {REFERENCE_COUNTER: "the reference counter", HYPERCALL_MSRS: "hypercalls", VP_INDEX: "VP indices"}
_ON_REQUEST: dict[Feature, int] = {"reference_tsc": REFERENCE_TSC}

_NEVER_CALL_FOR_SPINLOCKS = 0xFFFF_FFFF


def leaves(supported: list[tuple[int, ...]], features: tuple[Feature, ...], most_cpus: int) -> list[Entry]:
    """The leaves; `supported` are those of KVM, none where it is no Hyper-V. Raises HypervisorError."""
    there = {entry[0]: Entry._make(entry) for entry in supported}
    if FEATURES not in there:
        raise HypervisorError("this host's KVM cannot be a Hyper-V to its guests: it lacks KVM_CAP_SYS_HYPERV_CPUID")
    wanted = _ALWAYS | {_ON_REQUEST[feature]: feature for feature in features}
    if lacking := [name for bit, name in wanted.items() if not there[FEATURES].eax & bit]:
        raise HypervisorError(f"this host's KVM lacks, of Hyper-V: {', '.join(lacking)}")
    ebx, ecx, edx = (int.from_bytes(SIGNATURE[at : at + 4], "little") for at in (0, 4, 8))
    version = there.get(VERSION, _leaf(VERSION))
    return [
        _leaf(VENDOR, LIMITS, ebx, ecx, edx),
        _leaf(INTERFACE, HV_1),
        version,
        _leaf(FEATURES, sum(wanted)),
        _leaf(HINTS, 0, _NEVER_CALL_FOR_SPINLOCKS),
        _leaf(LIMITS, most_cpus),
    ]


def _leaf(function: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> Entry:
    return Entry(function, 0, 0, eax, ebx, ecx, edx)
