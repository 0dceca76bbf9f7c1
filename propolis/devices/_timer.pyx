"""A one-shot timer: set on any thread without the GIL, watched by the loop through its descriptor."""

from libc.errno cimport errno
from libc.stdint cimport uint8_t
from libc.string cimport memset, strerror
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, itimerspec, timespec
from posix.unistd cimport close, read

from propolis.devices._timerfd cimport TFD_CLOEXEC, TFD_NONBLOCK, timerfd_create, timerfd_settime

from propolis.errors import HypervisorError

cdef enum:
    SECOND = 1000000000


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    memset(&now, 0, sizeof(now))
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * SECOND + <uint64_t>now.tv_nsec


cdef int64_t realtime_ns() noexcept nogil:
    cdef timespec now
    memset(&now, 0, sizeof(now))
    clock_gettime(CLOCK_REALTIME, &now)
    return <int64_t>now.tv_sec * SECOND + <int64_t>now.tv_nsec


cdef class Timer:
    def __cinit__(self) -> None:
        self.fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self.fd < 0:
            raise HypervisorError(f"create a timer: {strerror(errno).decode()}")

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)

    cdef void arm(self, uint64_t delay_ns) noexcept nogil:
        self._set(delay_ns if delay_ns > 0 else 1)  # 0 would disarm it

    cdef void disarm(self) noexcept nogil:
        self._set(0)

    cdef void _set(self, uint64_t delay_ns) noexcept nogil:
        cdef itimerspec when
        memset(&when, 0, sizeof(when))
        when.it_value.tv_sec = <long>(delay_ns // SECOND)
        when.it_value.tv_nsec = <long>(delay_ns % SECOND)
        timerfd_settime(self.fd, 0, &when, NULL)

    def fileno(self) -> int:
        return self.fd

    def drain(self) -> bool:
        """Whether it has expired since the last call or setting."""
        cdef uint8_t count[8]
        return read(self.fd, count, 8) == 8
