"""The PCI bus: which function sits where, its interrupt, and its addresses when no firmware assigns them."""

from dataclasses import dataclass

from propolis._bus import Region
from propolis._vmm import Vm
from propolis.devices.pci._config import ConfigPorts
from propolis.devices.pci._function import PciFunction
from propolis.devices.pci._pirq import PirqRouter
from propolis.errors import ConfigError

CONFIG_ADDRESS = 0xCF8
CONFIG_PORTS = 8
SLOTS = 32
FUNCTIONS = 8

COMMAND = 0x04
COMMAND_DECODE = {"io": 1, "mmio32": 2, "mmio64": 2}
BAR0 = 0x10
INTERRUPT_LINE = 0x3C
PIRQ_REGISTERS = 0x60
LINK_IRQS = (10, 11, 10, 11)  # of links A to D under direct boot


def pin_of(number: int) -> int:
    """The interrupt pin (1 is INTA) that a function on bus 0 has: INTB for function 0, then C, D and A."""
    return (number + 1) % 4 + 1


def link_of(slot: int, pin: int) -> int:
    """The PIRQ link (0 is A) that a device's interrupt pin is wired to."""
    return (slot + pin + 2) % 4


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Address ranges for BARs. 64-bit BARs go below 4 GiB while there is room, where every guest reaches them."""

    io: range = range(0xC000, 0x10000)
    mmio32: range = range(0xC000_0000, 0xE000_0000)
    mmio64: range = range(0)


class PciBus:
    """Bus 0 of one machine. Functions are added and removed on the loop thread."""

    def __init__(self, vm: Vm, reset_control: Region | None = None) -> None:
        self.router = PirqRouter()
        self.functions: dict[tuple[int, int], PciFunction] = {}
        self._ports = ConfigPorts(reset_control)
        vm.pio.add(self._ports, CONFIG_ADDRESS, CONFIG_PORTS)

    def add(self, function: PciFunction, slot: int, number: int = 0, *, pin: int | None = None) -> None:
        """Puts a function on the bus. `pin` 0 is for one that interrupts in no PCI way. Raises ConfigError."""
        if not (0 <= slot < SLOTS and 0 <= number < FUNCTIONS):
            raise ConfigError(f"PCI address 0.{slot}.{number} of {function.name}: expected device 0-31, function 0-7")
        if (slot, number) in self.functions:
            taken = self.functions[slot, number].name
            raise ConfigError(f"PCI address 0.{slot}.{number} of {function.name}: taken by {taken}")
        if number and (slot, 0) not in self.functions:
            raise ConfigError(f"PCI address 0.{slot}.{number} of {function.name}: function 0 has to exist first")
        wire = function.attach(slot, number, pin_of(number) if pin is None else pin)
        if pin is None:
            self.router.connect(wire, link_of(slot, pin_of(number)))
        if number:
            self.functions[slot, 0].set_multifunction()
        self.functions[slot, number] = function
        self._ports.install(slot, number, function)

    def remove(self, function: PciFunction) -> None:
        """Takes a function off the bus; the vCPUs are held."""
        slot, number = function.slot, function.number
        del self.functions[slot, number]
        self._ports.install(slot, number, None)
        self.router.disconnect(function.wire())
        function.detach()

    def reset(self) -> None:
        """To the state at power-on: nothing assigned, nothing decoded; the vCPUs are held."""
        self._ports.reset()
        for function in self.functions.values():
            function.reset()

    def assign(self, isa_bridge: PciFunction, windows: Windows | None = None) -> None:
        """What firmware does on a real machine, for direct boot: BARs, interrupt lines, PIRQ routes, decoding.

        Raises ConfigError when the BARs do not fit.
        """
        windows = windows or Windows()
        for link, irq in enumerate(LINK_IRQS):
            isa_bridge.write(PIRQ_REGISTERS + link, 1, irq)
        for (slot, number), function in sorted(self.functions.items()):
            pin = function.read(INTERRUPT_LINE + 1, 1)
            if pin and function.wire().state()[0] >= 0:
                function.write(INTERRUPT_LINE, 1, LINK_IRQS[link_of(slot, pin_of(number))])
        self._assign_bars(windows)

    def _assign_bars(self, windows: Windows) -> None:
        free = {name: getattr(windows, name).start for name in ("io", "mmio32", "mmio64")}
        bars = [
            (size, address, index, kind)
            for address, function in self.functions.items()
            for index, kind, size, _, _ in function.bar_list()
        ]
        # Largest first: each is aligned to its size, so nothing is lost between them. 32-bit ones before 64-bit ones,
        # which have somewhere else to go.
        for size, address, index, kind in sorted(bars, key=lambda bar: (bar[3] == "mmio64", -bar[0], bar[1:])):
            function = self.functions[address]
            for window in ("mmio32", "mmio64") if kind == "mmio64" else (kind,):
                base = (free[window] + size - 1) & ~(size - 1)
                if base + size <= getattr(windows, window).stop:
                    free[window] = base + size
                    break
            else:
                raise ConfigError(f"{function.name}: no room for BAR {index}, {kind} of {size:#x} bytes")
            function.write(BAR0 + 4 * index, 4, base & 0xFFFF_FFFF)
            if kind == "mmio64":
                function.write(BAR0 + 4 * index + 4, 4, base >> 32)
            function.write(COMMAND, 2, function.read(COMMAND, 2) | COMMAND_DECODE[kind])

    def describe(self) -> list[str]:
        """One line for each function and BAR, for people."""
        lines = []
        for (slot, number), function in sorted(self.functions.items()):
            ids = f"{function.read(0, 2):04x}:{function.read(2, 2):04x}"
            pin, line = function.read(INTERRUPT_LINE + 1, 1), function.read(INTERRUPT_LINE, 1)
            interrupt = f" INT{'-ABCD'[pin]} IRQ {line}" if pin else ""
            lines.append(f"0.{slot}.{number} {function.read(0x0A, 2):04x} {ids} {function.name}{interrupt}")
            lines.extend(
                f"    BAR {index} {kind} {base:#x} {size:#x} bytes{'' if decoded else ' off'}"
                for index, kind, size, base, decoded in function.bar_list()
            )
        return lines
