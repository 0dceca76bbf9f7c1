"""The wire types of Propolis API 5.0.0, field by field, and `Extensions` for what that API has no word for.

A request with a field that is not listed here is refused. `to_spec` and `from_spec` convert to and from propolis.spec.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal
from uuid import UUID  # noqa: TC003 -- msgspec looks it up

from msgspec import Meta, Struct

API_VERSION = "5.0.0"

U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, Meta(ge=0)]  # msgspec knows no bound past 2^63; nothing that is used is ever that big
SpecKey = str  # a UUID where it reads as one, else a name


# mypy wants every frozen class to say so again.
class Wire(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what is sent and received."""


class Reply(Struct, frozen=True, omit_defaults=True):
    """Base of what is only sent to clients, who ignore what they do not know."""


# -- board -------------------------------------------------------------------------------------------------------------


class I440Fx(Wire, frozen=True):
    enable_pcie: bool


class I440FxChipset(Wire, frozen=True, tag_field="type", tag="i440_fx"):
    value: I440Fx


Chipset = I440FxChipset


class HyperVFeatureFlag(enum.Enum):
    REFERENCE_TSC = "reference_tsc"


class HyperVFeatures(Wire, frozen=True):
    features: tuple[HyperVFeatureFlag, ...]


class BhyveInterface(Wire, frozen=True, tag_field="type", tag="bhyve"):
    pass


class HyperVInterface(Wire, frozen=True, tag_field="type", tag="hyper_v"):
    value: HyperVFeatures


GuestHypervisorInterface = BhyveInterface | HyperVInterface


class CpuidVendor(enum.Enum):
    AMD = "amd"
    INTEL = "intel"


class CpuidEntry(Wire, frozen=True):
    leaf: U32
    eax: U32
    ebx: U32
    ecx: U32
    edx: U32
    subleaf: U32 | None = None


class Cpuid(Wire, frozen=True):
    entries: tuple[CpuidEntry, ...]
    vendor: CpuidVendor


class Board(Wire, frozen=True):
    """Without `guest_hv_interface` the guest sees the host's own hypervisor."""

    cpus: U8
    memory_mb: U64
    chipset: Chipset
    guest_hv_interface: GuestHypervisorInterface | None = None
    cpuid: Cpuid | None = None


class SmbiosType1Input(Wire, frozen=True):
    manufacturer: str
    product_name: str
    serial_number: str
    version: U64


# -- components --------------------------------------------------------------------------------------------------------


class PciPath(Wire, frozen=True):
    bus: U8
    device: U8
    function: U8


class VirtioDisk(Wire, frozen=True):
    backend_id: SpecKey
    pci_path: PciPath


class NvmeDisk(Wire, frozen=True):
    backend_id: SpecKey
    pci_path: PciPath
    serial_number: Annotated[tuple[U8, ...], Meta(min_length=20, max_length=20)]


class VirtioNic(Wire, frozen=True):
    backend_id: SpecKey
    interface_id: UUID
    pci_path: PciPath


class SerialPortNumber(enum.Enum):
    COM1 = "com1"
    COM2 = "com2"
    COM3 = "com3"
    COM4 = "com4"


class SerialPort(Wire, frozen=True):
    num: SerialPortNumber


class PciPciBridge(Wire, frozen=True):
    downstream_bus: U8
    pci_path: PciPath


class QemuPvpanic(Wire, frozen=True):
    enable_isa: bool


class BootOrderEntry(Wire, frozen=True):
    id: SpecKey


class BootSettings(Wire, frozen=True):
    order: tuple[BootOrderEntry, ...]


class VirtioSocket(Wire, frozen=True):
    guest_cid: U64
    pci_path: PciPath


class SoftNpuPciPort(Wire, frozen=True):
    pci_path: PciPath


class SoftNpuPort(Wire, frozen=True):
    backend_id: SpecKey
    link_name: str


class SoftNpuP9(Wire, frozen=True):
    pci_path: PciPath


class P9fs(Wire, frozen=True):
    chunk_size: U32
    pci_path: PciPath
    source: str
    target: str


