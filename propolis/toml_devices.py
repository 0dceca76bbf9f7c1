"""The tables of a TOML file that describe devices, for whatever file has them.

They are `[dev.NAME]`, and what is behind each, `[block_dev.NAME]` and `[net_dev.NAME]`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from propolis import spec as model
from propolis.small_devices import MIN_GUEST_CID, ConsolePort, VirtioConsole, VirtioRng, VirtioSocket
from propolis.toml_table import (
    NOT_HERE,
    Log,
    Path,
    Table,
    UnexpectedError,
    advice,
    flag,
    show,
    text,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    AsPath = Callable[[object], str]

# What the grammar has beside the things that this version runs.
_OTHER_BACKENDS = ("crucible", "crucible-mem", "mem-async")
_OTHER_DRIVERS = (
    "pci-nvme",
    "pci-virtio-9p",
    "softnpu-pci-port",
    "softnpu-port",
    "softnpu-p9",
)

_BACKENDS = ("file", "cloudinit")
_NETWORKS = ("user", "tap")

# The keys of the file that are not called as the field of the Spec which they set.
_KEYS = {"pci_path": "pci-path"}
_NETWORK_FIELDS = ("forward", "interface", "bridge")

_TEXTS = ("user-data", "meta-data", "network-config")

# Stands in for a PCI path that was wrong and is reported, so that the rest of the file is checked as well.
_NOWHERE = model.PciPath(0, 0, 0)


class DeviceTables:
    """Reads devices and what stands behind them; relative paths begin at `folder`.

    Texts that are files of their own are read from there, but only with `may_read`: where the file was written on
    another machine, they are on that one.
    """

    def __init__(self, folder: str, *, may_read: bool = True) -> None:
        self._folder = folder
        self._may_read = may_read
        self._implied: dict[str, model.Network] = {}  # of cards that name no [net_dev]

    def read(self, root: Table) -> tuple[list[model.Device], dict[str, model.Backend]]:
        """The tables `[dev]`, `[block_dev]`, `[net_dev]` and `[cloudinit]` of a file."""
        cloud_init = self._cloud_init(root.table("cloudinit")) if "cloudinit" in root else None
        tables = root.table("block_dev")
        backends = {name: self._backend(tables.table(name), cloud_init) for name in tables.names}
        if cloud_init is not None and cloud_init not in backends.values():
            root.wrong("cloudinit", "no [block_dev.NAME] is the volume: expected one of type 'cloudinit'", is_key=True)
        networks = root.table("net_dev")
        for name in networks.names:
            network = self._network(networks.table(name))
            if backends.setdefault(name, network) is not network:
                networks.wrong(name, f"there is a [block_dev.{name}] as well: expected another name", is_key=True)
        devices = self._devices(root.table("dev"))
        for device in devices:
            if isinstance(device, model.VirtioNic) and device.backend == _implied(device.name):
                backends.setdefault(device.backend, self._implied.get(device.name, model.UserNetwork()))
        return devices, backends

    def _network(self, table: Table) -> model.Network:
        kind = table.require("type", text, None, f"one of {', '.join(map(repr, _NETWORKS))}")
        network: model.Network = model.UserNetwork()
        if kind == "user":
            network = model.UserNetwork(
                forward=table.take("forward", _texts, ()),
                host=table.take("host", flag, False),
            )
        elif kind == "tap":
            network = model.Tap(
                interface=table.take("interface", text, None),
                bridge=table.take("bridge", text, None),
            )
        else:
            if kind is not None:
                table.wrong("type", f"unknown network type {show(kind)}: {advice(kind, list(_NETWORKS))}")
            return network
        table.finish()
        return network

    def _cloud_init(self, table: Table) -> model.CloudInit:
        user_data, meta_data, network_config = (self._text(table, key) for key in _TEXTS)
        if "user-data" not in table and "user-data-path" not in table:
            table.wrong("user-data", "[cloudinit] has no 'user-data': expected it or 'user-data-path'", is_key=True)
        table.finish()
        return model.CloudInit(user_data=user_data or "", meta_data=meta_data, network_config=network_config)

    def _text(self, table: Table, key: str) -> str | None:
        here = table.take(key, text, None)
        at_path = f"{key}-path"
        there = table.take(at_path, self._content, None)
        if key in table and at_path in table:
            table.wrong(key, f"{key!r} and {at_path!r} are both given: expected one of them", is_key=True)
        return there if here is None else here

    def _content(self, value: object) -> str:
        path = self.path(value)
        if not self._may_read:
            raise UnexpectedError("expected the text itself, because this file came without the others")
        return read_cloud_init(path)

    def _backend(self, table: Table, cloud_init: model.CloudInit | None) -> model.Backend:
        """A wrong backend is kept under its name, so that the device that uses it is not reported as well."""
        kind = table.require("type", text, None, f"one of {', '.join(map(repr, _BACKENDS))}")
        if kind == "cloudinit":
            if cloud_init is None:
                table.wrong("type", "the file has no [cloudinit]: expected one with user-data")
            table.finish()
            return cloud_init or model.CloudInit()
        if kind in _OTHER_BACKENDS:
            table.wrong("type", f"block backend type {kind!r} {NOT_HERE}: {advice('', list(_BACKENDS))}")
        elif kind is not None and kind != "file":
            hint = advice(kind, list(_BACKENDS), [*_BACKENDS, *_OTHER_BACKENDS])
            table.wrong("type", f"unknown block backend type {show(kind)}: {hint}")
        if kind != "file":
            return model.FileBlock(path="?")
        path = table.require("path", self.path, "?", "the path of a disk image")
        readonly = table.take("readonly", _old_flag, False)
        read_only = table.take("read_only", flag, False)
        if "readonly" in table and "read_only" in table:
            table.wrong("readonly", "'readonly' and 'read_only' are both given: expected one of them", is_key=True)
        block_size = table.take("block_size", whole, 512)
        skip_flush = table.take("skip_flush", flag, False)
        workers = table.take("workers", whole, None)
        table.finish()
        return model.FileBlock(
            path=path,
            readonly=readonly or read_only,
            block_size=block_size,
            skip_flush=skip_flush,
            workers=workers,
        )

    def _devices(self, tables: Table) -> list[model.Device]:
        devices = (self._device(name, tables.table(name)) for name in tables.names)
        return [device for device in devices if device is not None]

    def _device(self, name: str, table: Table) -> model.Device | None:
        driver = table.require("driver", text, None, f"one of {', '.join(map(repr, _DRIVERS))}")
        if driver is None:
            return None
        if driver in _OTHER_DRIVERS:
            table.wrong("driver", f"driver {driver!r} {NOT_HERE}")
            return None
        read = _DRIVERS.get(driver)
        if read is None:
            hint = advice(driver, list(_DRIVERS), [*_DRIVERS, *_OTHER_DRIVERS])
            table.wrong("driver", f"unknown driver {show(driver)}: {hint}")
            return None
        device = read(name, table, self.path)
        if driver == "pci-virtio-viona":
            self._implied[name] = model.Tap(interface=table.require("vnic", text, "?", "the name of a host's link"))
        table.finish()
        return device

    def path(self, value: object) -> str:
        """Paths in the file are relative to its folder, wherever the program was started."""
        path = text(value)
        if not path or "\0" in path:
            raise UnexpectedError(f"expected the path of a file, not {show(path)}")
        return os.path.join(self._folder, path)


def _take_pci_path(table: Table) -> model.PciPath:
    return table.require("pci-path", _pci_path, _NOWHERE, 'a PCI path such as "0.4.0"')


def _virtio_block(name: str, table: Table, _: AsPath) -> model.Device:
    return model.VirtioBlock(
        name=name,
        backend=table.require("block_dev", text, "", "the name of a [block_dev.NAME]"),
        pci_path=_take_pci_path(table),
        queues=table.take("queues", whole, 1),
        serial=table.take("serial", text, None),
    )


def _implied(card: str) -> str:
    """What the network of a card is called that names none."""
    return f"{card[:54]}-network"


def _virtio_net(name: str, table: Table, _: AsPath) -> model.Device:
    return model.VirtioNic(
        name=name,
        backend=table.take("net_dev", text, _implied(name)),
        pci_path=_take_pci_path(table),
        queues=table.take("queues", whole, 1),
        mac=table.take("mac", text, None),
        mtu=table.take("mtu", whole, None),
        own_address_only=table.take("own_address_only", flag, False),
    )


def _viona(name: str, table: Table, _: AsPath) -> model.Device:
    return model.VirtioNic(
        name=name,
        backend=_implied(name),
        pci_path=_take_pci_path(table),
    )


def _pvpanic(name: str, table: Table, _: AsPath) -> model.Device:
    return model.Pvpanic(name=name, enable_isa=table.take("enable_isa", flag, False))


def _virtio_rng(name: str, table: Table, _: AsPath) -> model.Device:
    return VirtioRng(
        name=name,
        pci_path=_take_pci_path(table),
        bytes_per_second=table.take("bytes_per_second", whole, None),
    )


def _screen(name: str, _table: Table, _: AsPath) -> model.Device:
    return model.Screen(name=name)


def _virtio_socket(name: str, table: Table, path: AsPath) -> model.Device:
    return VirtioSocket(
        name=name,
        pci_path=_take_pci_path(table),
        guest_cid=table.require("guest_cid", _number, MIN_GUEST_CID, "the guest's number, from 3 on"),
        path=table.take("path", path, None),
    )


def _virtio_console(name: str, table: Table, path: AsPath) -> model.Device:
    console = table.take("console", path, None)
    ports = table.table("ports")
    found = [] if console is None else [ConsolePort(name="console", path=console, is_console=True)]
    found += [ConsolePort(name=port, path=ports.take(port, path, "?")) for port in ports.names]
    if not found:
        table.wrong("ports", f"{name!r} has no port: expected 'console' or [dev.{name}.ports]", is_key=True)
        found = [ConsolePort(name="?", path="?")]
    return VirtioConsole(name=name, pci_path=_take_pci_path(table), ports=tuple(found))


def _number(value: object) -> int:
    """`guest_cid` was once written as a string."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else whole(value)


