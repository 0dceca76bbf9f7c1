"""The compiled core: the virtual machine, its vCPUs and the one loop that runs them.

See _vmm.pxd for the classes with their fields, and docs/design.md for how data flows between them.
"""

cimport cython
from libc.errno cimport ENOSYS, errno
from libc.string cimport memset, strerror
from posix.signal cimport SIG_SETMASK, sigaction, sigaction_t, sigdelset, sigfillset, sigset_t

from propolis._atomic cimport fence_seq, ld32_acq, ld64_rlx, st32_rel, st64_rlx
from propolis._lock cimport Lock
from propolis._posix cimport (
    SIGURG,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_kill,
    pthread_self,
    pthread_sigmask,
)

from propolis.errors import HypervisorError


@cython.no_gc_clear
cdef class Vm:
    def __cinit__(self) -> None:
        self.memory = GuestMemory()
        self.pio = Bus("port", True)
        self.mmio = Bus("physical address", False)
        self.mailbox = Mailbox()
        self.irq_lock = Lock()

    cdef int set_irq(self, uint32_t gsi, bint level) noexcept nogil:
        return -ENOSYS

    cdef int signal_msi(self, uint64_t address, uint32_t data) noexcept nogil:
        return -ENOSYS

    cdef int assign_doorbell(self, int fd, bint is_pio, uint64_t address, bint assign) noexcept nogil:
        return -ENOSYS

    cdef int route_msi(self, int32_t gsi, uint64_t address, uint32_t data) noexcept nogil:
        return -ENOSYS

    cdef void unroute_msi(self, int32_t gsi) noexcept nogil:
        pass

    cdef int assign_irqfd(self, int fd, int32_t gsi, bint assign) noexcept nogil:
        return -ENOSYS

    cdef int show_memory(self, uint64_t gpa, bint shown) noexcept nogil:
        return 0  # a back end without memory slots: all accesses come to the bus


cdef void _on_kick(int number) noexcept nogil:
    """Does nothing: delivery alone makes KVM_RUN return EINTR."""


cdef bint kick_is_installed = False


cdef int _install_kick() except -1:
    """Once: SIGURG with an empty handler and without SA_RESTART.

    A standard signal needs no room in the user's queue of pending signals, which others may have filled. This one is
    ignored by default, and by those who do not expect it.
    """
    global kick_is_installed
    cdef sigaction_t action
    if not kick_is_installed:
        memset(&action, 0, sizeof(action))
        action.sa_handler = _on_kick
        if sigaction(SIGURG, &action, NULL) < 0:
            raise HypervisorError(f"install the kick signal: {strerror(errno).decode()}")
        kick_is_installed = True
    return 0