class MigrationFailureInjector(Wire, frozen=True):
    fail_exports: U32
    fail_imports: U32


class CrucibleStorageBackend(Wire, frozen=True):
    readonly: bool
    request_json: str


class FileStorageBackend(Wire, frozen=True):
    block_size: U32
    path: str
    readonly: bool
    workers: Annotated[int, Meta(ge=1)] | None = None


class BlobStorageBackend(Wire, frozen=True):
    base64: str
    readonly: bool


class VirtioNetworkBackend(Wire, frozen=True):
    vnic_name: str


class DlpiNetworkBackend(Wire, frozen=True):
    vnic_name: str


class VirtioDiskComponent(Wire, frozen=True, tag_field="type", tag="virtio_disk"):
    component: VirtioDisk


class NvmeDiskComponent(Wire, frozen=True, tag_field="type", tag="nvme_disk"):
    component: NvmeDisk


class VirtioNicComponent(Wire, frozen=True, tag_field="type", tag="virtio_nic"):
    component: VirtioNic


class SerialPortComponent(Wire, frozen=True, tag_field="type", tag="serial_port"):
    component: SerialPort


class PciPciBridgeComponent(Wire, frozen=True, tag_field="type", tag="pci_pci_bridge"):
    component: PciPciBridge


class QemuPvpanicComponent(Wire, frozen=True, tag_field="type", tag="qemu_pvpanic"):
    component: QemuPvpanic


class BootSettingsComponent(Wire, frozen=True, tag_field="type", tag="boot_settings"):
    component: BootSettings


class VirtioSocketComponent(Wire, frozen=True, tag_field="type", tag="virtio_socket"):
    component: VirtioSocket


class SoftNpuPciPortComponent(Wire, frozen=True, tag_field="type", tag="soft_npu_pci_port"):
    component: SoftNpuPciPort


class SoftNpuPortComponent(Wire, frozen=True, tag_field="type", tag="soft_npu_port"):
    component: SoftNpuPort


class SoftNpuP9Component(Wire, frozen=True, tag_field="type", tag="soft_npu_p9"):
    component: SoftNpuP9


class P9fsComponent(Wire, frozen=True, tag_field="type", tag="p9fs"):
    component: P9fs


class MigrationFailureInjectorComponent(Wire, frozen=True, tag_field="type", tag="migration_failure_injector"):
    component: MigrationFailureInjector


class CrucibleStorageBackendComponent(Wire, frozen=True, tag_field="type", tag="crucible_storage_backend"):
    component: CrucibleStorageBackend


class FileStorageBackendComponent(Wire, frozen=True, tag_field="type", tag="file_storage_backend"):
    component: FileStorageBackend


class BlobStorageBackendComponent(Wire, frozen=True, tag_field="type", tag="blob_storage_backend"):
    component: BlobStorageBackend


class VirtioNetworkBackendComponent(Wire, frozen=True, tag_field="type", tag="virtio_network_backend"):
    component: VirtioNetworkBackend


class DlpiNetworkBackendComponent(Wire, frozen=True, tag_field="type", tag="dlpi_network_backend"):
    component: DlpiNetworkBackend


Component = (
    VirtioDiskComponent
    | NvmeDiskComponent
    | VirtioNicComponent
    | SerialPortComponent
    | PciPciBridgeComponent
    | QemuPvpanicComponent
    | BootSettingsComponent
    | VirtioSocketComponent
    | SoftNpuPciPortComponent
    | SoftNpuPortComponent
    | SoftNpuP9Component
    | P9fsComponent
    | MigrationFailureInjectorComponent
    | CrucibleStorageBackendComponent
    | FileStorageBackendComponent
    | BlobStorageBackendComponent
    | VirtioNetworkBackendComponent
    | DlpiNetworkBackendComponent
)


# -- what 5.0.0 has no word for ----------------------------------------------------------------------------------------


class DirectBoot(Wire, frozen=True, tag_field="type", tag="direct"):
    """Start a kernel that the VMM itself puts into memory."""

    kernel: str
    initrd: str | None = None
    cmdline: str = ""


