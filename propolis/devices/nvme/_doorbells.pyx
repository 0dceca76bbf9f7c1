"""Doorbells: written by vCPUs, read by whoever serves the queues.

A doorbell carries a value, so the kernel cannot take it in our place until shadow doorbells are configured: from then
on the values are in guest memory, and what is left of a doorbell is the knock.
"""

from posix.unistd cimport close

from propolis._atomic cimport (
    add64_rlx,
    fence_seq,
    ld32_acq,
    ld32_rlx,
    ld64_rlx,
    ldptr_acq,
    st32_rel,
    st32_rlx,
    stptr_rel,
)
from propolis._memory cimport ACCESS_READ, ACCESS_WRITE
from propolis._posix cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_read, eventfd_write

from propolis.errors import HypervisorError

cdef enum:
    STRIDE = 4               # CAP.DSTRD is 0
    PAGE = 4096


cdef class Doorbells(Region):
    """The doorbells of up to 17 queues of each direction; its offset 0 is BAR offset 1000h."""

    def __cinit__(self, Vm vm, *args: object) -> None:
        cdef uint32_t i
        self.vm = vm
        self.memory = vm.memory
        self.pin_lock = Lock()
        self.place_lock = Lock()
        for i in range(<uint32_t>MAX_QUEUES):
            self.fds[i] = -1

    def __init__(self, Vm vm, PciFunction function, slot: int, queues: int) -> None:
        cdef uint32_t i
        self.name = f"{function.name} doorbells"
        self.width = 8
        self.function = function
        self.slot = slot
        for i in range(<uint32_t>queues):
            self.fds[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
            if self.fds[i] < 0:
                raise HypervisorError("create an eventfd for a doorbell")

    def __dealloc__(self) -> None:
        cdef uint32_t i
        for i in range(<uint32_t>MAX_QUEUES):
            if self.fds[i] >= 0:
                close(self.fds[i])

    # -- the guest's side, on vCPU threads -----------------------------------------------------------------------------

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return 0  # §3.1.17: what a read returns is vendor specific

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t queue = <uint32_t>(offset // (2 * STRIDE))
        cdef uint32_t index = <uint32_t>value
        cdef bint is_head = offset & STRIDE != 0
        cdef uint32_t limit = 0
        if size != STRIDE or offset % STRIDE:
            add64_rlx(&self.ignored, 1)
            return
        if queue < MAX_QUEUES:
            limit = ld32_acq(&self.cq_sizes[queue] if is_head else &self.sq_sizes[queue])
        if index >= limit:
            add64_rlx(&self.ignored, 1)
            self.vm.mailbox.post(self.slot, EVENT_BAD_VALUE if limit else EVENT_BAD_DOORBELL)
            return
        if is_head:
            st32_rel(&self.heads[queue], index)  # the guest has read what is before it; pairs with head()
            fence_seq()  # it is out before we look who waits, or for shadows; pairs with block and cast_shadows
            self._follow(queue, True)
            if ld32_rlx(&self.blocked[queue]):
                st32_rlx(&self.blocked[queue], 0)
                self.vm.mailbox.post(self.slot, EVENT_ROOM)
            self.update_pin()
        else:
            add64_rlx(&self.rung, 1)
            st32_rel(&self.tails[queue], index)  # the entries are in memory; pairs with tail()
            fence_seq()  # it is out before we look for shadows; pairs with cast_shadows
            self._follow(queue, False)
            eventfd_write(self.fds[queue], 1)

    cdef void _follow(self, uint32_t queue, bint is_head) noexcept nogil:
        """A shadow says no less than its doorbell: the guest may have rung before it knew of shadows."""
        if ldptr_acq(<void **>&self.shadow) == NULL or queue == 0:
            return
        self.pin_lock.acquire()
        if self.shadow != NULL:
            self._copy(queue, is_head)
        self.pin_lock.release()

    cdef void _copy(self, uint32_t queue, bint is_head) noexcept nogil:
        """Under pin_lock: the value of a register goes to its shadow."""
        cdef uint32_t value = ld32_acq(&self.heads[queue] if is_head else &self.tails[queue])
        self._store(self.shadow, self.shadow_gpa, 2 * queue + is_head, value)

    cdef void placed(self, Bus bus, uint64_t base) noexcept nogil:
        cdef uint32_t i
        self.place_lock.acquire()
        self.is_placed = True
        self.base = base
        for i in range(<uint32_t>MAX_QUEUES):
            self._settle(i)
        self.place_lock.release()

    cdef void removed(self, Bus bus, uint64_t base) noexcept nogil:
        cdef uint32_t i
        self.place_lock.acquire()
        self.is_placed = False
        for i in range(<uint32_t>MAX_QUEUES):
            self._settle(i)
        self.place_lock.release()

    cdef void _settle(self, uint32_t queue) noexcept nogil:
        """Under place_lock: the kernel takes the doorbell of a queue with a shadow. The admin queue has none."""
        cdef uint64_t address = self.base + 2 * STRIDE * <uint64_t>queue
        cdef bint wanted = self.is_placed and queue != 0 and self.shadow != NULL and self.sq_sizes[queue] != 0
        if wanted and not self.lent[queue]:
            self.lent[queue] = self.vm.assign_doorbell(self.fds[queue], False, address, True) == 0
        elif not wanted and self.lent[queue]:
            self.vm.assign_doorbell(self.fds[queue], False, address, False)
            self.lent[queue] = False

    cdef void set_mask(self, uint32_t set, uint32_t clear) noexcept nogil:
        self.pin_lock.acquire()
        self.mask = (self.mask | set) & ~clear
        self.pin_lock.release()
        self.update_pin()

    cdef void update_pin(self) noexcept nogil:
        cdef uint32_t i
        cdef CompletionView *view
        cdef bint level = False
        if self.function.msix.enabled():
            return
        self.pin_lock.acquire()
        for i in range(<uint32_t>MAX_QUEUES):
            view = &self.completions[i]
            if ld32_acq(&self.cq_sizes[i]) and view.interrupts and ld32_acq(&view.tail) != self.head(i):
                level = level or (view.vector < 32 and self.mask >> view.vector & 1 == 0)
        self.function.set_intx(level)
        self.pin_lock.release()

    # -- the queues' side ----------------------------------------------------------------------------------------------

    cdef uint32_t tail(self, uint32_t queue) noexcept nogil:
        # Either pairs with a release after the entries: the guest's, or the vCPU's in write.
        if self.shadow != NULL and queue != 0:
            return ld32_acq(self.shadow + 2 * STRIDE * queue)
        return ld32_acq(&self.tails[queue])

    cdef uint32_t head(self, uint32_t queue) noexcept nogil:
        if self.shadow != NULL and queue != 0:
            return ld32_acq(self.shadow + 2 * STRIDE * queue + STRIDE)
        return ld32_acq(&self.heads[queue])

    cdef void _store(self, uint8_t *page, uint64_t gpa, uint32_t index, uint32_t value) noexcept nogil:
        st32_rlx(page + STRIDE * index, value)
        self.memory.mark_dirty(gpa + STRIDE * <uint64_t>index, STRIDE)

    cdef void listen(self, uint32_t queue, uint32_t head) noexcept nogil:
        if self.shadow != NULL:
            self._store(self.events, self.events_gpa, 2 * queue, head)
            fence_seq()  # pairs with the driver's fence between its tail and reading our event index

    cdef void block(self, uint32_t queue) noexcept nogil:
        st32_rlx(&self.blocked[queue], 1)
        if self.shadow != NULL and queue != 0:
            self._store(self.events, self.events_gpa, 2 * queue + 1, self.head(queue))
        fence_seq()  # pairs with the fence in write, and with the driver's after its head

    cdef void open_submission(self, uint32_t queue, uint32_t size) noexcept nogil:
        st32_rlx(&self.tails[queue], 0)
        if self.shadow != NULL and queue != 0:
            self._store(self.shadow, self.shadow_gpa, 2 * queue, 0)
            self._store(self.events, self.events_gpa, 2 * queue, 0)
        st32_rel(&self.sq_sizes[queue], size)  # pairs with the acquire in write
        self.place_lock.acquire()
        self._settle(queue)
        self.place_lock.release()

    cdef void open_completion(self, uint32_t queue, uint32_t size, uint32_t vector, bint interrupts) noexcept nogil:
        st32_rlx(&self.heads[queue], 0)
        st32_rlx(&self.blocked[queue], 0)
        if self.shadow != NULL and queue != 0:
            self._store(self.shadow, self.shadow_gpa, 2 * queue + 1, 0)
            self._store(self.events, self.events_gpa, 2 * queue + 1, 0)
        self.completions[queue].vector = vector
        self.completions[queue].interrupts = interrupts
        st32_rlx(&self.completions[queue].tail, 0)
        st32_rel(&self.cq_sizes[queue], size)  # pairs with the acquire in write and in update_pin

    cdef void close_submission(self, uint32_t queue) noexcept nogil:
        cdef uint64_t value = 0
        st32_rel(&self.sq_sizes[queue], 0)
        self.place_lock.acquire()
        self._settle(queue)
        self.place_lock.release()
        eventfd_read(self.fds[queue], &value)

    cdef void close_completion(self, uint32_t queue) noexcept nogil:
        st32_rel(&self.cq_sizes[queue], 0)
        self.update_pin()

    # -- for the controller, on the loop -------------------------------------------------------------------------------

    def cast_shadows(self, shadow: int, events: int) -> bool:
        """Uses these two pages of guest memory from now on. False when they are not RAM."""
        cdef uint64_t shadow_gpa = shadow
        cdef uint64_t events_gpa = events
        cdef uint8_t *here = self.memory.translate(shadow_gpa, PAGE, ACCESS_READ | ACCESS_WRITE)
        cdef uint8_t *there = self.memory.translate(events_gpa, PAGE, ACCESS_READ | ACCESS_WRITE)
        cdef uint32_t i
        if here == NULL or there == NULL or shadow_gpa == events_gpa:
            return False
        self.forget_shadows()
        self.pin_lock.acquire()
        self.shadow_gpa, self.events_gpa, self.events = shadow_gpa, events_gpa, there
        stptr_rel(<void **>&self.shadow, here)
        fence_seq()  # a vCPU that has not seen it yet stored its value before; pairs with write
        for i in range(1, <uint32_t>MAX_QUEUES):
            if self.sq_sizes[i]:
                self._copy(i, False)
            if self.cq_sizes[i]:
                self._copy(i, True)
        self.pin_lock.release()
        self.place_lock.acquire()
        for i in range(<uint32_t>MAX_QUEUES):
            self._settle(i)
        self.place_lock.release()
        return True

    def forget_shadows(self) -> None:
        """The values of the registers count again, as after a reset; what the shadows said is kept."""
        cdef uint32_t i
        for i in range(1, <uint32_t>MAX_QUEUES):
            if self.shadow != NULL:
                st32_rlx(&self.tails[i], self.tail(i))
                st32_rlx(&self.heads[i], self.head(i))
        self.pin_lock.acquire()
        stptr_rel(<void **>&self.shadow, NULL)
        self.pin_lock.release()
        self.place_lock.acquire()
        for i in range(<uint32_t>MAX_QUEUES):
            self._settle(i)
        self.place_lock.release()

    @property
    def has_shadows(self) -> bool:
        return self.shadow != NULL

    def fileno(self, queue: int) -> int:
        """Readable after the submission doorbell of a queue was rung."""
        return self.fds[queue]

    def drain(self, queue: int) -> None:
        cdef uint64_t value = 0
        eventfd_read(self.fds[queue], &value)

    def stats(self) -> dict:
        return {"ignored": ld64_rlx(&self.ignored), "rung": ld64_rlx(&self.rung)}
