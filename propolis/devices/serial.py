"""Serial ports COM1 to COM4: the stream behind a UART's registers."""

import asyncio
from typing import TYPE_CHECKING

from propolis._vmm import Vm
from propolis.devices._uart import INPUT_ROOM, OUTPUT, Uart
from propolis.devices.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable

PORTS = {1: (0x3F8, 4), 2: (0x2F8, 3), 3: (0x3E8, 4), 4: (0x2E8, 3)}  # number: (base port, IRQ)
PORT_COUNT = 8
OUTPUT_BATCH = 16384  # at once, so that other work of the loop gets its turn
# The loop is faster than a guest: taken as they come, a long output would be many pieces of a few bytes each, and each
# costs its clients a message. Once so much has come without a gap, it is left to gather for a moment after each piece.
STREAM_BYTES = 256
GATHER_SECONDS = 0.001


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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streamed = 0  # bytes without a gap
        self._taken_at = 0.0  # of the loop's clock
        self._gathering: asyncio.TimerHandle | None = None
        self._uart = Uart(vm, self.name, irq, vm.mailbox.register(self._on_events))
        vm.pio.add(self._uart, base, PORT_COUNT)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

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
        if bits & OUTPUT and self._gathering is None:
            self._take()
        if bits & INPUT_ROOM:
            self.on_input_room()

    def _take(self) -> None:
        self._gathering = None
        data = self._uart.take(OUTPUT_BATCH)
        if self._loop is not None and 0 < len(data) < OUTPUT_BATCH:  # what is left of a whole batch is next anyway
            now = self._loop.time()
            self._streamed = len(data) + (self._streamed if now - self._taken_at < 2 * GATHER_SECONDS else 0)
            self._taken_at = now
            if self._streamed >= STREAM_BYTES:
                self._gathering = self._loop.call_later(GATHER_SECONDS, self._take)
        self.on_output(data)

    def reset(self) -> None:
        self.on_reset()
        self._uart.reset()

    async def halt(self) -> None:
        """What the guest said last is still shown."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        while data := self._uart.take(OUTPUT_BATCH):
            self.on_output(data)
