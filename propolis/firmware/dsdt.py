"""The DSDT's AML: processors, the PCI root with its interrupt routing and hotplug, and the ISA devices."""

from functools import cache

from propolis.firmware import aml, layout
from propolis.firmware.board import Board

PCI_SLOTS = 32
FIRST_HOTPLUG_SLOT = 2  # 0 and 1 are the host bridge and the PIIX, which nobody unplugs

# PIIX3 (82371SB datasheet §3.2): PIRQRC[A:D] in the configuration space of 00:01.0
PIRQ_BASE = 0x60
PIRQ_DISABLED = 0x80
LINK_IRQS = (5, 10, 11)
SCI = 9
PM_DEVICE = 1  # function 3 of this device has INTA, wired to the SCI rather than to a PIRQ

PM_BASE = 0xB000
PM_LENGTH = 0x40
SMBUS_BASE = 0xB100
SMBUS_LENGTH = 0x10
GPE0_BASE = 0xAFE0
GPE0_LENGTH = 4
ELCR_BASE = 0x4D0
DEBUG_PORT = 0x402
PVPANIC_PORT = 0x505

# PCI hotplug: three 32-bit registers with one bit per slot of bus 0, announced by a GPE
HOTPLUG_BASE = 0xAE00  # +0 slots with a new device, +4 slots whose device should go; +8 write to eject
HOTPLUG_LENGTH = 0x10
HOTPLUG_EJECT = 0xAE08
HOTPLUG_GPE = 1
NOTIFY_DEVICE_CHECK = 1  # ACPI 6.5 §5.6.6
NOTIFY_EJECT_REQUEST = 3

UARTS = {1: (0x3F8, 4), 2: (0x2F8, 3), 3: (0x3E8, 4), 4: (0x2E8, 3)}

_PRESENT_ENABLED = 0x0B  # _STA: present, enabled, functioning; not shown in a user interface
_PRESENT_DISABLED = 0x09


def build(board: Board) -> bytes:
    """The definition block without its table header."""
    return b"".join(
        (
            aml.scope(
                "\\_SB",
                _processors(board),
                _pci_root(board),
                _links(),
                _motherboard(board),
            ),
            _hotplug_event(),
            # Soft-off is sleep type 0 in PM1_CNT; the third and fourth element are reserved (ACPI 6.5 §7.4.2.6)
            aml.name("\\_S5", aml.package([aml.ZERO] * 4)),
        )
    )


def _processors(board: Board) -> bytes:
    """Processor devices; _UID pairs each with its MADT entry (ACPI 6.5 §8.4)."""
    return b"".join(
        aml.device(f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(index)))
        for index in range(board.cpus)
    )


def _pci_root(board: Board) -> bytes:
    low, high = board.windows.mmio32, board.windows.mmio64
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.ZERO),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.word_bus_number(0, 255),
                aml.io(0xCF8, 8),
                aml.word_io(0, 0xCF7),
                aml.word_io(0xD00, 0xFFFF),
                aml.dword_memory(low.base, low.size),
                aml.qword_memory(high.base, high.size),
            ),
        ),
        aml.name("_PRT", _routing()),
        _isa_bridge(board),
        _hotplug_slots(),
    )


@cache
def _routing() -> bytes:
    """_PRT: which link each slot's pin drives (ACPI 6.5 §6.2.13). Pins count from 0 here, from 1 in PCI."""
    links = [aml.name_string(f"\\_SB.LNK{letter}") for letter in "ABCD"]
    sci = aml.name_string("\\_SB.LNKS")
    pins = [aml.integer(pin) for pin in range(4)]
    rows = []
    for slot in range(PCI_SLOTS):
        address = aml.integer(slot << 16 | 0xFFFF)
        for pin in range(4):
            link = sci if slot == PM_DEVICE and pin == 0 else links[(slot + pin + 1 + 2) % 4]
            rows.append(aml.package((address, pins[pin], link, aml.ZERO)))
    return aml.package(rows)


@cache
def _links() -> bytes:
    """The interrupt links: A to D steer by the PIRQ registers, S is the SCI and cannot be moved."""
    interrupt = aml.interrupt_pci(SCI)
    fixed = aml.device(
        "LNKS",
        aml.name("_HID", aml.eisa_id("PNP0C0F")),
        aml.name("_UID", aml.integer(4)),
        aml.name("_STA", aml.integer(_PRESENT_ENABLED)),
        aml.name("_PRS", aml.resource_template(interrupt)),
        aml.name("_CRS", aml.resource_template(interrupt)),
        aml.method("_DIS", 0),
        aml.method("_SRS", 1),
    )
    status = aml.method(
        "LSTA",
        1,
        aml.if_(aml.and_(aml.ARG0, aml.integer(PIRQ_DISABLED)), aml.return_(aml.integer(_PRESENT_DISABLED))),
        aml.return_(aml.integer(_PRESENT_ENABLED)),
    )
    current = aml.method(
        "LCRS",
        1,
        aml.store(aml.resource_template(aml.interrupt_pci(0)), aml.LOCAL0),
        aml.create_dword_field(aml.LOCAL0, aml.INTERRUPT_NUMBER_OFFSET, "IRQN"),
        aml.if_(
            aml.less(aml.ARG0, aml.integer(PIRQ_DISABLED)),  # a disabled link reports interrupt 0: none
            aml.store(aml.ARG0, aml.name_string("IRQN")),
        ),
        aml.return_(aml.LOCAL0),
        serialized=True,
    )
    return status + current + b"".join(_link(index, letter) for index, letter in enumerate("ABCD")) + fixed


