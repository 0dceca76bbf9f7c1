"""The I/O commands of one submission queue (NVMe 1.4 §6)."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from propolis.backends.block._engine cimport Engine, Io
from propolis.devices._polling cimport Polling
from propolis.devices.nvme._data cimport Command, Segments
from propolis.devices.nvme._queues cimport SubmissionQueue

cdef enum ServiceResult:
    SERVICE_IDLE = 0
    SERVICE_AGAIN = 1        # the budget is spent: call again

cdef enum:
    DEPTH = 256              # commands of one queue that are worked on at once
    MAX_RANGES = 256         # of one dataset management command, §6.7
    CID_WORDS = 1024         # a bit for each command identifier
    ERRORS = 16

cdef struct Range:           # in bytes of the namespace
    uint64_t offset
    uint64_t length

cdef struct Request:
    Io io                    # first, so that a completed Io is its request
    Segments data
    Range *ranges            # room for MAX_RANGES: what is to be zeroed or deallocated
    uint32_t range_count
    uint32_t range_index     # as far as the engine has been asked
    uint64_t range_done
    uint64_t lba
    uint16_t cid
    uint16_t status
    uint8_t opcode
    bint is_duplicate        # its identifier belongs to another command
    Request *next            # free list, or list of those that wait for room in the completion queue

cdef struct ErrorEntry:
    uint64_t when            # of the monotonic clock
    uint64_t lba
    uint16_t cid
    uint16_t status

cdef class Namespace:
    """What all queues know of the disk. Written by: loop."""
    cdef uint64_t blocks
    cdef readonly uint32_t shift         # of a block's size in bytes
    cdef readonly bint read_only
    cdef readonly bint can_zero
    cdef readonly bint can_discard
    cdef uint64_t max_extent             # bytes
    cdef public bint write_cache         # off: each change is on stable storage before it completes

cdef class IoQueue(SubmissionQueue):
    cdef Engine engine
    cdef Polling polling
    cdef Namespace namespace
    cdef Request *requests
    cdef iovec *vectors
    cdef uint64_t *addresses
    cdef Range *ranges
    cdef uint8_t *bounce                 # MAX_BYTES, of the one compare at a time
    cdef iovec bounce_vector
    cdef bint comparing
    cdef bint stopping                   # no new commands
    cdef bint is_stuck                   # the next one has to wait for a completion, or for room for one
    cdef Request *free_list
    cdef Request *held_first             # completed, but there was no room to say so
    cdef Request *held_last
    cdef uint32_t active                 # with the engine
    cdef uint64_t busy[CID_WORDS]            # identifiers in use
    cdef ErrorEntry failures[ERRORS]
    cdef uint64_t reads, writes, flushes, discards, others
    cdef uint64_t bytes_read, bytes_written
    cdef uint64_t errors
    cdef uint64_t fetched
    cdef int last_errno                  # of the backend

    cdef uint32_t service(self, uint32_t budget) noexcept nogil
    cdef void collect(self) noexcept nogil
    cdef uint32_t _pass(self, uint32_t budget) noexcept nogil
    cdef void _completed(self, Io *io) noexcept nogil
    cdef void _begin(self, const Command *command) noexcept nogil
    cdef int _prepare(self, Request *request, const Command *command) noexcept nogil
    cdef int _transfer(self, Request *request, const Command *command) noexcept nogil
    cdef int _zeroes(self, Request *request, const Command *command) noexcept nogil
    cdef int _dataset(self, Request *request, const Command *command) noexcept nogil
    cdef bint _next_extents(self, Request *request) noexcept nogil
    cdef void _submit(self, Request *request) noexcept nogil
    cdef bint _goes_on(self, Request *request) noexcept nogil
    cdef void _complete(self, Request *request) noexcept nogil
    cdef void _finish(self, Request *request, uint16_t status) noexcept nogil
    cdef bint _post(self, Request *request) noexcept nogil
    cdef void _free(self, Request *request) noexcept nogil
