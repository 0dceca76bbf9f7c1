"""Guest RAM in plain Python and builders of small kernel images, right unless told otherwise."""

import io
import mmap
import struct
from typing import Any

from propolis.errors import GuestMemoryError
from propolis.firmware import layout

KERNEL_NAME = "/x/kernel"
MAP_NORESERVE = 0x4000


class Ram:
    """Satisfies `firmware.memory.Memory`; anonymous mappings, so that unused RAM of any size costs nothing."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.parts = [(part, mmap.mmap(-1, part.size, flags=flags)) for part in layout.ram_ranges(size)]

    def view(self, gpa: int, length: int) -> memoryview:
        for part, backing in self.parts:
            if part.base <= gpa and gpa + length <= part.end:
                return memoryview(backing)[gpa - part.base : gpa - part.base + length]
        raise GuestMemoryError(f"{length} bytes at {gpa:#x} are not wholly RAM")

    def write(self, gpa: int, data: bytes) -> None:
        with self.view(gpa, len(data)) as view:
            view[:] = data

    def read(self, gpa: int, length: int) -> bytes:
        with self.view(gpa, length) as view:
            return bytes(view)

    def number(self, gpa: int, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.read(gpa, struct.calcsize(code)))
        return int(value)

    def close(self) -> None:
        """Raises BufferError while a loader still holds a view."""
        for _, backing in self.parts:
            backing.close()


class File(io.BytesIO):
    """An open file as the loaders get it: with a name."""

    def __init__(self, data: bytes, name: str = KERNEL_NAME) -> None:
        super().__init__(data)
        self.name = name


BZIMAGE_FIELDS = {
    "setup_sects": (0x1F1, "B", 1),
    "syssize": (0x1F4, "I", 128),
    "boot_flag": (0x1FE, "H", 0xAA55),
    "jump": (0x200, "H", 0x6AEB),
    "header": (0x202, "I", 0x53726448),
    "version": (0x206, "H", 0x020F),
    "loadflags": (0x211, "B", 1),
    "initrd_addr_max": (0x22C, "I", 0x7FFF_FFFF),
    "kernel_alignment": (0x230, "I", 0x20_0000),
    "relocatable_kernel": (0x234, "B", 1),
    "xloadflags": (0x236, "H", 3),
    "cmdline_size": (0x238, "I", 2047),
    "setup_data": (0x250, "Q", 0xDEAD_BEEF),
    "pref_address": (0x258, "Q", 0x10_0000),
    "init_size": (0x260, "I", 0x1_0000),
}
BZIMAGE_CODE = bytes(range(256)) * 8


def bzimage(code: bytes = BZIMAGE_CODE, **fields: int) -> bytes:
    """A bzImage of one setup sector with 2 KiB of code; `fields` replace header fields by name."""
    unknown = set(fields) - set(BZIMAGE_FIELDS)
    assert not unknown, unknown
    raw = bytearray(1024) + code
    for name, (offset, kind, value) in BZIMAGE_FIELDS.items():
        struct.pack_into(f"<{kind}", raw, offset, fields.get(name, value))
    return bytes(raw)


PT_LOAD, PT_NOTE = 1, 4
ENTRY = 0x10_0010


def phdr(kind: int = PT_LOAD, **fields: int) -> dict[str, int]:
    return {"type": kind, "flags": 7, "offset": 0, "vaddr": 0, "paddr": 0, "filesz": 0, "memsz": 0, "align": 4} | fields


def note(desc: bytes = struct.pack("<Q", ENTRY), kind: int = 18, name: bytes = b"Xen\0", **lies: int) -> bytes:
    header = struct.pack("<III", lies.get("namesz", len(name)), lies.get("descsz", len(desc)), kind)
    return header + name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)


ELF_CODE = bytes(range(1, 201))
ELF_LOAD = phdr(offset=0x400, paddr=0x10_0000, filesz=len(ELF_CODE), memsz=0x2000)


def elf(
    *programs: dict[str, int], bits: int = 64, notes: bytes | None = None, code: bytes = ELF_CODE, **fields: int
) -> bytes:
    """An ELF executable: headers, notes at 0x200, code at 0x400. A note segment is added where none is given."""
    notes = note() if notes is None else notes
    table = list(programs) or [ELF_LOAD]
    if not any(program["type"] == PT_NOTE for program in table):
        table.append(phdr(PT_NOTE, offset=0x200, filesz=len(notes)))
    wide = bits == 64
    head: dict[str, Any] = {
        "ident": 2 if wide else 1,
        "data": 1,
        "ident_version": 1,
        "type": 2,
        "machine": 62 if wide else 3,
        "version": 1,
        "phoff": 64,
        "phentsize": 56 if wide else 32,
        "phnum": len(table),
    } | fields
    raw = bytearray(struct.pack("<4sBBB9x", b"\x7fELF", head["ident"], head["data"], head["ident_version"]))
    word = "Q" if wide else "I"
    raw += struct.pack(f"<HHI{word}{word}{word}", head["type"], head["machine"], head["version"], 0, head["phoff"], 0)
    raw += struct.pack("<IHHHHHH", 0, 64 if wide else 52, head["phentsize"], head["phnum"], 0, 0, 0)
    raw += bytes(64 - len(raw))
    order = (
        ("type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align")
        if wide
        else ("type", "offset", "vaddr", "paddr", "filesz", "memsz", "flags", "align")
    )
    for program in table:
        raw += struct.pack("<II6Q" if wide else "<8I", *(program[key] for key in order))
    raw += bytes(0x200 - len(raw))
    raw += notes + bytes(0x200 - len(notes)) + code
    return bytes(raw)
