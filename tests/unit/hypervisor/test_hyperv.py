"""The leaves of a Hyper-V, and hosts that cannot be one."""

import pytest

from propolis.errors import HypervisorError
from propolis.hypervisor import hyperv
from propolis.hypervisor.hyperv import FEATURES, HINTS, INTERFACE, LIMITS, VENDOR, VERSION

# As Linux 6.1 has them on AMD.
KVM: list[tuple[int, ...]] = [
    (VENDOR, 0, 0, 0x4000_0082, 0x7263694D, 0x666F736F, 0x76482074),
    (INTERFACE, 0, 0, 0x31237648, 0, 0, 0),
    (VERSION, 0, 0, 0x3839, 0xA_0000, 0, 0),
    (FEATURES, 0, 0, 0xBE7F, 0x1_8030, 0, 0x10_C1D8),
    (HINTS, 0, 0, 0x6_0C2C, 0xFFF, 0, 0),
    (LIMITS, 0, 0, 1024, 64, 0, 0),
]


def test_what_a_guest_sees() -> None:
    seen = {entry.function: entry[3:] for entry in hyperv.leaves(KVM, ("reference_tsc",), 64)}
    assert b"".join(word.to_bytes(4, "little") for word in seen[VENDOR][1:]) == b"Microsoft Hv"
    assert seen[VENDOR][0] == LIMITS
    assert seen[INTERFACE][0].to_bytes(4, "little") == b"Hv#1"
    assert seen[VERSION] == (0x3839, 0xA_0000, 0, 0)
    assert seen[FEATURES] == (1 << 1 | 1 << 5 | 1 << 6 | 1 << 9, 0, 0, 0)
    assert seen[HINTS] == (0, 0xFFFF_FFFF, 0, 0)
    assert seen[LIMITS] == (64, 0, 0, 0)


def test_the_reference_tsc_is_there_on_request() -> None:
    (features,) = (entry for entry in hyperv.leaves(KVM, (), 64) if entry.function == FEATURES)
    assert features.eax == 1 << 1 | 1 << 5 | 1 << 6


def test_a_host_that_cannot_be_one() -> None:
    with pytest.raises(HypervisorError, match="this host's KVM cannot be a Hyper-V to its guests"):
        hyperv.leaves([], (), 64)


def test_a_host_that_lacks_some_of_it() -> None:
    less = [(*leaf[:3], leaf[3] & ~(1 << 5 | 1 << 9), *leaf[4:]) if leaf[0] == FEATURES else leaf for leaf in KVM]
    with pytest.raises(HypervisorError, match="lacks, of Hyper-V: hypercalls, reference_tsc"):
        hyperv.leaves(less, ("reference_tsc",), 64)
    with pytest.raises(HypervisorError, match=r"lacks, of Hyper-V: hypercalls$"):
        hyperv.leaves(less, (), 64)
