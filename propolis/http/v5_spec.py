"""A VM as Propolis API 5.0.0 describes it becomes a propolis.spec.Spec, and back."""

from __future__ import annotations

import base64
import binascii
import uuid
from typing import TYPE_CHECKING, TypeVar

from propolis import spec as model
from propolis.errors import FieldError
from propolis.http import v5, v5_devices
from propolis.small_devices import VirtioSocket

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator
    from types import UnionType

T = TypeVar("T")

BOOT_SETTINGS = "boot_settings"  # what the component is called that says in which order devices are booted
SPEC_AT = "/init/value/spec"
NAME_AT = "/properties/name"
_NOBODY = uuid.UUID(int=0)

_UNAVAILABLE = {
    v5.NvmeDiskComponent: "nvme_disk",
    v5.PciPciBridgeComponent: "pci_pci_bridge",
    v5.SoftNpuPciPortComponent: "soft_npu_pci_port",
    v5.SoftNpuPortComponent: "soft_npu_port",
    v5.SoftNpuP9Component: "soft_npu_p9",
    v5.P9fsComponent: "p9fs",
    v5.MigrationFailureInjectorComponent: "migration_failure_injector",
    v5.CrucibleStorageBackendComponent: "crucible_storage_backend",
    v5.DlpiNetworkBackendComponent: "dlpi_network_backend",
}
_PORTS = {
    v5.SerialPortNumber.COM1: 1,
    v5.SerialPortNumber.COM2: 2,
    v5.SerialPortNumber.COM3: 3,
    v5.SerialPortNumber.COM4: 4,
}
_PORT_NUMBERS = {number: port for port, number in _PORTS.items()}
_BOARD_FIELDS = {"cpus": "board/cpus", "memory_mib": "board/memory_mb"}
_DEVICE_FIELDS = {
    "backend": "component/backend_id",
    "pci_path": "component/pci_path",
    "guest_cid": "component/guest_cid",
}


def properties_of(name: str, identity: uuid.UUID, description: str = "") -> v5.InstanceProperties:
    """The properties of a VM that was not made by a request that has some."""
    metadata = v5.InstanceMetadata(
        silo_id=_NOBODY, project_id=_NOBODY, sled_id=_NOBODY, sled_serial="", sled_revision=0, sled_model=""
    )
    return v5.InstanceProperties(id=identity, name=name, description=description, metadata=metadata)


def key(text: str) -> str:
    """How a SpecKey is compared: one that reads as a UUID is that UUID, however it is written."""
    if len(text) in (32, 36, 38, 45):
        try:
            return str(uuid.UUID(text))
        except ValueError:
            pass
    return text


