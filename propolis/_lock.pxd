"""A mutex for what vCPU threads, I/O threads and the loop share.

No thread may hold one while it waits for the GIL: the loop takes them with the GIL in its hands.
"""

from propolis._posix cimport pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock


cdef class Lock:
    cdef pthread_mutex_t mutex

    cdef inline void acquire(self) noexcept nogil:
        pthread_mutex_lock(&self.mutex)

    cdef inline void release(self) noexcept nogil:
        pthread_mutex_unlock(&self.mutex)
