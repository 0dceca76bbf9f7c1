"""A PS/2 mouse, as the controller that it is plugged into sees it."""

from libc.stdint cimport int32_t, uint8_t, uint32_t

cdef enum:
    MOUSE_MOVES = 16
    MOUSE_BYTES = 16

cdef struct Move:
    int32_t x, y, wheel      # to the right, up, towards the user
    uint8_t buttons          # left, right, middle


cdef class Mouse:
    """All of it is guarded by the controller's lock."""
    cdef Move moves[MOUSE_MOVES]     # not told yet; `first` is the oldest
    cdef uint32_t first, used
    cdef uint8_t bytes[MOUSE_BYTES]  # replies and the packet under way
    cdef uint32_t first_byte, byte_count
    cdef uint8_t buttons             # now
    cdef uint8_t told                # of the last packet
    cdef uint8_t command             # that waits for its argument, or 0
    cdef uint8_t identity            # 0, or 3 with a wheel
    cdef uint8_t rate, resolution
    cdef uint8_t knocks[2]           # the rates before the last one
    cdef bint is_reporting, is_remote, is_wrapping, is_scaling
    cdef uint8_t last                # byte sent, for "resend"

    cdef void power_on(self) noexcept nogil
    cdef void receive(self, uint8_t byte) noexcept nogil   # a byte from the controller
    cdef bint has_byte(self) noexcept nogil
    cdef uint8_t take(self) noexcept nogil                 # has_byte() was true
    cdef void move(self, int32_t x, int32_t y, int32_t wheel, uint8_t buttons) noexcept nogil
    cdef void _defaults(self) noexcept nogil
    cdef void _forget(self) noexcept nogil
    cdef void _argument(self, uint8_t command, uint8_t byte) noexcept nogil
    cdef void _knock(self, uint8_t rate) noexcept nogil
    cdef void _packet(self) noexcept nogil
    cdef void _put(self, uint8_t byte) noexcept nogil
