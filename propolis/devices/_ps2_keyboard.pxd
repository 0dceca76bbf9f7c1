"""A PS/2 keyboard, as the controller that it is plugged into sees it."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    KEYBOARD_CODES = 256
    KEYBOARD_REPLIES = 16


cdef class Keyboard:
    """All of it is guarded by the controller's lock."""
    cdef uint8_t codes[KEYBOARD_CODES]       # of keys; `first` is the oldest
    cdef uint32_t first, used
    cdef uint8_t replies[KEYBOARD_REPLIES]   # to commands: they go before codes
    cdef uint32_t first_reply, reply_count
    cdef bint is_down[256]                   # by key number: the guest was told of the press
    cdef uint32_t down                       # how many of them
    cdef uint8_t command                     # that waits for its argument, or 0
    cdef uint8_t scan_set                    # 1 or 2
    cdef uint8_t leds, rate
    cdef bint is_scanning
    cdef uint8_t last                        # byte sent, for "resend"
    cdef uint64_t dropped                    # presses for which there was no room

    cdef void power_on(self) noexcept nogil
    cdef void receive(self, uint8_t byte) noexcept nogil   # a byte from the controller
    cdef bint has_byte(self) noexcept nogil
    cdef uint8_t take(self) noexcept nogil                 # has_byte() was true
    cdef void key(self, uint8_t number, bint is_press) noexcept nogil
    cdef void _defaults(self) noexcept nogil
    cdef void _argument(self, uint8_t command, uint8_t byte) noexcept nogil
    cdef void _reply(self, uint8_t byte) noexcept nogil
    cdef void _put(self, uint8_t byte) noexcept nogil


# The make code in scan code set 2 of a key of set 1; 0 where there is none.
cdef uint8_t scan_set_2(uint8_t code) noexcept nogil
