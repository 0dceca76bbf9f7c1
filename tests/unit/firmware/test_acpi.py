"""The ACPI tables: as bytes, through the reference compiler, and executed by the reference interpreter."""

import itertools
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from propolis.errors import ConfigError
from propolis.firmware import acpi, aml, dsdt, layout
from propolis.firmware.board import Board
from propolis.firmware.layout import GIB, MIB, Range

needs_iasl = pytest.mark.skipif(not shutil.which("iasl"), reason="iasl is missing (apt install acpica-tools)")
needs_acpiexec = pytest.mark.skipif(not shutil.which("acpiexec"), reason="acpiexec is missing (acpica-tools)")

MEMORY = [128 * MIB, 16 * GIB]
CPUS = [1, 4, 64]


def board(cpus: int = 1, memory: int = 128 * MIB, uarts: tuple[int, ...] = (1, 2, 3, 4)) -> Board:
    return Board(cpus=cpus, windows=layout.device_windows(memory, 40), uarts=uarts, keyboard=True, pvpanic=True)


def by_signature(tables: acpi.Tables) -> dict[bytes, tuple[int, bytes]]:
    return {content[:4]: (gpa, content) for gpa, content in tables.pieces}


@pytest.mark.parametrize("cpus", CPUS)
def test_places(cpus: int) -> None:
    pieces = sorted(acpi.build(board(cpus)).pieces)
    for (gpa, content), (after, _) in itertools.pairwise(pieces):
        assert gpa + len(content) <= after
    assert pieces[0][0] >= layout.ACPI_TABLES.base
    assert pieces[-1][0] + len(pieces[-1][1]) <= layout.ACPI_TABLES.end
    facs_gpa, _ = by_signature(acpi.build(board(cpus)))[b"FACS"]
    assert facs_gpa % 64 == 0


def test_place_that_is_too_small() -> None:
    with pytest.raises(ConfigError, match="ACPI tables"):
        acpi.build(board(), Range(0xF_0000, 0x1000))


@pytest.mark.parametrize("cpus", CPUS)
def test_lengths_and_checksums(cpus: int) -> None:
    for signature, (_, content) in by_signature(acpi.build(board(cpus))).items():
        if signature == b"RSD ":
            assert sum(content[:20]) & 0xFF == 0
            assert len(content) == struct.unpack_from("<I", content, 20)[0] == 36
        else:
            assert len(content) == struct.unpack_from("<I", content, 4)[0]
        if signature != b"FACS":
            assert sum(content) & 0xFF == 0


def test_pointers() -> None:
    tables = acpi.build(board())
    found = by_signature(tables)
    assert found[b"RSD "][0] == tables.rsdp == 0xF_0000
    xsdt = struct.unpack_from("<Q", found[b"RSD "][1], 24)[0]
    assert xsdt == found[b"XSDT"][0]
    assert struct.unpack_from("<2Q", found[b"XSDT"][1], 36) == (found[b"FACP"][0], found[b"APIC"][0])
    fadt = found[b"FACP"][1]
    assert struct.unpack_from("<II", fadt, 36) == (found[b"FACS"][0], found[b"DSDT"][0])
    assert struct.unpack_from("<QQ", fadt, 132) == (0, found[b"DSDT"][0])


def test_fadt_fields() -> None:
    fadt = acpi.fadt(0x1000, 0x2000, keyboard=False)
    assert (len(fadt), fadt[8]) == (276, 6)
    assert struct.unpack_from("<HIBBBB", fadt, 46) == (9, 0, 0, 0, 0, 0)  # SCI_INT; SMI_CMD and its values
    assert struct.unpack_from("<8I", fadt, 56) == (0xB000, 0, 0xB004, 0, 0, 0xB008, 0xAFE0, 0)
    assert struct.unpack_from("<6B", fadt, 88) == (4, 2, 0, 4, 4, 0)
    assert struct.unpack_from("<H", fadt, 109) == (0b101,)
    assert struct.unpack_from("<H", acpi.fadt(0x1000, 0x2000, keyboard=True), 109) == (0b111,)
    assert struct.unpack_from("<I", fadt, 112) == (0b101_0110_0101,)
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    for offset, port, bits in ((148, 0xB000, 32), (172, 0xB004, 16), (208, 0xB008, 32), (220, 0xAFE0, 32)):
        assert struct.unpack_from("<BB", fadt, offset) == (1, bits)
        assert struct.unpack_from("<Q", fadt, offset + 4) == (port,)
    for offset in (160, 184, 196, 232, 244, 256):
        assert fadt[offset : offset + 12] == bytes(12)


