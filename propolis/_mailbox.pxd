"""The mailbox: rare events from any thread to the loop.

Threads: everything declared `noexcept nogil` may run on a vCPU thread and never takes the GIL. The rest runs on the
loop thread. Each shared field says who writes it.
"""

from libc.stdint cimport uint32_t, uint64_t


cdef enum:
    SLOT_WORDS = 4
    MAX_SLOTS = 256  # 64 to a word

cdef class Mailbox:
    """Rare events from any thread to the loop. Each poster has a slot of 32 event bits, so nothing can overflow."""
    cdef int fd
    cdef uint32_t bits[MAX_SLOTS]        # any thread, or32_seq; the loop swaps with 0
    cdef uint64_t ready[SLOT_WORDS]  # slots with bits; any thread, or64_seq; the loop swaps with 0
    cdef uint32_t count                  # written by: loop
    cdef list callbacks                  # written by: loop

    cdef void post(self, uint32_t slot, uint32_t bits) noexcept nogil
