"""The few POSIX and Linux calls that compiled code makes: threads, signals, memory, eventfd, timerfd."""

from libc.stdint cimport uint64_t
from posix.signal cimport sigset_t
from posix.types cimport pid_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef unsigned long pthread_t
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *condition, void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_broadcast(pthread_cond_t *condition)
    pthread_t pthread_self()

cdef extern from "<signal.h>" nogil:
    int pthread_kill(pthread_t thread, int signal)
    int pthread_sigmask(int how, const sigset_t *new, sigset_t *old)
    int SIGURG

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int eventfd_write(int fd, uint64_t value)
    int eventfd_read(int fd, uint64_t *value)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char *name, unsigned int flags)
    int madvise(void *address, size_t length, int advice)
    unsigned int MFD_CLOEXEC
    unsigned int MFD_HUGETLB
    int MADV_HUGEPAGE
    int MADV_DONTFORK
    int MADV_DONTDUMP
    int MAP_NORESERVE
