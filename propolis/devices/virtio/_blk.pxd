"""The virtio-block request loop of one queue (virtio 1.2 §5.2.6)."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec

from propolis._memory cimport GuestMemory
from propolis.backends.block._engine cimport Engine, Io
from propolis.devices._polling cimport Polling
from propolis.devices.virtio._queue cimport Chain, Queue

cdef enum ServiceResult:
    SERVICE_IDLE = 0
    SERVICE_AGAIN = 1        # the budget is spent, or the guest was faster: call again
    SERVICE_BROKEN = 2       # a ring error: nothing more is served before a reset

cdef struct Request:
    Io io                    # first, so that a completed Io is its request
    Chain chain
    uint8_t *status          # in guest RAM: the last writable byte of the chain
    uint64_t status_gpa
    Request *next            # free list

cdef class BlkQueue:
    cdef Queue queue
    cdef GuestMemory memory
    cdef Engine engine
    cdef Polling polling
    cdef Request *requests               # one for each descriptor and one spare; allocated once
    cdef iovec *vectors
    cdef uint64_t *addresses
    cdef Request *free_list
    cdef uint64_t sectors
    cdef uint64_t sector_mask            # sectors of one logical block, less one
    cdef bint read_only
    # Negotiated; written by: loop, before the first request.
    cdef bint durable                    # no FLUSH: each change is on stable storage before it completes
    cdef bint discard
    cdef bint zero
    cdef uint64_t max_sectors            # of one discard or write-zeroes segment
    cdef uint8_t serial[20]
    cdef uint64_t reads, writes, flushes, discards, others
    cdef uint64_t bytes_read, bytes_written
    cdef uint64_t errors                 # requests answered with an error
    cdef int last_errno                  # of the backend

    cdef uint32_t service(self, uint32_t budget) noexcept nogil
    cdef void collect(self) noexcept nogil
    cdef uint32_t _pass(self, uint32_t budget) noexcept nogil
    cdef void _completed(self, Io *io) noexcept nogil
    cdef void _begin(self, Request *request) noexcept nogil
    cdef bint _data(self, Request *request, uint64_t sector, bint is_write) noexcept nogil
    cdef int _extents(self, Request *request, bint is_zero) noexcept nogil
    cdef void _complete(self, Request *request) noexcept nogil
    cdef void _answer(self, Request *request, uint8_t status, uint64_t written) noexcept nogil
