"""What a device and the hypervisor signal each other with: interrupt lines, MSI vectors and doorbells.

Threads: everything declared `noexcept nogil` may run on a vCPU thread and never takes the GIL. The rest runs on the
loop thread. Each shared field says who writes it.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t

from propolis._bus cimport Bus, Region
from propolis._vmm cimport Vm


cdef class IrqLine:
    """One source's wire to an input of the interrupt controllers; lines on one input are ORed."""
    cdef Vm vm
    cdef int32_t pin         # GSI 0..23, or -1: not routed; under: vm.irq_lock
    cdef bint level          # under: vm.irq_lock

    cdef void set(self, bint level) noexcept nogil
    cdef void pulse(self) noexcept nogil            # an edge: up and down again
    cdef void route(self, int32_t pin) noexcept nogil   # moves an asserted level to the new input
    cdef void _drive(self, bint level) noexcept nogil

cdef class MsiVector:
    """One message-signalled interrupt. Masking and pending bits belong to the MSI-X table."""
    cdef Vm vm
    cdef uint64_t address    # written by: vCPU, under the table's lock
    cdef uint32_t data
    cdef int fd              # eventfd of a vector lent to another process, else -1
    cdef int32_t gsi         # its route while lent, else -1

    cdef void set_message(self, uint64_t address, uint32_t data) noexcept nogil
    cdef void set_masked(self, bint masked) noexcept nogil   # matters for a lent vector alone
    cdef void fire(self) noexcept nogil

cdef class Doorbell(Region):
    """A register whose write adds one to an eventfd, whoever sees it first: the kernel or the vCPU loop."""
    cdef Vm vm
    cdef int fd
    cdef uint64_t rung       # writes that came through the vCPU loop; relaxed
