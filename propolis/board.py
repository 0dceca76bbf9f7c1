"""The board of one machine: chipset, serial ports and the devices of its Spec, each at its place."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from propolis import spec as model
from propolis.backends._iopool import IoPool
from propolis.backends.block import nocloud
from propolis.backends.block.file import FileBackend
from propolis.backends.block.memory import MemoryBackend
from propolis.board_network import open_backend
from propolis.devices.keyboard_controller import KeyboardController
from propolis.devices.pci.bus import Windows
from propolis.devices.pci.chipset import Chipset
from propolis.devices.pm import PowerManagement
from propolis.devices.ports import DebugConsole, LegacyPorts, Pvpanic
from propolis.devices.power import PowerEvent
from propolis.devices.ramfb import Ramfb
from propolis.devices.rtc import RealTimeClock
from propolis.devices.serial import Serial
from propolis.devices.virtio.blk import VirtioBlk
from propolis.devices.virtio.net import VirtioNet, own_mac
from propolis.firmware.board import Board as TableBoard
from propolis.firmware.layout import ram_ranges
from propolis.small_board import SocketOpener, make_device

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable

    from propolis._vmm import Vm
    from propolis.devices.device import Device
    from propolis.firmware.layout import DeviceWindows


class Keeper(SocketOpener, Protocol):
    """The keeper, as far as the board needs it."""

    def open_disk(self, path: str, *, read_only: bool) -> int: ...
    def open_network(self, name: str, network: model.Network, queues: int) -> list[int]: ...


class Board:
    """Everything on the buses. Built with the machine; `devices` are in the order of their start."""

    def __init__(
        self,
        vm: Vm,
        spec: model.Spec,
        identity: uuid.UUID,
        keeper: Keeper,
        windows: DeviceWindows,
        on_power: Callable[[PowerEvent], None],
        undo: ExitStack,
    ) -> None:
        self._spec = spec
        self._identity = identity
        self._windows = windows
        power = vm.mailbox.register(lambda bits: on_power(PowerEvent(bits)))
        low, *high = ram_ranges(spec.memory_mib << 20)
        legacy = LegacyPorts(vm, power)
        self.power = PowerManagement(vm, power)
        self.debug_console = DebugConsole(vm)
        has_screen = any(isinstance(device, model.Screen) for device in spec.devices)
        self.keyboard = KeyboardController(vm, power, has_devices=has_screen)
        self.ramfb = Ramfb(vm.memory) if has_screen else None
        self.devices: list[Device] = [
            legacy,
            self.keyboard,
            self.power,
            RealTimeClock(vm, low.size, sum(part.size for part in high)),
            self.debug_console,
        ]
        self.chipset = Chipset(vm, legacy.reset_control)
        self.serial_ports = {port.number: Serial(vm, port.number) for port in spec.serial_ports}
        self.devices += self.serial_ports.values()
        for device in spec.devices:
            if isinstance(device, model.VirtioBlock):
                self._add_disk(vm, device, spec.backends[device.backend], keeper, undo)
            elif isinstance(device, model.VirtioNic):
                self._add_card(vm, device, keeper, undo)
            elif isinstance(device, model.Pvpanic) and device.enable_isa:
                self.devices.append(Pvpanic(vm, power))
            elif isinstance(device, model.SmallDevice):
                self._add_small(vm, device, keeper, undo)
        if self.ramfb is not None:
            self.devices.append(self.ramfb)

    def _add_card(self, vm: Vm, device: model.VirtioNic, keeper: Keeper, undo: ExitStack) -> None:
        network = self._spec.backends[device.backend]
        assert isinstance(network, model.Network)
        backend = open_backend(keeper, device.backend, network, device.queues)
        undo.callback(backend.close)
        card = VirtioNet(
            vm,
            device.name,
            backend,
            mac=bytes.fromhex(device.mac.replace(":", "")) if device.mac else own_mac(self._identity, device.name),
            mtu=device.mtu,
            own_address_only=device.own_address_only,
        )
        self.chipset.bus.add(card.function, device.pci_path.device, device.pci_path.function)
        self.devices.append(card)

    def _add_disk(
        self, vm: Vm, device: model.VirtioBlock, backend: model.Backend, keeper: Keeper, undo: ExitStack
    ) -> None:
        assert isinstance(backend, model.Block)
        workers = (backend.workers or model.BLOCK_WORKERS) if isinstance(backend, model.FileBlock) else 1
        pool = IoPool(workers)
        undo.callback(pool.close)
        if isinstance(backend, model.FileBlock):
            file = _open_file(backend, keeper, pool)
        else:
            content = backend.content if isinstance(backend, model.BlobBlock) else _cloud_init(self._spec.name, backend)
            file = MemoryBackend(len(content), pool, contents=content, read_only=backend.readonly)
        undo.callback(file.close)
        disk = VirtioBlk(
            vm,
            device.name,
            file,
            queues=device.queues,
            serial=device.serial or device.name,
        )
        self.chipset.bus.add(disk.function, device.pci_path.device, device.pci_path.function)
        self.devices.append(disk)

    def _add_small(self, vm: Vm, device: model.SmallDevice, keeper: Keeper, undo: ExitStack) -> None:
        made = make_device(vm, device, keeper, undo)
        self.chipset.bus.add(made.function, device.pci_path.device, device.pci_path.function)
        self.devices.append(made)

    def program(self) -> None:
        """What firmware does on a real machine: assigns BARs and interrupts, switches decoding on."""
        low, high = self._windows.mmio32, self._windows.mmio64
        self.chipset.assign(Windows(mmio32=range(low.base, low.end), mmio64=range(high.base, high.end)))

    def reset(self) -> None:
        """To power-on: nothing on the bus is assigned any more; the vCPUs are held."""
        self.chipset.reset()
        for device in self.devices:
            device.reset()

    def press_power_button(self) -> None:
        """The guest's operating system decides what that means."""
        self.power.press_power_button()

    def tables(self) -> TableBoard:
        """What the ACPI tables say about this board."""
        return TableBoard(
            cpus=self._spec.cpus,
            windows=self._windows,
            uarts=tuple(sorted(self.serial_ports)),
            keyboard=self.ramfb is not None,
            pvpanic=any(isinstance(device, model.Pvpanic) and device.enable_isa for device in self._spec.devices),
        )


def _open_file(backend: model.FileBlock, keeper: Keeper, pool: IoPool) -> FileBackend:
    with ExitStack() as failed:
        fd = keeper.open_disk(backend.path, read_only=backend.readonly)
        failed.callback(os.close, fd)
        file = FileBackend(
            fd,
            pool,
            read_only=backend.readonly,
            path=backend.path,
            block_size=backend.block_size,
            skip_flush=backend.skip_flush,
        )
        failed.pop_all()  # the backend owns it now
    return file


def _cloud_init(name: str, backend: model.CloudInit) -> bytes:
    return nocloud.volume(name, backend.user_data, backend.meta_data, backend.network_config)
