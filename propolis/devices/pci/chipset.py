"""The three functions of an i440FX machine: host bridge, PIIX3 ISA bridge, PIIX4 power management.

Identities are those of the machine that Propolis presents; registers beyond them are what guests look at while they
probe. The power management block itself is in `propolis.devices.pm`: its base addresses here are fixed.
"""

from propolis._bus import Region
from propolis._vmm import Vm
from propolis.devices.pci._function import PciFunction
from propolis.devices.pci._pirq import IsaBridge
from propolis.devices.pci.bus import PciBus, Windows

INTEL = 0x8086
OXIDE = 0x01DE
SCI_IRQ = 9
PM_BASE = 0xB000
SMBUS_BASE = 0xB100


class Chipset:
    """The bus with its three built-in functions, as every machine has it."""

    def __init__(self, vm: Vm, reset_control: Region | None = None) -> None:
        self.bus = PciBus(vm, reset_control)
        self.host_bridge = PciFunction(
            vm,
            "host bridge",
            vendor=INTEL,
            device=0x1237,
            subsystem_vendor=OXIDE,
            subsystem=0xFFFE,
            class_code=0x060000,
            revision=2,
        )
        self.isa_bridge = IsaBridge(
            vm,
            self.bus.router,
            "isa bridge",
            vendor=INTEL,
            device=0x7000,
            subsystem_vendor=OXIDE,
            subsystem=0xFFFD,
            class_code=0x060100,
        )
        self.power = PciFunction(
            vm,
            "power management",
            vendor=INTEL,
            device=0x7113,
            subsystem_vendor=OXIDE,
            subsystem=0xFFFC,
            class_code=0x068000,
            revision=3,
        )
        # 82441FX: memory and bus mastering are always on. 82371: all three cycles, always on.
        self.host_bridge.define(0x04, b"\x06\x00", b"\x00\x01")
        self.isa_bridge.define(0x04, b"\x07\x00", b"\x00\x01")
        # 82371SB DLC: Linux switches passive release on and looks whether it is.
        self.isa_bridge.define(0x82, b"\x00", b"\x0f")
        # 82371AB: I/O decoding on; interrupt line 9, the SCI; PMBA and its enable bit in PMREGMISC; SMBBA.
        self.power.define(0x04, b"\x01\x00", b"\x00\x00")
        self.power.define(0x3C, bytes([SCI_IRQ]), b"\x00")
        self.power.define(0x40, (PM_BASE | 1).to_bytes(4, "little"))
        self.power.define(0x80, b"\x01")
        self.power.define(0x90, (SMBUS_BASE | 1).to_bytes(4, "little"))
        for port in (self.host_bridge, self.isa_bridge, self.power):
            port.define(0x06, b"\x80\x02")  # medium DEVSEL timing, fast back-to-back
        self.bus.add(self.host_bridge, 0, pin=0)
        self.bus.add(self.isa_bridge, 1, pin=0)
        self.bus.add(self.power, 1, 3, pin=1)

    def assign(self, windows: Windows | None = None) -> None:
        """Does firmware's part for direct boot; again after each reset."""
        self.bus.assign(self.isa_bridge, windows)

    def reset(self) -> None:
        self.bus.reset()
