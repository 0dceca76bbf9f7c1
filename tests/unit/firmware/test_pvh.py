"""ELF by PVH: what a right image becomes, and how a wrong one is refused."""

import random
import struct

import pytest

from propolis.errors import ImageError
from propolis.firmware import acpi, boot, layout
from propolis.firmware.board import Board
from propolis.firmware.entry import Entry
from propolis.firmware.layout import Range
from tests.unit.firmware.conftest import RAM_SIZE
from tests.unit.firmware.images import ELF_CODE, ELF_LOAD, ENTRY, KERNEL_NAME, PT_NOTE, File, Ram, elf, note, phdr

INFO = layout.PVH_START_INFO
BASE = 0x10_0000
MAX64 = (1 << 64) - 1


def load(ram: Ram, image: bytes, *, initrd: bytes | None = None, cmdline: str = "") -> Entry:
    initrd_file = File(initrd, "/x/initrd") if initrd is not None else None
    return boot.load(ram, RAM_SIZE, File(image), initrd=initrd_file, cmdline=cmdline)


@pytest.mark.parametrize("bits", [32, 64])
def test_entry_state(ram: Ram, bits: int) -> None:
    entry = load(ram, elf(bits=bits))
    registers = entry.registers
    assert entry.protocol == "pvh"
    assert entry.kernel == Range(BASE, 0x2000)
    assert registers.rip == ENTRY
    assert registers.rbx == INFO
    assert registers.rflags == 2
    assert registers.cr0 == 0x11
    assert (registers.cr3, registers.cr4, registers.efer) == (0, 0, 0)
    assert (registers.cs.base, registers.cs.limit, registers.cs.l, registers.cs.db) == (0, 0xFFFF_FFFF, 0, 1)
    assert (registers.ds.base, registers.ds.limit) == (0, 0xFFFF_FFFF)
    assert (registers.tr.base, registers.tr.limit, registers.tr.type) == (0, 0x67, 0xB)
    assert ram.number(registers.gdt.base + 0x10, "Q") == 0x00CF_9B00_0000_FFFF


def test_what_the_file_does_not_fill_is_cleared(ram: Ram) -> None:
    ram.write(BASE, b"\xff" * 0x3000)
    load(ram, elf())
    assert ram.read(BASE, 0x2001) == ELF_CODE + bytes(0x2000 - len(ELF_CODE)) + b"\xff"


def test_start_info(ram: Ram) -> None:
    board = Board(cpus=1, windows=layout.device_windows(RAM_SIZE, 40))
    tables = acpi.build(board)
    initrd = File(b"i" * 5000, "/x/initrd")
    entry = boot.load(ram, RAM_SIZE, File(elf()), initrd=initrd, cmdline="a=b", tables=tables)
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, count, reserved = struct.unpack(
        "<IIIIQQQQII", ram.read(INFO, 56)
    )
    assert (magic, version, flags, modules, reserved) == (0x336EC578, 1, 0, 1, 0)
    assert rsdp == tables.rsdp
    assert ram.read(rsdp, 8) == b"RSD PTR "
    assert ram.read(cmdline, 4) == b"a=b\0"
    assert entry.initrd == Range(RAM_SIZE - 0x2000, 5000)
    assert struct.unpack("<QQQQ", ram.read(modlist, 32)) == (entry.initrd.base, 5000, 0, 0)
    assert ram.read(entry.initrd.base, 5000) == b"i" * 5000
    assert count == 7
    assert struct.unpack("<QQII", ram.read(memmap, 24)) == (0, 0x9_FC00, 1, 0)
    assert struct.unpack("<QQII", ram.read(memmap + 24 * 3, 24)) == (BASE, RAM_SIZE - BASE, 1, 0)


def test_no_module_without_initrd(ram: Ram) -> None:
    load(ram, elf())
    assert ram.number(INFO + 12, "I") == 0
    assert ram.number(INFO + 16, "Q") == 0


