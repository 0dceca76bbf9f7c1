"""The compiled core: guest memory, buses, interrupts, doorbells, the mailbox and the one vCPU loop.

Threads: everything declared `noexcept nogil` may run on a vCPU thread and never takes the GIL. The rest runs on the
loop thread. Each shared field says who writes it.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from propolis._posix cimport pthread_cond_t, pthread_mutex_t, pthread_t


# -- guest memory ------------------------------------------------------------------------------------------------------

cdef enum Access:
    ACCESS_READ = 1
    ACCESS_WRITE = 2

cdef enum:
    MAX_MEMORY_REGIONS = 16

cdef struct MemoryRegion:
    uint64_t gpa
    uint64_t size
    uint8_t *host            # first byte; PROT_NONE guard pages on both sides
    uint8_t *reserved        # the whole reservation, guards included
    uint64_t reserved_size
    int access               # what the guest, and devices on its behalf, may do: Access bits
    int fd                   # memfd or hugetlb file, -1 for anonymous memory
    uint64_t *dirty          # one bit per 4 KiB page; NULL until tracking first starts; any thread, or64_seq

cdef class GuestMemory:
    cdef MemoryRegion regions[MAX_MEMORY_REGIONS]   # written by: loop, before `count` publishes them
    cdef uint32_t count                             # written by: loop (release)
    cdef uint32_t tracking                          # written by: loop
    cdef uint32_t exports                           # memoryviews alive; written by: loop
    cdef list backings

    # NULL unless [gpa, gpa + length) lies wholly in one region that allows `access`; length 0 is never valid.
    cdef uint8_t *translate(self, uint64_t gpa, uint64_t length, int access) noexcept nogil
    cdef bint copy_in(self, uint64_t gpa, void *destination, uint64_t length) noexcept nogil
    cdef bint copy_out(self, uint64_t gpa, const void *source, uint64_t length) noexcept nogil
    # Every host write to guest memory ends here, after the bytes are in place. A no-op while tracking is off.
    cdef void mark_dirty(self, uint64_t gpa, uint64_t length) noexcept nogil
    cdef int _back(self, MemoryRegion *region, str backing) except -1
    cdef int _record_dirty(self, MemoryRegion *region) except -1
    cdef uint8_t *_at(self, uint64_t gpa, uint64_t length, int access) except NULL
    cdef void _release(self) noexcept


# -- buses -------------------------------------------------------------------------------------------------------------

cdef class Region:
    """A range of ports or physical addresses that a device answers. Subclasses override the four methods."""
    cdef readonly str name
    cdef uint32_t width      # widest access in bytes that `read` and `write` take; the bus splits wider ones

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil
    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
    # The region now answers at `base` / no longer answers there. Called under the bus lock.
    cdef void placed(self, Bus bus, uint64_t base) noexcept nogil
    cdef void removed(self, Bus bus, uint64_t base) noexcept nogil

cdef enum:
    MAX_MAPPINGS = 512
    MAX_PARTS = 24
    MAX_READERS = 66

cdef struct Mapping:
    uint64_t base
    uint64_t last            # inclusive, so that a region may end at 2^64 - 1
    void *region             # borrowed Region; Bus.owners keeps it alive

cdef struct Table:
    uint32_t count
    Mapping at[MAX_MAPPINGS]

cdef struct Reader:
    uint64_t sequence        # odd while its owner looks into the table; written by: the owner

cdef class Bus:
    cdef readonly str name
    cdef bint is_pio
    cdef void *table                     # Table, sorted by base; published with release, read with acquire
    cdef Table wanted                    # in order of rank: what should be mapped; under: lock
    cdef Table *spare                    # the table that is not published; under: lock
    cdef Reader *readers[MAX_READERS]    # of Python callers and of each vCPU while it exists; under: lock
    cdef uint32_t reader_count           # under: lock
    cdef Reader own                      # the reader of Python callers; under: GIL
    cdef uint64_t missed                 # accesses nobody answered; relaxed
    cdef pthread_mutex_t lock
    cdef dict owners                     # regions that may be placed; written by: loop

    cdef void access(self, Reader *reader, uint64_t address, uint32_t size, bint is_write, uint8_t *data) noexcept nogil
    # Makes a region, made known by `own`, answer at [base, base + length), or nowhere. Callable on a vCPU thread: a
    # BAR write. False when it did not fit: it overlaps a region of older rank, wraps or the table is full.
    cdef bint place(self, Region region, uint64_t base, uint64_t length) noexcept nogil
    cdef void remove(self, Region region) noexcept nogil
    cdef void _publish(self) noexcept nogil
    cdef void _tell(self, const Table *old, const Table *new) noexcept nogil
    cdef bint _find(self, Reader *reader, uint64_t address, Mapping *found) noexcept nogil
    cdef int _enrol(self, Reader *reader) except -1
    cdef void _dismiss(self, Reader *reader) noexcept

cdef class Window(Region):
    """Regions side by side in one range, as a BAR holds them. Parts are added before it is placed."""
    cdef Table parts         # sorted by base; written by: loop, before the window is placed
    cdef list owners

    cdef void _access(self, uint64_t offset, uint32_t size, bint is_write, uint8_t *data) noexcept nogil


# -- interrupts and doorbells ------------------------------------------------------------------------------------------

cdef class IrqLine:
    """One source's wire to an input of the interrupt controllers; lines on one input are ORed."""
    cdef Vm vm
    cdef int32_t pin         # GSI 0..23, or -1: not routed; under: vm.irq_lock
    cdef bint level          # under: vm.irq_lock

    cdef void set(self, bint level) noexcept nogil
    cdef void pulse(self) noexcept nogil            # an edge: up and down again
    cdef void route(self, int32_t pin) noexcept nogil   # moves an asserted level to the new input
    cdef void _drive(self, bint level) noexcept nogil

