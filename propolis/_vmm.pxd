"""The compiled core: the virtual machine, its vCPUs and the one loop that runs them.

Threads: everything declared `noexcept nogil` may run on a vCPU thread and never takes the GIL. The rest runs on the
loop thread. Each shared field says who writes it.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from propolis._bus cimport Bus, Reader
from propolis._mailbox cimport Mailbox
from propolis._memory cimport GuestMemory
from propolis._lock cimport Lock
from propolis._posix cimport pthread_cond_t, pthread_t


cdef class Vm:
    """What a back end provides for a machine; _kvm, _bhyve and _replay subclass it."""
    cdef readonly GuestMemory memory
    cdef readonly Bus pio
    cdef readonly Bus mmio
    cdef readonly Mailbox mailbox
    cdef Lock irq_lock
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
    # Whether the guest reads the memory region at `gpa` without an exit; otherwise all its accesses go to the bus.
    cdef int show_memory(self, uint64_t gpa, bint shown) noexcept nogil

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
    cdef Lock lock
    cdef pthread_cond_t changed
    cdef uint32_t slot

    cdef int enter(self) noexcept nogil              # ExitKind; fills self.exit
    cdef void set_immediate_exit(self, bint on) noexcept nogil
    cdef void _loop(self) noexcept nogil
    cdef bint _park(self) noexcept nogil             # False: leave the loop
    cdef bint _give_up(self, uint32_t event) noexcept nogil  # False: leave the loop
    cdef int _kick(self) noexcept nogil              # 0 or an errno
    cdef int _command(self, uint32_t control) except -1
