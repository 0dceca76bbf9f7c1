"""A NOR flash with the Intel command set, for what firmware keeps: JEDEC's CFI, JESD68, and Intel's 28F datasheets.

Its array is a region of guest memory that the guest may read like any other; a write is a command, and comes here.
While the flash shows something else than its array the region is out of the guest's memory: reads come here too.

What is programmed or erased is written to the file before the command ends: a VMM that is killed loses nothing that
the guest believes is there. That it also reaches the disk is seen to on the loop, soon after the last command.
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.types cimport off_t
from posix.unistd cimport pwrite

from propolis._atomic cimport add64_rlx, ld64_rlx
from propolis._memory cimport ACCESS_READ
from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._vmm cimport Vm

from propolis.errors import ConfigError

cdef enum:
    PROGRAM = 0x10
    PROGRAM_ALTERNATE = 0x40
    ERASE = 0x20
    CONFIRM = 0xD0
    CLEAR_STATUS = 0x50
    READ_STATUS = 0x70
    READ_ID = 0x90
    READ_QUERY = 0x98
    READ_ARRAY = 0xFF

    STATUS_READY = 0x80
    STATUS_ERASE_ERROR = 0x20
    STATUS_PROGRAM_ERROR = 0x10

    FLASH_WRITTEN = 1
    BLOCK_SIZE = 4096

WRITTEN = FLASH_WRITTEN
BLOCK = BLOCK_SIZE


cdef class Flash(Region):
    """A flash of one byte's width and equal blocks. `fd` stays the caller's."""

    cdef Vm vm
    cdef uint32_t slot               # in the mailbox
    cdef Lock lock                   # guards all below
    cdef uint64_t base, length
    cdef uint8_t *array              # in guest memory
    cdef int fd
    cdef uint8_t shown               # the READ command in force, or that of a command under way
    cdef uint8_t status
    cdef bint is_hidden              # the array is not in the guest's memory
    cdef uint64_t failed_writes      # written by: vCPUs

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    def __init__(self, Vm vm, slot: int, base: int, length: int, fd: int) -> None:
        self.name = "flash"
        self.width = 8
        self.vm = vm
        self.slot = slot
        self.base = base
        self.length = length
        self.fd = fd
        self.array = vm.memory.translate(base, length, ACCESS_READ)
        if self.array == NULL or length % BLOCK_SIZE:
            raise ConfigError(f"flash at {base:#x}, {length} bytes: expected memory of whole blocks")
        self.shown = READ_ARRAY
        self.status = STATUS_READY

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint64_t value = 0
        cdef uint32_t i
        self.lock.acquire()
        for i in range(size):
            value |= <uint64_t>self._byte(offset + i) << 8 * i
        self.lock.release()
        return value

    cdef uint8_t _byte(self, uint64_t offset) noexcept nogil:
        if self.shown == READ_ARRAY:
            return self.array[offset]
        if self.shown == READ_ID:
            return 0x89 if offset & 0xFF == 0 else 0x18 if offset & 0xFF == 1 else 0
        if self.shown == READ_QUERY:
            return self._query(offset & 0xFF)
        return self.status

    cdef uint8_t _query(self, uint64_t at) noexcept nogil:
        """The query structure (JESD68 §2): who it is, its timing, its size and its blocks."""
        cdef uint64_t blocks = self.length // BLOCK_SIZE - 1
        cdef uint32_t bits = 0
        if at == 0x10:
            return 0x51  # Q
        if at == 0x11:
            return 0x52  # R
        if at == 0x12:
            return 0x59  # Y
        if at == 0x13:
            return 0x01  # the Intel command set
        if at == 0x27:
            while (<uint64_t>1 << bits) < self.length:
                bits += 1
            return <uint8_t>bits
        if at == 0x2C:
            return 1  # one region of equal blocks
        if at == 0x2D:
            return <uint8_t>(blocks & 0xFF)
        if at == 0x2E:
            return <uint8_t>(blocks >> 8)
        if at == 0x2F:
            return <uint8_t>(BLOCK_SIZE // 256 & 0xFF)
        return 0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef bint has_written = False
        cdef uint8_t command = <uint8_t>(value & 0xFF)
        self.lock.acquire()
        if self.shown == PROGRAM:
            has_written = self._program(offset, size, value)
            self.shown = READ_STATUS
        elif self.shown == ERASE:
            if command == CONFIRM:
                has_written = self._erase(offset)
            else:
                self.status |= STATUS_PROGRAM_ERROR | STATUS_ERASE_ERROR
            self.shown = READ_STATUS
        elif command == PROGRAM or command == PROGRAM_ALTERNATE:
            self.shown = PROGRAM
        elif command == CLEAR_STATUS:
            self.status = 0
            self.shown = READ_STATUS
        elif command == ERASE or command == READ_STATUS or command == READ_ID or command == READ_QUERY:
            self.shown = command
        else:
            self.shown = READ_ARRAY
        self._show(self.shown != READ_ARRAY)
        self.lock.release()
        if has_written:
            self.vm.mailbox.post(self.slot, FLASH_WRITTEN)

    cdef bint _program(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """Clears bits: those that are to be set stay as they are, which is an error."""
        cdef uint32_t i
        cdef uint8_t wanted
        for i in range(size):
            wanted = <uint8_t>(value >> 8 * i & 0xFF)
            self.array[offset + i] &= wanted
            if self.array[offset + i] != wanted:
                self.status |= STATUS_PROGRAM_ERROR
        return self._keep(offset, size, STATUS_PROGRAM_ERROR)

    cdef bint _erase(self, uint64_t offset) noexcept nogil:
        cdef uint64_t start = offset - offset % BLOCK_SIZE
        memset(self.array + start, 0xFF, BLOCK_SIZE)
        return self._keep(start, BLOCK_SIZE, STATUS_ERASE_ERROR)

    cdef bint _keep(self, uint64_t start, uint64_t size, uint8_t error) noexcept nogil:
        """Writes a part of the array to the file. True: the loop is to see that it reaches the disk."""
        cdef uint64_t done = 0
        cdef ssize_t n
        self.vm.memory.mark_dirty(self.base + start, size)
        self.status |= STATUS_READY
        while done < size:
            n = pwrite(self.fd, self.array + start + done, size - done, <off_t>(start + done))
            if n < 0 and errno == EINTR:
                continue
            if n <= 0:
                self.status |= error
                add64_rlx(&self.failed_writes, 1)
                break
            done += <uint64_t>n
        return True

    cdef void _show(self, bint hidden) noexcept nogil:
        """Takes the array out of the guest's memory, or puts it back."""
        if hidden != self.is_hidden:
            self.is_hidden = hidden
            self.vm.show_memory(self.base, not hidden)

    def reset(self) -> None:
        """To power-on; the vCPUs are held. The array stays."""
        self.shown = READ_ARRAY
        self.status = STATUS_READY
        self._show(False)

    def failures(self) -> int:
        """How often the file could not be written. Without the lock, which a vCPU has while its file hangs."""
        return ld64_rlx(&self.failed_writes)
