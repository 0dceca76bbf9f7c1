"""Neutral register state of an x86-64 vCPU: what every backend can read and write.

Never the bytes of a kernel's own structures: saved state must not depend on one host's headers.
Field names are those of the Intel SDM, volume 3A, chapters 2 and 3.
"""

from msgspec import Struct


class Segment(Struct, frozen=True, kw_only=True):
    """A segment register with its hidden part. `limit` is in bytes, already scaled by G."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0  # 4 bits
    s: int = 0  # 1: code or data, 0: system
    dpl: int = 0
    present: int = 0
    avl: int = 0
    l: int = 0  # noqa: E741 -- the architecture's name: 64-bit code
    db: int = 0
    g: int = 0
    unusable: int = 0


class DescriptorTable(Struct, frozen=True, kw_only=True):
    base: int = 0
    limit: int = 0


class Registers(Struct, frozen=True, kw_only=True):
    """General, control and segment registers: all that a boot protocol sets and a failure report shows."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2  # bit 1 reads as one

    cr0: int = 0x60000010  # value at reset: CD, NW, ET
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()


def real_mode_registers() -> Registers:
    """The registers at power-on (SDM volume 3A, table 10-1): real mode, first instruction at FFFF_FFF0."""
    data = Segment(limit=0xFFFF, type=3, s=1, present=1)
    return Registers(
        rip=0xFFF0,
        cs=Segment(base=0xFFFF_0000, limit=0xFFFF, selector=0xF000, type=0xB, s=1, present=1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(limit=0xFFFF, type=0xB, present=1),
        ldt=Segment(limit=0xFFFF, type=2, present=1),
    )
