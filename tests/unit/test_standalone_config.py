"""The grammar of the standalone file: what it reads, and one line at the right place for each thing that it refuses."""

from pathlib import Path

import pytest

from propolis.errors import ConfigError
from propolis.spec import (
    BootOrder,
    CloudInit,
    CpuidLeaf,
    CpuidProfile,
    DirectBoot,
    FileBlock,
    PciPath,
    Pvpanic,
    Tap,
    UserNetwork,
    VirtioBlock,
    VirtioNic,
)
from propolis.standalone_config import load, parse

MAIN = """[main]
name = "testvm"
cpus = 4
memory = 1024
kernel = "vmlinuz"
"""
BLOCK = """[block_dev.image]
type = "file"
path = "disk.raw"
"""
CHOSEN = MAIN + 'cpuid_profile = "old"\n'
CPUID = """[cpuid.old]
vendor = "intel"
0 = [7, 0x756e6547, 0x6c65746e, 0x49656e69]
1 = [0x306c3, 0, 1, 0x10]
7-0 = [0, 8, 0, 0]
"""
VOLUME = """[block_dev.seed]
type = "cloudinit"
"""
DEVICE = """[dev.block0]
driver = "pci-virtio-block"
block_dev = "image"
pci-path = "0.4.0"
"""
NIC = """[dev.n]
driver = "pci-virtio-net"
pci-path = "0.5.0"
"""
VIONA = """[dev.n]
driver = "pci-virtio-viona"
vnic = "net0"
pci-path = "0.5.0"
"""


def errors(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "vm.toml", "/etc/vm")
    return str(caught.value).splitlines()


def test_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text("""[main]
name = "testvm"
cpus = 4
memory = 1024
kernel = "vmlinuz"
initrd = "/boot/initrd"
cmdline = "console=ttyS0"
hypervisor_interface = "bhyve"
memory_backing = "memfd"
exit_on_halt = 3
exit_on_reboot = 4
use_reservoir = false

[chipset]
enable-pcie = false

[block_dev.image]
type = "file"
path = "disk.raw"
read_only = true
block_size = 4096
skip_flush = true
workers = 2

[block_dev."an old one"]
type = "file"
path = "/old.raw"
readonly = "true"

[dev.block0]
driver = "pci-virtio-block"
block_dev = "image"
pci-path = "0.4.0"
queues = 2
serial = "S1"

[dev.block1]
driver = "pci-virtio-block"
block_dev = "an old one"
pci-path = "0.5.0"

[dev.panic]
driver = "qemu-pvpanic"
enable_isa = true
""")
    spec = load(file)
    assert (spec.name, spec.cpus, spec.memory_mib, spec.memory_backing) == ("testvm", 4, 1024, "memfd")
    assert (spec.hypervisor_interface, spec.exit_on_halt, spec.exit_on_reboot) == ("bhyve", 3, 4)
    assert spec.boot == DirectBoot(kernel=f"{tmp_path}/vmlinuz", initrd="/boot/initrd", cmdline="console=ttyS0")
    assert spec.backends == {
        "image": FileBlock(path=f"{tmp_path}/disk.raw", readonly=True, block_size=4096, skip_flush=True, workers=2),
        "an old one": FileBlock(path="/old.raw", readonly=True),
    }
    assert spec.devices == (
        VirtioBlock(name="block0", backend="image", pci_path=PciPath(0, 4, 0), queues=2, serial="S1"),
        VirtioBlock(name="block1", backend="an old one", pci_path=PciPath(0, 5, 0)),
        Pvpanic(name="panic", enable_isa=True),
    )


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vm.toml").write_text(MAIN)
    monkeypatch.chdir(tmp_path)
    assert load("vm.toml").boot == DirectBoot(kernel=f"{tmp_path}/vmlinuz")


