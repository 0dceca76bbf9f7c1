"""The state of the boot processor at a kernel's entry point, and the tables that state refers to.

One GDT serves both protocols: Linux wants its code segment at selector 0x10 and its data segment at 0x18
(Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"); PVH leaves the selectors open.
"""

import struct

from msgspec import Struct

from propolis.firmware import layout
from propolis.firmware.memory import Memory
from propolis.hypervisor.state import DescriptorTable, Registers, Segment

BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20

# Intel SDM 3A §2.5 and §2.2.1
CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_NE = 1 << 5
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

# Intel SDM 3A §3.4.5.1 and §3.5; the accessed bit is set because the hidden part of a loaded segment has it set.
_TYPE_CODE = 0xB
_TYPE_DATA = 0x3
_TYPE_TSS_BUSY = 0xB
_TYPE_LDT = 0x2

_FLAT_LIMIT = 0xFFFF_FFFF
_TSS_LIMIT = 0x67

# Intel SDM 3A §4.5: present, writable, page size (2 MiB in a page directory)
_TABLE = 0x03
_PAGE_2M = 0x83
_IDENTITY_SIZE = 4 * layout.GIB


class Entry(Struct, frozen=True, kw_only=True):
    """How to start the boot processor, and what was loaded where."""

    registers: Registers
    protocol: str  # "linux64" or "pvh"
    kernel: layout.Range
    initrd: layout.Range | None = None


def long_mode(memory: Memory, *, rip: int, rsi: int) -> Registers:
    """64-bit mode at `rip`: the first 4 GiB identity-mapped, flat segments, interrupts off."""
    _write_page_tables(memory)
    code = _code(long_mode=True)
    return _registers(
        memory,
        code,
        rip=rip,
        rsi=rsi,
        rsp=layout.BOOT_STACK_TOP,
        cr0=CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr3=layout.PML4,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
    )


def protected_mode(memory: Memory, *, rip: int, rbx: int) -> Registers:
    """32-bit protected mode at `rip` without paging: flat segments, interrupts off."""
    return _registers(memory, _code(long_mode=False), rip=rip, rbx=rbx, rsp=layout.BOOT_STACK_TOP, cr0=CR0_PE | CR0_ET)


def _code(*, long_mode: bool) -> Segment:
    return Segment(
        selector=BOOT_CS,
        limit=_FLAT_LIMIT,
        type=_TYPE_CODE,
        s=1,
        present=1,
        l=int(long_mode),
        db=int(not long_mode),
        g=1,
    )


def _registers(memory: Memory, code: Segment, **values: int) -> Registers:
    data = Segment(selector=BOOT_DS, limit=_FLAT_LIMIT, type=_TYPE_DATA, s=1, present=1, db=1, g=1)
    task = Segment(selector=BOOT_TSS, limit=_TSS_LIMIT, type=_TYPE_TSS_BUSY, present=1)  # VMX insists on a busy TSS
    descriptors = (0, 0, _descriptor(code), _descriptor(data), _descriptor(task), 0)  # a 64-bit TSS takes two
    gdt = struct.pack(f"<{len(descriptors)}Q", *descriptors)
    memory.write(layout.GDT, gdt)
    return Registers(
        **values,
        cs=code,
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=task,
        ldt=Segment(type=_TYPE_LDT, unusable=1),
        gdt=DescriptorTable(base=layout.GDT, limit=len(gdt) - 1),
        idt=DescriptorTable(),
    )


def _descriptor(segment: Segment) -> int:
    """The 8-byte form of a segment (Intel SDM 3A figure 3-8)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return (
        limit & 0xFFFF
        | (segment.base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )


def _write_page_tables(memory: Memory) -> None:
    directories = range(layout.PAGE_DIRECTORIES, layout.PAGE_DIRECTORIES + 4 * layout.PAGE_SIZE, layout.PAGE_SIZE)
    pages = range(_PAGE_2M, _IDENTITY_SIZE, 2 * layout.MIB)
    memory.write(layout.PML4, struct.pack("<Q4088x", layout.PDPT | _TABLE))
    memory.write(layout.PDPT, struct.pack("<4Q4064x", *(directory | _TABLE for directory in directories)))
    memory.write(layout.PAGE_DIRECTORIES, struct.pack(f"<{len(pages)}Q", *pages))
