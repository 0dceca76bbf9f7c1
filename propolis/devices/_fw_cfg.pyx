"""The registers of fw_cfg: a selector, a data port and DMA, through which firmware reads what the VMM has for it.

QEMU's specification "Firmware Configuration Device" names the registers, items and control bits. Items are added before
the guest runs; what an item holds is copied in here, or read from an open file when the guest asks for it.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport pread

from propolis._memory cimport ACCESS_WRITE, GuestMemory
from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._vmm cimport Vm

cdef enum:
    MAX_ITEMS = 128
    KEY_MASK = 0x3FFF        # above it a bit for writing through the data port, which is gone, and one for the platform
    MAX_TRANSFER = 1 << 26   # bytes of one DMA operation: a vCPU thread is away that long

    DMA_ERROR = 0x01
    DMA_READ = 0x02
    DMA_SKIP = 0x04
    DMA_SELECT = 0x08
    DMA_WRITE = 0x10

    ITEM_WRITTEN = 1

cdef uint64_t DMA_SIGNATURE = 0x51454D5520434647  # "QEMU CFG"

WRITTEN = ITEM_WRITTEN


cdef struct Item:
    uint16_t key
    uint8_t *content         # NULL where a file has it
    int fd
    uint64_t start           # in the file
    uint64_t size
    bint is_writable
    bint was_written


cdef struct Command:         # FWCfgDmaAccess, big-endian
    uint32_t control
    uint32_t length
    uint64_t address


cdef uint32_t swap32(uint32_t value) noexcept nogil:
    return value >> 24 | (value >> 8 & 0xFF00) | (value << 8 & 0xFF0000) | value << 24


cdef uint64_t swap64(uint64_t value) noexcept nogil:
    return <uint64_t>swap32(<uint32_t>value) << 32 | swap32(<uint32_t>(value >> 32))


cdef class Selector:
    """What is selected, and the items; behind both regions."""

    cdef Vm vm
    cdef GuestMemory memory
    cdef uint32_t slot               # in the mailbox
    cdef Lock lock                   # guards all below; held by a vCPU as long as the file of an item takes
    cdef Lock written_lock           # taken last; guards what the loop looks at: writable items' content, was_written
    cdef Item items[MAX_ITEMS]
    cdef uint32_t count
    cdef Item *selected              # NULL for a key that nothing has: it reads as zeros
    cdef uint64_t position
    cdef uint64_t dma_address        # the upper half, until the lower one comes
    cdef list files                  # keeps those open that items read

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()
        self.written_lock = Lock()
        self.files = []

    def __init__(self, Vm vm, slot: int) -> None:
        self.vm = vm
        self.memory = vm.memory
        self.slot = slot

    def __dealloc__(self) -> None:
        cdef uint32_t i
        for i in range(self.count):
            free(self.items[i].content)

    def add(self, key: int, content: bytes, writable: bool = False) -> None:
        """An item, before the guest runs. Raises ValueError where the key is taken or there are too many."""
        cdef const uint8_t[::1] source = content
        cdef Item *item = self._new(key)
        item.size = <uint64_t>source.shape[0]
        item.content = <uint8_t *>calloc(1, item.size + 1)
        if item.content == NULL:
            raise MemoryError
        if item.size:
            memcpy(item.content, &source[0], item.size)
        item.is_writable = writable
        self.count += 1

    def add_file(self, key: int, file, start: int, size: int) -> None:
        """An item that is `size` bytes from `start` on in an open file. Raises ValueError as add() does."""
        cdef Item *item = self._new(key)
        item.fd = file.fileno()
        item.start = start
        item.size = size
        self.files.append(file)
        self.count += 1

    cdef Item *_new(self, key: int) except NULL:
        cdef Item *item
        cdef uint32_t i
        if not 0 <= key <= KEY_MASK or self.count == MAX_ITEMS:
            raise ValueError(f"fw_cfg item {key:#x}: one of {MAX_ITEMS} with a key of 14 bits")
        for i in range(self.count):
            if self.items[i].key == key:
                raise ValueError(f"fw_cfg item {key:#x} is there already")
        item = &self.items[self.count]
        memset(item, 0, sizeof(Item))
        item.key = <uint16_t>key
        item.fd = -1
        return item

    def take_written(self) -> list:
        """(key, content) of every item that the guest has written to since the last call."""
        cdef uint32_t i
        written = []
        self.written_lock.acquire()
        for i in range(self.count):
            if self.items[i].was_written:
                self.items[i].was_written = False
                written.append((self.items[i].key,
                                PyBytes_FromStringAndSize(<char *>self.items[i].content, self.items[i].size)))
        self.written_lock.release()
        return written

    def reset(self) -> None:
        """To power-on; the vCPUs are held. What the guest wrote is gone."""
        cdef uint32_t i
        self.selected = NULL
        self.position = 0
        self.dma_address = 0
        for i in range(self.count):
            if self.items[i].is_writable:
                memset(self.items[i].content, 0, self.items[i].size)
                self.items[i].was_written = False

    cdef void _select(self, uint16_t key) noexcept nogil:
        cdef uint32_t i
        self.selected = NULL
        self.position = 0
        for i in range(self.count):
            if self.items[i].key == key & KEY_MASK:
                self.selected = &self.items[i]

    cdef void select(self, uint16_t key) noexcept nogil:
        self.lock.acquire()
        self._select(key)
        self.lock.release()

    cdef uint8_t next(self) noexcept nogil:
        """The byte at the position, for the data port."""
        cdef uint8_t byte = 0
        self.lock.acquire()
        self._read(&byte, 1)
        self.lock.release()
        return byte

    cdef bint _read(self, uint8_t *destination, uint64_t length) noexcept nogil:
        """Bytes from the position on, zeros after the item's end; False where the item's file cannot be read."""
        cdef uint64_t there = 0, done = 0
        cdef ssize_t n
        cdef Item *item = self.selected
        if item != NULL and self.position < item.size:
            there = min(length, item.size - self.position)
            if item.content != NULL:
                memcpy(destination, item.content + self.position, there)
            else:
                while done < there:
                    n = pread(item.fd, destination + done, there - done,
                              <off_t>(item.start + self.position + done))
                    if n < 0 and errno == EINTR:
                        continue
                    if n <= 0:
                        return False
                    done += <uint64_t>n
        memset(destination + there, 0, length - there)
        self.position += length
        return True

    cdef bint _write(self, uint64_t address, uint64_t length) noexcept nogil:
        cdef Item *item = self.selected
        cdef bint is_there
        if (item == NULL or not item.is_writable or self.position > item.size
                or length > item.size - self.position):
            return False
        self.written_lock.acquire()
        is_there = self.memory.copy_in(address, item.content + self.position, length)
        if is_there:
            item.was_written = True
        self.written_lock.release()
        if is_there:
            self.position += length
        return is_there

    cdef void dma(self, uint64_t address) noexcept nogil:
        """Does what the command at this guest-physical address says, and answers there."""
        cdef Command command
        cdef uint32_t control, result
        if not self.memory.copy_in(address, &command, sizeof(command)):
            return  # there is no place for an answer either
        control = swap32(command.control)
        self.lock.acquire()
        if control & DMA_SELECT:
            self._select(<uint16_t>(control >> 16))
        result = 0 if self._transfer(control, swap32(command.length), swap64(command.address)) else DMA_ERROR
        self.lock.release()
        result = swap32(result)
        self.memory.copy_out(address, &result, sizeof(result))
        if control & DMA_WRITE:
            self.vm.mailbox.post(self.slot, ITEM_WRITTEN)

    cdef bint _transfer(self, uint32_t control, uint64_t length, uint64_t address) noexcept nogil:
        cdef uint8_t *destination
        if not control & (DMA_READ | DMA_WRITE | DMA_SKIP) or length == 0:
            return True
        if control & (DMA_READ | DMA_WRITE):
            if length > MAX_TRANSFER:
                return False
            if control & DMA_WRITE and not control & DMA_READ:
                return self._write(address, length)
            destination = self.memory.translate(address, length, ACCESS_WRITE)
            if destination == NULL or not self._read(destination, length):
                return False
            self.memory.mark_dirty(address, length)
            return True
        self.position += length
        return True


cdef class SelectorPort(Region):
    """Ports 0x510 and 0x511: a word written selects, a byte read is the next one of what is selected."""

    cdef Selector selector

    def __init__(self, Selector selector) -> None:
        self.name = "fw_cfg"
        self.width = 2
        self.selector = selector

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.selector.next() if offset == 1 else 0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset == 0 and size == 2:
            self.selector.select(<uint16_t>value)


cdef class DmaPort(Region):
    """Ports 0x514 to 0x51B: a guest-physical address, big-endian; its lower half starts the operation."""

    cdef Selector selector

    def __init__(self, Selector selector) -> None:
        self.name = "fw_cfg dma"
        self.width = 8
        self.selector = selector

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return swap64(DMA_SIGNATURE) >> 8 * offset

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint64_t address
        if offset == 0 and size == 8:
            self.selector.dma(swap64(value))
        elif offset == 0 and size == 4:
            self.selector.lock.acquire()
            self.selector.dma_address = <uint64_t>swap32(<uint32_t>value) << 32
            self.selector.lock.release()
        elif offset == 4 and size == 4:
            self.selector.lock.acquire()
            address = self.selector.dma_address | swap32(<uint32_t>value)
            self.selector.dma_address = 0
            self.selector.lock.release()
            self.selector.dma(address)