class FirmwareBoot(Wire, frozen=True, tag_field="type", tag="firmware"):
    """Start firmware other than the server's own; it may be offered a kernel to start.

    Its variables are kept in the file `nvram`, which is made from `nvram_template` where it is missing.
    """

    bootrom: str
    nvram: str | None = None
    nvram_template: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    cmdline: str = ""


class DiskExtension(Wire, frozen=True):
    """More about a virtio_disk, by its id."""

    queues: U32 = 1
    serial: str | None = None


class FileExtension(Wire, frozen=True):
    """More about a file_storage_backend, by its id."""

    skip_flush: bool = False


class CloudInitExtension(Wire, frozen=True):
    """What is in a blob_storage_backend, by its id, as texts: a volume of cloud-init's data source NoCloud.

    The component then has no base64 and is readonly. Without `meta_data` the instance is called as the VM is.
    """

    user_data: str = ""
    meta_data: str | None = None
    network_config: str | None = None


class NicExtension(Wire, frozen=True):
    """More about a virtio_nic, by its id. With `own_address_only` the guest sends from its own address alone."""

    queues: U32 = 1
    mac: str | None = None
    mtu: U32 | None = None
    own_address_only: bool = False


class UserNetworkExtension(Wire, frozen=True, tag_field="type", tag="user"):
    """The host's network without a privilege, by passt; its virtio_network_backend has an empty vnic_name."""

    forward: tuple[str, ...] = ()
    host: bool = False


class TapExtension(Wire, frozen=True, tag_field="type", tag="tap"):
    """The tap called vnic_name, or one that is made where that is empty, as a port of a bridge."""

    bridge: str | None = None


class ScreenExtension(Wire, frozen=True):
    """A screen with keyboard and mouse."""

    name: SpecKey = "screen"


class SocketExtension(Wire, frozen=True):
    """More about a virtio_socket, by its id: the path of the unix socket at which the host listens."""

    path: str | None = None


class RngDevice(Wire, frozen=True, tag_field="type", tag="virtio-rng"):
    """The host's random numbers, at most so many bytes each second where there is a limit."""

    pci_path: PciPath
    bytes_per_second: U32 | None = None


class ConsolePort(Wire, frozen=True):
    """A port by its name in the guest, a terminal or not; its client connects to the unix socket `path`."""

    name: str
    path: str
    is_console: bool = False


class ConsoleDevice(Wire, frozen=True, tag_field="type", tag="virtio-console"):
    """Ports by which programs of the guest and of the host talk."""

    pci_path: PciPath
    ports: tuple[ConsolePort, ...]


SmallDevice = RngDevice | ConsoleDevice


class Extensions(Wire, frozen=True):
    """What a VM has beyond 5.0.0; absent from the spec of one that has nothing of it.

    Without `boot` the VM boots what its server was told to boot.
    """

    boot: DirectBoot | FirmwareBoot | None = None
    hypervisor_interface: Literal["none"] | None = None
    memory_backing: Literal["anonymous", "memfd", "hugetlb"] = "anonymous"
    disks: dict[SpecKey, DiskExtension] = {}
    files: dict[SpecKey, FileExtension] = {}
    cloud_init: dict[SpecKey, CloudInitExtension] = {}
    nics: dict[SpecKey, NicExtension] = {}
    networks: dict[SpecKey, UserNetworkExtension | TapExtension] = {}
    screen: ScreenExtension | None = None
    sockets: dict[SpecKey, SocketExtension] = {}
    devices: dict[SpecKey, SmallDevice] = {}
    exit_on_halt: U8 = 0
    exit_on_reboot: U8 | None = None


class InstanceSpec(Wire, frozen=True):
    board: Board
    components: dict[SpecKey, Component]
    smbios: SmbiosType1Input | None = None
    extensions: Extensions | None = None


# -- instance ----------------------------------------------------------------------------------------------------------


