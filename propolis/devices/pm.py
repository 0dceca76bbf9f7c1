"""ACPI power management: the power button, soft-off, events, and the ports for PCI hotplug."""

from typing import TYPE_CHECKING

from propolis.devices._pm import GpeBlock, HotplugPorts, PmBlock
from propolis.devices.device import Device

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from propolis._vmm import Vm

PM_BASE, PM_LENGTH = 0xB000, 0x40
GPE0_BASE, GPE0_LENGTH = 0xAFE0, 4
HOTPLUG_BASE, HOTPLUG_LENGTH = 0xAE00, 12
HOTPLUG_GPE = 1


def ignore_ejection(slots: int) -> None:
    """Nobody plugs anything."""


class PowerManagement(Device):
    """The PIIX4's PM1 and GPE0 blocks. `slot` is the machine's for power events."""

    def __init__(self, vm: "Vm", slot: int) -> None:
        super().__init__("pm")
        self.on_ejected: Callable[[int], None] = ignore_ejection
        self._pm1 = PmBlock(vm, slot)
        self._gpe0 = GpeBlock(vm)
        self._hotplug = HotplugPorts(vm, vm.mailbox.register(self._on_hotplug))
        self._loop: asyncio.AbstractEventLoop | None = None
        vm.pio.add(self._pm1, PM_BASE, PM_LENGTH)
        vm.pio.add(self._gpe0, GPE0_BASE, GPE0_LENGTH)
        vm.pio.add(self._hotplug, HOTPLUG_BASE, HOTPLUG_LENGTH)

    def press_power_button(self) -> None:
        """The guest's operating system decides what that means."""
        self._pm1.press_button()

    def raise_gpe(self, bit: int) -> None:
        """A general-purpose event, 0 to 15."""
        self._gpe0.raise_event(bit)

    def announce_hotplug(self, *, added: int = 0, unwanted: int = 0) -> None:
        """Tells the guest of slots of bus 0, as bits, that have a new device or whose device shall go."""
        self._hotplug.announce(added, unwanted)
        self.raise_gpe(HOTPLUG_GPE)

    def _on_hotplug(self, _bits: int) -> None:
        self.on_ejected(self._hotplug.take_ejected())

    def start(self, loop: "asyncio.AbstractEventLoop") -> None:
        self._loop = loop
        self.resume()

    def pause(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._pm1.timer.fileno())

    def resume(self) -> None:
        if self._loop is not None:
            self._loop.add_reader(self._pm1.timer.fileno(), self._pm1.tick)

    def reset(self) -> None:
        self._pm1.reset()
        self._gpe0.reset()
        self._hotplug.reset()

    async def halt(self) -> None:
        self.pause()
        self._loop = None
