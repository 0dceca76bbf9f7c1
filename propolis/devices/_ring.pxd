"""Bytes on their way from the guest to the loop."""

from libc.stdint cimport uint8_t, uint32_t

cdef class ByteRing:
    """One writer at a time (the device's lock sees to that), one reader: the loop. Positions wrap at 2^32."""
    cdef uint8_t *data
    cdef uint32_t size       # a power of two
    cdef uint32_t inward     # written by: the writer (release)
    cdef uint32_t outward    # written by: loop (release)

    # Bytes in it. For the writer an upper bound, for the loop a lower one.
    cdef uint32_t used(self) noexcept nogil
    # True when the loop has to be told: it had read everything. The caller saw that there is room.
    cdef bint put(self, uint8_t byte) noexcept nogil
