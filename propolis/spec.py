"""What a VM is: its board, processors, memory, devices and what stands behind them.

A `Spec` that exists is a valid one: it checks itself when it is made, whoever makes it (a TOML file, the API, a test),
and raises one `SpecError` that lists everything wrong with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import msgspec

from propolis.errors import ConfigError
from propolis.network_spec import Network as Network  # noqa: PLC0414 -- whoever has a Spec finds it here
from propolis.network_spec import Tap as Tap  # noqa: PLC0414
from propolis.network_spec import UserNetwork as UserNetwork  # noqa: PLC0414
from propolis.network_spec import VirtioNic as VirtioNic  # noqa: PLC0414
from propolis.network_spec import network_problems, nic_problems
from propolis.pci_path import PciPath as PciPath  # noqa: PLC0414 -- likewise
from propolis.small_devices import SmallDevice as SmallDevice  # noqa: PLC0414 -- likewise

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CPUS = 64
MIN_MEMORY_MIB = 16
MAX_MEMORY_MIB = 1 << 20
HUGE_PAGE_MIB = 2
BLOCK_SIZES = (512, 2048, 4096)
MAX_BLOCK_QUEUES = 16
MAX_BLOCK_WORKERS = 32
BLOCK_WORKERS = 8
SERIAL_BYTES = 20  # VIRTIO_BLK_ID_BYTES, virtio 1.2 §5.2.6
MAX_NAME = 64
NVRAM_MAX_BYTES = 4 << 20
MAX_CMDLINE = 65535
MAX_SMBIOS_TEXT = 64
MAX_CPUID_LEAVES = 128
HYPERVISOR_LEAVES = range(0x4000_0000, 0x5000_0000)
CPU_VENDORS = {"amd": b"AuthenticAMD", "intel": b"GenuineIntel"}
MAX_CLOUD_INIT_BYTES = 512 << 10  # of each of its texts
CLOUD_INIT_VOLUME_BYTES = 2 << 20  # of all of them, at most
BLOB_BLOCK = 512
SERIAL_PORTS = (1, 2, 3, 4)

HypervisorInterface = Literal["kvm", "bhyve", "hyper-v", "none"]
HyperVFeature = Literal["reference_tsc"]
MemoryBacking = Literal["anonymous", "memfd", "hugetlb"]

_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
NAME_RULE = f"1 to {MAX_NAME} of the characters A-Z a-z 0-9 . _ - that do not begin with '.' or '-'"


class Problem(NamedTuple):
    """One thing wrong with a Spec: the path of the field from its root, and what was expected there."""

    where: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.where))}: {self.message}"


class SpecError(ConfigError):
    """A Spec that does not hold together; `problems` has one entry for each line of the message."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


BOARD_FUNCTIONS = {
    PciPath(0, 0, 0): "the host bridge",
    PciPath(0, 1, 0): "the ISA bridge",
    PciPath(0, 1, 3): "the power management function",
}


class DirectBoot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="direct"):
    """Start a kernel that the VMM itself puts into memory."""

    kernel: str
    initrd: str | None = None
    cmdline: str = ""


class FirmwareBoot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="firmware"):
    """Start firmware from the top of the address space and let it find a system, or start the kernel it is offered.

    It keeps its variables in the file `nvram`, which is made from `nvram_template` where it is missing.
    """

    bootrom: str
    nvram: str | None = None
    nvram_template: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = ""


Boot = DirectBoot | FirmwareBoot


def boot_files(boot: Boot) -> list[str]:
    """The paths of what a VM boots."""
    bootrom = boot.bootrom if isinstance(boot, FirmwareBoot) else None
    return [path for path in (bootrom, boot.kernel, boot.initrd) if path is not None]


class VirtioBlock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="virtio-block"):
    """A virtio disk; `serial` is what the guest reads as its ID, the device's name where none is given."""

    name: str
    backend: str
    pci_path: PciPath
    queues: int = 1
    serial: str | None = None


