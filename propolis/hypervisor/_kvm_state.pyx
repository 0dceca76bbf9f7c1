"""What a KVM vCPU holds: its state at power-on, which a reset brings back, and its registers as the neutral struct.

KVM has no call that resets a vCPU (docs/decisions/0005-reset-from-remembered-state.md).
"""

from libc.string cimport memcpy, memset

from propolis.hypervisor cimport kvm
from propolis.hypervisor._ioctl cimport call, refused

from propolis.hypervisor.state import DescriptorTable, Registers, Segment

cdef enum:
    # Reset leaves the time stamp counter running: a guest's clock must not jump back.
    MSR_TSC = 0x10
    MSR_TSC_ADJUST = 0x3B
    MSR_TSC_DEADLINE = 0x6E0
    # KVM does not list the MTRRs (SDM volume 3A, §12.11): eight pairs from 0x200 on, and these.
    MTRR_PAIRS = 0x200
    MTRR_PAIR_REGISTERS = 16
    # Nor the machine check banks, whose number is in MCG_CAP (§16.3): four registers each from 0x400 on.
    MSR_MCG_CAP = 0x179
    MCE_BANKS = 0x400
    MAX_MCE_BANKS = 32

cdef uint32_t *OTHER_MTRRS = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F, 0x2FF, 0,
]


cdef int remember(int fd, const MsrList *listed, bint has_xcrs, PowerOn *p) except -1:
    cdef uint32_t i, n
    cdef long got
    call(fd, kvm.KVM_GET_REGS, &p.regs, "read the registers")
    call(fd, kvm.KVM_GET_SREGS, &p.sregs, "read the system registers")
    call(fd, kvm.KVM_GET_XSAVE, &p.xsave, "read the extended state")
    if has_xcrs:
        call(fd, kvm.KVM_GET_XCRS, &p.xcrs, "read the extended control registers")
    call(fd, kvm.KVM_GET_DEBUGREGS, &p.debugregs, "read the debug registers")
    call(fd, kvm.KVM_GET_VCPU_EVENTS, &p.events, "read the pending events")
    call(fd, kvm.KVM_GET_LAPIC, &p.lapic, "read the local APIC")
    call(fd, kvm.KVM_GET_MP_STATE, &p.mp_state, "read the multiprocessor state")
    n = 0
    for i in range(listed.nmsrs):
        if listed.indices[i] not in (MSR_TSC, MSR_TSC_ADJUST, MSR_TSC_DEADLINE):
            p.msrs.entries[n].index = listed.indices[i]
            n += 1
    for i in range(<uint32_t>MTRR_PAIR_REGISTERS):
        p.msrs.entries[n].index = MTRR_PAIRS + i
        n += 1
    i = 0
    while OTHER_MTRRS[i]:
        p.msrs.entries[n].index = OTHER_MTRRS[i]
        i += 1
        n += 1
    for i in range(4 * mce_banks(fd)):
        p.msrs.entries[n].index = MCE_BANKS + i
        n += 1
    # KVM stops at the first MSR this vCPU lacks: leave that one out and read on.
    p.msrs.nmsrs = n
    while p.msrs.nmsrs > 0:
        got = call(fd, kvm.KVM_GET_MSRS, &p.msrs, "read the MSRs")
        if got == <long>p.msrs.nmsrs:
            break
        p.msrs.nmsrs -= 1
        for i in range(<uint32_t>got, p.msrs.nmsrs):
            p.msrs.entries[i] = p.msrs.entries[i + 1]
    return 0


cdef uint32_t mce_banks(int fd) except? 0:
    cdef Msrs one
    memset(&one, 0, sizeof(one))
    one.nmsrs = 1
    one.entries[0].index = MSR_MCG_CAP
    if call(fd, kvm.KVM_GET_MSRS, &one, "read the number of machine check banks") != 1:
        return 0
    return min(<uint32_t>(one.entries[0].data & 0xFF), <uint32_t>MAX_MCE_BANKS)


cdef int restore(int fd, bint has_xcrs, PowerOn *p) except -1:
    cdef uint32_t at = 0
    cdef long done
    # The APIC's base and mode are in the system registers, and the rest of it depends on them.
    call(fd, kvm.KVM_SET_SREGS, &p.sregs, "reset the system registers")
    call(fd, kvm.KVM_SET_REGS, &p.regs, "reset the registers")
    if has_xcrs:
        call(fd, kvm.KVM_SET_XCRS, &p.xcrs, "reset the extended control registers")
    call(fd, kvm.KVM_SET_XSAVE, &p.xsave, "reset the extended state")
    call(fd, kvm.KVM_SET_DEBUGREGS, &p.debugregs, "reset the debug registers")
    # A read-only MSR among them must not end the rest: KVM stops there, and we go on behind it.
    cdef Msrs rest
    while at < p.msrs.nmsrs:
        rest.nmsrs = p.msrs.nmsrs - at
        rest.padding = 0
        memcpy(rest.entries, &p.msrs.entries[at], rest.nmsrs * sizeof(Msr))
        done = kvm.ioctl(fd, kvm.KVM_SET_MSRS, &rest)
        if done < 0:
            refused("reset the MSRs")
        at += <uint32_t>done + 1
    call(fd, kvm.KVM_SET_LAPIC, &p.lapic, "reset the local APIC")
    call(fd, kvm.KVM_SET_VCPU_EVENTS, &p.events, "reset the pending events")
    call(fd, kvm.KVM_SET_MP_STATE, &p.mp_state, "reset the multiprocessor state")
    return 0