def _link(index: int, letter: str) -> bytes:
    register = aml.name_string(f"\\_SB.PCI0.ISA.PRQ{letter}")
    return aml.device(
        f"LNK{letter}",
        aml.name("_HID", aml.eisa_id("PNP0C0F")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_PRS", aml.resource_template(aml.interrupt_pci(*LINK_IRQS))),
        aml.method("_STA", 0, aml.return_(aml.call("LSTA", register))),
        aml.method("_CRS", 0, aml.return_(aml.call("LCRS", register))),
        aml.method("_DIS", 0, aml.store(aml.integer(PIRQ_DISABLED), register)),
        aml.method(
            "_SRS",
            1,
            aml.create_dword_field(aml.ARG0, aml.INTERRUPT_NUMBER_OFFSET, "IRQN"),
            aml.store(aml.name_string("IRQN"), register),
            serialized=True,
        ),
    )


def _isa_bridge(board: Board) -> bytes:
    devices = [
        _isa_device("PIC", "PNP0000", aml.io(0x20, 2), aml.io(0xA0, 2), aml.irq(2)),
        _isa_device("TIMR", "PNP0100", aml.io(0x40, 4), aml.irq(0)),
        _isa_device("RTC", "PNP0B00", aml.io(0x70, 2), aml.irq(8)),
    ]
    if board.keyboard:
        devices.append(_isa_device("KBD", "PNP0303", aml.io(0x60, 1), aml.io(0x64, 1), aml.irq(1)))
        devices.append(_isa_device("MOU", "PNP0F13", aml.irq(12)))
    for number in sorted(board.uarts):
        base, irq = UARTS[number]
        devices.append(_isa_device(f"COM{number}", "PNP0501", aml.io(base, 8), aml.irq(irq), uid=number))
    if board.pvpanic:
        devices.append(
            aml.device(
                "PEVT",
                aml.name("_HID", aml.string("QEMU0001")),
                aml.name("_CRS", aml.resource_template(aml.io(PVPANIC_PORT, 1))),
            )
        )
    return aml.device(
        "ISA",
        aml.name("_ADR", aml.integer(1 << 16)),
        aml.operation_region("PIRQ", aml.PCI_CONFIG, PIRQ_BASE, 4),
        aml.field("PIRQ", aml.BYTE_ACCESS, *((f"PRQ{letter}", 8) for letter in "ABCD")),
        *devices,
    )


def _isa_device(path: str, hid: str, *resources: bytes, uid: int | None = None) -> bytes:
    return aml.device(
        path,
        aml.name("_HID", aml.eisa_id(hid)),
        aml.name("_UID", aml.integer(uid)) if uid is not None else b"",
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _motherboard(board: Board) -> bytes:
    """Ports and addresses that belong to no device an OS would drive, so that it assigns them to nothing else."""
    # Not what firmware may have given to a device.
    is_free = board.windows.mmio32.end <= layout.ECAM.base
    ecam = [aml.memory32_fixed(layout.ECAM.base, layout.ECAM.size)] if is_free else []
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.ZERO),
        aml.name(
            "_CRS",
            aml.resource_template(
                aml.io(DEBUG_PORT, 1),
                aml.io(ELCR_BASE, 2),
                aml.io(HOTPLUG_BASE, HOTPLUG_LENGTH),
                aml.io(GPE0_BASE, GPE0_LENGTH),
                aml.io(PM_BASE, PM_LENGTH),
                aml.io(SMBUS_BASE, SMBUS_LENGTH),
                *ecam,
            ),
        ),
    )


@cache
def _hotplug_slots() -> bytes:
    """Slot devices and PCNT, which tells the OS about every slot whose bit is set in the two status registers."""
    slots = range(FIRST_HOTPLUG_SLOT, PCI_SLOTS)
    devices = []
    checks = []
    for slot in slots:
        bit = aml.integer(1 << slot)
        path = f"S{slot:02X}"
        devices.append(
            aml.device(
                path,
                aml.name("_ADR", aml.integer(slot << 16)),
                aml.name("_SUN", aml.integer(slot)),
                aml.method("_EJ0", 1, aml.store(bit, aml.name_string("PCEJ"))),
            )
        )
        checks.append(aml.if_(aml.and_(aml.LOCAL0, bit), aml.notify(path, aml.integer(NOTIFY_DEVICE_CHECK))))
        checks.append(aml.if_(aml.and_(aml.LOCAL1, bit), aml.notify(path, aml.integer(NOTIFY_EJECT_REQUEST))))
    return b"".join(
        (
            aml.operation_region("PCST", aml.SYSTEM_IO, HOTPLUG_BASE, 8),
            aml.field("PCST", aml.DWORD_ACCESS, ("PCIU", 32), ("PCID", 32)),
            aml.operation_region("PCSE", aml.SYSTEM_IO, HOTPLUG_EJECT, 4),
            aml.field("PCSE", aml.DWORD_ACCESS, ("PCEJ", 32)),
            *devices,
            aml.method(
                "PCNT",
                0,
                aml.store(aml.name_string("PCIU"), aml.LOCAL0),
                aml.store(aml.name_string("PCID"), aml.LOCAL1),
                aml.if_(aml.or_(aml.LOCAL0, aml.LOCAL1), *checks),
                serialized=True,
            ),
        )
    )


@cache
def _hotplug_event() -> bytes:
    """An edge event: the OS clears its status bit first, so that a change during PCNT raises it again."""
    return aml.scope("\\_GPE", aml.method(f"_E{HOTPLUG_GPE:02X}", 0, aml.call("\\_SB.PCI0.PCNT")))
