"""The small devices of a Spec become devices, with what they need of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from propolis import small_devices as model
from propolis.devices.virtio.console import PortSetting, VirtioConsole
from propolis.devices.virtio.rng import VirtioRng
from propolis.devices.virtio.vsock import VirtioVsock

if TYPE_CHECKING:
    import socket
    from contextlib import ExitStack

    from propolis._vmm import Vm
    from propolis.devices.virtio.device import VirtioDevice
    from propolis.devices.virtio.vsock import Connector


class Listener(Protocol):
    """A socket that listens, to be closed after the device that has it."""

    @property
    def socket(self) -> socket.socket: ...
    def close(self) -> None: ...


class SocketOpener(Protocol):
    """The keeper, as far as these devices need it."""

    def open_listener(self, path: str) -> Listener: ...
    def open_connector(self, path: str) -> Connector: ...


def make_device(vm: Vm, device: model.SmallDevice, keeper: SocketOpener, undo: ExitStack) -> VirtioDevice:
    """Raises BusyError or BackendError where one of its sockets cannot be had."""
    match device:
        case model.VirtioRng():
            return VirtioRng(vm, device.name, bytes_per_second=device.bytes_per_second)
        case model.VirtioSocket():
            return _socket(vm, device, keeper, undo)
        case model.VirtioConsole():
            ports = [PortSetting(port.name, port.is_console, _listen(keeper, port.path, undo)) for port in device.ports]
            return VirtioConsole(vm, device.name, ports)


def _socket(vm: Vm, device: model.VirtioSocket, keeper: SocketOpener, undo: ExitStack) -> VirtioVsock:
    if device.path is None:
        return VirtioVsock(vm, device.name, guest_cid=device.guest_cid)
    listener = _listen(keeper, device.path, undo)
    connector = keeper.open_connector(device.path)
    undo.callback(connector.close)
    return VirtioVsock(vm, device.name, guest_cid=device.guest_cid, listener=listener, connector=connector)


def _listen(keeper: SocketOpener, path: str, undo: ExitStack) -> socket.socket:
    listener = keeper.open_listener(path)
    undo.callback(listener.close)
    listener.socket.setblocking(False)
    return listener.socket