@pytest.mark.parametrize(
    ("readonly", "expected"),
    [
        ("", False),
        ("readonly = true", True),
        ('readonly = "true"', True),
        ("read_only = true", True),
        ("readonly = false", False),
        ("read_only = false", False),
    ],
)
def test_both_spellings_of_read_only(readonly: str, expected: bool) -> None:
    spec = parse(MAIN + BLOCK + readonly, "vm.toml", "/")
    image = spec.backends["image"]
    assert isinstance(image, FileBlock)
    assert image.readonly is expected


def test_cpuid_profiles() -> None:
    """Of several the one that is chosen, by the file or by who reads it; keys are hexadecimal."""
    text = CHOSEN + CPUID + '[cpuid.new]\nvendor = "amd"\n'
    text += "0x0 = [0xb, 0x68747541, 0x444d4163, 0x69746e65]\n80000001 = [1, 2, 3, 4]\n"
    old = CpuidProfile(
        vendor="intel",
        leaves=(
            CpuidLeaf(leaf=0, eax=7, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69),
            CpuidLeaf(leaf=1, eax=0x306C3, ecx=1, edx=0x10),
            CpuidLeaf(leaf=7, subleaf=0, ebx=8),
        ),
    )
    assert parse(text, "vm.toml", "/").cpuid == old
    assert parse(text.replace("cpuid_profile", "#"), "vm.toml", "/").cpuid is None
    new = parse(text, "vm.toml", "/", cpuid_profile="new").cpuid
    assert new is not None
    assert new.vendor == "amd"
    assert new.leaves[1] == CpuidLeaf(leaf=0x8000_0001, eax=1, ebx=2, ecx=3, edx=4)
    with pytest.raises(ConfigError, match=r"--cpuid-profile: there is no \[cpuid.older\]: did you mean 'old'"):
        parse(text, "vm.toml", "/", cpuid_profile="older")


def test_boot_order() -> None:
    text = MAIN + 'boot_order = ["b", "block0"]\n' + BLOCK + BLOCK.replace("image", "b") + DEVICE
    text += DEVICE.replace("block0", "b").replace('"image"', '"b"').replace("0.4.0", "0.5.0")
    assert parse(text, "vm.toml", "/").boot_order == BootOrder(devices=("b", "block0"))
    assert parse(MAIN, "vm.toml", "/").boot_order is None


def test_texts_for_cloud_init_are_in_the_file_or_beside_it(tmp_path: Path) -> None:
    (tmp_path / "user").write_text("#cloud-config\n# ü\n")
    text = MAIN + VOLUME + DEVICE.replace("image", "seed")
    text += '[cloudinit]\nuser-data-path = "user"\nmeta-data = "instance-id: i"\nnetwork-config-path = "/dev/null"'
    expected = CloudInit(user_data="#cloud-config\n# ü\n", meta_data="instance-id: i", network_config="")
    assert parse(text, "vm.toml", str(tmp_path)).backends == {"seed": expected}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "expected UTF-8 text"), (b"x" * 524289, "expected at most 524288 bytes of text")],
)
def test_a_file_that_is_no_text_for_cloud_init(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "user").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parse(MAIN + VOLUME + '[cloudinit]\nuser-data-path = "user"', "vm.toml", str(tmp_path))
    assert str(caught.value) == f"vm.toml:9:18: user-data-path: '{tmp_path}/user': {message}" + (
        ", found a byte that is none" if content == b"\xff" else ""
    )


