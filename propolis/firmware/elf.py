"""Reading an ELF executable for loading: its header, load segments and notes (System V gABI, chapters 4 and 5).

Everything is checked against the file's size here; whether it fits the guest is the loader's question.
"""

import struct
from collections.abc import Iterator

from msgspec import Struct

from propolis.firmware.image import ImageFile, size_text
from propolis.firmware.layout import MIB, align_up

MAGIC = b"\x7fELF"
EI_CLASS, EI_DATA, EI_VERSION = 4, 5, 6
ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1
EV_CURRENT = 1
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF

NOTES_MAX = 1 * MIB  # of all note segments together; a kernel has well under a page

# (name, offset, code) by class; those that loading needs
_HEADER_FIELDS = {
    ELFCLASS32: (
        ("e_type", 16, "H"),
        ("e_machine", 18, "H"),
        ("e_version", 20, "I"),
        ("e_phoff", 28, "I"),
        ("e_phentsize", 42, "H"),
        ("e_phnum", 44, "H"),
    ),
    ELFCLASS64: (
        ("e_type", 16, "H"),
        ("e_machine", 18, "H"),
        ("e_version", 20, "I"),
        ("e_phoff", 32, "Q"),
        ("e_phentsize", 54, "H"),
        ("e_phnum", 56, "H"),
    ),
}
_HEADER_MAX = 64
_PROGRAM_HEADER = {ELFCLASS32: struct.Struct("<8I"), ELFCLASS64: struct.Struct("<II6Q")}
_NOTE_HEADER = struct.Struct("<III")


class Segment(Struct, frozen=True, kw_only=True):
    """A program header: `index` is its place in the table, for error messages."""

    index: int
    type: int
    offset: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Note(Struct, frozen=True):
    name: bytes
    type: int
    desc: bytes


def segments(image: ImageFile) -> list[Segment]:
    """The load and note segments, each wholly inside the file."""
    raw = image.read(0, _HEADER_MAX)
    for name, offset in (("e_ident[EI_CLASS]", EI_CLASS), ("e_ident[EI_DATA]", EI_DATA), ("e_ident[EI_VERSION]", 6)):
        if offset >= len(raw):
            raise image.error(name, f"at offset {offset:#x}, {image.ends()}")
    if raw[EI_CLASS] not in _HEADER_FIELDS:
        raise image.error("e_ident[EI_CLASS]", f"{raw[EI_CLASS]}, expected 1 (32-bit) or 2 (64-bit)")
    if raw[EI_DATA] != ELFDATA2LSB:
        raise image.error("e_ident[EI_DATA]", f"{raw[EI_DATA]}, expected 1 (little-endian)")
    if raw[EI_VERSION] != EV_CURRENT:
        raise image.error("e_ident[EI_VERSION]", f"{raw[EI_VERSION]}, expected 1")
    header: dict[str, int] = {}
    for name, offset, code in _HEADER_FIELDS[raw[EI_CLASS]]:
        if offset + struct.calcsize(code) > len(raw):
            raise image.error(name, f"at offset {offset:#x}, {image.ends()}")
        (header[name],) = struct.unpack_from(f"<{code}", raw, offset)
    layout = _PROGRAM_HEADER[raw[EI_CLASS]]
    _check_header(image, header, layout.size)
    table = image.read(header["e_phoff"], header["e_phnum"] * layout.size)
    found = []
    for index, values in enumerate(layout.iter_unpack(table)):
        segment = _segment(raw[EI_CLASS], index, values)
        if segment.type in (PT_LOAD, PT_NOTE):
            _check_segment(image, segment)
            found.append(segment)
    return found


def notes(image: ImageFile, table: list[Segment]) -> Iterator[Note]:
    """All notes of all note segments. A note that reaches beyond its segment is an error, not an end."""
    wanted = [segment for segment in table if segment.type == PT_NOTE]
    if sum(segment.filesz for segment in wanted) > NOTES_MAX:
        raise image.error("p_filesz", f"more than {size_text(NOTES_MAX)} of notes")
    for segment in wanted:
        alignment = 8 if segment.align == 8 else 4
        data = image.read(segment.offset, segment.filesz)
        at = 0
        while at < len(data):
            if at + _NOTE_HEADER.size > len(data):
                raise _note_error(image, segment, at, "its header")
            namesz, descsz, kind = _NOTE_HEADER.unpack_from(data, at)
            name_at = at + _NOTE_HEADER.size
            desc_at = align_up(name_at + namesz, alignment)
            if name_at + namesz > len(data):
                raise _note_error(image, segment, at, f"n_namesz of {namesz}")
            if desc_at + descsz > len(data):
                raise _note_error(image, segment, at, f"n_descsz of {descsz}")
            yield Note(data[name_at : name_at + namesz], kind, data[desc_at : desc_at + descsz])
            at = align_up(desc_at + descsz, alignment)


def _check_header(image: ImageFile, header: dict[str, int], entry_size: int) -> None:
    if header["e_type"] not in (ET_EXEC, ET_DYN):
        raise image.error("e_type", f"{header['e_type']}, expected 2 (executable) or 3 (position-independent)")
    if header["e_machine"] not in (EM_386, EM_X86_64):
        raise image.error("e_machine", f"{header['e_machine']}, expected 62 (x86-64) or 3 (i386)")
    if header["e_version"] != EV_CURRENT:
        raise image.error("e_version", f"{header['e_version']}, expected 1")
    if not header["e_phnum"]:
        raise image.error("e_phnum", "0: there is nothing to load")
    if header["e_phnum"] == PN_XNUM:
        raise image.error("e_phnum", "PN_XNUM: a kernel with that many segments is not supported")
    if header["e_phentsize"] != entry_size:
        raise image.error("e_phentsize", f"{header['e_phentsize']}, expected {entry_size}")
    size = header["e_phnum"] * entry_size
    if header["e_phoff"] + size > image.size:
        raise image.error("e_phoff", f"{header['e_phnum']} program headers at {header['e_phoff']:#x}, {image.ends()}")


def _segment(elf_class: int, index: int, values: tuple[int, ...]) -> Segment:
    if elf_class == ELFCLASS64:
        kind, _flags, offset, _vaddr, paddr, filesz, memsz, align = values
    else:
        kind, offset, _vaddr, paddr, filesz, memsz, _flags, align = values
    return Segment(index=index, type=kind, offset=offset, paddr=paddr, filesz=filesz, memsz=memsz, align=align)


def _check_segment(image: ImageFile, segment: Segment) -> None:
    if segment.offset + segment.filesz > image.size:
        raise image.error(
            f"program header {segment.index}: p_filesz",
            f"{size_text(segment.filesz)} at offset {segment.offset:#x}, {image.ends()}",
        )
    if segment.type == PT_LOAD and segment.filesz > segment.memsz:
        raise image.error(
            f"program header {segment.index}: p_filesz", f"{segment.filesz}, more than p_memsz {segment.memsz}"
        )


def _note_error(image: ImageFile, segment: Segment, at: int, what: str) -> Exception:
    return image.error(
        f"program header {segment.index}: note at {at:#x}",
        f"{what} reaches beyond the {segment.filesz} bytes of the segment",
    )