class Pvpanic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="pvpanic"):
    """The port where a guest reports its own panic; without `enable_isa` it is named but not attached."""

    name: str
    enable_isa: bool = False


class Screen(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ramfb"):
    """A screen that the guest draws in its own memory (ramfb), with a PS/2 keyboard and mouse."""

    name: str


Device = VirtioBlock | VirtioNic | Pvpanic | Screen | SmallDevice


class FileBlock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="file"):
    """A raw image file; with `skip_flush` a flush of the guest is answered without reaching the disk.

    `workers` is how many threads do its I/O, BLOCK_WORKERS where none is given.
    """

    path: str
    readonly: bool = False
    block_size: int = 512
    skip_flush: bool = False
    workers: int | None = None


class BlobBlock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="blob"):
    """A disk in memory that begins with `content`; what a guest writes to it is gone with its VM."""

    content: bytes
    readonly: bool = False


class CloudInit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="cloud-init"):
    """A volume of cloud-init's data source NoCloud, with these texts.

    Without `meta_data` the instance and its host are called as the VM is.
    """

    readonly: ClassVar[bool] = True

    user_data: str = ""
    meta_data: str | None = None
    network_config: str | None = None


Block = FileBlock | BlobBlock | CloudInit
Backend = Block | Network

_SINGLE: dict[type[Device], str] = {Screen: "screen", Pvpanic: "pvpanic"}


class SerialPort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the four COM ports; `name` is what the API calls it, "com1" to "com4" where there is none."""

    number: int
    name: str | None = None


class CpuidLeaf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the CPUID instruction answers; without `subleaf`, to every sub-leaf."""

    leaf: int
    subleaf: int | None = None
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class CpuidProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All leaves that a guest sees, but for those of its hypervisor; topology is put into them."""

    vendor: Literal["amd", "intel"]
    leaves: tuple[CpuidLeaf, ...]


class SystemNames(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the guest reads in SMBIOS of the machine that it runs on; printable ASCII, an empty text is none."""

    manufacturer: str
    product_name: str
    serial_number: str
    version: int


class BootOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The devices that firmware tries, by name, the first one first.

    `name` is what the API calls this, "boot_settings" where there is none.
    """

    devices: tuple[str, ...]
    name: str | None = None


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything needed to build one VM.

    With `boot_is_default` what it boots is the server's choice, and not part of what its maker is shown.
    """

    name: str
    cpus: int
    memory_mib: int
    boot: Boot
    boot_is_default: bool = False
    memory_backing: MemoryBacking = "anonymous"
    hypervisor_interface: HypervisorInterface = "kvm"
    hyperv_features: tuple[HyperVFeature, ...] = ()  # of "hyper-v" alone
    cpuid: CpuidProfile | None = None
    devices: tuple[Device, ...] = ()
    backends: dict[str, Backend] = {}
    serial_ports: tuple[SerialPort, ...] = tuple(SerialPort(number=number) for number in SERIAL_PORTS)
    boot_order: BootOrder | None = None
    smbios: SystemNames | None = None
    exit_on_halt: int = 0
    exit_on_reboot: int | None = None

    def files(self) -> list[FileBlock]:
        """The backends that are files of the host."""
        return [backend for backend in self.backends.values() if isinstance(backend, FileBlock)]

    def sockets(self) -> list[str]:
        """The paths at which the host listens for the devices."""
        return [path for device in self.devices if isinstance(device, SmallDevice) for path in device.sockets()]

    def __post_init__(self) -> None:
        problems = [*_board_problems(self), *_boot_problems(self.boot), *_device_problems(self)]
        if self.cpuid is not None:
            problems += _cpuid_problems(self.cpuid)
        if self.smbios is not None:
            problems += _smbios_problems(self.smbios)
        if self.boot_order is not None:
            problems += _boot_order_problems(self.boot_order, self.devices)
        for name, backend in self.backends.items():
            problems += _backend_problems(name, backend)
        if problems:
            raise SpecError(problems)