def test_segments_in_any_order(ram: Ram) -> None:
    high = phdr(offset=0x400, paddr=0x20_0000, filesz=16, memsz=16)
    empty = phdr(paddr=MAX64, filesz=0, memsz=0)
    entry = load(ram, elf(high, empty, ELF_LOAD))
    assert entry.kernel == Range(BASE, 0x10_0010)
    assert ram.read(0x20_0000, 16) == ELF_CODE[:16]


def test_other_notes_are_passed_over(ram: Ram) -> None:
    notes = note(b"x" * 5, kind=3, name=b"GNU\0") + note(b"", kind=18, name=b"GNU\0") + note(b"y", kind=6) + note()
    assert load(ram, elf(notes=notes)).registers.rip == ENTRY


def test_notes_of_8_byte_alignment(ram: Ram) -> None:
    wanted = struct.pack("<III4s", 4, 4, 18, b"Xen\0") + struct.pack("<I4x", ENTRY)
    first = struct.pack("<III8s4x", 5, 1, 1, b"GNUX\0") + b"d" + bytes(7)  # name padded to 24, note to 32
    notes = phdr(PT_NOTE, offset=0x200, filesz=len(first + wanted), align=8)
    assert load(ram, elf(ELF_LOAD, notes, notes=first + wanted)).registers.rip == ENTRY


HEADER_LIES = [
    ("ident", 3, r"e_ident\[EI_CLASS\]"),
    ("data", 2, r"e_ident\[EI_DATA\]"),
    ("ident_version", 0, r"e_ident\[EI_VERSION\]"),
    ("type", 1, "e_type"),
    ("machine", 183, "e_machine"),
    ("version", 2, "e_version"),
    ("phoff", MAX64, "e_phoff"),
    ("phoff", 1 << 63, "e_phoff"),
    ("phoff", 0x4C8 - 111, "e_phoff"),
    ("phentsize", 32, "e_phentsize"),
    ("phentsize", 0, "e_phentsize"),
    ("phnum", 0, "e_phnum"),
    ("phnum", 0xFFFE, "e_phoff"),
    ("phnum", 0xFFFF, "e_phnum"),
]


