"""The ACPI tables of the machine (ACPI 6.5 chapter 5), and their places under direct boot.

The functions named after tables return contents and take the addresses they point to as arguments, so that a
firmware's table loader can use the same contents and fill in the addresses itself.
"""

import struct

from msgspec import Struct

from propolis.errors import ConfigError
from propolis.firmware import dsdt as definition
from propolis.firmware import layout
from propolis.firmware.board import CPUS_MAX, Board

OEM_ID = b"PROPLS"
OEM_TABLE_ID = b"PROPOLIS"
CREATOR_ID = b"PRPL"
REVISION = 1

HEADER_SIZE = 36
CHECKSUM_OFFSET = 9

# Where one table points to another: what a table loader patches
FADT_FIRMWARE_CTRL = 36
FADT_DSDT = 40
FADT_X_DSDT = 140
XSDT_ENTRIES = HEADER_SIZE
RSDP_XSDT = 24
RSDP_CHECKSUM = 8
RSDP_EXTENDED_CHECKSUM = 32

PM1A_EVT = (definition.PM_BASE, 4)
PM1A_CNT = (definition.PM_BASE + 4, 2)
PM_TMR = (definition.PM_BASE + 8, 4)
GPE0 = (definition.GPE0_BASE, definition.GPE0_LENGTH)
RESET_PORT = 0xCF9
RESET_VALUE = 6

# FADT flags (§5.2.9, table 5.10). PWR_BUTTON clear means that the power button is the fixed one; SLP_BUTTON and
# FIX_RTC set mean that there is no sleep button and no RTC wake-up in the PM1 registers.
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_SLP_BUTTON = 1 << 5
_FIX_RTC = 1 << 6
_TMR_VAL_EXT = 1 << 8
_RESET_REG_SUP = 1 << 10
FADT_FLAGS = _WBINVD | _PROC_C1 | _SLP_BUTTON | _FIX_RTC | _TMR_VAL_EXT | _RESET_REG_SUP

# IAPC_BOOT_ARCH (§5.2.9.3). 8042 only where a keyboard is plugged in: a bare one resets and answers probes, but an OS
# that is told of a controller complains when it finds no working one.
_LEGACY_DEVICES = 1 << 0
_KEYBOARD_CONTROLLER = 1 << 1
_VGA_NOT_PRESENT = 1 << 2

_PROFILE_ENTERPRISE_SERVER = 4
_NO_C2 = 101  # a latency above 100 us says that the state is not supported; above 1000 for C3
_NO_C3 = 1001

# Generic Address Structure (§5.2.3.2)
_SYSTEM_IO = 1
_BYTE, _WORD, _DWORD = 1, 2, 3
_NO_REGISTER = bytes(12)

_MADT_PCAT_COMPAT = 1 << 0
_LAPIC_ENABLED = 1 << 0
_ACTIVE_HIGH_LEVEL = 0b1101  # MPS INTI flags (§5.2.12.5)
_LEVEL_IRQS = (5, 9, 10, 11)  # those that links and the SCI use
_ALL_PROCESSORS = 0xFF
IOAPIC_ID = 0  # what the register of the controller reads after reset

_FACS_SIZE = 64
_ALIGNMENT = 64  # the FACS needs it (§5.2.10); the others may have it too


class Tables(Struct, frozen=True):
    """Tables with their places in guest memory; `rsdp` is the address of the root."""

    rsdp: int
    pieces: tuple[tuple[int, bytes], ...]


def build(board: Board, place: layout.Range = layout.ACPI_TABLES) -> Tables:
    """All tables, placed one after the other in `place`, the RSDP first."""
    pieces: list[tuple[int, bytes]] = []
    used = place.base + _ALIGNMENT  # the RSDP's own slot; it is written last because it points to the XSDT

    def put(content: bytes) -> int:
        nonlocal used
        gpa = used
        pieces.append((gpa, content))
        used = layout.align_up(gpa + len(content), _ALIGNMENT)
        if used > place.end:
            raise ConfigError(f"ACPI tables: they need more than the {place.size} bytes at {place.base:#x}")
        return gpa

    facs_gpa = put(facs())
    fadt_gpa = put(fadt(facs_gpa, put(dsdt(board)), keyboard=board.keyboard))
    xsdt_gpa = put(xsdt((fadt_gpa, put(madt(board)))))
    pieces.append((place.base, rsdp(xsdt_gpa)))
    return Tables(place.base, tuple(pieces))


def rsdp(xsdt_address: int) -> bytes:
    """Root System Description Pointer, revision 2 (§5.2.5.3). No RSDT: every OS that runs here reads the XSDT."""
    content = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt_address, 0))
    content[RSDP_CHECKSUM] = checksum(content[:20])
    content[RSDP_EXTENDED_CHECKSUM] = checksum(content)
    return bytes(content)


