"""The mailbox: rare events from any thread to the loop."""

cimport cython
from libc.errno cimport errno
from libc.string cimport strerror
from posix.unistd cimport close

from propolis._atomic cimport or32_seq, or64_seq, swap32_seq, swap64_seq
from propolis._posix cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_read, eventfd_write

from propolis.errors import HypervisorError


@cython.no_gc_clear
cdef class Mailbox:
    def __cinit__(self) -> None:
        self.callbacks = []
        self.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.fd < 0:
            raise HypervisorError(f"create an eventfd: {strerror(errno).decode()}")

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)

    def fileno(self) -> int:
        return self.fd

    def register(self, callback) -> int:
        """A slot whose events reach `callback(bits)` on the loop thread."""
        if self.count == MAX_SLOTS:
            raise HypervisorError(f"more than {MAX_SLOTS} event sources in one machine")
        self.callbacks.append(callback)
        self.count += 1
        return self.count - 1

    cdef void post(self, uint32_t slot, uint32_t bits) noexcept nogil:
        cdef uint64_t mask = <uint64_t>1 << (slot & 63)
        or32_seq(&self.bits[slot], bits)
        # The eventfd rings once per collection: only the poster that makes the slot ready pays for the call.
        if or64_seq(&self.ready[slot >> 6], mask) & mask == 0:
            eventfd_write(self.fd, 1)

    def send(self, slot: int, bits: int) -> None:
        """post() for Python callers."""
        if not 0 <= slot < self.count:
            raise ValueError(f"no slot {slot}")
        self.post(slot, bits)

    def dispatch(self) -> None:
        """Calls the callbacks of all slots with events; bounded by the number of slots."""
        cdef uint64_t value = 0
        cdef uint64_t word
        cdef uint32_t bit, bits
        cdef int i
        eventfd_read(self.fd, &value)
        events = []
        for i in range(SLOT_WORDS):
            word = swap64_seq(&self.ready[i], 0)  # before the bits: an event that comes now rings again
            bit = 0
            while word != 0:
                if word & 1:
                    bits = swap32_seq(&self.bits[i * 64 + bit], 0)
                    if bits:
                        events.append((self.callbacks[i * 64 + bit], bits))
                word >>= 1
                bit += 1
        errors = []
        for callback, bits in events:
            try:
                callback(bits)
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("event callbacks", errors)
