"""What a guest sees of the controller itself: PCI identity, registers, doorbells.

Registers only take notes and post events: queues are made, served and let go of on the loop. A host has to wait for
CSTS.RDY in both directions, so that is where the loop's answer shows.
"""

cimport cython
from libc.string cimport memcpy, memset

from propolis._atomic cimport add64_rlx, ld64_rlx
from propolis._lock cimport Lock
from propolis.devices.nvme._doorbells cimport EVENT_DISABLE, EVENT_ENABLE, EVENT_SHUTDOWN, EVENT_WAKE, MAX_QUEUES

cdef enum:
    # §3.1, figure 68
    CAP = 0x00
    VS = 0x08
    INTMS = 0x0C
    INTMC = 0x10
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    REGISTERS_END = 0x38

    VERSION = 0x00010400
    CAP_MQES = 0xFFFF        # 0's based: what a queue has at most
    CAP_CQR = 1 << 16        # queues are contiguous
    TIMEOUT = 120            # of 500 ms: a disable waits for the host's storage
    CC_ENABLE = 1
    CC_SHUTDOWN = 3 << 14
    CC_WHILE_DISABLED = 0x3FF0   # MPS, AMS and CSS: they change only while EN is 0
    CC_MASK = 0x00FFFFF1
    CSTS_READY = 1
    CSTS_FATAL = 2
    CSTS_SHUTDOWN = 3 << 2
    CSTS_SHUTDOWN_BEGUN = 1 << 2
    CSTS_SHUTDOWN_DONE = 2 << 2
    AQA_MASK = 0x0FFF0FFF

    REGISTER_BAR = 0
    MSIX_BAR = 4
    BAR_BYTES = 0x4000
    DOORBELLS = 0x1000
    MSIX_BYTES = 0x1000
    MSIX_PBA = 0x800

    VENDOR = 0x01DE
    DEVICE = 0x0000
    CLASS_NVME = 0x010802


