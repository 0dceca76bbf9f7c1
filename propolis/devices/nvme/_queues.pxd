"""Submission and completion queues (NVMe 1.4 §4.1, §4.6), and the admin queue's side of them for Python."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from propolis._memory cimport GuestMemory
from propolis.devices.nvme._data cimport Command
from propolis.devices.nvme._doorbells cimport Doorbells
from propolis.devices.pci._msix cimport Msix

cdef class CompletionQueue:
    """Made when the host creates it. Used by one thread, as are the submission queues that complete here."""
    cdef readonly uint32_t id
    cdef readonly uint32_t size
    cdef readonly uint32_t users         # submission queues that complete here; written by: loop
    cdef GuestMemory memory
    cdef Doorbells doorbells
    cdef Msix msix
    cdef uint8_t *base                   # checked when it was made; guest memory stays as long as the machine
    cdef uint64_t gpa
    cdef uint32_t head                   # as far as the host has read
    cdef uint32_t tail
    cdef uint32_t vector
    cdef bint interrupts
    cdef bint phase
    cdef bint posted                     # since the last interrupt
    cdef readonly uint64_t interrupt_count

    # False where the host has to take entries first: then EVENT_ROOM comes.
    cdef bint post(
        self, uint32_t sq_id, uint32_t sq_head, uint16_t cid, uint16_t status, uint32_t result
    ) noexcept nogil
    cdef void signal(self) noexcept nogil    # one interrupt for what was posted
    cdef bint _has_room(self) noexcept nogil
    cdef void _look(self) noexcept nogil

cdef class SubmissionQueue:
    cdef readonly uint32_t id
    cdef GuestMemory memory
    cdef Doorbells doorbells
    cdef CompletionQueue cq              # None while the queue does not exist
    cdef uint8_t *base                   # NULL then
    cdef uint32_t size
    cdef uint32_t head

    # A copy of the next command, where there is one.
    cdef bint peek(self, Command *copy) noexcept nogil
    cdef void consume(self) noexcept nogil
    cdef bint offered(self) noexcept nogil  # whether peek would find one; a hint for who does not listen yet
    # Asks for a doorbell with the next command; True when it has come already.
    cdef bint listen(self) noexcept nogil
