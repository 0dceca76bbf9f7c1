"""A machine's CPUID, computed from made-up Intel and AMD hosts: topology, masks, and the hypervisor's own leaves."""

import pytest

from propolis.hypervisor.cpuid import (
    CMP_LEGACY,
    HTT,
    HYPERVISOR,
    SIGNIFICANT_INDEX,
    SVM,
    TSC_DEADLINE,
    VMX,
    Entry,
    Interface,
    machine_cpuid,
    vcpu_cpuid,
)

Leaf = tuple[int, ...]
ONES = 0xFFFF_FFFF

KVM_LEAVES: list[Leaf] = [
    (0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D),
    (0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 1),
]

# A host of 28 cores with two threads each, seen from CPU 13: everything that a guest must not inherit is set.
INTEL: list[Leaf] = [
    (0, 0, 0, 0x1F, 0x756E6547, 0x6C65746E, 0x49656E69),
    (1, 0, 0, 0x50654, 0x1A40_0800, 0x7FFE_FBFF & ~TSC_DEADLINE, 0xBFEB_FBFF),
    (4, 0, SIGNIFICANT_INDEX, 0xFC00_4121, 0x01C0_003F, 0x3F, 0),  # L1 data, for two threads
    (4, 1, SIGNIFICANT_INDEX, 0xFC00_4122, 0x01C0_003F, 0x3F, 0),
    (4, 2, SIGNIFICANT_INDEX, 0xFC00_4143, 0x03C0_003F, 0x3FF, 0),
    (4, 3, SIGNIFICANT_INDEX, 0xFC0F_C163, 0x0280_003F, 0xDFFF, 4),  # L3, for 64
    (4, 4, SIGNIFICANT_INDEX, 0, 0, 0, 0),
    (7, 0, SIGNIFICANT_INDEX, 1, 0xD39F_FFEB, 0x18, 0xBC00_0400),
    (0xB, 0, SIGNIFICANT_INDEX, 1, 2, 0x100, 13),
    (0xB, 1, SIGNIFICANT_INDEX, 6, 56, 0x201, 13),
    (0xD, 0, SIGNIFICANT_INDEX, 0x2E7, 0xA88, 0xA88, 0),
    (0x12, 0, SIGNIFICANT_INDEX, 1, 0, 0, 0),
    (0x1F, 0, SIGNIFICANT_INDEX, 1, 2, 0x100, 13),
    *KVM_LEAVES,
    (0x8000_0000, 0, 0, 0x8000_0008, 0, 0, 0),
    (0x8000_0001, 0, 0, 0, 0, 0x121, 0x2C10_0800),
    (0x8000_0008, 0, 0, 0x302E, 0, 0, 0),
]

# A host of 64 cores with two threads each.
AMD: list[Leaf] = [
    (0, 0, 0, 0x10, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0, 0, 0xA10F11, 0x0D80_0800, 0xF6F8_3203, 0x178B_FBFF),
    (0xB, 0, SIGNIFICANT_INDEX, 1, 2, 0x100, 13),
    *KVM_LEAVES,
    (0x8000_0000, 0, 0, 0x8000_0026, 0x68747541, 0x444D4163, 0x69746E65),
    (0x8000_0001, 0, 0, 0xA10F11, 0x4000_0000, 0x75C2_37FF, 0x2FD3_FBFF),
    (0x8000_0008, 0, 0, 0x3030, 0x111E_F657, 0x0001_707F, 0x0001_0007),
    (0x8000_000A, 0, 0, 1, 0x8000, 0, 0x119B_9CFF),
    (0x8000_001D, 0, SIGNIFICANT_INDEX, 0x4121, 0x01C0_003F, 0x3F, 0),
    (0x8000_001D, 2, SIGNIFICANT_INDEX, 0x4143, 0x01C0_003F, 0x7FF, 2),
    (0x8000_001D, 3, SIGNIFICANT_INDEX, 0x3_C163, 0x03C0_003F, 0x7FFF, 1),
    (0x8000_001D, 4, SIGNIFICANT_INDEX, 0, 0, 0, 0),
    (0x8000_001E, 0, 0, 13, 0x106, 0x300, 0),
    (0x8000_0026, 0, SIGNIFICANT_INDEX, 1, 2, 0x100, 13),
]

