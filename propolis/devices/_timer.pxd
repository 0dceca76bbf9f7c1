"""Clocks, and timers that compiled code sets and the loop watches."""

from libc.stdint cimport int64_t, uint64_t

cdef uint64_t monotonic_ns() noexcept nogil
cdef int64_t realtime_ns() noexcept nogil

cdef class Timer:
    cdef int fd

    # Any thread. Replaces what was set before.
    cdef void arm(self, uint64_t delay_ns) noexcept nogil
    cdef void disarm(self) noexcept nogil
    cdef void _set(self, uint64_t delay_ns) noexcept nogil
