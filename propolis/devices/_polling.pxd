"""How long a queue is looked at before its thread sleeps and has to be woken."""

from libc.stdint cimport uint64_t

cdef enum Look:
    LOOK_ON = 0              # look again
    LOOK_SLEEP = 1           # nothing came for long enough
    LOOK_YIELD = 2           # everybody else on the thread has a turn now

cdef class Polling:
    # One thread, that of the queue.
    cdef readonly uint64_t limit         # nanoseconds; 0: never
    cdef uint64_t window                 # 0 or `limit`: what it is worth at present
    cdef uint64_t quiet_since
    cdef uint64_t turn_end
    cdef bint asleep
    cdef readonly uint64_t hits          # what came while it was looked for
    cdef readonly uint64_t sleeps

    # The queue's thread begins to serve it, woken or because its turn has come again.
    cdef void begin(self) noexcept nogil
    # Something came.
    cdef void found(self) noexcept nogil
    # Nothing is there: look again, or not. Waits a moment.
    cdef Look idle(self) noexcept nogil
    # Whether the turn is over, with work left.
    cdef bint is_over(self) noexcept nogil