_DRIVERS: dict[str, Callable[[str, Table, AsPath], model.Device]] = {
    "pci-virtio-block": _virtio_block,
    "pci-virtio-console": _virtio_console,
    "pci-virtio-rng": _virtio_rng,
    "pci-virtio-socket": _virtio_socket,
    "pci-virtio-net": _virtio_net,
    "pci-virtio-viona": _viona,
    "qemu-pvpanic": _pvpanic,
    "ramfb": _screen,
}


def place_in_file(where: Path, devices: list[model.Device]) -> tuple[Path, bool] | None:
    """The path in the file of a field of a Spec that is about its devices, and whether the key there is at fault."""
    if where[0] == "devices" and isinstance(where[1], int):
        device = devices[where[1]]
        table: Path = ("dev", device.name)
        field = str(where[-1])
        if len(where) == 2 or field == "name":
            return table, True
        if field == "backend":
            return (*table, "net_dev" if isinstance(device, model.VirtioNic) else "block_dev"), False
        return (*table, _KEYS.get(field, field)), False
    if where[0] == "boot_order":
        return ("main", "boot_order", where[-1]), False
    if where[0] == "backends":
        if len(where) == 2:
            is_network = any(isinstance(d, model.VirtioNic) and d.backend == where[1] for d in devices)
            return ("net_dev" if is_network else "block_dev", where[1]), True
        if where[2] in _NETWORK_FIELDS:
            card = next((d.name for d in devices if isinstance(d, model.VirtioNic) and d.backend == where[1]), None)
            if card is not None and where[1] == _implied(card):
                return ("dev", card, "vnic"), False
            return ("net_dev", *where[1:3]), False
        if (key := str(where[2]).replace("_", "-")) in _TEXTS:
            return ("cloudinit", key), False
        return ("block_dev", *where[1:]), False
    return None