OLD: list[Leaf] = [
    (0, 0, 0, 7, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0, 0, 0x600F12, 0x0D80_0800, 0x1E98_220B, 0x178B_FBFF),
    (0x8000_0000, 0, 0, 0x8000_0001, 0, 0, 0),
]

HOSTS = {"intel": INTEL, "amd": AMD, "old": OLD}
COUNTS = [1, 2, 3, 4, 5, 63, 64]


def seen(
    host: str, cpus: int, index: int = 0, interface: Interface = "kvm", *, deadline: bool = True
) -> dict[tuple[int, int], Entry]:
    """What vCPU `index` sees, by leaf and sub-leaf, each once."""
    table = [Entry(*entry) for entry in vcpu_cpuid(machine_cpuid(HOSTS[host], cpus, interface, deadline), index)]
    found = {(entry.function, entry.subleaf): entry for entry in table}
    assert len(found) == len(table), "a leaf is there twice"
    assert all(0 <= word <= ONES for entry in table for word in entry)
    return found


def bits(cpus: int) -> int:
    """Of an APIC ID that tells `cpus` apart, counted the slow way."""
    width = 0
    while 1 << width < cpus:
        width += 1
    return width


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("cpus", COUNTS)
def test_leaf_1_counts_and_names_the_vcpus(host: str, cpus: int) -> None:
    for index in {0, cpus // 2, cpus - 1}:
        leaf = seen(host, cpus, index)[1, 0]
        assert leaf.ebx >> 24 == index
        assert leaf.ebx >> 16 & 0xFF == cpus
        assert leaf.ebx & 0xFFFF == 0x0800  # cache line flush size, brand
        assert bool(leaf.edx & HTT) == (cpus > 1)


@pytest.mark.parametrize("host", ["intel", "amd"])
@pytest.mark.parametrize("cpus", COUNTS)
def test_leaf_b_tells_one_thread_a_core_and_all_cores_in_one_socket(host: str, cpus: int) -> None:
    """SDM volume 2A: EAX is the shift to the next level's ID, EBX the processors, ECX level number and type."""
    for index in {0, cpus - 1}:
        leaves = seen(host, cpus, index)
        threads, cores, end = leaves[0xB, 0], leaves[0xB, 1], leaves[0xB, 2]
        assert threads[3:] == (0, 1, 0x100, index)
        assert cores[3:] == (bits(cpus), cpus, 0x201, index)
        assert (end.eax, end.ebx, end.ecx >> 8, end.edx) == (0, 0, 0, index)
        assert index >> cores.eax == 0  # every vCPU is in package 0
        assert all(leaf.flags == SIGNIFICANT_INDEX for leaf in (threads, cores, end))


def test_a_host_without_leaf_b_gives_none() -> None:
    """Nothing above the highest leaf that leaf 0 names."""
    assert not any(function == 0xB for function, _ in seen("old", 4))


@pytest.mark.parametrize("cpus", COUNTS)
def test_intel_caches_are_shared_as_the_cores_are(cpus: int) -> None:
    """EAX[25:14] sharers - 1, EAX[31:26] core IDs - 1: levels 1 and 2 are a core's own, level 3 the socket's."""
    leaves = seen("intel", cpus)
    for subleaf, level in ((0, 1), (1, 1), (2, 2), (3, 3)):
        leaf = leaves[4, subleaf]
        assert leaf.eax >> 5 & 7 == level
        assert leaf.eax >> 14 & 0xFFF == (cpus - 1 if level == 3 else 0)
        assert (leaf.eax >> 26) + 1 == 1 << bits(cpus)
        original = next(entry for entry in INTEL if entry[:2] == (4, subleaf))
        assert leaf.eax & 0x3FFF == original[3] & 0x3FFF
        assert leaf[4:] == original[4:]
    assert leaves[4, 4][3:] == (0, 0, 0, 0)


@pytest.mark.parametrize("cpus", COUNTS)
def test_amd_topology(cpus: int) -> None:
    """APM volume 3, 8000_0008 ECX, 8000_001D EAX, 8000_001E."""
    leaves = seen("amd", cpus, cpus - 1)
    size = leaves[0x8000_0008, 0]
    assert size.ecx & 0xFF == cpus - 1
    assert size.ecx >> 12 & 0xF == bits(cpus)
    assert size.ecx & ~0xF0FF == 0x1_0000  # performance time stamp size
    assert size.eax == 0x3030
    for subleaf, sharers in ((0, 1), (2, 1), (3, cpus)):
        assert leaves[0x8000_001D, subleaf].eax >> 14 == sharers - 1
    assert leaves[0x8000_001D, 4][3:] == (0, 0, 0, 0)
    identity = leaves[0x8000_001E, 0]
    assert identity[3:] == (cpus - 1, cpus - 1, 0, 0)  # one thread a core, node 0 of 1
    assert bool(leaves[0x8000_0001, 0].ecx & CMP_LEGACY) == (cpus > 1)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("interface", ["kvm", "bhyve", "none"])
def test_no_nested_virtualization(host: str, interface: Interface) -> None:
    leaves = seen(host, 4, interface=interface)
    assert leaves[1, 0].ecx & VMX == 0
    assert all(leaf.ecx & SVM == 0 for (function, _), leaf in leaves.items() if function == 0x8000_0001)
    assert not {0x12, 0x1F, 0x8000_000A, 0x8000_0026} & {function for function, _ in leaves}


@pytest.mark.parametrize("host", HOSTS)
def test_features_are_the_hosts(host: str) -> None:
    """Nothing else of leaves 1 and 7 changes."""
    original = next(entry for entry in HOSTS[host] if entry[0] == 1)
    leaf = seen(host, 2)[1, 0]
    assert leaf.eax == original[3]
    assert leaf.ecx == original[5] & ~VMX | HYPERVISOR | TSC_DEADLINE
    assert leaf.edx == original[6] | HTT
    for entry in HOSTS[host]:
        if entry[0] in (0, 7, 0xD, 0x8000_0000):
            assert seen(host, 2)[entry[0], entry[1]] == entry


@pytest.mark.parametrize("deadline", [True, False])
def test_the_deadline_timer_is_the_back_ends(deadline: bool) -> None:
    for host in HOSTS:
        assert bool(seen(host, 1, deadline=deadline)[1, 0].ecx & TSC_DEADLINE) == deadline


def test_interface_kvm() -> None:
    """The signature, and the features that this KVM has."""
    leaves = seen("intel", 2, interface="kvm")
    assert leaves[0x4000_0000, 0][3:] == (0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D)
    assert leaves[0x4000_0001, 0][3:] == (0x0100_7EFB, 0, 0, 1)
    assert leaves[1, 0].ecx & HYPERVISOR


def test_interface_bhyve() -> None:
    """A name without features: no paravirtual clock."""
    leaves = seen("intel", 2, interface="bhyve")
    words = leaves[0x4000_0000, 0][3:]
    assert words[0] == 0x4000_0000
    assert b"".join(word.to_bytes(4, "little") for word in words[1:]) == b"bhyve bhyve "
    assert (0x4000_0001, 0) not in leaves
    assert leaves[1, 0].ecx & HYPERVISOR


def test_interface_none() -> None:
    """No sign of a hypervisor."""
    leaves = seen("intel", 2, interface="none")
    assert not any(0x4000_0000 <= function < 0x5000_0000 for function, _ in leaves)
    assert leaves[1, 0].ecx & HYPERVISOR == 0


def test_vcpus_differ_in_their_apic_id_alone() -> None:
    for host in HOSTS:
        first, second = seen(host, 4, 0), seen(host, 4, 3)
        assert first.keys() == second.keys()
        differing = {key[0] for key in first if first[key] != second[key]}
        assert differing <= {1, 0xB, 0x8000_001E}


def test_the_hosts_table_is_not_changed() -> None:
    """It is computed once and kept."""
    before = list(INTEL)
    shared = machine_cpuid(INTEL, 3, "kvm", deadline_timer=True)
    again = machine_cpuid(INTEL, 3, "kvm", deadline_timer=True)
    kept = list(shared)
    vcpu_cpuid(shared, 2)
    assert before == INTEL
    assert shared == again == kept