@cython.no_gc_clear
cdef class Vcpu:
    """One virtual CPU: a control word, and the loop that obeys it. Created held.

    A thread runs `run()`; the loop thread calls hold(), release() and stop(). A held vCPU has no I/O pending inside the
    hypervisor, so its registers are consistent.
    """

    def __cinit__(self, Vm vm, index: int, on_event, *args, **kwargs) -> None:
        _install_kick()
        self.vm = vm
        self.index = index
        self.control = CONTROL_HOLD
        self.slot = vm.mailbox.register(on_event)
        self.lock = Lock()
        pthread_cond_init(&self.changed, NULL)
        vm.pio._enrol(&self.pio_reader)
        vm.mmio._enrol(&self.mmio_reader)

    def __dealloc__(self) -> None:
        if self.vm is not None:
            self.vm.pio._dismiss(&self.pio_reader)
            self.vm.mmio._dismiss(&self.mmio_reader)
        pthread_cond_destroy(&self.changed)

    def run(self) -> None:
        """The body of the vCPU's thread: returns after stop()."""
        cdef sigset_t mask
        cdef bint refused
        sigfillset(&mask)
        sigdelset(&mask, SIGURG)
        pthread_sigmask(SIG_SETMASK, &mask, NULL)
        self.lock.acquire()
        refused = self.running
        if not refused:
            self.thread = pthread_self()
            self.running = True
        self.lock.release()
        if refused:
            raise HypervisorError(f"vCPU {self.index} already has a thread")
        with nogil:
            self._loop()
            self.lock.acquire()
            self.running = False
            self.lock.release()
            self.vm.mailbox.post(self.slot, VCPU_ENDED)

    cdef void _loop(self) noexcept nogil:
        cdef Exit *exit = &self.exit
        cdef uint32_t i
        cdef int kind
        self.set_immediate_exit(True)
        while True:
            kind = self.enter()
            st64_rlx(&self.exits[kind], self.exits[kind] + 1)
            if kind == EXIT_PIO:
                for i in range(exit.count):
                    self.vm.pio.access(&self.pio_reader, exit.address, exit.size, exit.is_write,
                                       exit.data + i * exit.size)
            elif kind == EXIT_MMIO:
                self.vm.mmio.access(&self.mmio_reader, exit.address, exit.size, exit.is_write, exit.data)
            elif kind == EXIT_INTERRUPTED:
                # First forget the kick, then look at what it was for: the other order loses one.
                self.set_immediate_exit(False)
                fence_seq()  # pairs with the fence in _kick
                if ld32_acq(&self.control) != CONTROL_RUN and not self._park():
                    return
            elif kind == EXIT_SHUTDOWN:
                if not self._give_up(VCPU_SHUTDOWN):
                    return
            elif kind == EXIT_FAILED:
                if not self._give_up(VCPU_FAILED):
                    return

    cdef bint _park(self) noexcept nogil:
        cdef bint go_on
        self.lock.acquire()
        while self.control == CONTROL_HOLD:
            if not self.parked:
                self.parked = True
                self.vm.mailbox.post(self.slot, VCPU_PARKED)
            pthread_cond_wait(&self.changed, &self.lock.mutex)
        self.parked = False
        go_on = self.control == CONTROL_RUN
        self.lock.release()
        return go_on

    cdef bint _give_up(self, uint32_t event) noexcept nogil:
        """Tells the loop of an exit it cannot answer, and parks at once: another entry may fail for good."""
        self.lock.acquire()
        if self.control == CONTROL_RUN:
            self.control = CONTROL_HOLD
        self.lock.release()
        self.vm.mailbox.post(self.slot, event)
        return self._park()

    cdef int _kick(self) noexcept nogil:
        """Under the lock, after the control word was stored."""
        fence_seq()  # the word is visible before the flag; pairs with the fence in _loop
        self.set_immediate_exit(True)
        return pthread_kill(self.thread, SIGURG) if self.running else 0

    cdef int _command(self, uint32_t control) except -1:
        cdef int error = 0
        self.lock.acquire()
        if self.control != CONTROL_STOP:
            st32_rel(&self.control, control)
            if control != CONTROL_RUN:
                error = self._kick()
            pthread_cond_signal(&self.changed)
        self.lock.release()
        if error:
            raise HypervisorError(f"signal the thread of vCPU {self.index}: {strerror(error).decode()}")
        return 0

    def hold(self) -> None:
        """Asks it to park; VCPU_PARKED arrives through the mailbox unless it is parked already."""
        self._command(CONTROL_HOLD)

    def release(self) -> None:
        """Lets it run."""
        self._command(CONTROL_RUN)

    def stop(self) -> None:
        """Asks its thread to end, for good."""
        self._command(CONTROL_STOP)

    @property
    def is_parked(self) -> bool:
        """True while it is held and has no thread inside the guest or the hypervisor."""
        cdef bint parked
        self.lock.acquire()
        parked = self.control != CONTROL_RUN and (self.parked or not self.running)
        self.lock.release()
        return parked

    def stats(self) -> dict:
        """Exits by kind since creation."""
        names = ("interrupted", "pio", "mmio", "retry", "shutdown", "failed")
        return {name: ld64_rlx(&self.exits[i]) for i, name in enumerate(names)}

    def failure(self) -> tuple:
        """(reason, details) of the last EXIT_FAILED, as the back end filled them."""
        return self.exit.reason, tuple([self.exit.detail[i] for i in range(4)])

    cdef int enter(self) noexcept nogil:
        self.exit.reason = 0
        return EXIT_FAILED

    cdef void set_immediate_exit(self, bint on) noexcept nogil:
        pass
