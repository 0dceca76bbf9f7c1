"""Control-path ioctls whose failure says what was tried."""

cdef int refused(str what) except -1
# Raises HypervisorError with `what`.
cdef long call(int fd, unsigned long request, void *argument, str what) except -1