class InstanceMetadata(Wire, frozen=True):
    silo_id: UUID
    project_id: UUID
    sled_id: UUID
    sled_serial: str
    sled_revision: U32
    sled_model: str


class InstanceProperties(Wire, frozen=True):
    id: UUID
    name: str
    description: str
    metadata: InstanceMetadata


class MigrationFailureInjectorReplacement(Wire, frozen=True, tag_field="component", tag="MigrationFailureInjector"):
    spec: MigrationFailureInjector


class CrucibleStorageBackendReplacement(Wire, frozen=True, tag_field="component", tag="CrucibleStorageBackend"):
    spec: CrucibleStorageBackend


class VirtioNetworkBackendReplacement(Wire, frozen=True, tag_field="component", tag="VirtioNetworkBackend"):
    spec: VirtioNetworkBackend


ReplacementComponent = (
    MigrationFailureInjectorReplacement | CrucibleStorageBackendReplacement | VirtioNetworkBackendReplacement
)


class SpecInitialization(Wire, frozen=True):
    spec: InstanceSpec


class MigrationTargetInitialization(Wire, frozen=True):
    migration_id: UUID
    src_addr: str
    replace_components: dict[SpecKey, ReplacementComponent]


class InitializeBySpec(Wire, frozen=True, tag_field="method", tag="Spec"):
    value: SpecInitialization


class InitializeAsMigrationTarget(Wire, frozen=True, tag_field="method", tag="MigrationTarget"):
    value: MigrationTargetInitialization


InstanceInitializationMethod = InitializeBySpec | InitializeAsMigrationTarget


class InstanceEnsureRequest(Wire, frozen=True):
    properties: InstanceProperties
    init: InstanceInitializationMethod


class InstanceMigrateInitiateResponse(Reply, frozen=True):
    migration_id: UUID


class InstanceEnsureResponse(Reply, frozen=True):
    migrate: InstanceMigrateInitiateResponse | None = None


class InstanceState(enum.Enum):
    CREATING = "Creating"
    STARTING = "Starting"
    RUNNING = "Running"
    STOPPING = "Stopping"
    STOPPED = "Stopped"
    REBOOTING = "Rebooting"
    MIGRATING = "Migrating"
    REPAIRING = "Repairing"
    FAILED = "Failed"
    DESTROYED = "Destroyed"


class Instance(Reply, frozen=True):
    """`paused` and `detail`, why the state is what it is, are ours."""

    properties: InstanceProperties
    state: InstanceState
    paused: bool | None = None
    detail: str | None = None


class InstanceGetResponse(Reply, frozen=True):
    instance: Instance


class SpecWaiting(Reply, frozen=True, tag_field="type", tag="WaitingForMigrationSource"):
    pass


class SpecPresent(Reply, frozen=True, tag_field="type", tag="Present"):
    value: InstanceSpec


InstanceSpecStatus = SpecWaiting | SpecPresent


class InstanceSpecGetResponse(Reply, frozen=True):
    properties: InstanceProperties
    state: InstanceState
    spec: InstanceSpecStatus


class InstanceStateRequested(enum.Enum):
    RUN = "Run"
    STOP = "Stop"
    REBOOT = "Reboot"


class InstanceStateMonitorRequest(Wire, frozen=True):
    gen: U64


class InstanceStateMonitorQuery(Wire, frozen=True):
    """The same in the query, where a client cannot send a body with GET: ours."""

    gen: U64 | None = None


class MigrationState(enum.Enum):
    SYNC = "Sync"
    RAM_PUSH = "RamPush"
    PAUSE = "Pause"
    RAM_PUSH_DIRTY = "RamPushDirty"
    DEVICE = "Device"
    RESUME = "Resume"
    RAM_PULL = "RamPull"
    SERVER = "Server"
    FINISH = "Finish"
    ERROR = "Error"


class InstanceMigrationStatus(Reply, frozen=True):
    id: UUID
    state: MigrationState


class InstanceMigrateStatusResponse(Reply, frozen=True):
    migration_in: InstanceMigrationStatus | None = None
    migration_out: InstanceMigrationStatus | None = None