@pytest.mark.parametrize(("field", "value", "message"), HEADER_LIES)
def test_lying_header_field_is_named(ram: Ram, field: str, value: int, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(ram, elf(**{field: value}))  # type: ignore[arg-type]  # no field is named code or notes
    assert str(caught.value).startswith(f"kernel '{KERNEL_NAME}': ")


SEGMENT_LIES = [
    ({"offset": MAX64}, "p_filesz"),
    ({"offset": 0x401}, "p_filesz: 200 bytes at offset 0x401, but the file ends after 1224 bytes"),
    ({"filesz": MAX64, "memsz": MAX64}, "p_filesz"),
    ({"memsz": 100}, "p_filesz: 200, more than p_memsz 100"),
    ({"memsz": 0}, "p_filesz: 200, more than p_memsz 0"),
    ({"memsz": MAX64}, "p_memsz"),
    ({"memsz": RAM_SIZE - BASE + 1}, "p_memsz"),
    ({"paddr": 0}, "p_paddr: 0x0 lies below 1 MiB"),
    ({"paddr": 0xF_FFFF}, "p_paddr"),
    ({"paddr": RAM_SIZE}, "p_paddr"),
    ({"paddr": 0xC000_0000}, "p_paddr"),
    ({"paddr": MAX64 - 0x1000}, "p_paddr"),
    ({"paddr": RAM_SIZE - 1}, "p_memsz"),
    ({"paddr": 0x10_0011}, "XEN_ELFNOTE_PHYS32_ENTRY: 0x100010 lies in no loaded segment"),
]


@pytest.mark.parametrize(("lie", "message"), SEGMENT_LIES)
def test_lying_segment_is_named(ram: Ram, lie: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(ram, elf(ELF_LOAD | lie))


@pytest.mark.parametrize("paddr", [BASE, BASE + 1, BASE + 0x1FFF])
def test_overlapping_segments(ram: Ram, paddr: int) -> None:
    with pytest.raises(ImageError, match=r"p_paddr: 0x10.* overlaps program header"):
        load(ram, elf(ELF_LOAD, phdr(offset=0x400, paddr=paddr, filesz=8, memsz=8)))


NOTE_LIES = [
    (note(namesz=MAX64 >> 32), "n_namesz of 4294967295"),
    (note(descsz=MAX64 >> 32), "n_descsz of 4294967295"),
    (note(descsz=9), "n_descsz of 9"),
    (note(kind=1)[:-1], "n_descsz of 8"),
    (note(kind=1) + bytes(11), "its header"),
    (note(kind=1), "there is no such note"),
    (note(name=b"Xen"), "there is no such note"),
    (b"", "there is no such note"),
    (note(b"xy"), "2 bytes, expected 4 or 8"),
    (note(b"x" * 16), "16 bytes, expected 4 or 8"),
    (note(struct.pack("<Q", ENTRY | 1 << 40)), "lies in no loaded segment"),
    (note(struct.pack("<I", BASE + 0x1000)), "lies in no loaded segment"),  # in the cleared part: no code there
]


@pytest.mark.parametrize(("notes", "message"), NOTE_LIES)
def test_lying_notes(ram: Ram, notes: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load(ram, elf(notes=notes))


def test_note_segment_beyond_the_file(ram: Ram) -> None:
    with pytest.raises(ImageError, match="program header 1: p_filesz"):
        load(ram, elf(ELF_LOAD, phdr(PT_NOTE, offset=0x200, filesz=1 << 40)))


def test_many_note_segments_over_the_same_bytes(ram: Ram) -> None:
    """Their sum is bounded, not each: a thousand times the whole file would take minutes."""
    image = elf(phnum=1001, phoff=0x400 + 0x10_0000, code=bytes(0x10_0000))
    loaded = struct.pack("<II6Q", 1, 7, 0x400, 0, BASE, 0x1000, 0x1000, 4)
    notes = struct.pack("<II6Q", PT_NOTE, 4, 0x400, 0, 0, 0x10_0000, 0, 4)
    with pytest.raises(ImageError, match="more than 1024 KiB of notes"):
        load(ram, image + loaded + notes * 1000)


def test_no_load_segment(ram: Ram) -> None:
    with pytest.raises(ImageError, match="PT_LOAD"):
        load(ram, elf(phdr(PT_NOTE, offset=0x200, filesz=len(note()))))


def test_truncated_at_every_byte(ram: Ram) -> None:
    image = elf()
    for length in range(len(image)):
        with pytest.raises(ImageError):
            load(ram, image[:length])


def test_initrd_larger_than_memory(ram: Ram) -> None:
    with pytest.raises(ImageError, match="initrd '/x/initrd': size"):
        load(ram, elf(), initrd=bytes(RAM_SIZE - BASE - 0x1FFF))


def test_cmdline_of_64_kib(ram: Ram) -> None:
    with pytest.raises(ImageError, match="cmdline: 65536 bytes"):
        load(ram, elf(), cmdline="x" * 65536)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_images(ram: Ram, seed: int) -> None:
    """Whatever the bytes say: loaded, or refused with an ImageError."""
    chance = random.Random(seed)
    loaded = 0
    refused: list[str] = []
    for _ in range(500):
        image = bytearray(elf(bits=chance.choice([32, 64])))
        for _ in range(chance.randint(1, 3)):
            at = chance.choice([chance.randrange(4, 0xC0), chance.randrange(0x200, 0x220), chance.randrange(0x400)])
            image[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.getrandbits(8)])
        if chance.random() < 0.1:
            del image[chance.randrange(4, len(image)) :]
        try:
            load(ram, bytes(image), initrd=b"x")
            loaded += 1
        except ImageError as error:
            refused.append(str(error))
    assert all(message.isprintable() for message in refused)
    assert min(loaded, len(refused)) > 20, f"seed {seed}: one outcome is hardly tested"