cdef class Registers(Region):
    def __init__(self, Vm vm, name: str, slot: int) -> None:
        self.name = f"{name} registers"
        self.width = 8
        self.vm = vm
        self.slot = slot
        self.lock = Lock()
        self.cap = CAP_MQES | CAP_CQR | <uint64_t>TIMEOUT << 24 | <uint64_t>1 << 37  # CSS: the NVM command set

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef unsigned char image[REGISTERS_END + 8]
        cdef uint32_t version = VERSION
        cdef uint64_t value = 0
        if offset >= REGISTERS_END:
            return 0
        memset(image, 0, sizeof(image))
        memcpy(image + CAP, &self.cap, 8)
        memcpy(image + VS, &version, 4)
        memcpy(image + INTMS, &self.doorbells.mask, 4)
        memcpy(image + INTMC, &self.doorbells.mask, 4)
        self.lock.acquire()
        memcpy(image + CC, &self.cc, 4)
        memcpy(image + CSTS, &self.csts, 4)
        memcpy(image + AQA, &self.aqa, 4)
        memcpy(image + ASQ, &self.asq, 8)
        memcpy(image + ACQ, &self.acq, 8)
        self.lock.release()
        memcpy(&value, image + offset, size if size <= 8 else 8)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t low = <uint32_t>value
        cdef uint32_t events = 0
        cdef bint is_known = True
        # §3.1: the registers are accessed in their natural size, those of 64 bits also by halves.
        if (size != 4 and size != 8) or offset % size or (size == 8 and offset != ASQ and offset != ACQ):
            add64_rlx(&self.ignored, 1)
            return
        if offset == INTMS:
            self.doorbells.set_mask(low, 0)
            return
        if offset == INTMC:
            self.doorbells.set_mask(0, low)
            return
        self.lock.acquire()
        if offset == CC:
            events = self._configure(low)
        elif self.cc & CC_ENABLE and offset >= AQA:
            is_known = False  # the admin queue is in use
        elif offset == AQA:
            self.aqa = low & AQA_MASK
        elif offset == ASQ:
            self.asq = (value if size == 8 else self.asq >> 32 << 32 | low) & ~<uint64_t>0xFFF
        elif offset == ASQ + 4:
            self.asq = <uint64_t>low << 32 | <uint32_t>self.asq
        elif offset == ACQ:
            self.acq = (value if size == 8 else self.acq >> 32 << 32 | low) & ~<uint64_t>0xFFF
        elif offset == ACQ + 4:
            self.acq = <uint64_t>low << 32 | <uint32_t>self.acq
        else:
            is_known = False
        self.lock.release()
        if events:
            self.vm.mailbox.post(self.slot, events)
        if not is_known:
            add64_rlx(&self.ignored, 1)

    cdef uint32_t _configure(self, uint32_t value) noexcept nogil:
        """Under the lock: CC was written; returns what the loop has to do."""
        cdef uint32_t old = self.cc
        cdef uint32_t events = 0
        value &= CC_MASK
        if old & CC_ENABLE and value & CC_ENABLE:
            value = value & ~<uint32_t>CC_WHILE_DISABLED | old & CC_WHILE_DISABLED
        self.cc = value
        if value & ~old & CC_ENABLE:
            events |= EVENT_ENABLE
        if old & ~value & CC_ENABLE:
            events |= EVENT_DISABLE
        if value & CC_SHUTDOWN and self.csts & CSTS_SHUTDOWN == 0:
            self.csts |= CSTS_SHUTDOWN_BEGUN
            events |= EVENT_SHUTDOWN
        return events

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def admin_queues(self) -> tuple:
        """(configuration, entries of submission and completion queue, their addresses)."""
        self.lock.acquire()
        cc, aqa, asq, acq = self.cc, self.aqa, self.asq, self.acq
        self.lock.release()
        return cc, (aqa & 0xFFF) + 1, (aqa >> 16 & 0xFFF) + 1, asq, acq

    @property
    def configuration(self) -> int:
        """CC."""
        self.lock.acquire()
        cc = self.cc
        self.lock.release()
        return cc

    @property
    def status(self) -> int:
        """CSTS."""
        self.lock.acquire()
        csts = self.csts
        self.lock.release()
        return csts

    def set_ready(self) -> None:
        self._change(0, CSTS_READY)

    def set_fatal(self) -> None:
        """The controller cannot work; the host has to reset it."""
        self._change(0, CSTS_FATAL)

    def set_shut_down(self) -> None:
        self._change(CSTS_SHUTDOWN, CSTS_SHUTDOWN_DONE)

    def finish_disable(self) -> None:
        """A controller reset is done (§7.3.2): the registers of the admin queue stay."""
        self._change(CSTS_READY | CSTS_FATAL | CSTS_SHUTDOWN, 0)
        self.doorbells.set_mask(0, 0xFFFFFFFF)

    def power_on(self) -> None:
        """To the state at power-on; the vCPUs are held."""
        self.lock.acquire()
        self.cc = self.csts = self.aqa = 0
        self.asq = self.acq = 0
        self.lock.release()
        self.doorbells.set_mask(0, 0xFFFFFFFF)

    def _change(self, clear: int, set: int) -> None:
        cdef uint32_t off = clear
        cdef uint32_t on = set
        self.lock.acquire()
        self.csts = self.csts & ~off | on
        self.lock.release()

    def stats(self) -> dict:
        return {"ignored": ld64_rlx(&self.ignored)}


@cython.no_gc_clear
cdef class NvmeFunction(PciFunction):
    """One controller on the PCI bus, with `queues` of each direction, the admin queue's included.

    `on_event(bits)` runs on the loop.
    """

    def __init__(self, Vm vm, name: str, *, queues: int, on_event: object) -> None:
        super().__init__(
            vm, name, vendor=VENDOR, device=DEVICE, subsystem_vendor=VENDOR, subsystem=DEVICE, class_code=CLASS_NVME,
        )
        if not 2 <= queues <= MAX_QUEUES:
            raise ValueError(f"{name}: {queues} queues: expected 2 to {MAX_QUEUES}")
        slot = vm.mailbox.register(on_event)
        self.registers = Registers(vm, name, slot)
        self.doorbells = Doorbells(vm, self, slot, queues)
        self.registers.doorbells = self.doorbells
        self.window = Window(self.registers.name)
        self.window.add(self.registers, 0, DOORBELLS)
        self.window.add(self.doorbells, DOORBELLS, BAR_BYTES - DOORBELLS)
        self.add_bar(REGISTER_BAR, "mmio64", BAR_BYTES, self.window)
        msix = self.add_msix(queues, MSIX_BAR, 0, MSIX_PBA)
        self.msix_window = Window(f"{name} MSI-X")
        self.msix_window.add(msix.table, 0, 16 * queues)
        self.msix_window.add(msix.pba, MSIX_PBA, 8)
        self.add_bar(MSIX_BAR, "mmio32", MSIX_BYTES, self.msix_window)

    cdef void write_config(self, uint32_t offset, uint32_t size, uint32_t value) noexcept nogil:
        cdef bint could = self.bus_master()
        PciFunction.write_config(self, offset, size, value)
        if not could and self.bus_master():
            self.vm.mailbox.post(self.registers.slot, EVENT_WAKE)
