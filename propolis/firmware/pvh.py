"""ELF kernels by the PVH protocol (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h)."""

import struct

from propolis.firmware import e820, elf, entry, layout
from propolis.firmware.elf import Segment
from propolis.firmware.entry import Entry
from propolis.firmware.image import ImageFile, size_text
from propolis.firmware.layout import Range
from propolis.firmware.memory import Memory
from propolis.firmware.payload import load_cmdline, load_initrd

XEN_NOTE_NAME = b"Xen\0"
XEN_ELFNOTE_PHYS32_ENTRY = 18
START_MAGIC = 0x336EC578
START_VERSION = 1

_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMMAP_ENTRY = struct.Struct("<QQII")

_MODLIST = layout.PVH_START_INFO + 0x40
_MEMMAP = layout.PVH_START_INFO + 0x80
_ZERO_CHUNK = bytes(1 * layout.MIB)


def load(
    memory: Memory, memory_size: int, kernel: ImageFile, initrd: ImageFile | None, cmdline: str, rsdp: int
) -> Entry:
    """Loads `kernel` and what belongs to it; the vCPU then starts at the returned entry."""
    low = layout.ram_ranges(memory_size)[0]
    table = elf.segments(kernel)
    loads = _place(kernel, table, low)
    start = _entry_point(kernel, table, loads)

    load_cmdline(memory, cmdline, layout.CMDLINE.size - 1, "the PVH protocol here")
    for segment in loads:
        kernel.load(f"program header {segment.index}: p_filesz", memory, segment.paddr, segment.offset, segment.filesz)
        _zero(memory, segment.paddr + segment.filesz, segment.memsz - segment.filesz)
    loaded = Range(loads[0].paddr, _end(loads[-1]) - loads[0].paddr)
    ramdisk = None
    if initrd is not None:
        free = layout.align_up(loaded.end, layout.PAGE_SIZE)
        ramdisk = load_initrd(memory, initrd, [Range(free, max(low.end - free, 0))])
    _write_start_info(memory, memory_size, ramdisk, rsdp)
    registers = entry.protected_mode(memory, rip=start, rbx=layout.PVH_START_INFO)
    return Entry(registers=registers, protocol="pvh", kernel=loaded, initrd=ramdisk)


def _place(kernel: ImageFile, table: list[Segment], low: Range) -> list[Segment]:
    """The load segments by address, all in RAM between 1 MiB and the end of low memory, none over another."""
    loads = sorted((s for s in table if s.type == elf.PT_LOAD and s.memsz), key=lambda segment: segment.paddr)
    if not loads:
        raise kernel.error("e_phnum", "no program header of type PT_LOAD: there is nothing to load")
    previous: Segment | None = None
    for segment in loads:
        where = f"program header {segment.index}"
        if segment.paddr < layout.KERNEL_MIN:
            raise kernel.error(f"{where}: p_paddr", f"{segment.paddr:#x} lies below 1 MiB")
        if segment.paddr >= low.end:
            raise kernel.error(f"{where}: p_paddr", f"{segment.paddr:#x}, but memory ends at {low.end:#x}")
        if _end(segment) > low.end:
            raise kernel.error(
                f"{where}: p_memsz",
                f"{size_text(segment.memsz)} from {segment.paddr:#x}, but memory ends at {low.end:#x}",
            )
        if previous is not None and segment.paddr < _end(previous):
            raise kernel.error(
                f"{where}: p_paddr",
                f"{segment.paddr:#x} overlaps program header {previous.index}, which ends at {_end(previous):#x}",
            )
        previous = segment
    return loads


def _entry_point(kernel: ImageFile, table: list[Segment], loads: list[Segment]) -> int:
    """The 32-bit entry point out of the Xen note; Linux keeps the note as 4 or 8 bytes, by its word size."""
    for note in elf.notes(kernel, table):
        if note.name != XEN_NOTE_NAME or note.type != XEN_ELFNOTE_PHYS32_ENTRY:
            continue
        if len(note.desc) not in (4, 8):
            raise kernel.error("XEN_ELFNOTE_PHYS32_ENTRY", f"{len(note.desc)} bytes, expected 4 or 8")
        address = int.from_bytes(note.desc, "little")
        if not any(segment.paddr <= address < segment.paddr + segment.filesz for segment in loads):
            raise kernel.error("XEN_ELFNOTE_PHYS32_ENTRY", f"{address:#x} lies in no loaded segment")
        return address
    raise kernel.error("XEN_ELFNOTE_PHYS32_ENTRY", "there is no such note: the kernel has no PVH entry point")


def _end(segment: Segment) -> int:
    return segment.paddr + segment.memsz


def _zero(memory: Memory, gpa: int, length: int) -> None:
    """Clears what the file does not fill: after a reboot the old contents would still be there."""
    while length:
        count = min(length, len(_ZERO_CHUNK))
        memory.write(gpa, _ZERO_CHUNK if count == len(_ZERO_CHUNK) else bytes(count))
        gpa += count
        length -= count


def _write_start_info(memory: Memory, memory_size: int, ramdisk: Range | None, rsdp: int) -> None:
    """struct hvm_start_info version 1, with its module list and memory map; types are those of e820."""
    entries = e820.build(memory_size)
    if ramdisk is not None:
        memory.write(_MODLIST, _MODULE.pack(ramdisk.base, ramdisk.size, 0, 0))
    memory.write(_MEMMAP, b"".join(_MEMMAP_ENTRY.pack(item.base, item.length, item.type, 0) for item in entries))
    modules = 1 if ramdisk is not None else 0
    memory.write(
        layout.PVH_START_INFO,
        _START_INFO.pack(
            START_MAGIC,
            START_VERSION,
            0,
            modules,
            _MODLIST if modules else 0,
            layout.CMDLINE.base,
            rsdp,
            _MEMMAP,
            len(entries),
            0,
        ),
    )
