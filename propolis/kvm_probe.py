"""Can this host's KVM run an unmodified kernel? It is full, limited or absent, and why.

Nested or paravirtual KVMs exist that run only guest user mode on the processor and interpret guest kernel mode,
without the x87, SSE, XSAVE and cmpxchg16b instructions that every stock kernel uses. The probe runs those in ring 0 of
a guest of its own, by ioctls on /dev/kvm, in a few milliseconds. It needs the standard library only.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
from dataclasses import dataclass

KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_RUN = 0xAE80
KVM_GET_REGS, KVM_SET_REGS = 0x8090AE81, 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
EXIT_HLT, EXIT_SHUTDOWN, EXIT_INTERNAL_ERROR = 5, 8, 17

CODE_AT, DATA_AT, MEMORY = 0x4000, 0x5000, 0x10000
PML4_AT, PDPT_AT, PD_AT, IDT_AT = 0x1000, 0x2000, 0x3000, 0x6000

# Each ends in hlt; rdi points at 64 aligned bytes, cr4.OSFXSR is set, cr0.EM and TS are clear.
STEPS = {
    "integer arithmetic": "48 31 c0 48 ff c0 f4",  # xor rax,rax; inc rax
    "fninit": "db e3 f4",
    "fxsave": "0f ae 07 f4",
    "an SSE store (movaps)": "0f 57 c0 0f 29 07 f4",  # xorps xmm0,xmm0; movaps [rdi],xmm0
    "cmpxchg16b": "f0 48 0f c7 0f f4",  # lock cmpxchg16b [rdi]
    "int3 and iretq": "cc f4",  # the handler is an iretq
}


@dataclass(frozen=True)
class Verdict:
    """What the host's KVM can run."""

    word: str  # full, limited, absent
    reason: str = ""

    @property
    def is_full(self) -> bool:
        """Whether an unmodified kernel can run here."""
        return self.word == "full"

    @property
    def is_usable(self) -> bool:
        """Whether /dev/kvm runs at least guests of our own."""
        return self.word != "absent"

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.word}: {self.reason}" if self.reason else self.word


def _memory() -> mmap.mmap:
    ram = mmap.mmap(-1, MEMORY)
    ram[PML4_AT : PML4_AT + 8] = struct.pack("<Q", PDPT_AT | 3)
    ram[PDPT_AT : PDPT_AT + 8] = struct.pack("<Q", PD_AT | 3)
    ram[PD_AT : PD_AT + 8] = struct.pack("<Q", 0x83)  # one page of 2 MiB at 0
    handler = DATA_AT + 0xF00
    ram[handler : handler + 2] = b"\x48\xcf"  # iretq
    gate = struct.pack("<HHBBHII", handler & 0xFFFF, 8, 0, 0x8E, handler >> 16, 0, 0)
    ram[IDT_AT + 3 * 16 : IDT_AT + 4 * 16] = gate
    gdt = DATA_AT + 0xE00
    ram[gdt + 8 : gdt + 24] = struct.pack("<QQ", 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    return ram


def _segment(selector: int, kind: int, *, is_code: bool) -> bytes:
    return struct.pack("<QIH10B", 0, 0xFFFFFFFF, selector, kind, 1, 0, not is_code, 1, is_code, 1, 0, 0, 0)


def _sregs(old: bytes) -> bytes:
    code, data = _segment(8, 11, is_code=True), _segment(16, 3, is_code=False)
    new = bytearray(old)
    new[0:144] = code + data * 5  # cs ds es fs gs ss
    struct.pack_into("<QH", new, 192, DATA_AT + 0xE00, 23)  # gdt
    struct.pack_into("<QH", new, 208, IDT_AT, 0xFFF)  # idt
    cr0 = 0x80000033  # PG NE ET MP PE
    cr4 = 0x620  # OSXMMEXCPT OSFXSR PAE
    struct.pack_into("<6Q", new, 224, cr0, 0, PML4_AT, cr4, 0, 0x500)  # cr0 cr2 cr3 cr4 cr8 efer (LMA LME)
    return bytes(new)


def _run(kvm: int, code: bytes) -> int:
    """Run `code` in ring 0, long mode; the exit reason."""
    vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    ram = _memory()
    ram[CODE_AT : CODE_AT + len(code)] = code
    anchor = (ctypes.c_char * MEMORY).from_buffer(ram)
    cpu = -1
    try:
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, MEMORY, ctypes.addressof(anchor)))
        cpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        with mmap.mmap(cpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0)) as run:
            fcntl.ioctl(cpu, KVM_SET_SREGS, _sregs(fcntl.ioctl(cpu, KVM_GET_SREGS, bytes(312))))
            regs = [0] * 18
            regs[5], regs[6], regs[16], regs[17] = DATA_AT, DATA_AT + 0xD00, CODE_AT, 2  # rdi rsp rip rflags
            fcntl.ioctl(cpu, KVM_SET_REGS, struct.pack("<18Q", *regs))
            fcntl.ioctl(cpu, KVM_RUN, 0)
            reason: int = struct.unpack_from("<I", run, 8)[0]
            return reason
    finally:
        if cpu >= 0:
            os.close(cpu)
        os.close(vm)
        del anchor
        ram.close()


def probe(path: str = "/dev/kvm") -> Verdict:
    """Try every step; the first that fails is the reason."""
    if os.uname().machine != "x86_64":
        return Verdict("absent", f"this machine is {os.uname().machine}, guests are x86_64")
    try:
        kvm = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = {errno.ENOENT: " (no KVM module, or no virtualization)", errno.EACCES: " (be in the group kvm, or root)"}
        return Verdict("absent", f"{path}: {error.strerror}{hint.get(error.errno or 0, '')}")
    try:
        if fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0) != 12:
            return Verdict("absent", f"{path} speaks another API version than 12")
        for name, code in STEPS.items():
            try:
                reason = _run(kvm, bytes.fromhex(code))
            except OSError as error:
                return Verdict("absent" if name == "integer arithmetic" else "limited", f"{name}: {error.strerror}")
            if reason != EXIT_HLT:
                what = {EXIT_SHUTDOWN: "a triple fault", EXIT_INTERNAL_ERROR: "an internal error"}
                return Verdict("limited", f"{name} in guest kernel mode ends in {what.get(reason, f'exit {reason}')}")
    finally:
        os.close(kvm)
    return Verdict("full")


def main() -> int:
    """Print the verdict."""
    verdict = probe()
    sys.stdout.write(f"{verdict}\n")
    return ("full", "limited", "absent").index(verdict.word)