class InstanceStateMonitorResponse(Reply, frozen=True):
    """`paused` and `detail` are ours."""

    gen: U64
    state: InstanceState
    migration: InstanceMigrateStatusResponse
    paused: bool | None = None
    detail: str | None = None


# -- console -----------------------------------------------------------------------------------------------------------


class InstanceSerialConsoleStreamRequest(Wire, frozen=True):
    """A query; `com` and `control`, for which text frames carry notices, are ours."""

    from_start: U64 | None = None
    most_recent: U64 | None = None
    com: Annotated[int, Meta(ge=1, le=4)] = 1
    control: bool = False


class InstanceSerialConsoleHistoryRequest(Wire, frozen=True):
    """A query; `com` is ours."""

    from_start: U64 | None = None
    most_recent: U64 | None = None
    max_bytes: U64 | None = None
    com: Annotated[int, Meta(ge=1, le=4)] = 1


class InstanceSerialConsoleHistoryResponse(Reply, frozen=True):
    data: tuple[U8, ...]
    last_byte_offset: U64


# -- Crucible's disks, which nothing here has --------------------------------------------------------------------------


class InstanceVCRReplace(Wire, frozen=True):
    vcr_json: str


class ReplaceResult(enum.Enum):
    STARTED = "started"
    STARTED_ALREADY = "started_already"
    COMPLETED_ALREADY = "completed_already"
    MISSING = "missing"
    VCR_MATCHES = "vcr_matches"


class DownstairsInfoConnectionMode(enum.Enum):
    NEW = "new"
    OFFLINE = "offline"
    FAULTED = "faulted"
    REPLACED = "replaced"


class DownstairsInfoNegotiationStatus(enum.Enum):
    WAIT_CONNECT = "wait_connect"
    NEGOTIATING = "negotiating"
    WAIT_QUORUM = "wait_quorum"
    RECONCILE = "reconcile"
    LIVE_REPAIR_READY = "live_repair_ready"


class DownstairsConnecting(Reply, frozen=True, tag_field="type", tag="connecting"):
    mode: DownstairsInfoConnectionMode
    state: DownstairsInfoNegotiationStatus


class DownstairsActive(Reply, frozen=True, tag_field="type", tag="active"):
    pass


class DownstairsLiveRepair(Reply, frozen=True, tag_field="type", tag="live_repair"):
    pass


class DownstairsStopping(Reply, frozen=True, tag_field="type", tag="stopping"):
    pass


DownstairsInfoStatus = DownstairsConnecting | DownstairsActive | DownstairsLiveRepair | DownstairsStopping


class DownstairsInfo(Reply, frozen=True):
    state: DownstairsInfoStatus
    region_id: UUID | None = None
    repair_addr: str | None = None
    target_addr: str | None = None


class UpstairsInfoStatus(enum.Enum):
    INITIALIZING = "initializing"
    GO_ACTIVE = "go_active"
    ACTIVE = "active"
    DEACTIVATING = "deactivating"
    DISABLED = "disabled"


class UpstairsInfo(Reply, frozen=True):
    encrypted: bool
    generation: U64
    live_repair_in_progress: bool
    read_only: bool
    reconcile_in_progress: bool
    session_id: UUID
    state: UpstairsInfoStatus
    targets: tuple[DownstairsInfo, ...]
    upstairs_id: UUID
    block_size: U64 | None = None


class Volume(Reply, frozen=True):
    sub_volumes: tuple[VolumeInfo, ...]
    read_only_parent: VolumeInfo | None = None


class VolumeInfo(Reply, frozen=True):
    """One of the two."""

    volume: Volume | None = None
    upstairs: UpstairsInfo | None = None


class VolumeStatus(Reply, frozen=True):
    volume_info: VolumeInfo


class Error(Reply, frozen=True):
    """The body of every error; `state` is what the VM is in, `pointer` the JSON pointer of a field: both are ours."""

    request_id: str
    message: str
    error_code: str | None = None
    state: str | None = None
    pointer: str | None = None
