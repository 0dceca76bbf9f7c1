"""The real-time clock: its ports, its timer on the loop, and what its memory says about the machine's."""

from typing import TYPE_CHECKING

from propolis.devices._rtc import Rtc
from propolis.devices.device import Device

if TYPE_CHECKING:
    import asyncio

    from propolis._vmm import Vm

PORT = 0x70
PORT_COUNT = 2
KIB = 1 << 10
MIB = 1 << 20
UNIT = 64 * KIB
# What firmware and loaders read: where each size stands, its bytes, and where it starts counting.
BASE_MEMORY = (0x15, 0x16)  # KiB below 640 KiB
EXTENDED_MEMORY = ((0x17, 0x18), (0x30, 0x31))  # KiB from 1 MiB, twice
LOW_MEMORY = (0x34, 0x35)  # 64 KiB units from 16 MiB
HIGH_MEMORY = (0x5B, 0x5C, 0x5D)  # 64 KiB units from 4 GiB


def memory_bytes(low: int, high: int) -> dict[int, int]:
    """The NVRAM bytes for that much memory below and above 4 GiB; a size too large to say is the largest."""
    found: dict[int, int] = {}

    def put(places: tuple[int, ...], value: int) -> None:
        limit = (1 << 8 * len(places)) - 1
        found.update(zip(places, min(max(value, 0), limit).to_bytes(len(places), "little"), strict=True))

    put(BASE_MEMORY, min(low // KIB, 640))
    for places in EXTENDED_MEMORY:
        put(places, (low - MIB) // KIB)
    put(LOW_MEMORY, (low - 16 * MIB) // UNIT)
    put(HIGH_MEMORY, high // UNIT)
    return found


class RealTimeClock(Device):
    """MC146818 at 0x70, interrupt 8."""

    def __init__(self, vm: "Vm", low_memory: int, high_memory: int) -> None:
        super().__init__("rtc")
        self._rtc = Rtc(vm)
        for index, value in memory_bytes(low_memory, high_memory).items():
            self._rtc.provide(index, value)
        self._loop: asyncio.AbstractEventLoop | None = None
        vm.pio.add(self._rtc, PORT, PORT_COUNT)

    def start(self, loop: "asyncio.AbstractEventLoop") -> None:
        self._loop = loop
        self.resume()

    def pause(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._rtc.timer.fileno())

    def resume(self) -> None:
        if self._loop is not None:
            self._loop.add_reader(self._rtc.timer.fileno(), self._rtc.tick)

    def reset(self) -> None:
        self._rtc.reset()

    async def halt(self) -> None:
        self.pause()
        self._loop = None
