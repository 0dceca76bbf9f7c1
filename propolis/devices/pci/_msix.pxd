"""MSI-X: the table, the pending bits, and the vectors they guard."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._interrupts cimport MsiVector

cdef enum:
    MAX_VECTORS = 2048       # the size field has 11 bits
    NO_VECTOR = 0xFFFF       # virtio 1.2 §4.1.5.1.2: "no vector"

cdef struct Entry:
    uint64_t address
    uint32_t data
    uint32_t control         # bit 0: masked by the guest
    bint silent              # what the vector was told last: masked by entry, function or disabled MSI-X
    bint pending
    void *vector             # borrowed MsiVector; Msix.vectors keeps it alive

cdef class MsixTable(Region):
    cdef Msix msix

cdef class MsixPba(Region):
    cdef Msix msix

cdef class Msix:
    cdef readonly uint32_t count
    cdef readonly MsixTable table        # put it into the BAR's window, 16 bytes a vector
    cdef readonly MsixPba pba            # and this, 8 bytes for each 64 vectors begun
    cdef Entry *entries                  # under: lock
    cdef uint32_t is_enabled             # under: lock; read relaxed
    cdef bint function_masked            # under: lock
    cdef uint64_t dropped                # messages to no local APIC; under: lock
    cdef Lock lock
    cdef list vectors

    # Any thread. Masked: it becomes pending. Ignored while MSI-X is disabled and for a vector that is not in the table.
    cdef void fire(self, uint32_t vector) noexcept nogil
    cdef bint enabled(self) noexcept nogil
    # The function's Message Control word was written.
    cdef void set_control(self, uint32_t control) noexcept nogil
    cdef void _settle(self, Entry *entry) noexcept nogil
    cdef void _send(self, Entry *entry) noexcept nogil
