"""A copy of what the guest shows, and when each tile of it changed."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    TILE = 64                # pixels, both ways: ZRLE's tiles
    MAX_SIDE = 4096          # pixels

cdef class Surface:
    """Written by one thread at a time: `refresh` and the encoders take turns."""
    cdef readonly uint32_t width, height
    cdef uint32_t columns, rows      # of tiles
    cdef uint32_t *pixels            # XRGB, row by row without gaps
    cdef uint64_t *changed           # by tile: the number of the look that found it changed
    cdef readonly uint64_t looks

    cdef uint32_t _compare(self, const uint8_t *source, uint64_t stride) noexcept nogil

cdef class View:
    """What one client has seen of a surface."""
    cdef readonly Surface surface
    cdef uint64_t *sent              # by tile: the look that was sent

    cdef bint _is_unsent(self, uint32_t row, uint32_t column)