def is_name(text: str) -> bool:
    """Whether a VM may be called this: names become file names, so they are kept plain."""
    return 0 < len(text) <= MAX_NAME and text[0] not in ".-" and _NAME_CHARACTERS.issuperset(text)


def _board_problems(spec: Spec) -> Iterator[Problem]:
    if not is_name(spec.name):
        yield Problem(("name",), f"{spec.name!r} cannot name a VM: expected {NAME_RULE}")
    if not 1 <= spec.cpus <= MAX_CPUS:
        yield Problem(("cpus",), f"expected 1 to {MAX_CPUS} CPUs, not {spec.cpus}")
    if not MIN_MEMORY_MIB <= spec.memory_mib <= MAX_MEMORY_MIB:
        wanted = f"expected {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB"
        yield Problem(("memory_mib",), f"{wanted}, not {spec.memory_mib}")
    elif spec.memory_backing == "hugetlb" and spec.memory_mib % HUGE_PAGE_MIB:
        wanted = f"expected a multiple of {HUGE_PAGE_MIB} MiB, because the memory is of huge pages"
        yield Problem(("memory_mib",), f"{wanted}, not {spec.memory_mib}")
    for field, status in (("exit_on_halt", spec.exit_on_halt), ("exit_on_reboot", spec.exit_on_reboot)):
        if status is not None and not 0 <= status <= 255:
            yield Problem((field,), f"expected an exit status from 0 to 255, not {status}")
    if spec.hyperv_features and spec.hypervisor_interface != "hyper-v":
        yield Problem(("hyperv_features",), f"the hypervisor's interface is {spec.hypervisor_interface!r}")
    taken: set[int] = set()
    for index, port in enumerate(spec.serial_ports):
        where = ("serial_ports", index, "number")
        if port.number not in SERIAL_PORTS:
            yield Problem(where, f"COM{port.number} does not exist: expected 1 to 4")
        elif port.number in taken:
            yield Problem(where, f"COM{port.number} is given twice")
        taken.add(port.number)


def _boot_problems(boot: Boot) -> Iterator[Problem]:
    if isinstance(boot, FirmwareBoot):
        yield from _path_problems(("boot", "bootrom"), boot.bootrom)
        for key, path in (("nvram", boot.nvram), ("nvram_template", boot.nvram_template)):
            if path is not None:
                yield from _path_problems(("boot", key), path)
        if boot.nvram is None and boot.nvram_template is not None:
            yield Problem(("boot", "nvram_template"), "expected a nvram beside it")
        if boot.kernel is None:
            for key, value in (("initrd", boot.initrd), ("cmdline", boot.cmdline)):
                if value:
                    yield Problem(("boot", key), "expected a kernel beside it")
    if boot.kernel is not None:
        yield from _path_problems(("boot", "kernel"), boot.kernel)
    if boot.initrd is not None:
        yield from _path_problems(("boot", "initrd"), boot.initrd)
    if "\0" in boot.cmdline or "\n" in boot.cmdline:
        yield Problem(("boot", "cmdline"), "expected a kernel command line without NUL or newline")
    elif len(boot.cmdline.encode(errors="surrogatepass")) > MAX_CMDLINE:
        yield Problem(("boot", "cmdline"), f"expected a kernel command line of at most {MAX_CMDLINE} bytes")


