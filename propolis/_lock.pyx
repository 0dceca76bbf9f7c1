"""A mutex that compiled code takes without the GIL."""

cimport cython

from propolis._posix cimport pthread_mutex_destroy, pthread_mutex_init


@cython.final
cdef class Lock:
    """Unlocked when made. It has nothing for Python code: its methods are those of the .pxd."""

    def __cinit__(self) -> None:
        pthread_mutex_init(&self.mutex, NULL)

    def __dealloc__(self) -> None:
        pthread_mutex_destroy(&self.mutex)
