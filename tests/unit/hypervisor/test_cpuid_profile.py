"""A CPUID of one's own: what a host can give of it, and what is said of what it cannot."""

import pytest

from propolis.errors import HypervisorError
from propolis.hypervisor.cpuid import HYPERVISOR, SIGNIFICANT_INDEX, TSC_DEADLINE, VMX, Entry, machine_cpuid
from propolis.hypervisor.cpuid_profile import leaves_on
from tests.unit.hypervisor.test_cpuid import AMD, HOSTS, INTEL, Leaf

OWN = range(0x4000_0000, 0x4000_0100)


def of(host: list[Leaf]) -> list[Entry]:
    """A profile like a host, but for some leaves."""
    return [Entry(*leaf) for leaf in host if leaf[0] not in OWN]


def with_leaf(host: list[Leaf], leaf: int, subleaf: int = 0, **registers: int) -> list[Entry]:
    """The host's leaves, with registers of one changed."""
    entries = of(host)
    assert any((entry.function, entry.subleaf) == (leaf, subleaf) for entry in entries)
    return [
        entry._replace(**registers) if (entry.function, entry.subleaf) == (leaf, subleaf) else entry
        for entry in entries
    ]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("deadline", [False, True])
def test_a_host_s_own_leaves_fit_it(host: str, deadline: bool) -> None:
    leaves, has_deadline = leaves_on(HOSTS[host], of(HOSTS[host]), deadline)
    assert not has_deadline  # the supported CPUID never has it
    assert sorted(leaves) == sorted(HOSTS[host])


def test_the_guest_sees_the_profile_in_its_topology() -> None:
    """Less than the host has, another model and brand; what is the machine's is still the machine's."""
    profile = [
        Entry(0, 0, 0, 0x7, *INTEL[0][4:]),
        Entry(1, 0, 0, 0x306C3, 0x0001_0800, 1 << 0 | VMX | TSC_DEADLINE, 1 << 4),
        Entry(7, 0, SIGNIFICANT_INDEX, 0, 1 << 3, 0, 0),
        Entry(0x8000_0002, 0, 0, *(int.from_bytes(word, "little") for word in (b"Made", b" up ", b"proc", b"esso"))),
    ]
    leaves, deadline = leaves_on(INTEL, profile, deadline_timer=True)
    assert deadline
    seen = {(entry.function, entry.subleaf): entry for entry in machine_cpuid(leaves, 4, "kvm", deadline)}
    assert {function for function, _ in seen} == {0, 1, 7, 0x4000_0000, 0x4000_0001, 0x8000_0002}
    assert seen[1, 0].ecx == 1 << 0 | TSC_DEADLINE | HYPERVISOR
    assert seen[1, 0].ebx >> 16 & 0xFF == 4
    assert seen[7, 0] == profile[2]
    assert seen[0x8000_0002, 0] == profile[3]
    assert seen[0x4000_0001, 0][2:] == (0, 0x0100_7EFB, 0, 0, 1)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (of(AMD), "leaf 0x0: the vendor is 'AuthenticAMD', this host's is 'GenuineIntel'"),
        (with_leaf(INTEL, 7, edx=0xBC00_0403), "leaf 0x7 edx, bits 0, 1: this host lacks it"),
        (with_leaf(INTEL, 7, ecx=0x38), "leaf 0x7 ecx, bit 5: this host lacks it"),
        (with_leaf(INTEL, 0x8000_0001, ecx=0x125 | 1 << 6), "leaf 0x80000001 ecx, bit 6: this host lacks it"),
        ([*of(INTEL), Entry(7, 1, 1, 1 << 4, 0, 0, 0)], "leaf 0x7-0x1 eax, bit 4: this host lacks it"),
        (
            with_leaf(INTEL, 0x8000_0008, eax=0x3030),
            "leaf 0x80000008 eax: 48 bits of physical address, at most 46",
        ),
        (with_leaf(INTEL, 1, ecx=TSC_DEADLINE), "leaf 0x1 ecx, bit 24: this host's KVM has no TSC deadline timer"),
    ],
)
def test_what_a_host_lacks_is_refused_by_leaf_register_and_bit(profile: list[Entry], message: str) -> None:
    with pytest.raises(HypervisorError) as caught:
        leaves_on(INTEL, profile, deadline_timer=False)
    assert message in str(caught.value).removeprefix("the VM's CPUID does not fit this host: ").split("; ")


def test_all_of_it_is_told_at_once() -> None:
    profile = [Entry(1, 0, 0, 0, 0, 0, 0xFFFF_FFFF), Entry(7, 0, 1, 0, 0, 0xFFFF_FFFF, 0)]
    with pytest.raises(HypervisorError) as caught:
        leaves_on(INTEL, profile, deadline_timer=False)
    assert str(caught.value).count("this host lacks it") == 2


def test_bits_that_are_the_machine_s_may_be_anything() -> None:
    profile = with_leaf(INTEL, 1, ecx=INTEL[1][5] | VMX | HYPERVISOR | 1 << 27, edx=INTEL[1][6] | 1 << 28)
    leaves_on(INTEL, profile, deadline_timer=False)
