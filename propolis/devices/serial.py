"""Serial ports COM1 to COM4: the stream behind a UART's registers."""

from typing import TYPE_CHECKING

from propolis._vmm import Vm
from propolis.devices._uart import INPUT_ROOM, OUTPUT, Uart
from propolis.devices.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable

PORTS = {1: (0x3F8, 4), 2: (0x2F8, 3), 3: (0x3E8, 4), 4: (0x2E8, 3)}  # number: (base port, IRQ)
PORT_COUNT = 8
OUTPUT_BATCH = 16384  # at once, so that other work of the loop gets its turn


def ignore_output(data: bytes) -> None:
    """Nobody listens: what the guest prints is dropped, and the guest is never held up."""


def ignore_room() -> None:
    """Nobody types."""


def ignore_reset() -> None:
    """Nobody has anything for the guest in hand."""


class Serial(Device):
    """One COM port. Whoever shows it sets the `on_` functions, which are called on the loop thread."""

    def __init__(self, vm: Vm, number: int, name: str | None = None) -> None:
        super().__init__(name or f"com{number}")
        base, irq = PORTS[number]
        self.on_output: Callable[[bytes], None] = ignore_output
        self.on_input_room: Callable[[], None] = ignore_room
        self.on_reset: Callable[[], None] = ignore_reset
        self._uart = Uart(vm, self.name, irq, vm.mailbox.register(self._on_events))
        vm.pio.add(self._uart, base, PORT_COUNT)

    def feed(self, data: bytes) -> int:
        """Input for the guest. Returns how many bytes were taken; `on_input_room` is called when more would be."""
        return self._uart.receive(data)

    def feed_break(self) -> None:
        """A break condition, as a terminal's break key makes it."""
        self._uart.receive_break()

    def stats(self) -> dict[str, int]:
        """Characters lost: see Uart.stats."""
        return self._uart.stats()

    def _on_events(self, bits: int) -> None:
        if bits & OUTPUT:
            self.on_output(self._uart.take(OUTPUT_BATCH))
        if bits & INPUT_ROOM:
            self.on_input_room()

    def reset(self) -> None:
        self.on_reset()
        self._uart.reset()

    async def halt(self) -> None:
        """What the guest said last is still shown."""
        while data := self._uart.take(OUTPUT_BATCH):
            self.on_output(data)