# A file with one thing wrong, the place of it, and words of the message.
ONE_WRONG = [
    ("", "1:1", "the file has no [main]"),
    ("main = 3", "1:8", "[main]: expected a table, not 3"),
    ("[[main]]\nname='x'", "1:1", "[main]: expected a table, not an array"),
    (MAIN.replace('name = "testvm"\n', ""), "1:1", "[main] has no 'name'"),
    (MAIN.replace("cpus = 4\n", ""), "1:1", "[main] has no 'cpus': expected a number from 1 to 64"),
    (MAIN.replace("memory = 1024\n", ""), "1:1", "[main] has no 'memory'"),
    (MAIN.replace('kernel = "vmlinuz"\n', ""), "1:1", "[main] has no 'kernel'"),
    (MAIN.replace('"testvm"', '"a b"'), "2:8", "name: 'a b' cannot name a VM"),
    (MAIN.replace('"testvm"', "7"), "2:8", "name: expected a string, not 7"),
    (MAIN.replace("cpus = 4", "cpus = 0"), "3:8", "cpus: expected 1 to 64 CPUs, not 0"),
    (MAIN.replace("cpus = 4", "cpus = 65"), "3:8", "cpus: expected 1 to 64 CPUs, not 65"),
    (MAIN.replace("cpus = 4", 'cpus = "4"'), "3:8", "cpus: expected a whole number, not '4'"),
    (MAIN.replace("cpus = 4", "cpus = true"), "3:8", "cpus: expected a whole number, not true"),
    (MAIN.replace("cpus = 4", "cpus = 4.0"), "3:8", "cpus: expected a whole number, not 4.0"),
    (MAIN.replace("cpus = 4", f"cpus = {'9' * 100}"), "3:8", "cpus: expected a whole number, not one so large"),
    (MAIN.replace("cpus = 4", "cpu = 4\ncpus = 4"), "3:1", "unknown key 'cpu' in [main]: did you mean 'cpus'?"),
    (MAIN.replace("1024", "15"), "4:10", "memory: expected 16 to 1048576 MiB, not 15"),
    (MAIN.replace("1024", "2026-01-01"), "4:10", "memory: expected a whole number, not 2026-01-01"),
    (MAIN.replace('"vmlinuz"', '""'), "5:10", "kernel: expected the path of a file, not ''"),
    (MAIN.replace('"vmlinuz"', '"a\\u0000"'), "5:10", "kernel: expected the path of a file"),
    (MAIN.replace('kernel = "vmlinuz"', 'bootrom = ""'), "5:11", "bootrom: expected the path of a file, not ''"),
    (MAIN + 'nvram = "x"', "6:1", "'nvram' is given without 'bootrom'"),
    (MAIN + 'bootrom = "x"\nnvram_template = "x"', "7:18", "nvram_template: expected a nvram beside it"),
    (MAIN.replace("kernel", "bootrom") + 'initrd = "x"', "6:1", "'initrd' is given without 'kernel'"),
    (MAIN + "initrd = []", "6:10", "initrd: expected a string, not an array"),
    (MAIN + "cmdline = {}", "6:11", "cmdline: expected a string, not a table"),
    (MAIN + 'cmdline = "a\\nb"', "6:11", "cmdline: expected a kernel command line without"),
    (MAIN + 'hypervisor_interface = "xen"', "6:24", "expected 'kvm', 'bhyve', 'hyper-v' or 'none', not 'xen'"),
    (MAIN + "hypervisor_interface = 1", "6:24", "expected 'kvm', 'bhyve', 'hyper-v' or 'none', not 1"),
    (MAIN + 'memory_backing = "file"', "6:18", "expected 'anonymous', 'memfd' or 'hugetlb', not 'file'"),
    (MAIN + "exit_on_halt = 256", "6:16", "exit_on_halt: expected an exit status from 0 to 255, not 256"),
    (MAIN + "exit_on_reboot = -1", "6:18", "exit_on_reboot: expected an exit status"),
    (MAIN + "use_reservoir = true", "6:1", "use_reservoir = true is known, but not available"),
    (MAIN + 'bootrom_version = "1"', "6:1", "'bootrom_version' is known, but not available"),
    (MAIN + 'cpuid_profile = "x"', "6:17", "there is no [cpuid.x]: the file has no [cpuid.NAME]"),
    (MAIN + 'cpuid_profile = "x"\n' + CPUID, "6:17", "there is no [cpuid.x]: expected 'old'"),
    (
        CHOSEN + CPUID + "40000000 = [0, 0, 0, 0]",
        "12:1",
        "leaf 0x40000000 is the hypervisor's",
    ),
    (CHOSEN + CPUID + "0x1 = [0, 0, 0, 0]", "12:1", "leaf 0x1 is given twice"),
    (
        CHOSEN + CPUID + "7 = [0, 0, 0, 0]",
        "12:1",
        "leaf 0x7 is given for one sub-leaf as well",
    ),
    (CHOSEN + CPUID.replace("intel", "amd"), "8:10", "leaf 0x0 is not amd's: its vendor is"),
    (CHOSEN + '[cpuid.old]\nvendor = "amd"', "7:1", "expected leaf 0x0, which says who made"),
    (MAIN + 'cpu_binding = "any"', "6:1", "'cpu_binding' is known, but not available"),
    (MAIN + "boot_order = 1", "6:14", "boot_order: expected an array of the names of devices, not 1"),
    (MAIN + "boot_order = [1]", "6:14", "boot_order: expected an array of the names of devices, not an array"),
    (MAIN + 'boot_order = ["x"]', "6:15", "boot_order: there is no device 'x'"),
    (MAIN + 'boot_order = ["block0", "block0"]\n' + BLOCK + DEVICE, "6:25", "device 'block0' is given twice"),
    (
        MAIN + 'boot_order = ["block0", "p"]\n' + BLOCK + DEVICE + '[dev.p]\ndriver = "qemu-pvpanic"',
        "6:25",
        "boot_order: nothing can be booted from device 'p', a pvpanic",
    ),
    (MAIN + 'acpi_variant = "V0"', "6:1", "'acpi_variant' is known, but not available"),
    (MAIN + "zzzz = 1", "6:1", "unknown key 'zzzz' in [main]: expected one of 'name', 'cpus'"),
    (MAIN + '"a\\nb" = 1', "6:1", r"unknown key 'a\nb' in [main]"),
    ('bootrom = "x"\n' + MAIN, "1:1", "unknown key 'bootrom' in the file: it belongs in [main]"),
    ("[mian]\n" + MAIN, "1:1", "unknown key 'mian' in the file: did you mean 'main'?"),
    (MAIN + "[chipset]\nenable-pcie = true", "7:1", "enable-pcie = true is known, but not available"),
    (MAIN + "[chipset]\nenable-pcie = 1", "7:15", "enable-pcie: expected true or false, not 1"),
    (MAIN + "[chipset]\nenable_pcie = true", "7:1", "did you mean 'enable-pcie'?"),
    (MAIN + '[[pci_bridge]]\npci-path = "0.9.0"', "6:1", "'pci_bridge' is known, but not available"),
    (MAIN + '[cloudinit]\nuser-data = "x"', "6:1", "no [block_dev.NAME] is the volume: expected one of type"),
    (MAIN + VOLUME + "[cloudinit]", "8:1", "[cloudinit] has no 'user-data': expected it or 'user-data-path'"),
    (MAIN + VOLUME + "[cloudinit]\nuser-data = 1", "9:13", "user-data: expected a string, not 1"),
    (MAIN + VOLUME + '[cloudinit]\nuserdata = ""\nuser-data = ""', "9:1", "did you mean 'user-data'?"),
    (
        MAIN + VOLUME + f'[cloudinit]\nuser-data = "{"x" * (1 << 19)}"\nmeta-data = "{"é" * (1 << 18)}é"',
        "10:13",
        "meta-data: expected at most 524288 bytes of text, not 524290",
    ),
    (
        MAIN + VOLUME + '[cloudinit]\nuser-data-path = "/none"',
        "9:18",
        "user-data-path: open '/none': No such file or directory",
    ),
    (
        MAIN + VOLUME + '[cloudinit]\nuser-data = "x"\nuser-data-path = "/dev/null"',
        "9:1",
        "'user-data' and 'user-data-path' are both given",
    ),
    (MAIN + "[cpuid.x]", "6:1", "[cpuid.x] has no 'vendor': expected 'amd' or 'intel'"),
    (MAIN + '[cpuid.x]\nvendor = "via"', "7:10", "vendor: expected 'amd' or 'intel', not 'via'"),
    (MAIN + CPUID + "z = [0, 0, 0, 0]", "11:1", "unknown key 'z': expected 'vendor', or a leaf such as '1' or '7-0'"),
    (MAIN + CPUID + "1_0 = [0, 0, 0, 0]", "11:1", "unknown key '1_0'"),
    (MAIN + CPUID + "100000000 = [0, 0, 0, 0]", "11:1", "unknown key '100000000'"),
    (MAIN + CPUID + "-1 = [0, 0, 0, 0]", "11:1", "unknown key '-1'"),
    (MAIN + CPUID + "2 = [0, 0, 0]", "11:5", "expected the four registers [eax, ebx, ecx, edx], not an array"),
    (MAIN + CPUID + "2 = [0, 0, 0, -1]", "11:5", "expected the four registers"),
    (MAIN + CPUID + "2 = [0, 0, 0, true]", "11:5", "expected the four registers"),
    (MAIN + CPUID + "2 = 1", "11:5", "expected the four registers [eax, ebx, ecx, edx], not 1"),
    (MAIN + "[block_dev]\nx = 3", "7:5", "x: expected a table, not 3"),
    (MAIN + "[block_dev.x]", "6:1", "[block_dev.x] has no 'type': expected one of 'file', 'cloudinit'"),
    (MAIN + '[block_dev."a b".c]\ntype = "file"', "6:1", "[block_dev.'a b'] has no 'type'"),
    (MAIN + '[block_dev.x]\ntype = "file"', "6:1", "[block_dev.x] has no 'path'"),
    (MAIN + '[block_dev.x]\ntype = "flie"', "7:8", "unknown block backend type 'flie': did you mean 'file'?"),
    (MAIN + '[block_dev.x]\ntype = "zzz"', "7:8", "type 'zzz': expected one of 'file', 'cloudinit'"),
    (MAIN + '[block_dev.x]\ntype = "crucible"\ntargets = []', "7:8", "type 'crucible' is known, but not available"),
    (MAIN + '[block_dev.x]\ntype = "crucible-mem"', "7:8", "type 'crucible-mem' is known, but not available"),
    (MAIN + '[block_dev.x]\ntype = "mem-async"', "7:8", "type 'mem-async' is known, but not available"),
    (MAIN + '[block_dev.x]\ntype = "cloudinit"', "7:8", "the file has no [cloudinit]: expected one with"),
    (MAIN + BLOCK + "readonly = 1", "9:12", "readonly: expected true or false, not 1"),
    (MAIN + BLOCK + 'readonly = "false"', "9:12", "readonly: expected true or false, not 'false'"),
    (MAIN + BLOCK + 'read_only = "true"', "9:13", "read_only: expected true or false, not 'true'"),
    (MAIN + BLOCK + "read_only = true\nreadonly = true", "10:1", "'readonly' and 'read_only' are both given"),
    (MAIN + BLOCK + "block_size = 1000", "9:14", "block_size: expected one of 512, 2048, 4096, not 1000"),
    (MAIN + BLOCK + "workers = 0", "9:11", "workers: expected 1 to 32 workers, not 0"),
    (MAIN + BLOCK + "worker = 1", "9:1", "unknown key 'worker' in [block_dev.image]: did you mean 'workers'?"),
    (MAIN + f'[block_dev.{"x" * 65}]\ntype = "file"\npath = "x"', "6:1", "cannot name a device or backend"),
    (
        MAIN + BLOCK + "[dev.d]",
        "9:1",
        "[dev.d] has no 'driver': expected one of 'pci-virtio-block', 'pci-virtio-console'",
    ),
    (MAIN + BLOCK + "[dev.d]\ndriver = 1", "10:10", "driver: expected a string, not 1"),
    (MAIN + BLOCK + '[dev.d]\ndriver = "virtio-block"', "10:10", "did you mean 'pci-virtio-block'?"),
    (MAIN + BLOCK + '[dev.d]\ndriver = "pci-nvme"\nx = 1', "10:10", "driver 'pci-nvme' is known, but not available"),
    (MAIN + '[dev.n]\ndriver = "pci-virtio-viona"\npci-path = "0.5.0"', "6:1", "[dev.n] has no 'vnic'"),
    (MAIN + VIONA.replace("net0", "net/0"), "8:8", "vnic: expected the name of an interface, 1 to 15 of"),
    (MAIN + NIC + "queues = 9", "9:10", "queues: expected 1 to 8 pairs of queues, not 9"),
    (MAIN + NIC + "queues = 8", "9:10", "queues: expected at most a pair of queues for each CPU, 4, not 8"),
    (MAIN + NIC + "queues = 2", "9:10", "queues: a network of type 'user' has one pair of queues, not 2"),
    (MAIN + NIC + 'mac = "01:00:00:00:00:01"', "9:7", "mac: expected a MAC address of one card such as"),
    (MAIN + NIC + 'mac = "0"', "9:7", "mac: expected a MAC address of one card such as"),
    (MAIN + NIC + "mtu = 1279", "9:7", "mtu: expected an MTU from 1280 to 65520, not 1279"),
    (MAIN + NIC + 'net_dev = "n"', "9:11", "net_dev: there is no network backend 'n'"),
    (MAIN + NIC + 'net_dev = "n"\n[net_dev.n]', "10:1", "[net_dev.n] has no 'type': expected one of 'user', 'tap'"),
    (MAIN + '[net_dev.n]\ntype = "tab"', "7:8", "unknown network type 'tab': did you mean 'tap'?"),
    (MAIN + '[net_dev.n]\ntype = "user"\nbridge = "b"', "8:1", "unknown key 'bridge' in [net_dev.n]"),
    (MAIN + '[net_dev.n]\ntype = "user"\nforward = "22"', "8:11", "forward: expected an array of strings, not '22'"),
    (MAIN + BLOCK + '[net_dev.image]\ntype = "user"', "9:1", "there is a [block_dev.image] as well"),
    (MAIN + '[dev.n]\ndriver = "pci-virtio-9p"', "7:10", "driver 'pci-virtio-9p' is known, but not available"),
    (MAIN + BLOCK + DEVICE.replace("0.4.0", "0.4"), "12:12", "expected a PCI path"),
    (MAIN + BLOCK + DEVICE.replace("0.4.0", "0.1.3"), "12:12", "PCI path 0.1.3 belongs to the power management"),
    (MAIN + BLOCK + DEVICE.replace("0.4.0", "0.4.2"), "12:12", "a guest does not look at PCI path 0.4.2 unless"),
    (MAIN + BLOCK + DEVICE.replace('pci-path = "0.4.0"\n', ""), "9:1", "[dev.block0] has no 'pci-path'"),
    (MAIN + BLOCK + DEVICE.replace('block_dev = "image"\n', ""), "9:1", "[dev.block0] has no 'block_dev'"),
    (MAIN + BLOCK + DEVICE.replace('"image"', '"imagf"'), "11:13", "there is no block backend 'imagf'"),
    (MAIN + BLOCK + DEVICE + "queues = 17", "13:10", "queues: expected 1 to 16 queues, not 17"),
    (MAIN + BLOCK + DEVICE + f'serial = "{"x" * 21}"', "13:10", "serial: expected 1 to 20 ASCII characters"),
    (MAIN + BLOCK + DEVICE + 'vnic = "x"', "13:1", "unknown key 'vnic' in [dev.block0]"),
    (MAIN + '[dev.p]\ndriver = "qemu-pvpanic"\nenable_isa = 1', "8:14", "enable_isa: expected true or false, not 1"),
    (
        MAIN + BLOCK + DEVICE + DEVICE.replace("block0", "block1").replace("0.4.0", "0.5.0"),
        "15:13",
        "block_dev: block backend 'image' is already used by device 'block0'",
    ),
    (
        MAIN
        + BLOCK
        + BLOCK.replace("image", "b")
        + DEVICE
        + DEVICE.replace("block0", "block1").replace('"image"', '"b"'),
        "19:12",
        "pci-path: PCI path 0.4.0 is already taken by device 'block0'",
    ),
    (
        MAIN + '[dev.p]\ndriver = "qemu-pvpanic"\n[dev.q]\ndriver = "qemu-pvpanic"',
        "8:1",
        "a VM has at most one pvpanic, and 'p' is it",
    ),
    (MAIN + "x = ", "6:5", "not TOML:"),
    (MAIN + "cpus = 5", "6:9", "not TOML:"),
    ("[main\n", "1:6", "not TOML:"),
    ("x = 'é' ?\n", "1:9", "not TOML:"),
]