def xsdt(addresses: tuple[int, ...]) -> bytes:
    """Extended System Description Table (§5.2.8)."""
    return _table(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses))


def facs() -> bytes:
    """Firmware ACPI Control Structure (§5.2.10): the global lock; it has neither header nor checksum."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", _FACS_SIZE, 0, 0, 0, 0, 0, 2)


def dsdt(board: Board) -> bytes:
    """Differentiated System Description Table (§5.2.11.1). Revision 2 makes its integers 64 bits wide."""
    check(board)
    return _table(b"DSDT", 2, definition.build(board))


def madt(board: Board) -> bytes:
    """Multiple APIC Description Table (§5.2.12)."""
    check(board)
    entries = [struct.pack("<BBBBI", 0, 8, index, index, _LAPIC_ENABLED) for index in range(board.cpus)]
    entries.append(struct.pack("<BBBBII", 1, 12, IOAPIC_ID, 0, layout.IOAPIC.base, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0))  # the PIT comes in on pin 2
    entries += [struct.pack("<BBBBIH", 2, 10, 0, irq, irq, _ACTIVE_HIGH_LEVEL) for irq in _LEVEL_IRQS]
    entries.append(struct.pack("<BBBHB", 4, 6, _ALL_PROCESSORS, 0, 1))  # NMI on LINT1
    return _table(b"APIC", 4, struct.pack("<II", layout.LAPIC.base, _MADT_PCAT_COMPAT) + b"".join(entries))


def fadt(facs_address: int, dsdt_address: int, *, keyboard: bool) -> bytes:
    """Fixed ACPI Description Table, revision 6.0 (§5.2.9).

    SMI_CMD is 0: there is no legacy mode to leave, SCI_EN always reads 1. The 32-bit and the extended form of each
    register block agree; the FACS has only its 32-bit address, because the specification wants one of the two.
    """
    boot_arch = _LEGACY_DEVICES | _VGA_NOT_PRESENT | (_KEYBOARD_CONTROLLER if keyboard else 0)
    body = b"".join(
        (
            struct.pack("<IIBB", facs_address, dsdt_address, 0, _PROFILE_ENTERPRISE_SERVER),
            struct.pack("<HIBBBB", definition.SCI, 0, 0, 0, 0, 0),  # SCI_INT, SMI_CMD and its four values
            struct.pack("<8I", PM1A_EVT[0], 0, PM1A_CNT[0], 0, 0, PM_TMR[0], GPE0[0], 0),
            struct.pack("<8B", PM1A_EVT[1], PM1A_CNT[1], 0, PM_TMR[1], GPE0[1], 0, 0, 0),
            struct.pack("<HHHHBB", _NO_C2, _NO_C3, 0, 0, 0, 0),
            struct.pack("<BBBHxI", 0, 0, 0, boot_arch, FADT_FLAGS),  # no alarm and century bytes in the RTC
            _register(RESET_PORT, 1, _BYTE),
            struct.pack("<BHB", RESET_VALUE, 0, 0),  # no ARM flags; minor revision 0
            struct.pack("<QQ", 0, dsdt_address),
            _register(*PM1A_EVT, _WORD),
            _NO_REGISTER,  # PM1b_EVT
            _register(*PM1A_CNT, _WORD),
            _NO_REGISTER * 2,  # PM1b_CNT, PM2_CNT
            _register(*PM_TMR, _DWORD),
            _register(*GPE0, _BYTE),
            _NO_REGISTER * 3,  # GPE1, SLEEP_CONTROL_REG, SLEEP_STATUS_REG
            struct.pack("<8s", OEM_TABLE_ID),  # hypervisor vendor identity
        )
    )
    return _table(b"FACP", 6, body)


def check(board: Board) -> None:
    if not 1 <= board.cpus <= CPUS_MAX:
        raise ConfigError(f"cpus: {board.cpus}, expected 1 to {CPUS_MAX}")
    if unknown := set(board.uarts) - set(definition.UARTS):
        raise ConfigError(f"uarts: COM{min(unknown)}, expected COM1 to COM4")


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of `data`, whose checksum is still 0, come out as 0."""
    return -sum(data) & 0xFF


def _register(port: int, length: int, access: int) -> bytes:
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8 * length, 0, access, port)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A System Description Table: header (§5.2.6) and body."""
    header = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        HEADER_SIZE + len(body),
        revision,
        0,
        OEM_ID,
        OEM_TABLE_ID,
        REVISION,
        CREATOR_ID,
        REVISION,
    )
    content = bytearray(header + body)
    content[CHECKSUM_OFFSET] = checksum(content)
    return bytes(content)