def _cpuid_problems(cpuid: CpuidProfile) -> Iterator[Problem]:
    if len(cpuid.leaves) > MAX_CPUID_LEAVES:
        yield Problem(("cpuid", "leaves"), f"expected at most {MAX_CPUID_LEAVES} leaves, not {len(cpuid.leaves)}")
    seen: set[tuple[int, int | None]] = set()
    for index, leaf in enumerate(cpuid.leaves):
        where = ("cpuid", "leaves", index)
        if leaf.leaf in HYPERVISOR_LEAVES:
            yield Problem(where, f"leaf {leaf.leaf:#x} is the hypervisor's to answer")
        elif (leaf.leaf, leaf.subleaf) in seen:
            yield Problem(where, f"leaf {_leaf_text(leaf)} is given twice")
        elif leaf.subleaf is not None and (leaf.leaf, None) in seen:
            yield Problem(where, f"leaf {leaf.leaf:#x} is given for every sub-leaf as well")
        elif leaf.subleaf is None and any(number == leaf.leaf for number, _ in seen):
            yield Problem(where, f"leaf {leaf.leaf:#x} is given for one sub-leaf as well")
        seen.add((leaf.leaf, leaf.subleaf))
    first = next((leaf for leaf in cpuid.leaves if leaf.leaf == 0), None)
    if first is None:
        yield Problem(("cpuid", "leaves"), "expected leaf 0x0, which says who made the processor")
    else:
        name = b"".join(
            (register & 0xFFFF_FFFF).to_bytes(4, "little") for register in (first.ebx, first.edx, first.ecx)
        )
        if name != CPU_VENDORS[cpuid.vendor]:
            yield Problem(("cpuid", "vendor"), f"leaf 0x0 is not {cpuid.vendor}'s: its vendor is {name!r}")


def _leaf_text(leaf: CpuidLeaf) -> str:
    return f"{leaf.leaf:#x}" if leaf.subleaf is None else f"{leaf.leaf:#x}-{leaf.subleaf:#x}"


def _smbios_problems(names: SystemNames) -> Iterator[Problem]:
    for field in ("manufacturer", "product_name", "serial_number"):
        text = getattr(names, field)
        if not (text.isascii() and text.isprintable() and len(text) <= MAX_SMBIOS_TEXT):
            yield Problem(("smbios", field), f"expected at most {MAX_SMBIOS_TEXT} printable ASCII characters")


def _boot_order_problems(order: BootOrder, devices: tuple[Device, ...]) -> Iterator[Problem]:
    there = {device.name: device for device in devices}
    seen: set[str] = set()
    for index, name in enumerate(order.devices):
        where = ("boot_order", "devices", index)
        if name not in there:
            yield Problem(where, f"there is no device {name[:MAX_NAME]!r}")
        elif isinstance(there[name], Pvpanic | SmallDevice):
            yield Problem(where, f"nothing can be booted from device {name!r}, a {there[name].__struct_config__.tag}")
        elif name in seen:
            yield Problem(where, f"device {name!r} is given twice")
        seen.add(name)


def _device_problems(spec: Spec) -> Iterator[Problem]:
    """What is wrong with the devices: alone, and beside each other."""
    names: set[str] = set()
    owners: dict[PciPath, str] = {}
    users: dict[str, str] = {}
    only: dict[type[Device], str] = {}  # the first of what a VM has at most one of
    present = {device.pci_path for device in spec.devices if not isinstance(device, Pvpanic | Screen)}
    present |= BOARD_FUNCTIONS.keys()
    paths = spec.sockets()
    for index, device in enumerate(spec.devices):
        if wrong := _label_problem(device.name):
            yield Problem(("devices", index, "name"), wrong)
        elif device.name in names:
            yield Problem(("devices", index, "name"), f"a second device is named {device.name!r}")
        names.add(device.name)
        single = only.setdefault(type(device), device.name)
        if type(device) in _SINGLE and single != device.name:
            yield Problem(("devices", index), f"a VM has at most one {_SINGLE[type(device)]}, and {single!r} is it")
        if isinstance(device, Pvpanic | Screen):
            continue
        if wrong := device.pci_path.range_problem() or _conflict(device.pci_path, owners):
            yield Problem(("devices", index, "pci_path"), wrong)
        elif (first := _function_zero(device.pci_path)) not in present:
            wrong = f"a guest does not look at PCI path {device.pci_path} unless {first} is there"
            yield Problem(("devices", index, "pci_path"), wrong)
        owners.setdefault(device.pci_path, device.name)
        if isinstance(device, SmallDevice):
            for field, message in device.problems():
                yield Problem(("devices", index, *field), message)
            if any(paths.count(path) > 1 for path in device.sockets()):
                yield Problem(("devices", index), "two sockets have the same path")
            continue
        kind, wanted = ("network", Network) if isinstance(device, VirtioNic) else ("block", Block)
        behind = spec.backends.get(device.backend)
        if not isinstance(behind, wanted):
            yield Problem(("devices", index, "backend"), f"there is no {kind} backend {device.backend!r}")
        elif (user := users.setdefault(device.backend, device.name)) != device.name:
            wrong = f"{kind} backend {device.backend!r} is already used by device {user!r}"
            yield Problem(("devices", index, "backend"), wrong)
        problems = nic_problems(device, spec.cpus, behind) if isinstance(device, VirtioNic) else _disk_problems(device)
        for name, wrong in problems:
            yield Problem(("devices", index, name), wrong)