cdef class MsiVector:
    """One message-signalled interrupt. Masking and pending bits belong to the MSI-X table."""
    cdef Vm vm
    cdef uint64_t address    # written by: vCPU, under the table's lock
    cdef uint32_t data
    cdef int fd              # eventfd of a vector lent to another process, else -1
    cdef int32_t gsi         # its route while lent, else -1

    cdef void set_message(self, uint64_t address, uint32_t data) noexcept nogil
    cdef void set_masked(self, bint masked) noexcept nogil   # matters for a lent vector alone
    cdef void fire(self) noexcept nogil

cdef class Doorbell(Region):
    """A register whose write adds one to an eventfd, whoever sees it first: the kernel or the vCPU loop."""
    cdef Vm vm
    cdef int fd
    cdef uint64_t rung       # writes that came through the vCPU loop; relaxed


# -- mailbox -----------------------------------------------------------------------------------------------------------

cdef enum:
    SLOT_WORDS = 4
    MAX_SLOTS = 256  # 64 to a word

cdef class Mailbox:
    """Rare events from any thread to the loop. Each poster has a slot of 32 event bits, so nothing can overflow."""
    cdef int fd
    cdef uint32_t bits[MAX_SLOTS]        # any thread, or32_seq; the loop swaps with 0
    cdef uint64_t ready[SLOT_WORDS]  # slots with bits; any thread, or64_seq; the loop swaps with 0
    cdef uint32_t count                  # written by: loop
    cdef list callbacks                  # written by: loop

    cdef void post(self, uint32_t slot, uint32_t bits) noexcept nogil


# -- the virtual machine and its vCPUs ---------------------------------------------------------------------------------

cdef class Vm:
    """What a back end provides for a machine; _kvm, _bhyve and _replay subclass it."""
    cdef readonly GuestMemory memory
    cdef readonly Bus pio
    cdef readonly Bus mmio
    cdef readonly Mailbox mailbox
    cdef pthread_mutex_t irq_lock
    cdef uint16_t asserted[24]           # lines up on each input; under: irq_lock

    # 0 or -errno.
    cdef int set_irq(self, uint32_t gsi, bint level) noexcept nogil
    cdef int signal_msi(self, uint64_t address, uint32_t data) noexcept nogil
    # Lets the kernel ring `fd` on a write of any width at `address`; -ENOSYS where the exit path must do it.
    cdef int assign_doorbell(self, int fd, bint is_pio, uint64_t address, bint assign) noexcept nogil
    # A route for a lent MSI vector: `gsi` -1 asks for a new one, returned; later calls change its message.
    cdef int route_msi(self, int32_t gsi, uint64_t address, uint32_t data) noexcept nogil
    cdef void unroute_msi(self, int32_t gsi) noexcept nogil   # its irqfd is unassigned already
    cdef int assign_irqfd(self, int fd, int32_t gsi, bint assign) noexcept nogil

cdef enum ExitKind:
    EXIT_INTERRUPTED = 0     # kicked, and nothing is pending inside the hypervisor: state may be read
    EXIT_PIO = 1
    EXIT_MMIO = 2
    EXIT_RETRY = 3           # nothing to do
    EXIT_SHUTDOWN = 4        # triple fault
    EXIT_FAILED = 5          # the hypervisor cannot go on; `reason` and `detail` say why
    EXIT_KINDS = 6

cdef struct Exit:
    uint8_t *data            # bytes written, or room for those read; `count` times `size`
    uint64_t address
    uint32_t size
    uint32_t count
    bint is_write
    uint32_t reason          # EXIT_FAILED: the hypervisor's exit number
    uint64_t detail[4]       # EXIT_FAILED: its arguments

cdef enum Control:
    CONTROL_RUN = 0
    CONTROL_HOLD = 1
    CONTROL_STOP = 2

cdef enum VcpuEvent:
    VCPU_PARKED = 1
    VCPU_SHUTDOWN = 2
    VCPU_FAILED = 4
    VCPU_ENDED = 8           # its thread has left the loop for good

cdef class Vcpu:
    cdef Vm vm
    cdef readonly uint32_t index
    cdef Exit exit                       # written by: vcpu
    cdef uint64_t exits[8]               # by ExitKind, EXIT_KINDS of them; written by: vcpu, relaxed
    cdef Reader pio_reader
    cdef Reader mmio_reader
    cdef uint32_t control                # under: lock; read by the vCPU after a kick
    cdef bint parked                     # under: lock
    cdef bint running                    # the thread exists and `thread` is valid; under: lock
    cdef pthread_t thread
    cdef pthread_mutex_t lock
    cdef pthread_cond_t changed
    cdef uint32_t slot

    cdef int enter(self) noexcept nogil              # ExitKind; fills self.exit
    cdef void set_immediate_exit(self, bint on) noexcept nogil
    cdef void _loop(self) noexcept nogil
    cdef bint _park(self) noexcept nogil             # False: leave the loop
    cdef bint _give_up(self, uint32_t event) noexcept nogil  # False: leave the loop
    cdef int _kick(self) noexcept nogil              # 0 or an errno
    cdef int _command(self, uint32_t control) except -1
