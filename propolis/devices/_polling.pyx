"""Bounded polling: a wake-up costs more than a request, so a busy queue is looked at for a moment before its thread
sleeps. Only while that pays: a pause that was much longer than the moment ends it, a short one begins it again.
"""

from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from propolis._atomic cimport cpu_relax

cdef enum:
    TURN = 300_000           # nanoseconds: the console and the API wait no longer for a queue that is never empty
    WAKE_UP = 2              # a pause up to so many times the limit is for the most part the wake-up itself


cdef inline uint64_t now() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_MONOTONIC, &at)
    return <uint64_t>at.tv_sec * 1_000_000_000 + <uint64_t>at.tv_nsec


cdef class Polling:
    """`limit` is in nanoseconds; with 0 it costs nothing, not even a look at the clock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asleep = True

    cdef void begin(self) noexcept nogil:
        cdef uint64_t at
        if self.limit == 0:
            return
        at = now()
        if self.asleep:
            self.asleep = False
            self.window = self.limit if at - self.quiet_since < WAKE_UP * self.limit else 0
            self.quiet_since = at  # and not with each turn: a moment may be longer than that
        self.turn_end = at + TURN

    cdef void found(self) noexcept nogil:
        if self.limit:
            self.hits += 1
            self.quiet_since = now()

    cdef Look idle(self) noexcept nogil:
        cdef uint64_t at
        if self.window:
            at = now()
            if at >= self.turn_end:
                return LOOK_YIELD
            if at - self.quiet_since < self.window:
                cpu_relax()
                return LOOK_ON
        self.sleeps += 1
        self.asleep = True
        return LOOK_SLEEP

    cdef bint is_over(self) noexcept nogil:
        return self.limit and now() >= self.turn_end
