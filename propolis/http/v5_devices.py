"""The devices of `extensions.devices` become those of a Spec and back: they have the same fields, but for the name."""

from __future__ import annotations

import msgspec

from propolis import spec as model
from propolis.http import v5


def to_device(name: str, wire: v5.SmallDevice) -> model.SmallDevice:
    """The device called `name`."""
    return msgspec.convert({**msgspec.to_builtins(wire), "name": name}, model.SmallDevice)


def from_device(device: model.SmallDevice) -> v5.SmallDevice:
    """What goes below the device's name."""
    fields = msgspec.to_builtins(device)
    del fields["name"]
    return msgspec.convert(fields, v5.SmallDevice)
