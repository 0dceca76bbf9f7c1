"""Threads that do blocking block I/O without ever running Python."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec

from propolis._lock cimport Lock
from propolis._posix cimport pthread_cond_t
from propolis.backends.block._engine cimport Engine, Extent, Io

cdef enum:
    ZERO_BYTES = 65536
    ZERO_VECTORS = 16        # one write of zeros covers up to a MiB

# All of `length` bytes: a short transfer is continued, one of nothing is an error. 0 or -errno.
cdef int transfer(int fd, bint is_write, iovec *iov, uint32_t count, uint64_t offset, uint64_t length) noexcept nogil

cdef class IoPool:
    cdef Lock lock
    cdef pthread_cond_t work
    cdef Io *first                       # under: lock
    cdef Io *last                        # under: lock
    cdef uint32_t idle                   # threads that wait; under: lock
    cdef bint stopping                   # under: lock
    cdef uint64_t performed              # under: lock
    cdef list threads                    # written by: loop
    cdef list engines                    # keeps them alive while a thread may touch them; written by: loop
    cdef iovec zero_vectors[ZERO_VECTORS]

    cdef void enqueue(self, Io *first, Io *last, uint32_t count) noexcept nogil
    cdef void _serve(self) noexcept nogil
    cdef int _perform(self, int fd, bint skip_sync, Io *io) noexcept nogil
    cdef int _zero(self, int fd, const Extent *extent) noexcept nogil

cdef class PoolEngine(Engine):
    cdef IoPool pool
    cdef int file                        # borrowed descriptor: the backend closes it after this engine
    cdef bint skip_sync                  # never changes
    cdef Io *batch_first                 # submitted, not committed; written by: the submitter
    cdef Io *batch_last
    cdef uint32_t batch_count