def _disk_problems(device: VirtioBlock) -> Iterator[tuple[str, str]]:
    if not 1 <= device.queues <= MAX_BLOCK_QUEUES:
        yield "queues", f"expected 1 to {MAX_BLOCK_QUEUES} queues, not {device.queues}"
    if (serial := device.serial) is not None and not (serial.isascii() and 0 < len(serial) <= SERIAL_BYTES):
        yield "serial", f"expected 1 to {SERIAL_BYTES} ASCII characters"


def _function_zero(path: PciPath) -> PciPath:
    return PciPath(path.bus, path.device, 0)


def _conflict(path: PciPath, owners: dict[PciPath, str]) -> str | None:
    if board := BOARD_FUNCTIONS.get(path):
        return f"PCI path {path} belongs to {board} of the board"
    if (owner := owners.get(path)) is not None:
        return f"PCI path {path} is already taken by device {owner!r}"
    return None


def _backend_problems(name: str, backend: Backend) -> Iterator[Problem]:
    where = ("backends", name)
    if wrong := _label_problem(name):
        yield Problem(where, wrong)
    if isinstance(backend, BlobBlock):
        if not backend.content or len(backend.content) % BLOB_BLOCK:
            wanted = f"expected a multiple of {BLOB_BLOCK} bytes"
            yield Problem((*where, "content"), f"{wanted}, not {len(backend.content)}")
        return
    if isinstance(backend, CloudInit):
        yield from _cloud_init_problems(where, backend)
        return
    if isinstance(backend, UserNetwork | Tap):
        yield from (Problem((*where, *place), wrong) for place, wrong in network_problems(backend))
        return
    yield from _path_problems((*where, "path"), backend.path)
    if backend.block_size not in BLOCK_SIZES:
        wanted = ", ".join(map(str, BLOCK_SIZES))
        yield Problem((*where, "block_size"), f"expected one of {wanted}, not {backend.block_size}")
    if backend.workers is not None and not 1 <= backend.workers <= MAX_BLOCK_WORKERS:
        yield Problem((*where, "workers"), f"expected 1 to {MAX_BLOCK_WORKERS} workers, not {backend.workers}")


def _cloud_init_problems(where: tuple[str | int, ...], backend: CloudInit) -> Iterator[Problem]:
    for field in ("user_data", "meta_data", "network_config"):
        try:
            size = len((getattr(backend, field) or "").encode())
        except UnicodeEncodeError:
            yield Problem((*where, field), "expected Unicode text, found half a surrogate pair")
        else:
            if size > MAX_CLOUD_INIT_BYTES:
                yield Problem((*where, field), f"expected at most {MAX_CLOUD_INIT_BYTES} bytes of text, not {size}")


def _label_problem(name: str) -> str | None:
    """Devices and backends are only ever named in messages and by each other, so most names will do."""
    if 0 < len(name) <= MAX_NAME and name.isprintable():
        return None
    return f"{name[:MAX_NAME]!r} cannot name a device or backend: expected 1 to {MAX_NAME} printable characters"


def _path_problems(where: tuple[str | int, ...], path: str) -> Iterator[Problem]:
    if not path or "\0" in path:
        yield Problem(where, "expected the path of a file")
