"""The shape of every block engine: submit, commit, reap.

A device owns its Io records and allocates them up front; an engine only links them, so no list here can overflow. Each
record that is submitted comes back exactly once, by `take` or `reap`, and is not touched by the engine afterwards.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.uio cimport iovec

from propolis._lock cimport Lock

cdef enum IoOp:
    IO_READ = 0
    IO_WRITE = 1
    IO_FLUSH = 2
    IO_DISCARD = 3
    IO_ZERO = 4

cdef enum:
    MAX_EXTENTS = 16

cdef struct Extent:
    uint64_t offset
    uint64_t length
    bint unmap               # IO_ZERO: the range may become a hole

cdef struct Io:
    int op
    bint durable             # a change that must be on stable storage when it completes
    int result               # 0 or -errno; written by: the engine, before it completes
    uint32_t iov_count
    iovec *iov               # IO_READ, IO_WRITE: `length` bytes in all, unchanged when it completes
    uint64_t offset
    uint64_t length
    uint32_t extent_count
    Extent extents[MAX_EXTENTS]    # IO_DISCARD, IO_ZERO
    Io *next
    void *engine             # borrowed Engine; its owner keeps it while anything is pending
    void *owner              # for whoever made the record

cdef class Engine:
    cdef int fd                          # eventfd: readable while completions wait
    cdef uint32_t pending                # submitted, not reaped; written by: the submitter
    cdef Io *ready_first                 # performed by submit itself; written by: the submitter
    cdef Io *ready_last
    cdef Lock done_lock
    cdef Io *done_first                  # under: done_lock
    cdef Io *done_last                   # under: done_lock
    cdef set operations                  # Python's, in flight; written by: loop

    # One thread per engine submits, commits and reaps.
    cdef void submit(self, Io *io) noexcept nogil
    cdef void commit(self) noexcept nogil
    # What submit performed itself, linked by `next`, or NULL; what is left of it at commit waits for reap.
    cdef Io *take(self) noexcept nogil
    # Whether reap would find anything: without a system call, so that it can be asked again and again.
    cdef bint waiting(self) noexcept nogil
    # All completions so far, linked by `next`, or NULL.
    cdef Io *reap(self) noexcept nogil
    # For subclasses, on any thread; `io` belongs to the submitter again.
    cdef void complete(self, Io *io) noexcept nogil
    # For subclasses, in submit: it is done.
    cdef void finish(self, Io *io) noexcept nogil
    cdef void _join(self, Io *first, Io *last) noexcept nogil
    cdef void _ring_for_ready(self) noexcept nogil
