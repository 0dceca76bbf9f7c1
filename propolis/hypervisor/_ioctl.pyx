"""Control-path ioctls whose failure says what was tried."""

from libc.errno cimport EINTR, errno
from libc.string cimport strerror

from propolis.hypervisor.kvm cimport ioctl

from propolis.errors import HypervisorError


cdef int refused(str what) except -1:
    raise HypervisorError(f"{what}: {strerror(errno).decode()}")


cdef long call(int fd, unsigned long request, void *argument, str what) except -1:
    """A control-path ioctl: raises HypervisorError with what was tried."""
    cdef long result = ioctl(fd, request, argument)
    while result < 0 and errno == EINTR:  # KVM_CREATE_VM may be, by any signal
        result = ioctl(fd, request, argument)
    if result < 0:
        refused(what)
    return result