@pytest.mark.parametrize(("text", "place", "words"), ONE_WRONG, ids=[words for _, _, words in ONE_WRONG])
def test_one_thing_wrong_is_one_line(text: str, place: str, words: str) -> None:
    (line,) = errors(text)
    assert line.startswith(f"vm.toml:{place}: "), line
    assert words in line


def test_everything_wrong_is_reported_in_the_order_of_the_file() -> None:
    text = """[main]
name = "test vm"
cpu = 3
cpus = true
bootrom = ""

[block_dev.a]
type = "file"
path = ""
workers = 33

[block_dev.c]
type = "crucible"

[dev.x]
driver = "pci-virtio-block"
block_dev = "a"
pci_path = "0.4.0"

[dev.y]
driver = "pci-virtio-block"
block_dev = "c"
pci-path = "0.32.0"

[dev.z]
driver = "pci-virtio-block"
block_dev = "a"
pci-path = "0.1.0"
"""
    places = [line.split(": ")[0].removeprefix("vm.toml:") for line in errors(text)]
    assert places == [
        "1:1",
        "2:8",
        "3:1",
        "4:8",
        "5:11",
        "9:8",
        "10:11",
        "13:8",
        "15:1",
        "18:1",
        "23:12",
        "27:13",
        "28:12",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[main]\nname = '\xff'", "vm.toml:2:9: expected UTF-8 text"),
        (b"x = " + b"9" * 5000, "vm.toml: "),
        (b"x = " + b"[" * 5000, "vm.toml: "),
        (b"#" * ((1 << 20) + 1), "at most 1048576 bytes"),
        (b"\xef\xbb\xbf[main]", "vm.toml:1:1: not TOML"),
    ],
)
def test_what_is_hardly_a_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "vm.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "reason"), [("none.toml", "No such file or directory"), (".", "Is a directory"), ("a\0b", "null byte")]
)
def test_what_cannot_be_opened(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(f"{tmp_path}/{name}")


def test_network_cards(tmp_path: Path) -> None:
    """One that says nothing of it is on the network of a user."""
    file = tmp_path / "vm.toml"
    other = NIC.replace("dev.n", "dev.m").replace("0.5.0", "0.6.0")
    file.write_text(
        MAIN
        + NIC
        + other
        + 'net_dev = "lan"\nqueues = 2\nmac = "02:00:00:00:00:01"\nmtu = 9000\nown_address_only = true\n'
        '[net_dev.lan]\ntype = "tap"\ninterface = "tap0"\nbridge = "br0"\n'
        + VIONA.replace("dev.n", "dev.o").replace("0.5.0", "0.7.0")
        + NIC.replace("dev.n", "dev.p").replace("0.5.0", "0.8.0")
        + 'net_dev = "out"\n[net_dev.out]\ntype = "user"\nhost = true\nforward = ["2222:22", "udp 53"]\n'
    )
    spec = load(file)
    assert spec.backends == {
        "n-network": UserNetwork(),
        "lan": Tap(interface="tap0", bridge="br0"),
        "o-network": Tap(interface="net0"),
        "out": UserNetwork(forward=("2222:22", "udp 53"), host=True),
    }
    card = next(device for device in spec.devices if device.name == "m")
    assert card == VirtioNic(
        name="m", backend="lan", pci_path=PciPath(0, 6, 0), queues=2, mac="02:00:00:00:00:01", mtu=9000,
        own_address_only=True,
    )  # fmt: skip
