"""The small fixed ports of a PC: resets and POST code, the debug console, pvpanic."""

from typing import TYPE_CHECKING

from propolis.devices._ports import DebugPort, FastA20, PostPort, PvpanicPort, ResetControl
from propolis.devices.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis._vmm import Vm

POST_CODE = 0x80
FAST_A20 = 0x92
DEBUG_CONSOLE = 0x402
PVPANIC = 0x505
OUTPUT_BATCH = 16384


class LegacyPorts(Device):
    """What every machine has. `slot` is the machine's for power events; `reset_control` goes to the chipset."""

    def __init__(self, vm: "Vm", slot: int) -> None:
        super().__init__("legacy ports")
        self.reset_control = ResetControl(vm, slot)
        self._a20 = FastA20(vm, slot)
        self._post = PostPort()
        vm.pio.add(self._post, POST_CODE, 1)
        vm.pio.add(self._a20, FAST_A20, 1)

    def reset(self) -> None:
        for part in (self.reset_control, self._a20, self._post):
            part.reset()


def ignore_output(data: bytes) -> None:
    """Nobody reads what the firmware says."""


class DebugConsole(Device):
    """Port 0x402. `on_output` is called on the loop thread with what the guest wrote."""

    def __init__(self, vm: "Vm") -> None:
        super().__init__("debug console")
        self.on_output: Callable[[bytes], None] = ignore_output
        self._port = DebugPort(vm, vm.mailbox.register(self._on_events))
        vm.pio.add(self._port, DEBUG_CONSOLE, 1)

    def _on_events(self, _bits: int) -> None:
        self.on_output(self._port.take(OUTPUT_BATCH))

    def stats(self) -> dict[str, int]:
        """Characters `dropped` because the loop was too slow."""
        return self._port.stats()

    async def halt(self) -> None:
        """What the guest wrote last is still shown."""
        while data := self._port.take(OUTPUT_BATCH):
            self.on_output(data)


class Pvpanic(Device):
    """Port 0x505: the guest's kernel says that it panicked. `slot` is the machine's for power events."""

    def __init__(self, vm: "Vm", slot: int) -> None:
        super().__init__("pvpanic")
        self._port = PvpanicPort(vm, slot)
        vm.pio.add(self._port, PVPANIC, 1)

    def stats(self) -> dict[str, int]:
        """How often the guest `panicked`, and how often it had a crash kernel (`crash_loaded`)."""
        return self._port.stats()
