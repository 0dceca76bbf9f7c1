"""The keyboard controller at 0x60 and 0x64, and the keyboard and mouse of a VM that has a screen."""

from typing import TYPE_CHECKING

from propolis.devices._i8042 import CommandPort, Controller, DataPort
from propolis.devices.device import Device

if TYPE_CHECKING:
    from propolis._vmm import Vm

DATA = 0x60
COMMAND = 0x64


class KeyboardController(Device):
    """i8042, interrupts 1 and 12. `slot` is the machine's for power events: a guest may reset itself here."""

    def __init__(self, vm: "Vm", slot: int, *, has_devices: bool) -> None:
        super().__init__("keyboard controller")
        self._controller = Controller(vm, slot, has_devices)
        self.key = self._controller.key
        self.move = self._controller.move
        vm.pio.add(DataPort(self._controller), DATA, 1)
        vm.pio.add(CommandPort(self._controller), COMMAND, 1)

    def stats(self) -> dict[str, int]:
        """Key presses `dropped` because the guest read none."""
        return self._controller.stats()

    def reset(self) -> None:
        self._controller.reset()
