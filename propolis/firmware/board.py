"""What the ACPI tables need to know about a machine."""

from msgspec import Struct

from propolis.firmware.layout import DeviceWindows

CPUS_MAX = 64


class Board(Struct, frozen=True, kw_only=True):
    """Everything else in the tables is the same for every machine."""

    cpus: int  # local APIC ids are 0 to cpus - 1
    windows: DeviceWindows
    uarts: tuple[int, ...] = (1,)  # numbers of the COM ports present, of 1 to 4
    keyboard: bool = False  # and a mouse
    pvpanic: bool = False
