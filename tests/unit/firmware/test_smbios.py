"""The SMBIOS tables as dmidecode reads them, and what is in them of a machine."""

import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from propolis.firmware import layout, smbios
from propolis.firmware.smbios import Cache, Processor, System
from tests.unit.hypervisor.test_cpuid import AMD, INTEL

DUMPED_AT = 0x20  # where a file of `dmidecode --dump-bin` has the tables, behind their entry point

SYSTEM = System(
    uuid=uuid.UUID("0b3a7b64-0bb2-4c5e-9a7a-7f6b3f3ad1aa"),
    cpus=4,
    memory_size=4 << 30,
    serial_number="S-1",
    version="5",
    firmware_version="0.1",
    is_uefi=True,
    processor=Processor(
        vendor="GenuineIntel",
        name="A processor",
        signature=0x306C3,
        features=0x078B_FBFF,
        caches=(
            Cache(level=1, kind="data", size=128 << 10, ways=8),
            Cache(level=1, kind="instruction", size=128 << 10, ways=8),
            Cache(level=2, kind="unified", size=1 << 20, ways=16),
            Cache(level=3, kind="unified", size=40 << 20, ways=11),
        ),
    ),
)

needs_dmidecode = pytest.mark.skipif(
    not shutil.which("dmidecode", path="/usr/sbin:/usr/bin"), reason="dmidecode is missing (apt install dmidecode)"
)


def decoded(tmp_path: Path, system: System, *options: str) -> list[str]:
    """What dmidecode shows of a dump, without the lines about itself and the file."""
    content = smbios.tables(system)
    dump = tmp_path / "dump"
    dump.write_bytes(smbios.entry_point(DUMPED_AT, content).ljust(DUMPED_AT, b"\0") + content)
    command = ["/usr/sbin/dmidecode", "--from-dump", str(dump), *options]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stderr == ""
    return [line for line in result.stdout.splitlines() if not line.startswith(("#", "Reading"))]


@needs_dmidecode
def test_dmidecode_reads_what_is_in_the_golden_file(tmp_path: Path) -> None:
    golden = (Path(__file__).parent / "smbios.txt").read_text().splitlines()
    assert decoded(tmp_path, SYSTEM) == golden


@needs_dmidecode
@pytest.mark.parametrize("mib", [16, 3072, 3073, 32767, 1 << 20])
@pytest.mark.parametrize("cpus", [1, 64])
def test_machines_of_any_size(tmp_path: Path, mib: int, cpus: int) -> None:
    """Nothing is wrong or left over, and the ranges make up the memory."""
    system = System(uuid=SYSTEM.uuid, cpus=cpus, memory_size=mib << 20)
    text = "\n".join(decoded(tmp_path, system))
    for word in ("Wrong", "Invalid", "OUT OF SPEC", "Truncated", "BAD INDEX", "TABLE IS"):
        assert word.lower() not in text.lower(), text
    assert f"Core Count: {cpus}\n" in text
    ranges = [line.split() for line in text.splitlines() if "Range Size" in line]
    units = {"kB": 1, "MB": 1 << 10, "GB": 1 << 20, "TB": 1 << 30}
    assert sum(int(line[2]) * units[line[3]] for line in ranges) == mib << 10


def test_the_entry_point_is_found_by_a_scan_and_points_to_the_tables() -> None:
    (place, entry), (address, content) = smbios.pieces(SYSTEM)
    assert place % 16 == 0
    assert place in range(layout.BIOS_SEGMENT.base, layout.BIOS_SEGMENT.end)
    assert entry.startswith(b"_SM3_")
    assert sum(entry) % 256 == 0
    assert int.from_bytes(entry[16:24], "little") == address
    assert int.from_bytes(entry[12:16], "little") == len(content)
    assert place + len(entry) <= address
    assert address + len(content) <= layout.SMBIOS_TABLES.end


def test_the_tables_have_room_whatever_they_say() -> None:
    most = "x" * 64
    system = System(
        uuid=SYSTEM.uuid,
        cpus=64,
        memory_size=1 << 40,
        serial_number=most,
        manufacturer=most,
        product_name=most,
        version=most,
        processor=Processor(
            vendor=most, name=most, caches=tuple(Cache(level=7, kind="instruction", size=1 << 40) for _ in range(8))
        ),
    )
    _, (address, content) = smbios.pieces(system)
    assert address + len(content) <= layout.SMBIOS_TABLES.end


def test_a_processor_is_what_its_cpuid_says() -> None:
    brand = [(0x8000_0002 + part, 0, 0, *(0x2D2D2D2D,) * 4) for part in range(3)]
    seen = smbios.processor([*INTEL, *brand], 56)
    assert (seen.vendor, seen.name, seen.signature) == ("GenuineIntel", "-" * 48, 0x50654)
    assert seen.features == 0xBFEB_FBFF
    # Of each level what all 56 processors have: two share the first and second, 64 the third.
    assert seen.caches == (
        Cache(level=1, kind="data", size=28 * 8 * 64 * 64, ways=8),
        Cache(level=1, kind="instruction", size=28 * 8 * 64 * 64, ways=8),
        Cache(level=2, kind="unified", size=28 * 16 * 64 * 1024, ways=16),
        Cache(level=3, kind="unified", size=11 * 64 * 57344, ways=11),
    )
    assert smbios.processor(AMD, 1).caches == (
        Cache(level=1, kind="data", size=8 * 64 * 64, ways=8),
        Cache(level=2, kind="unified", size=8 * 64 * 2048, ways=8),
        Cache(level=3, kind="unified", size=16 * 64 * 32768, ways=16),
    )
    assert smbios.processor([], 1) == Processor()
