"""The TOML file of `propolis-standalone`, read into a Spec.

Everything wrong with a file is reported at once, a line for each place: `vm.toml:3:8: cpus: expected ...`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from propolis import spec as model
from propolis.toml_table import (
    NOT_HERE,
    Log,
    Path,
    Table,
    UnexpectedError,
    advice,
    flag,
    parse_text,
    read_text,
    show,
    text,
    whole,
)

# What the grammar has beside the things that this version runs.
_OTHER_BACKENDS = ("crucible", "crucible-mem", "mem-async", "cloudinit")
_OTHER_DRIVERS = (
    "pci-nvme",
    "pci-virtio-viona",
    "pci-virtio-socket",
    "pci-virtio-9p",
    "softnpu-pci-port",
    "softnpu-port",
    "softnpu-p9",
)

if TYPE_CHECKING:
    from collections.abc import Callable
_OTHER_TABLES = ("cloudinit", "cpuid", "pci_bridge")
_OTHER_MAIN_KEYS = ("bootrom_version", "cpuid_profile", "cpu_binding", "boot_order", "acpi_variant")

# The keys of the file that are not called as the field of the Spec which they set.
_MAIN_KEYS = {"memory_mib": "memory"}
_DEVICE_KEYS = {"pci_path": "pci-path", "backend": "block_dev"}

# Stands in for a PCI path that was wrong and is reported, so that the rest of the file is checked as well.
_NOWHERE = model.PciPath(0, 0, 0)


def load(path: str | os.PathLike[str]) -> model.Spec:
    """Read the file at `path`; a ConfigError has one line for each thing wrong with it."""
    shown = os.fspath(path)
    return parse(read_text(shown), shown, os.path.dirname(os.path.abspath(shown)))


def parse(source: str, shown: str, folder: str) -> model.Spec:
    """Read the text of a file; messages call it `shown`, relative paths in it begin at `folder`."""
    log = Log()
    spec = _Reader(log, folder).document(Table(log, (), parse_text(source, shown)))
    if spec is None or log:
        raise log.error(source, shown)
    return spec


class _Reader:
    """The grammar, a method for each table."""

    def __init__(self, log: Log, folder: str) -> None:
        self._log = log
        self._folder = folder

    def document(self, root: Table) -> model.Spec | None:
        main = root.table("main")
        chipset = root.table("chipset")
        if chipset.take("enable-pcie", flag, False):
            chipset.wrong("enable-pcie", f"enable-pcie = true {NOT_HERE}", is_key=True)
        chipset.finish()
        backends = self._backends(root.table("block_dev"))
        devices = self._devices(root.table("dev"))
        root.unavailable(*_OTHER_TABLES)
        spec = None
        if "main" not in root:
            root.wrong("main", "the file has no [main]: expected one with name, cpus, memory and kernel", is_key=True)
        else:
            spec = self._main(main, devices, backends)
        root.finish(lambda key: "it belongs in [main]" if key in main.known else None)
        return spec

    def _main(self, main: Table, devices: list[model.Device], backends: dict[str, model.Backend]) -> model.Spec | None:
        name = main.require("name", text, "unnamed", "the VM's name")
        cpus = main.require("cpus", whole, 1, f"a number from 1 to {model.MAX_CPUS}")
        memory_mib = main.require("memory", whole, model.MIN_MEMORY_MIB, "a number of MiB")
        boot = self._boot(main)
        interface: model.HypervisorInterface = main.take("hypervisor_interface", _hypervisor_interface, "kvm")
        backing: model.MemoryBacking = main.take("memory_backing", _memory_backing, "anonymous")
        exit_on_halt = main.take("exit_on_halt", whole, 0)
        exit_on_reboot = main.take("exit_on_reboot", whole, None)
        if main.take("use_reservoir", flag, False):
            main.wrong("use_reservoir", f"use_reservoir = true {NOT_HERE}", is_key=True)
        main.unavailable(*_OTHER_MAIN_KEYS)
        main.finish()
        try:
            return model.Spec(
                name=name,
                cpus=cpus,
                memory_mib=memory_mib,
                boot=boot,
                memory_backing=backing,
                hypervisor_interface=interface,
                devices=tuple(devices),
                backends=backends,
                exit_on_halt=exit_on_halt,
                exit_on_reboot=exit_on_reboot,
            )
        except model.SpecError as error:
            for problem in error.problems:
                path, is_key = _place_in_file(problem.where, devices)
                self._log.add(path, problem.message if is_key else f"{path[-1]}: {problem.message}", is_key=is_key)
            return None

    def _boot(self, main: Table) -> model.Boot:
        kernel = main.take("kernel", self._path, None)
        initrd = main.take("initrd", self._path, None)
        cmdline = main.take("cmdline", text, "")
        main.take("bootrom", self._path, None)
        if "bootrom" in main and "kernel" in main:
            main.wrong("bootrom", "'bootrom' and 'kernel' are both given: expected 'kernel' alone", is_key=True)
        elif "bootrom" in main:
            message = (
                "'bootrom' is known, but this version only boots a kernel directly: expected 'kernel' in its place"
            )
            main.wrong("bootrom", message, is_key=True)
        elif "kernel" not in main:
            main.wrong("kernel", "[main] has no 'kernel': expected the path of a Linux kernel", is_key=True)
        return model.DirectBoot(kernel=kernel or "?", initrd=initrd, cmdline=cmdline)

    def _backends(self, tables: Table) -> dict[str, model.Backend]:
        return {name: self._backend(tables.table(name)) for name in tables.names}

    def _backend(self, table: Table) -> model.Backend:
        """A wrong backend is kept under its name, so that the device that uses it is not reported as well."""
        kind = table.require("type", text, None, "'file'")
        if kind in _OTHER_BACKENDS:
            table.wrong("type", f"block backend type {kind!r} {NOT_HERE}: expected 'file'")
        elif kind is not None and kind != "file":
            hint = advice(kind, ["file"], ["file", *_OTHER_BACKENDS])
            table.wrong("type", f"unknown block backend type {show(kind)}: {hint}")
        if kind != "file":
            return model.FileBlock(path="?")
        path = table.require("path", self._path, "?", "the path of a disk image")
        readonly = table.take("readonly", _old_flag, False)
        read_only = table.take("read_only", flag, False)
        if "readonly" in table and "read_only" in table:
            table.wrong("readonly", "'readonly' and 'read_only' are both given: expected one of them", is_key=True)
        block_size = table.take("block_size", whole, 512)
        skip_flush = table.take("skip_flush", flag, False)
        workers = table.take("workers", whole, 8)
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
        device = read(name, table)
        table.finish()
        return device

    def _path(self, value: object) -> str:
        """Paths in the file are relative to its folder, wherever the program was started."""
        path = text(value)
        if not path or "\0" in path:
            raise UnexpectedError(f"expected the path of a file, not {show(path)}")
        return os.path.join(self._folder, path)


def _virtio_block(name: str, table: Table) -> model.Device:
    return model.VirtioBlock(
        name=name,
        backend=table.require("block_dev", text, "", "the name of a [block_dev.NAME]"),
        pci_path=table.require("pci-path", _pci_path, _NOWHERE, 'a PCI path such as "0.4.0"'),
        queues=table.take("queues", whole, 1),
        serial=table.take("serial", text, None),
    )


def _pvpanic(name: str, table: Table) -> model.Device:
    return model.Pvpanic(name=name, enable_isa=table.take("enable_isa", flag, False))


_DRIVERS: dict[str, Callable[[str, Table], model.Device]] = {
    "pci-virtio-block": _virtio_block,
    "qemu-pvpanic": _pvpanic,
}


def _place_in_file(where: Path, devices: list[model.Device]) -> tuple[Path, bool]:
    """The path in the file of a field of the Spec, and whether the key there is at fault."""
    if where[0] == "devices" and isinstance(where[1], int):
        table: Path = ("dev", devices[where[1]].name)
        field = str(where[-1])
        if len(where) == 2 or field == "name":
            return table, True
        return (*table, _DEVICE_KEYS.get(field, field)), False
    if where[0] == "backends":
        if len(where) == 2:
            return ("block_dev", where[1]), True
        return ("block_dev", *where[1:]), False
    field = str(where[-1])
    return ("main", _MAIN_KEYS.get(field, field)), False


def _old_flag(value: object) -> bool:
    """`readonly` was once written as a string, and files that do so still work."""
    return value == "true" or flag(value)


def _pci_path(value: object) -> model.PciPath:
    path = text(value)
    try:
        return model.PciPath.parse(path)
    except ValueError as error:
        raise UnexpectedError(f"{error}, not {show(path)}") from error


def _hypervisor_interface(value: object) -> Literal["kvm", "bhyve", "none"]:
    if value == "kvm" or value == "bhyve" or value == "none":
        return value
    raise UnexpectedError(f"expected 'kvm', 'bhyve' or 'none', not {show(value)}")


def _memory_backing(value: object) -> Literal["anonymous", "memfd", "hugetlb"]:
    if value == "anonymous" or value == "memfd" or value == "hugetlb":
        return value
    raise UnexpectedError(f"expected 'anonymous', 'memfd' or 'hugetlb', not {show(value)}")