cdef object read_registers(int fd):
    cdef kvm.kvm_regs regs
    cdef kvm.kvm_sregs sregs
    call(fd, kvm.KVM_GET_REGS, &regs, "read the registers")
    call(fd, kvm.KVM_GET_SREGS, &sregs, "read the system registers")
    return Registers(
        rax=regs.rax, rbx=regs.rbx, rcx=regs.rcx, rdx=regs.rdx, rsi=regs.rsi, rdi=regs.rdi, rsp=regs.rsp,
        rbp=regs.rbp, r8=regs.r8, r9=regs.r9, r10=regs.r10, r11=regs.r11, r12=regs.r12, r13=regs.r13,
        r14=regs.r14, r15=regs.r15, rip=regs.rip, rflags=regs.rflags,
        cr0=sregs.cr0, cr2=sregs.cr2, cr3=sregs.cr3, cr4=sregs.cr4, cr8=sregs.cr8, efer=sregs.efer,
        cs=segment_out(&sregs.cs), ds=segment_out(&sregs.ds), es=segment_out(&sregs.es),
        fs=segment_out(&sregs.fs), gs=segment_out(&sregs.gs), ss=segment_out(&sregs.ss),
        tr=segment_out(&sregs.tr), ldt=segment_out(&sregs.ldt),
        gdt=DescriptorTable(base=sregs.gdt.base, limit=sregs.gdt.limit),
        idt=DescriptorTable(base=sregs.idt.base, limit=sregs.idt.limit),
    )


cdef int load_registers(int fd, object registers) except -1:
    cdef kvm.kvm_regs regs
    cdef kvm.kvm_sregs sregs
    memset(&regs, 0, sizeof(regs))
    call(fd, kvm.KVM_GET_SREGS, &sregs, "read the system registers")
    regs.rax, regs.rbx, regs.rcx, regs.rdx = registers.rax, registers.rbx, registers.rcx, registers.rdx
    regs.rsi, regs.rdi, regs.rsp, regs.rbp = registers.rsi, registers.rdi, registers.rsp, registers.rbp
    regs.r8, regs.r9, regs.r10, regs.r11 = registers.r8, registers.r9, registers.r10, registers.r11
    regs.r12, regs.r13, regs.r14, regs.r15 = registers.r12, registers.r13, registers.r14, registers.r15
    regs.rip, regs.rflags = registers.rip, registers.rflags
    sregs.cr0, sregs.cr2, sregs.cr3 = registers.cr0, registers.cr2, registers.cr3
    sregs.cr4, sregs.cr8, sregs.efer = registers.cr4, registers.cr8, registers.efer
    segment_in(registers.cs, &sregs.cs)
    segment_in(registers.ds, &sregs.ds)
    segment_in(registers.es, &sregs.es)
    segment_in(registers.fs, &sregs.fs)
    segment_in(registers.gs, &sregs.gs)
    segment_in(registers.ss, &sregs.ss)
    segment_in(registers.tr, &sregs.tr)
    segment_in(registers.ldt, &sregs.ldt)
    sregs.gdt.base, sregs.gdt.limit = registers.gdt.base, registers.gdt.limit
    sregs.idt.base, sregs.idt.limit = registers.idt.base, registers.idt.limit
    call(fd, kvm.KVM_SET_SREGS, &sregs, "set the system registers")
    call(fd, kvm.KVM_SET_REGS, &regs, "set the registers")
    return 0


cdef object segment_out(const kvm.kvm_segment *s):
    return Segment(base=s.base, limit=s.limit, selector=s.selector, type=s.type, s=s.s, dpl=s.dpl, present=s.present,
                   avl=s.avl, l=s.l, db=s.db, g=s.g, unusable=s.unusable)


cdef int segment_in(segment, kvm.kvm_segment *s) except -1:
    memset(s, 0, sizeof(s[0]))
    s.base, s.limit, s.selector, s.type = segment.base, segment.limit, segment.selector, segment.type
    s.s, s.dpl, s.present, s.avl = segment.s, segment.dpl, segment.present, segment.avl
    s.l, s.db, s.g, s.unusable = segment.l, segment.db, segment.g, segment.unusable
    return 0
