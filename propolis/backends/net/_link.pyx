"""The host's side of a network card: frames by a tap, by a socket of messages, or by a stream."""

cimport cython
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EPROTO, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove
from posix.uio cimport readv, writev
from posix.unistd cimport close, read, write

cdef enum:
    PREFIX = 4


cdef class Link:
    """A frame's way to and from the host. Owns `fd`, which is non-blocking."""

    def __cinit__(self, fd: int, has_header: bool) -> None:
        self.fd = fd
        self.has_header = has_header

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)

    def fileno(self) -> int:
        """-1 once closed."""
        return self.fd

    def close(self) -> None:
        """Twice is fine."""
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef int64_t receive(self, iovec *iov, uint32_t count) noexcept nogil:
        return -ECONNRESET

    cdef int64_t send(self, iovec *iov, uint32_t count, uint64_t length) noexcept nogil:
        return -ECONNRESET

    cdef bint is_behind(self) noexcept nogil:
        return False


cdef class PacketLink(Link):
    cdef int64_t receive(self, iovec *iov, uint32_t count) noexcept nogil:
        cdef int64_t got = readv(self.fd, iov, <int>count)  # marked dirty by NetPair, which knows whose pages these are
        if got < 0:
            return -EAGAIN if errno == EINTR else -errno
        return got if got > 0 else -ECONNRESET

    cdef int64_t send(self, iovec *iov, uint32_t count, uint64_t length) noexcept nogil:
        if writev(self.fd, iov, <int>count) < 0:
            return -EAGAIN if errno == EINTR else -errno
        return 0


@cython.no_gc_clear
cdef class StreamLink(Link):
    def __cinit__(self, fd: int, has_header: bool) -> None:
        self.input = <uint8_t *>malloc(STREAM_BUFFER)
        self.rest = <uint8_t *>malloc(PREFIX + MAX_MESSAGE)
        if self.input == NULL or self.rest == NULL:
            raise MemoryError

    def __dealloc__(self) -> None:
        free(self.input)
        free(self.rest)

    cdef int64_t receive(self, iovec *iov, uint32_t count) noexcept nogil:
        cdef int64_t length = self._next()
        cdef uint8_t *at = self.input + self.start + PREFIX
        cdef uint64_t left, part
        cdef uint32_t i
        if length < 0:
            return length
        left = <uint64_t>length
        for i in range(count):
            part = min(left, <uint64_t>iov[i].iov_len)
            memcpy(iov[i].iov_base, at, part)  # marked dirty by NetPair, as after PacketLink's readv
            at += part
            left -= part
        self.start += <uint32_t>(PREFIX + length)
        return length - <int64_t>left

    cdef int64_t _next(self) noexcept nogil:
        """The length of the next frame, which is wholly in the buffer; -errno."""
        cdef const uint8_t *at
        cdef uint32_t length
        cdef int error
        while True:  # each round has more of one frame, and the buffer holds the largest
            if self.end - self.start >= PREFIX:
                at = self.input + self.start
                length = <uint32_t>at[0] << 24 | <uint32_t>at[1] << 16 | <uint32_t>at[2] << 8 | at[3]
                if length == 0 or length > MAX_MESSAGE:
                    return -EPROTO
                if self.end - self.start >= PREFIX + length:
                    return length
            error = self._fill()
            if error:
                return error

    cdef int _fill(self) noexcept nogil:
        """0, or -errno."""
        cdef int64_t got
        if self.start:
            memmove(self.input, self.input + self.start, self.end - self.start)
            self.end -= self.start
            self.start = 0
        got = read(self.fd, self.input + self.end, STREAM_BUFFER - self.end)
        if got < 0:
            return -EAGAIN if errno == EINTR else -errno
        if got == 0:
            return -ECONNRESET
        self.end += <uint32_t>got
        return 0

    cdef int64_t send(self, iovec *iov, uint32_t count, uint64_t length) noexcept nogil:
        cdef int64_t sent
        if self.is_behind():
            return -EAGAIN
        self.prefix[0] = <uint8_t>(length >> 24)
        self.prefix[1] = <uint8_t>(length >> 16)
        self.prefix[2] = <uint8_t>(length >> 8)
        self.prefix[3] = <uint8_t>length
        iov -= 1
        iov[0].iov_base = self.prefix
        iov[0].iov_len = PREFIX
        sent = writev(self.fd, iov, <int>count + 1)
        if sent < 0:
            return -EAGAIN if errno == EINTR else -errno
        if <uint64_t>sent < PREFIX + length:
            self._keep(iov, count + 1, <uint64_t>sent)
        return 0

    cdef void _keep(self, iovec *iov, uint32_t count, uint64_t skip) noexcept nogil:
        """What of the vectors is left behind their first `skip` bytes."""
        cdef uint32_t i
        cdef uint64_t part
        self.rest_start = self.rest_end = 0
        for i in range(count):
            if skip >= iov[i].iov_len:
                skip -= iov[i].iov_len
                continue
            part = iov[i].iov_len - skip
            memcpy(self.rest + self.rest_end, <uint8_t *>iov[i].iov_base + skip, part)
            self.rest_end += <uint32_t>part
            skip = 0

    cdef bint is_behind(self) noexcept nogil:
        cdef int64_t sent
        if self.rest_start < self.rest_end:
            sent = write(self.fd, self.rest + self.rest_start, self.rest_end - self.rest_start)
            if sent > 0:
                self.rest_start += <uint32_t>sent
        return self.rest_start < self.rest_end
