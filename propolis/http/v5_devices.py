"""The devices of `extensions.devices` become those of a Spec and back: they have the same fields, but for the name."""

from __future__ import annotations

import msgspec

from propolis import spec as model
from propolis.http import v5
from propolis.small_devices import VirtioSocket


def to_device(name: str, wire: v5.SmallDevice) -> model.SmallDevice:
    """The device called `name`."""
    device: model.SmallDevice = msgspec.convert({**msgspec.to_builtins(wire), "name": name}, model.SmallDevice)
    return device


def to_socket(name: str, wire: v5.VirtioSocket, more: v5.SocketExtension) -> VirtioSocket:
    """5.0.0 has a word for it, but not for the host's side."""
    path = model.PciPath(wire.pci_path.bus, wire.pci_path.device, wire.pci_path.function)
    return VirtioSocket(name=name, pci_path=path, guest_cid=wire.guest_cid, path=more.path)


def from_socket(device: VirtioSocket) -> tuple[v5.VirtioSocketComponent, v5.SocketExtension]:
    """The component, and what 5.0.0 has no word for."""
    at = device.pci_path
    path = v5.PciPath(bus=at.bus, device=at.device, function=at.function)
    wire = v5.VirtioSocket(guest_cid=device.guest_cid, pci_path=path)
    return v5.VirtioSocketComponent(component=wire), v5.SocketExtension(path=device.path)


def from_device(device: model.SmallDevice) -> v5.SmallDevice:
    """What goes below the device's name."""
    fields = msgspec.to_builtins(device)
    del fields["name"]
    wire: v5.SmallDevice = msgspec.convert(fields, v5.SmallDevice)
    return wire
