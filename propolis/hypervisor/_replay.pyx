"""A hypervisor made of a script: the run loop, the buses and every device are tested where there is no KVM.

A script is a list of exits. Interrupts that devices raise are recorded instead of delivered.
"""

cimport cython
from libc.errno cimport EINVAL
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from propolis._atomic cimport ld32_acq, st32_rel
from propolis._lock cimport Lock
from propolis._posix cimport (
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_t,
    pthread_cond_wait,
)
from propolis._vmm cimport EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MMIO, EXIT_PIO, EXIT_RETRY, EXIT_SHUTDOWN, Vcpu, Vm

from propolis.errors import HypervisorError
from propolis.hypervisor.state import real_mode_registers

cdef enum:
    MAX_RECORDS = 4096

cdef struct Step:
    int kind
    bint is_write
    uint32_t size
    uint32_t count
    uint64_t address
    uint8_t data[64]

cdef struct Interrupt:
    uint64_t address  # of an MSI; for a line, its input
    uint32_t data     # of an MSI; for a line, its level
    bint is_msi


cdef class ReplayVm(Vm):
    """A machine without a processor. Records up to 4096 interrupts; later ones are counted only."""

    cdef Interrupt records[MAX_RECORDS]  # under: irq_lock for lines, record_lock for all
    cdef uint32_t recorded
    cdef Lock record_lock
    cdef int32_t next_gsi

    def __cinit__(self) -> None:
        self.record_lock = Lock()
        self.next_gsi = 24

    cdef void _record(self, bint is_msi, uint64_t address, uint32_t data) noexcept nogil:
        self.record_lock.acquire()
        if self.recorded < MAX_RECORDS:
            self.records[self.recorded] = Interrupt(address=address, data=data, is_msi=is_msi)
        self.recorded += 1
        self.record_lock.release()

    cdef int set_irq(self, uint32_t gsi, bint level) noexcept nogil:
        self._record(False, gsi, level)
        return 0

    cdef int signal_msi(self, uint64_t address, uint32_t data) noexcept nogil:
        self._record(True, address, data)
        return 0

    cdef int route_msi(self, int32_t gsi, uint64_t address, uint32_t data) noexcept nogil:
        if gsi == -1:
            gsi = self.next_gsi
            self.next_gsi += 1
        return gsi

    cdef int assign_irqfd(self, int fd, int32_t gsi, bint assign) noexcept nogil:
        return 0 if gsi >= 24 else -EINVAL

    def take_interrupts(self) -> list:
        """What was raised since the last call: ("line", input, level) or ("msi", address, data)."""
        cdef uint32_t i = 0
        found = []
        self.record_lock.acquire()
        while i < self.recorded and i < MAX_RECORDS:
            kind = "msi" if self.records[i].is_msi else "line"
            found.append((kind, self.records[i].address, self.records[i].data))
            i += 1
        self.recorded = 0
        self.record_lock.release()
        return found

    def line_level(self, pin: int) -> bool:
        """Whether any line holds this input of the interrupt controllers up."""
        if not 0 <= pin < 24:
            raise ValueError(f"no input {pin}")
        cdef bint level
        self.irq_lock.acquire()
        level = self.asserted[<uint32_t>pin] != 0
        self.irq_lock.release()
        return bool(level)

    def create_vcpu(self, index: int, on_event) -> Vcpu:
        """A held vCPU, whose events reach `on_event` through the mailbox."""
        return ReplayVcpu(self, index, on_event)

    def max_vcpus(self) -> int:
        return 64

    def has_deadline_timer(self) -> bool:
        return False

    def supported_cpuid(self) -> list:
        return [(0, 0, 0, 1, 0, 0, 0), (1, 0, 0, 0, 0, 0, 0)]

    def supported_hyperv(self) -> list:
        return []

    def map_memory(self) -> None:
        """There is nobody to map it for."""

    def add_interrupt_controllers(self) -> None:
        """What would reach them is recorded."""

    def inject_nmi(self) -> None:
        """Recorded as the message to all local APICs that it is elsewhere."""
        self.signal_msi(0xFEEFF000, 0x400)

    def reset(self) -> None:
        """There is no interrupt controller; lines keep the level of their devices."""

    def close(self) -> None:
        """Gives back guest memory."""
        self.memory.close()


