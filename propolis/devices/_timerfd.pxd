"""timerfd(2)."""

from posix.time cimport itimerspec

cdef extern from "<sys/timerfd.h>" nogil:
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)
    int TFD_NONBLOCK
    int TFD_CLOEXEC