def pointer(*parts: str | int) -> str:
    """A JSON pointer, RFC 6901."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def no_migration() -> FieldError:
    """What a request for the target of a migration is told."""
    return FieldError([("/init/method", "MigrationTarget is not available in this version")])


def to_spec(
    wire: v5.InstanceSpec,
    name: str,
    *,
    default_boot: model.Boot | None = None,
    at: str = SPEC_AT,
    name_at: str = NAME_AT,
) -> model.Spec:
    """The VM called `name`. Raises FieldError with everything wrong, each by its pointer.

    `default_boot` is what a VM boots that does not say so itself; `at` and `name_at` are where the two came from.
    """
    return _Reader(wire, at, name_at).spec(name, default_boot)


def from_spec(spec: model.Spec) -> v5.InstanceSpec:
    """What `to_spec` makes this of; names that a device and its backend share become two."""
    return _Writer(spec).wire()


class _Reader:
    def __init__(self, wire: v5.InstanceSpec, at: str, name_at: str) -> None:
        self._wire = wire
        self._more = wire.extensions or v5.Extensions()
        self._at = at
        self._name_at = name_at
        self._problems: list[tuple[str, str]] = []
        self._devices: list[tuple[str, model.Device]] = []  # with the key of the component
        self._ports: list[tuple[str, model.SerialPort]] = []
        self._backends: dict[str, model.Backend] = {}
        self._boot_order: tuple[str, model.BootOrder] | None = None
        self._keys: dict[str, str] = {}  # canonical: as it was written

    def spec(self, name: str, default_boot: model.Boot | None) -> model.Spec:
        self._board()
        for written, component in self._wire.components.items():
            self._component(written, component)
        self._leftovers(
            "disks", "virtio_disk", self._more.disks, {name for name, _ in self._named_devices(model.VirtioBlock)}
        )
        self._leftovers("files", "file_storage_backend", self._more.files, self._named_backends(model.FileBlock))
        sockets = {device.name for _, device in self._devices if isinstance(device, VirtioSocket)}
        self._leftovers("sockets", "virtio_socket", self._more.sockets, sockets)
        volumes = self._named_backends(model.CloudInit)
        self._leftovers(
            "nics", "virtio_nic", self._more.nics, {name for name, _ in self._named_devices(model.VirtioNic)}
        )
        networks = self._named_backends(model.Network)
        self._leftovers("networks", "virtio_network_backend", self._more.networks, networks)
        self._leftovers("cloud_init", "blob_storage_backend", self._more.cloud_init, volumes)
        if self._more.screen is not None:
            self._devices.append(("", model.Screen(name=key(self._more.screen.name))))
        for written, small in self._more.devices.items():
            self._devices.append((written, v5_devices.to_device(key(written), small)))
        boot = self._boot() or default_boot
        if boot is None:
            self._wrong("expected what the VM boots, as this server has no default", "extensions", "boot")
            boot = model.FirmwareBoot(bootrom="?")
        try:
            spec = self._make(name, boot)
        except model.SpecError as error:
            for problem in error.problems:
                self._problems.append((self._place(problem.where), problem.message))
        if self._problems:
            raise FieldError(self._problems)
        return spec

    def _make(self, name: str, boot: model.Boot) -> model.Spec:
        return model.Spec(
            name=name,
            cpus=self._wire.board.cpus,
            memory_mib=self._wire.board.memory_mb,
            boot=boot,
            boot_is_default=self._more.boot is None,
            memory_backing=self._more.memory_backing,
            hypervisor_interface=self._hypervisor_interface(),
            hyperv_features=self._hyperv_features(),
            devices=tuple(device for _, device in self._devices),
            backends=self._backends,
            cpuid=self._cpuid(),
            smbios=self._smbios(),
            boot_order=None if self._boot_order is None else self._boot_order[1],
            serial_ports=tuple(port for _, port in self._ports),
            exit_on_halt=self._more.exit_on_halt,
            exit_on_reboot=self._more.exit_on_reboot,
        )

    def _named_devices(self, kind: type[model.Device]) -> Iterator[tuple[str, model.Device]]:
        return ((device.name, device) for _, device in self._devices if isinstance(device, kind))

    def _named_backends(self, kind: type[model.Backend] | UnionType) -> set[str]:
        return {name for name, backend in self._backends.items() if isinstance(backend, kind)}

    def _wrong(self, message: str, *parts: str | int) -> None:
        self._problems.append((self._at + pointer(*parts), message))

    def _board(self) -> None:
        board = self._wire.board
        if board.chipset.value.enable_pcie:
            self._wrong("PCI Express is not available in this version", "board", "chipset", "value", "enable_pcie")
        if board.guest_hv_interface is not None and self._more.hypervisor_interface is not None:
            self._wrong("board.guest_hv_interface says otherwise", "extensions", "hypervisor_interface")

    def _hypervisor_interface(self) -> model.HypervisorInterface:
        if self._more.hypervisor_interface is not None:
            return self._more.hypervisor_interface
        there = self._wire.board.guest_hv_interface
        return "kvm" if there is None else "hyper-v" if isinstance(there, v5.HyperVInterface) else "bhyve"

    def _hyperv_features(self) -> tuple[model.HyperVFeature, ...]:
        there = self._wire.board.guest_hv_interface
        return tuple(feature.value for feature in there.value.features) if isinstance(there, v5.HyperVInterface) else ()

    def _cpuid(self) -> model.CpuidProfile | None:
        if (cpuid := self._wire.board.cpuid) is None:
            return None
        leaves = (
            model.CpuidLeaf(leaf=e.leaf, subleaf=e.subleaf, eax=e.eax, ebx=e.ebx, ecx=e.ecx, edx=e.edx)
            for e in cpuid.entries
        )
        return model.CpuidProfile(vendor=cpuid.vendor.value, leaves=tuple(leaves))

    def _smbios(self) -> model.SystemNames | None:
        if (names := self._wire.smbios) is None:
            return None
        return model.SystemNames(
            manufacturer=names.manufacturer,
            product_name=names.product_name,
            serial_number=names.serial_number,
            version=names.version,
        )

    def _component(self, written: str, component: v5.Component) -> None:
        name = key(written)
        if self._keys.setdefault(name, written) != written:
            self._wrong(f"is the same UUID as {self._keys[name]!r}", "components", written)
        elif isinstance(component, v5.VirtioDiskComponent):
            self._devices.append((written, self._disk(name, component.component)))
        elif isinstance(component, v5.VirtioSocketComponent):
            more = _find(self._more.sockets, name) or v5.SocketExtension()
            self._devices.append((written, v5_devices.to_socket(name, component.component, more)))
        elif isinstance(component, v5.VirtioNicComponent):
            self._devices.append((written, self._nic(name, component.component)))
        elif isinstance(component, v5.VirtioNetworkBackendComponent):
            self._backends[name] = self._network(written, name, component.component.vnic_name)
        elif isinstance(component, v5.QemuPvpanicComponent):
            panic = model.Pvpanic(name=name, enable_isa=component.component.enable_isa)
            self._devices.append((written, panic))
        elif isinstance(component, v5.SerialPortComponent):
            number = _PORTS[component.component.num]
            named = None if name == component.component.num.value else name
            self._ports.append((written, model.SerialPort(number=number, name=named)))
        elif isinstance(component, v5.FileStorageBackendComponent):
            self._backends[name] = self._file(name, component.component)
        elif isinstance(component, v5.BlobStorageBackendComponent):
            self._backends[name] = self._blob(written, name, component.component)
        elif isinstance(component, v5.BootSettingsComponent):
            self._boot_settings(written, name, component.component)
        else:
            self._wrong(f"{_UNAVAILABLE[type(component)]} is not available in this version", "components", written)

    def _disk(self, name: str, disk: v5.VirtioDisk) -> model.VirtioBlock:
        more = _find(self._more.disks, name) or v5.DiskExtension()
        path = disk.pci_path
        return model.VirtioBlock(
            name=name,
            backend=key(disk.backend_id),
            pci_path=model.PciPath(path.bus, path.device, path.function),
            queues=more.queues,
            serial=more.serial,
        )

    def _nic(self, name: str, nic: v5.VirtioNic) -> model.VirtioNic:
        more = _find(self._more.nics, name) or v5.NicExtension()
        path = nic.pci_path
        return model.VirtioNic(
            name=name,
            backend=key(nic.backend_id),
            pci_path=model.PciPath(path.bus, path.device, path.function),
            queues=more.queues,
            mac=more.mac,
            mtu=more.mtu,
            own_address_only=more.own_address_only,
            interface_id=nic.interface_id,
        )

    def _network(self, written: str, name: str, vnic: str) -> model.Network:
        more = _find(self._more.networks, name)
        if isinstance(more, v5.UserNetworkExtension) or (more is None and not vnic):
            if vnic:
                wanted = "expected an empty string, because extensions.networks says what it is"
                self._wrong(wanted, "components", written, "component", "vnic_name")
            more = more or v5.UserNetworkExtension()
            return model.UserNetwork(forward=more.forward, host=more.host)
        return model.Tap(interface=vnic or None, bridge=None if more is None else more.bridge)

    def _file(self, name: str, file: v5.FileStorageBackend) -> model.FileBlock:
        more = _find(self._more.files, name) or v5.FileExtension()
        return model.FileBlock(
            path=file.path,
            readonly=file.readonly,
            block_size=file.block_size,
            skip_flush=more.skip_flush,
            workers=file.workers,
        )

    def _blob(self, written: str, name: str, blob: v5.BlobStorageBackend) -> model.BlobBlock | model.CloudInit:
        more = _find(self._more.cloud_init, name)
        if more is None:
            try:
                content = base64.b64decode(blob.base64, validate=True)
            except (binascii.Error, ValueError) as error:
                self._wrong(f"expected base64: {error}", "components", written, "component", "base64")
                content = bytes(model.BLOB_BLOCK)
            return model.BlobBlock(content=content, readonly=blob.readonly)
        if blob.base64:
            wanted = "expected an empty string, because extensions.cloud_init says what is in it"
            self._wrong(wanted, "components", written, "component", "base64")
        if not blob.readonly:
            wanted = "expected true, because it is a volume for cloud-init"
            self._wrong(wanted, "components", written, "component", "readonly")
        return model.CloudInit(user_data=more.user_data, meta_data=more.meta_data, network_config=more.network_config)

    def _boot_settings(self, written: str, name: str, settings: v5.BootSettings) -> None:
        if self._boot_order is not None:
            self._wrong(f"a VM has one boot_settings, and {self._boot_order[0]!r} is it", "components", written)
            return
        devices = tuple(key(entry.id) for entry in settings.order)
        order = model.BootOrder(devices=devices, name=None if name == BOOT_SETTINGS else name)
        self._boot_order = written, order

    def _leftovers(self, field: str, kind: str, entries: Iterable[str], known: Container[str]) -> None:
        for written in entries:
            if key(written) not in known:
                self._wrong(f"there is no {kind} {written!r}", "extensions", field, written)

    def _boot(self) -> model.Boot | None:
        boot = self._more.boot
        if isinstance(boot, v5.DirectBoot):
            return model.DirectBoot(kernel=boot.kernel, initrd=boot.initrd, cmdline=boot.cmdline)
        if boot is None:
            return None
        return model.FirmwareBoot(
            bootrom=boot.bootrom,
            nvram=boot.nvram,
            nvram_template=boot.nvram_template,
            kernel=boot.kernel,
            initrd=boot.initrd,
            cmdline=boot.cmdline,
        )

    def _place(self, where: tuple[str | int, ...]) -> str:
        """Where in the request a field of the Spec came from."""
        first, *rest = where
        if first == "name":
            return self._name_at
        if first in _BOARD_FIELDS:
            return f"{self._at}/{_BOARD_FIELDS[str(first)]}"
        if first == "devices":
            written, device = self._devices[int(rest[0])]
            field = str(rest[1]) if len(rest) > 1 else "name"
            if isinstance(device, model.Screen):
                return self._at + pointer("extensions", "screen", field)
            if isinstance(device, VirtioSocket):
                if field == "path":
                    return self._at + pointer("extensions", "sockets", written, field)
            elif isinstance(device, model.SmallDevice):
                return self._at + pointer("extensions", "devices", written, *(rest[1:] if field != "name" else ()))
            if field in ("queues", "serial", "mac", "mtu"):
                kind = "nics" if isinstance(device, model.VirtioNic) else "disks"
                return self._at + pointer("extensions", kind, written, field)
            below = _DEVICE_FIELDS.get(field)
            return self._at + pointer("components", written) + (f"/{below}" if below else "")
        if first == "serial_ports":
            return self._at + pointer("components", self._ports[int(rest[0])][0], "component", "num")
        if first == "hyperv_features":
            return self._at + pointer("extensions", "hypervisor_interface")
        if first == "smbios":
            return self._at + pointer(*where)
        if first == "cpuid":
            return self._at + pointer("board", "cpuid", *("entries" if part == "leaves" else part for part in rest))
        if first == "boot_order" and self._boot_order is not None:
            return self._at + pointer("components", self._boot_order[0], "component", "order", rest[-1], "id")
        if first == "backends":
            return self._at + self._backend_place(str(rest[0]), rest[1:])
        return self._at + pointer("extensions", *where)

    def _backend_place(self, name: str, rest: list[str | int]) -> str:
        written = self._keys[name]
        if not rest:
            return pointer("components", written)
        if isinstance(self._backends[name], model.CloudInit):
            extension = next(other for other in self._more.cloud_init if key(other) == name)
            return pointer("extensions", "cloud_init", extension, *rest)
        if rest[0] in ("forward", "bridge"):
            extension = next(other for other in self._more.networks if key(other) == name)
            return pointer("extensions", "networks", extension, *rest)
        if rest[0] == "interface":
            rest = ["vnic_name"]
        field = "base64" if rest == ["content"] else rest[0]
        return pointer("components", written, "component", field)


class _Writer:
    def __init__(self, spec: model.Spec) -> None:
        self._spec = spec
        self._components: dict[str, v5.Component] = {}
        self._disks: dict[str, v5.DiskExtension] = {}
        self._files: dict[str, v5.FileExtension] = {}
        self._cloud_init: dict[str, v5.CloudInitExtension] = {}
        self._nics: dict[str, v5.NicExtension] = {}
        self._networks: dict[str, v5.UserNetworkExtension | v5.TapExtension] = {}
        self._screen: v5.ScreenExtension | None = None
        self._sockets: dict[str, v5.SocketExtension] = {}
        self._small: dict[str, v5.SmallDevice] = {}

    def wire(self) -> v5.InstanceSpec:
        spec = self._spec
        taken = {device.name for device in spec.devices}
        names = {}  # of the backends, in the API's one space of names
        for name in spec.backends:
            names[name] = _free(name, f"{name}-backend", taken)
            taken.add(names[name])
        for device in spec.devices:
            self._device(device, names)
        for name, backend in spec.backends.items():
            self._backend(names[name], backend)
        for port in spec.serial_ports:
            number = _PORT_NUMBERS[port.number]
            name = _free(port.name or number.value, f"serial-{number.value}", taken)
            taken.add(name)
            self._components[name] = v5.SerialPortComponent(component=v5.SerialPort(num=number))
        if (order := spec.boot_order) is not None:
            settings = v5.BootSettings(order=tuple(v5.BootOrderEntry(id=device) for device in order.devices))
            name = _free(order.name or BOOT_SETTINGS, "boot-settings", taken)
            self._components[name] = v5.BootSettingsComponent(component=settings)
        more = self._extensions()
        return v5.InstanceSpec(
            board=v5.Board(
                cpus=spec.cpus,
                memory_mb=spec.memory_mib,
                chipset=v5.I440FxChipset(value=v5.I440Fx(enable_pcie=False)),
                guest_hv_interface=_interface(spec),
                cpuid=None if spec.cpuid is None else _cpuid(spec.cpuid),
            ),
            components=self._components,
            smbios=None if spec.smbios is None else _smbios(spec.smbios),
            extensions=None if more == v5.Extensions() else more,
        )

    def _device(self, device: model.Device, backends: dict[str, str]) -> None:
        if isinstance(device, model.Pvpanic):
            panic = v5.QemuPvpanic(enable_isa=device.enable_isa)
            self._components[device.name] = v5.QemuPvpanicComponent(component=panic)
            return
        if isinstance(device, model.Screen):
            self._screen = v5.ScreenExtension(name=device.name)
            return
        if isinstance(device, VirtioSocket):
            self._components[device.name], self._sockets[device.name] = v5_devices.from_socket(device)
            return
        if isinstance(device, model.SmallDevice):
            self._small[device.name] = v5_devices.from_device(device)
            return
        path = v5.PciPath(bus=device.pci_path.bus, device=device.pci_path.device, function=device.pci_path.function)
        if isinstance(device, model.VirtioNic):
            self._nic(device, backends[device.backend], path)
            return
        disk = v5.VirtioDisk(backend_id=backends[device.backend], pci_path=path)
        self._components[device.name] = v5.VirtioDiskComponent(component=disk)
        more = v5.DiskExtension(queues=device.queues, serial=device.serial)
        if more != v5.DiskExtension():
            self._disks[device.name] = more

    def _nic(self, device: model.VirtioNic, backend: str, path: v5.PciPath) -> None:
        identity = device.interface_id or uuid.uuid5(_NOBODY, device.name)
        nic = v5.VirtioNic(backend_id=backend, interface_id=identity, pci_path=path)
        self._components[device.name] = v5.VirtioNicComponent(component=nic)
        more = v5.NicExtension(
            queues=device.queues, mac=device.mac, mtu=device.mtu, own_address_only=device.own_address_only
        )
        if more != v5.NicExtension():
            self._nics[device.name] = more

    def _network(self, name: str, network: model.Network) -> None:
        vnic = ""
        if network == model.UserNetwork():
            pass  # as one is that nothing is said of
        elif isinstance(network, model.UserNetwork):
            self._networks[name] = v5.UserNetworkExtension(forward=network.forward, host=network.host)
        else:
            vnic = network.interface or ""
            if not vnic or network.bridge is not None:
                self._networks[name] = v5.TapExtension(bridge=network.bridge)
        backend = v5.VirtioNetworkBackend(vnic_name=vnic)
        self._components[name] = v5.VirtioNetworkBackendComponent(component=backend)

    def _backend(self, name: str, backend: model.Backend) -> None:
        if isinstance(backend, model.UserNetwork | model.Tap):
            self._network(name, backend)
            return
        if isinstance(backend, model.FileBlock):
            self._file(name, backend)
            return
        text = ""
        if isinstance(backend, model.BlobBlock):
            text = base64.b64encode(backend.content).decode()
        else:
            self._cloud_init[name] = v5.CloudInitExtension(
                user_data=backend.user_data, meta_data=backend.meta_data, network_config=backend.network_config
            )
        blob = v5.BlobStorageBackend(base64=text, readonly=backend.readonly)
        self._components[name] = v5.BlobStorageBackendComponent(component=blob)

    def _file(self, name: str, backend: model.FileBlock) -> None:
        file = v5.FileStorageBackend(
            block_size=backend.block_size, path=backend.path, readonly=backend.readonly, workers=backend.workers
        )
        self._components[name] = v5.FileStorageBackendComponent(component=file)
        if backend.skip_flush:
            self._files[name] = v5.FileExtension(skip_flush=True)

    def _extensions(self) -> v5.Extensions:
        spec = self._spec
        boot: v5.DirectBoot | v5.FirmwareBoot | None = None
        if isinstance(spec.boot, model.DirectBoot):
            boot = v5.DirectBoot(kernel=spec.boot.kernel, initrd=spec.boot.initrd, cmdline=spec.boot.cmdline)
        else:
            boot = v5.FirmwareBoot(
                bootrom=spec.boot.bootrom,
                nvram=spec.boot.nvram,
                nvram_template=spec.boot.nvram_template,
                kernel=spec.boot.kernel,
                initrd=spec.boot.initrd,
                cmdline=spec.boot.cmdline,
            )
        return v5.Extensions(
            boot=None if spec.boot_is_default else boot,
            hypervisor_interface="none" if spec.hypervisor_interface == "none" else None,
            memory_backing=spec.memory_backing,
            disks=self._disks,
            files=self._files,
            cloud_init=self._cloud_init,
            nics=self._nics,
            networks=self._networks,
            screen=self._screen,
            sockets={name: more for name, more in self._sockets.items() if more != v5.SocketExtension()},
            devices=self._small,
            exit_on_halt=spec.exit_on_halt,
            exit_on_reboot=spec.exit_on_reboot,
        )


def _interface(spec: model.Spec) -> v5.GuestHypervisorInterface | None:
    if spec.hypervisor_interface == "hyper-v":
        features = tuple(v5.HyperVFeatureFlag(feature) for feature in spec.hyperv_features)
        return v5.HyperVInterface(value=v5.HyperVFeatures(features=features))
    return v5.BhyveInterface() if spec.hypervisor_interface == "bhyve" else None


def _smbios(names: model.SystemNames) -> v5.SmbiosType1Input:
    return v5.SmbiosType1Input(
        manufacturer=names.manufacturer,
        product_name=names.product_name,
        serial_number=names.serial_number,
        version=names.version,
    )


def _cpuid(profile: model.CpuidProfile) -> v5.Cpuid:
    entries = (
        v5.CpuidEntry(leaf=e.leaf, subleaf=e.subleaf, eax=e.eax, ebx=e.ebx, ecx=e.ecx, edx=e.edx)
        for e in profile.leaves
    )
    return v5.Cpuid(vendor=v5.CpuidVendor(profile.vendor), entries=tuple(entries))


def _find(entries: dict[str, T], name: str) -> T | None:
    return next((more for other, more in entries.items() if key(other) == name), None)


def _free(name: str, other: str, taken: set[str]) -> str:
    """`name` if it is still free, else `other`, with a number where that is taken too."""
    if name not in taken:
        return name
    number = 2
    candidate = other
    while candidate in taken:
        candidate = f"{other}-{number}"
        number += 1
    return candidate