@pytest.mark.parametrize("cpus", CPUS)
def test_madt_entries(cpus: int) -> None:
    content = acpi.madt(board(cpus))
    assert struct.unpack_from("<II", content, 36) == (0xFEE0_0000, 1)
    entries: dict[int, list[bytes]] = {}
    at = 44
    while at < len(content):
        entries.setdefault(content[at], []).append(content[at : at + content[at + 1]])
        at += content[at + 1]
    assert at == len(content)
    assert [struct.unpack("<BBI", entry[2:]) for entry in entries[0]] == [(n, n, 1) for n in range(cpus)]
    assert [struct.unpack("<BxII", entry[2:]) for entry in entries[1]] == [(0, 0xFEC0_0000, 0)]
    overrides = {entry[3]: struct.unpack("<IH", entry[4:]) for entry in entries[2]}
    assert overrides == {0: (2, 0), 5: (5, 13), 9: (9, 13), 10: (10, 13), 11: (11, 13)}
    assert [struct.unpack("<BHB", entry[2:]) for entry in entries[4]] == [(0xFF, 0, 1)]


@pytest.mark.parametrize(
    "wrong", [{"cpus": 0}, {"cpus": 65}, {"uarts": (0,)}, {"uarts": (1, 5)}], ids=["none", "65", "COM0", "COM5"]
)
def test_impossible_board(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        acpi.build(board(**wrong))  # type: ignore[arg-type]  # several types in one table


def test_only_present_devices_are_described() -> None:
    bare = acpi.dsdt(Board(cpus=1, windows=layout.device_windows(128 * MIB, 40), uarts=(2,)))
    assert b"COM2" in bare
    assert b"COM1" not in bare
    for name in (b"QEMU0001", b"KBD_", b"MOU_"):
        assert name not in bare
        assert name in acpi.dsdt(board())


@needs_iasl
@pytest.mark.parametrize("memory", MEMORY, ids=["128MiB", "16GiB"])
@pytest.mark.parametrize("cpus", CPUS)
def test_compiler_accepts_its_own_disassembly(tmp_path: Path, cpus: int, memory: int) -> None:
    names = []
    for signature, (_, content) in by_signature(acpi.build(board(cpus, memory))).items():
        if signature != b"RSD ":  # found by address, never compiled
            names.append(signature.decode().lower())
            (tmp_path / f"{names[-1]}.aml").write_bytes(content)
    output = run(tmp_path, "iasl", "-d", *(f"{name}.aml" for name in names))
    assert "Error" not in output
    assert "Warning" not in output
    for name in names:
        output = run(tmp_path, "iasl", "-p", f"again-{name}", f"{name}.dsl")
        assert "Compilation successful. 0 Errors, 0 Warnings, 0 Remarks" in output


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The DSDT as ASL."""
    if not shutil.which("iasl"):
        pytest.skip("iasl is missing (apt install acpica-tools)")
    folder = tmp_path_factory.mktemp("dsdt")
    (folder / "dsdt.aml").write_bytes(acpi.dsdt(board(memory=16 * GIB)))
    run(folder, "iasl", "-d", "dsdt.aml")
    return " ".join((folder / "dsdt.dsl").read_text().split())


def test_interrupt_routing(listing: str) -> None:
    for slot in range(32):
        for pin in range(4):
            link = "LNKS" if (slot, pin) == (1, 0) else "LNK" + "ABCD"[(slot + pin + 1 + 2) % 4]
            address = f"0x{slot << 16 | 0xFFFF:08X}" if slot else "0xFFFF"
            pin_text = ("Zero", "One", "0x02", "0x03")[pin]
            assert f"{{ {address}, {pin_text}, \\_SB.{link}, Zero }}" in listing


def test_windows(listing: str) -> None:
    assert "0xC0000000, // Range Minimum 0xDFFFFFFF, // Range Maximum" in listing
    base = layout.mmio64_window(16 * GIB, 40)
    assert f"0x{base.base:016X}, // Range Minimum 0x{base.end - 1:016X}, // Range Maximum" in listing


def test_slots_and_soft_off(listing: str) -> None:
    assert "Name (\\_S5, Package (0x04) // _S5_: S5 System State { Zero, Zero, Zero, Zero })" in listing
    for slot in range(dsdt.FIRST_HOTPLUG_SLOT, 32):
        assert f"Device (S{slot:02X})" in listing
    assert "Device (S01)" not in listing


def interpret(folder: Path, *commands: str, fill: int = 0) -> str:
    """What the interpreter prints; its registers are memory that starts with the byte `fill` everywhere."""
    (folder / "dsdt.aml").write_bytes(acpi.dsdt(board()))
    script = "".join(f"{command}\n" for command in (*commands, "quit"))
    output = run(folder, "acpiexec", "-fv", f"{fill:#04x}", "dsdt.aml", script=script)
    assert "ACPI Error" not in output
    return output


@needs_acpiexec
def test_link_methods_follow_the_register(tmp_path: Path) -> None:
    disable, status, current = (f"execute \\_SB.LNKC.{name}" for name in ("_DIS", "_STA", "_CRS"))
    output = interpret(tmp_path, status, current, disable, status, current)
    states = [line.split("=")[1].strip()[-2:] for line in output.splitlines() if "[Integer] =" in line]
    assert states == ["0B", "09"]
    assert output.count("89 06 00 09 01 00 00 00 00 79 00") == 2


@needs_acpiexec
def test_link_is_set_by_its_resource(tmp_path: Path) -> None:
    """_SRS with the template of _PRS cut to one interrupt, then _CRS returns it."""
    resource = "(89 06 00 09 01 0B 00 00 00 79 00)"
    output = interpret(tmp_path, f"execute \\_SB.LNKB._SRS {resource}", "execute \\_SB.LNKB._CRS")
    assert "89 06 00 09 01 0B 00 00 00 79 00" in output


def notified(output: str) -> set[tuple[str, int]]:
    """Slot devices with the values they were notified of."""
    found = re.findall(r"Notify on \[(S[01][0-9A-F])_\] \w+ Value (0x\d\d)", output.split("Evaluating", 1)[1])
    return {(name, int(value, 16)) for name, value in found}


@needs_acpiexec
def test_hotplug_event_with_empty_registers(tmp_path: Path) -> None:
    assert not notified(interpret(tmp_path, "execute \\_GPE._E01", "execute \\_SB.PCI0.S1F._EJ0 1"))


@needs_acpiexec
def test_hotplug_event_with_every_bit_set(tmp_path: Path) -> None:
    slots = range(dsdt.FIRST_HOTPLUG_SLOT, 32)
    values = (dsdt.NOTIFY_DEVICE_CHECK, dsdt.NOTIFY_EJECT_REQUEST)
    expected = {(f"S{slot:02X}", value) for slot in slots for value in values}
    assert notified(interpret(tmp_path, "execute \\_GPE._E01", fill=0xFF)) == expected


def run(folder: Path, *command: str, script: str = "") -> str:
    result = subprocess.run(command, cwd=folder, input=script, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("\\", b"\\\0"),
        ("^X", b"^X___"),
        ("_CRS", b"_CRS"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("\\_SB.PCI0.ISA", b"\\\x2f\x03_SB_PCI0ISA_"),
    ],
)
def test_names(name: str, encoded: bytes) -> None:
    assert aml.name_string(name) == encoded


@pytest.mark.parametrize("name", ["TOOLONG", "1ABC", "a", "A-B", "A..B"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="AML name"):
        aml.name_string(name)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (1, "01"), (2, "0a02"), (256, "0b0001"), (1 << 16, "0c00000100"), (1 << 32, "0e0000000001000000")],
)
def test_integers(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("size", [0, 61, 62, 63, 4000, 4092, 4093, 4094, 1 << 20])
def test_package_length(size: int) -> None:
    """Decoded as §20.2.4 says, the length covers itself and the body."""
    encoded = aml.else_(b"\xa3" * size)[1:]
    more = encoded[0] >> 6
    length = encoded[0] & 0x3F if not more else encoded[0] & 0xF | int.from_bytes(encoded[1 : 1 + more], "little") << 4
    assert length == len(encoded) == size + 1 + more


def test_eisa_id() -> None:
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"