def report(log: Log, problem: model.Problem, place: tuple[Path, bool]) -> None:
    """Notes what is wrong with a Spec, at its place in the file."""
    path, is_key = place
    field = next(part for part in reversed(path) if isinstance(part, str))
    log.add(path, problem.message if is_key else f"{field}: {problem.message}", is_key=is_key)


def take_boot_order(table: Table) -> model.BootOrder | None:
    """The key `boot_order`, an array of the names of devices."""
    names = table.take("boot_order", _names, None)
    return None if names is None else model.BootOrder(devices=names)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UnexpectedError(f"expected an array of strings, not {show(value)}")
    return tuple(value)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UnexpectedError(f"expected an array of the names of devices, not {show(value)}")
    return tuple(value)


def read_cloud_init(path: str) -> str:
    """The text in a file for cloud-init. Raises UnexpectedError, which says what is wrong with the file."""
    try:
        with open(path, "rb") as file:
            content = file.read(model.MAX_CLOUD_INIT_BYTES + 1)
    except OSError as error:
        raise UnexpectedError(f"open {path!r}: {error.strerror}") from error
    if len(content) > model.MAX_CLOUD_INIT_BYTES:
        raise UnexpectedError(f"{path!r}: expected at most {model.MAX_CLOUD_INIT_BYTES} bytes of text")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UnexpectedError(f"{path!r}: expected UTF-8 text, found a byte that is none") from error


def _old_flag(value: object) -> bool:
    """`readonly` was once written as a string, and files that do so still work."""
    return value == "true" or flag(value)


def _pci_path(value: object) -> model.PciPath:
    path = text(value)
    try:
        return model.PciPath.parse(path)
    except ValueError as error:
        raise UnexpectedError(f"{error}, not {show(path)}") from error
