"""The tables of a TOML file that describe devices, `[block_dev.NAME]` and `[dev.NAME]`, for whatever file has them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from propolis import spec as model
from propolis.toml_table import (
    NOT_HERE,
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

# The keys of the file that are not called as the field of the Spec which they set.
_KEYS = {"pci_path": "pci-path", "backend": "block_dev"}

# Stands in for a PCI path that was wrong and is reported, so that the rest of the file is checked as well.
_NOWHERE = model.PciPath(0, 0, 0)


class DeviceTables:
    """Reads devices and what stands behind them; relative paths begin at `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def backends(self, tables: Table) -> dict[str, model.Backend]:
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

    def devices(self, tables: Table) -> list[model.Device]:
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

    def path(self, value: object) -> str:
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


def place_in_file(where: Path, devices: list[model.Device]) -> tuple[Path, bool] | None:
    """The path in the file of a field of a Spec's devices or backends, and whether the key there is at fault."""
    if where[0] == "devices" and isinstance(where[1], int):
        table: Path = ("dev", devices[where[1]].name)
        field = str(where[-1])
        if len(where) == 2 or field == "name":
            return table, True
        return (*table, _KEYS.get(field, field)), False
    if where[0] == "backends":
        if len(where) == 2:
            return ("block_dev", where[1]), True
        return ("block_dev", *where[1:]), False
    return None


def _old_flag(value: object) -> bool:
    """`readonly` was once written as a string, and files that do so still work."""
    return value == "true" or flag(value)


def _pci_path(value: object) -> model.PciPath:
    path = text(value)
    try:
        return model.PciPath.parse(path)
    except ValueError as error:
        raise UnexpectedError(f"{error}, not {show(path)}") from error