@cython.no_gc_clear
cdef class ReplayVcpu(Vcpu):
    """A vCPU whose exits come from a script, run `rounds` times; then it idles until it is kicked.

    Steps: ("out", port, size, value), ("in", port, size), ("write", gpa, size, value), ("read", gpa, size),
    ("outs", port, size, bytes), ("ins", port, size, count), ("retry",), ("shutdown",), ("fail", reason).
    """

    cdef Step *steps
    cdef uint32_t length
    cdef uint32_t position
    cdef uint64_t rounds
    cdef uint32_t done               # the last step is behind it; written by: vcpu (release)
    cdef uint32_t immediate_exit
    cdef Lock idle_lock
    cdef pthread_cond_t kicked
    cdef object registers
    cdef list cpuid

    def __cinit__(self, Vm vm, index: int, on_event, script: list | None = None, rounds: int = 1) -> None:
        kinds = {
            "out": (EXIT_PIO, True), "in": (EXIT_PIO, False), "outs": (EXIT_PIO, True), "ins": (EXIT_PIO, False),
            "write": (EXIT_MMIO, True), "read": (EXIT_MMIO, False), "retry": (EXIT_RETRY, False),
            "shutdown": (EXIT_SHUTDOWN, False), "fail": (EXIT_FAILED, False),
        }
        cdef Step *step
        cdef bytes payload
        self.idle_lock = Lock()
        pthread_cond_init(&self.kicked, NULL)
        self.steps = <Step *>calloc(len(script or ()) + 1, sizeof(Step))
        if self.steps == NULL:
            raise MemoryError
        for entry in script or ():
            step = &self.steps[self.length]
            name = entry[0]
            if name not in kinds:
                raise HypervisorError(f"replay: unknown step {name!r}")
            step.kind, step.is_write = kinds[name]
            step.count = 1
            if name == "fail":
                step.address = entry[1]
            elif step.kind in (EXIT_PIO, EXIT_MMIO):
                step.address = entry[1]
                step.size = entry[2]
                payload = b""
                if name in ("out", "write"):
                    payload = int(entry[3]).to_bytes(8, "little")
                elif name == "outs":
                    payload = entry[3]
                    step.count = <uint32_t>(len(payload) // step.size)
                elif name == "ins":
                    step.count = entry[3]
                if step.size * step.count > 64:
                    raise HypervisorError("replay: a step holds 64 bytes")
                memcpy(step.data, <const char *>payload, len(payload))
            self.length += 1
        self.rounds = rounds
        self.registers = real_mode_registers()

    def __dealloc__(self) -> None:
        free(self.steps)
        pthread_cond_destroy(&self.kicked)

    cdef void set_immediate_exit(self, bint on) noexcept nogil:
        self.idle_lock.acquire()
        st32_rel(&self.immediate_exit, on)
        pthread_cond_signal(&self.kicked)
        self.idle_lock.release()

    cdef int enter(self) noexcept nogil:
        cdef Step *step
        if self.position == self.length and self.rounds <= 1:
            st32_rel(&self.done, 1)  # what the last step read is in place; pairs with is_done
        if ld32_acq(&self.immediate_exit):
            return EXIT_INTERRUPTED
        if self.position == self.length:
            if self.rounds > 1:
                self.rounds -= 1
                self.position = 0
            if self.position == self.length:
                self.idle_lock.acquire()
                while not self.immediate_exit:
                    pthread_cond_wait(&self.kicked, &self.idle_lock.mutex)
                self.idle_lock.release()
                return EXIT_INTERRUPTED
        step = &self.steps[self.position]
        self.position += 1
        self.exit.data = step.data
        self.exit.address = step.address
        self.exit.size = step.size
        self.exit.count = step.count
        self.exit.is_write = step.is_write
        self.exit.reason = <uint32_t>step.address
        return step.kind

    @property
    def is_done(self) -> bool:
        """Whether the whole script, with all its rounds, has run and been answered."""
        if ld32_acq(&self.done):
            return True
        # A vCPU that was held as soon as it had parked itself has not come back to say so.
        return bool(self.is_parked) and self.position == self.length and self.rounds <= 1

    def set_cpuid(self, entries: list) -> None:
        self.cpuid = entries

    def get_registers(self):
        return self.registers

    def set_registers(self, registers) -> None:
        self.registers = registers

    def instruction_bytes(self) -> bytes:
        return b""

    def failure_text(self) -> str:
        return f"replayed failure {self.failure()[0]}"

    def reset(self) -> None:
        """Starts the script again; held."""
        self.position = self.done = 0
        self.registers = real_mode_registers()

    def close(self) -> None:
        if self.running:
            raise HypervisorError(f"vCPU {self.index} is still running")

    def results(self) -> list:
        """What each reading step got in its last round: an int, or bytes of a string instruction."""
        found = []
        for i in range(self.length):
            if self.steps[i].kind in (EXIT_PIO, EXIT_MMIO) and not self.steps[i].is_write:
                data = bytes(self.steps[i].data[:self.steps[i].size * self.steps[i].count])
                found.append(int.from_bytes(data, "little") if self.steps[i].count == 1 else data)
        return found
