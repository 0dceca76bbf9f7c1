"""The way to an open file that is the fastest for its kind."""

from libc.stdint cimport uint64_t

from propolis.backends._iopool cimport PoolEngine
from propolis.backends.block._engine cimport Io

cdef enum FileKind:
    KIND_OTHER = 0           # the pool does everything
    KIND_MEMORY = 1          # tmpfs, memfd: nothing to wait for
    KIND_CACHED = 2          # a page cache: what is in there is had at once

cdef class FileEngine(PoolEngine):
    cdef FileKind kind
    cdef bint can_write_now              # written by: the submitter
    cdef uint64_t in_place               # requests performed by submit; written by: the submitter
    cdef uint64_t passed_on

    cdef bint _perform_now(self, Io *io) noexcept nogil
