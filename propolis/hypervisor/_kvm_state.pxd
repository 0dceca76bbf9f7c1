"""What a KVM vCPU holds: its state at power-on, which a reset brings back, and its registers as the neutral struct.

All of it runs on the loop thread while the vCPU is parked. `fd` is the vCPU's, borrowed.
"""

from libc.stdint cimport uint32_t, uint64_t

from propolis.hypervisor cimport kvm

cdef enum:
    MAX_MSRS = 512
    MAX_UNLISTED = 32 + 4 * 32

ctypedef struct Msr:  # struct kvm_msr_entry
    uint32_t index
    uint32_t reserved
    uint64_t data

ctypedef struct Msrs:  # struct kvm_msrs with room
    uint32_t nmsrs
    uint32_t padding
    Msr entries[MAX_MSRS + MAX_UNLISTED]

ctypedef struct MsrList:
    uint32_t nmsrs
    uint32_t indices[MAX_MSRS]

ctypedef struct PowerOn:
    kvm.kvm_regs regs
    kvm.kvm_sregs sregs
    kvm.kvm_xsave xsave
    kvm.kvm_xcrs xcrs
    kvm.kvm_debugregs debugregs
    kvm.kvm_vcpu_events events
    kvm.kvm_lapic_state lapic
    kvm.kvm_mp_state mp_state
    Msrs msrs

# Reads what `restore` writes back; once, before the vCPU first runs. `listed` are the MSRs that KVM knows to save.
cdef int remember(int fd, const MsrList *listed, bint has_xcrs, PowerOn *p) except -1
cdef int restore(int fd, bint has_xcrs, PowerOn *p) except -1
cdef object read_registers(int fd)
# The APIC base stays.
cdef int load_registers(int fd, object registers) except -1
