"""What a device and the hypervisor signal each other with: interrupt lines, MSI vectors and doorbells."""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport uint16_t
from libc.string cimport strerror
from posix.unistd cimport close

from propolis._atomic cimport add64_rlx, ld64_rlx
from propolis._posix cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_read, eventfd_write

from propolis.errors import HypervisorError


cdef class IrqLine:
    def __init__(self, Vm vm, pin: int = -1) -> None:
        self.vm = vm
        self.pin = pin
        self.level = False

    cdef void set(self, bint level) noexcept nogil:
        self.vm.irq_lock.acquire()
        if level != self.level:
            self.level = level
            self._drive(level)
        self.vm.irq_lock.release()

    cdef void pulse(self) noexcept nogil:
        self.set(True)
        self.set(False)

    cdef void route(self, int32_t pin) noexcept nogil:
        if pin < -1 or pin >= 24:
            pin = -1
        self.vm.irq_lock.acquire()
        if pin != self.pin:
            if self.level:
                self._drive(False)
            self.pin = pin
            if self.level:
                self._drive(True)
        self.vm.irq_lock.release()

    cdef void _drive(self, bint level) noexcept nogil:
        """Under irq_lock: this wire changes; the input follows the OR of its wires."""
        cdef uint16_t *lines
        if self.pin < 0:
            return
        lines = &self.vm.asserted[self.pin]
        if level:
            lines[0] += 1
            if lines[0] == 1:
                self.vm.set_irq(<uint32_t>self.pin, True)
        else:
            lines[0] -= 1
            if lines[0] == 0:
                self.vm.set_irq(<uint32_t>self.pin, False)

    def drive(self, level: bool) -> None:
        """Raises or lowers the line; for devices written in Python."""
        self.set(level)

    def reroute(self, pin: int) -> None:
        """Wires the line to another input of the interrupt controllers; to none if there is no such input."""
        self.route(pin)

    def state(self) -> tuple:
        """(pin, level)."""
        cdef int32_t pin
        cdef bint level
        self.vm.irq_lock.acquire()
        pin = self.pin
        level = self.level
        self.vm.irq_lock.release()
        return pin, bool(level)


@cython.no_gc_clear
cdef class MsiVector:
    def __init__(self, Vm vm) -> None:
        self.vm = vm
        self.fd = -1
        self.gsi = -1

    cdef void set_message(self, uint64_t address, uint32_t data) noexcept nogil:
        if address == self.address and data == self.data:
            return  # changing a route costs the kernel a grace period
        self.address = address
        self.data = data
        if self.fd >= 0:
            self.vm.route_msi(self.gsi, address, data)

    cdef void set_masked(self, bint masked) noexcept nogil:
        # While unassigned the eventfd keeps what was signalled; assigning it again delivers that.
        if self.fd >= 0:
            self.vm.assign_irqfd(self.fd, self.gsi, not masked)

    cdef void fire(self) noexcept nogil:
        if self.fd >= 0:
            eventfd_write(self.fd, 1)
        else:
            self.vm.signal_msi(self.address, self.data)

    def lend(self) -> int:
        """An eventfd that fires this vector without us: for vhost and other processes. Raises HypervisorError."""
        cdef int fd
        cdef int gsi
        if self.fd < 0:
            gsi = self.vm.route_msi(-1, self.address, self.data)
            if gsi < 0:
                raise HypervisorError(f"route an MSI vector: {strerror(-gsi).decode()}")
            fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
            if fd < 0:
                error = strerror(errno).decode()
                self.vm.unroute_msi(gsi)
                raise HypervisorError(f"create an eventfd: {error}")
            gsi_error = self.vm.assign_irqfd(fd, gsi, True)
            if gsi_error < 0:
                close(fd)
                self.vm.unroute_msi(gsi)
                raise HypervisorError(f"assign an irqfd: {strerror(-gsi_error).decode()}")
            self.gsi = gsi
            self.fd = fd
        return self.fd

    def trigger(self) -> None:
        """Fires the vector; for devices written in Python and for tests."""
        self.fire()

    def configure(self, address: int, data: int) -> None:
        self.set_message(address, data)

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            # Who borrowed the descriptor may keep it: it must not fire the next owner of the route.
            self.vm.assign_irqfd(self.fd, self.gsi, False)
            self.vm.unroute_msi(self.gsi)
            close(self.fd)


cdef class Doorbell(Region):
    def __init__(self, Vm vm, name: str) -> None:
        self.name = name
        self.width = 8
        self.vm = vm
        self.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.fd < 0:
            raise HypervisorError(f"create an eventfd: {strerror(errno).decode()}")

    def __cinit__(self) -> None:
        self.fd = -1

    def fileno(self) -> int:
        return self.fd

    def drain(self) -> int:
        """How often it was rung since the last call."""
        cdef uint64_t value = 0
        eventfd_read(self.fd, &value)
        return value

    def stats(self) -> dict:
        return {"rung": ld64_rlx(&self.rung)}

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return 0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        add64_rlx(&self.rung, 1)
        eventfd_write(self.fd, 1)

    cdef void placed(self, Bus bus, uint64_t base) noexcept nogil:
        self.vm.assign_doorbell(self.fd, bus.is_pio, base, True)

    cdef void removed(self, Bus bus, uint64_t base) noexcept nogil:
        self.vm.assign_doorbell(self.fd, bus.is_pio, base, False)

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)
