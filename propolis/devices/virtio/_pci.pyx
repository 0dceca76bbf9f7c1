"""virtio-pci registers: common configuration, notification, ISR status, device configuration, PCI configuration access.

What must be answered at once is decided here, on the vCPU thread: feature check, queue addresses, which writes count.
What may come later is an event for the loop: activation and reset. A driver polls the status register after a reset, so
it keeps its old value until the loop has drained the device.
"""

cimport cython
from libc.string cimport memcpy, memset

from propolis._atomic cimport ld16_rlx, ld32_rlx, st16_rlx, st32_rlx
from propolis._lock cimport Lock
from propolis._interrupts cimport Doorbell
from propolis._vmm cimport Vm
from propolis.devices.pci._msix cimport NO_VECTOR
from propolis.devices.virtio._queue cimport Queue

from propolis.devices.virtio._queue import ERRORS as _ERRORS

cdef enum:
    # §2.1
    STATUS_ACKNOWLEDGE = 1
    STATUS_DRIVER = 2
    STATUS_DRIVER_OK = 4
    STATUS_FEATURES_OK = 8
    STATUS_NEEDS_RESET = 64
    STATUS_FAILED = 128
    STATUS_BY_DRIVER = 1 | 2 | 4 | 8 | 128

    F_VERSION_1 = 32  # §6

    # §4.1.4.3
    DEVICE_FEATURE_SELECT = 0
    DEVICE_FEATURE = 4
    DRIVER_FEATURE_SELECT = 8
    DRIVER_FEATURE = 12
    CONFIG_VECTOR = 16
    NUM_QUEUES = 18
    DEVICE_STATUS = 20
    GENERATION = 21
    QUEUE_SELECT = 22
    QUEUE_SIZE = 24
    QUEUE_VECTOR = 26
    QUEUE_ENABLE = 28
    QUEUE_NOTIFY_OFF = 30
    QUEUE_DESC = 32
    QUEUE_DEVICE_END = 56
    COMMON_LENGTH = 56

    ISR_QUEUE = 1  # §4.1.4.5
    ISR_CONFIG = 2

    # §4.1.4
    CAPABILITY_VENDOR = 9
    CFG_COMMON = 1
    CFG_NOTIFY = 2
    CFG_ISR = 3
    CFG_DEVICE = 4
    CFG_PCI = 5
    ACCESS_BAR = 4           # offsets in the PCI configuration access capability, §4.1.4.9
    ACCESS_OFFSET = 8
    ACCESS_LENGTH = 12
    ACCESS_DATA = 16

    MSIX_BAR = 1
    REGISTER_BAR = 2
    PAGE = 0x1000
    DEVICE_PAGE = 0x1000
    NOTIFY_PAGE = 0x2000
    ISR_PAGE = 0x3000
    NOTIFY_STRIDE = 4
    MSIX_PBA = 0x800

    VENDOR = 0x1AF4          # §4.1.2
    DEVICE_BASE = 0x1040
    SUBSYSTEM_VENDOR = 0x01DE


cdef class CommonConfig(Region):
    def __init__(self, VirtioPci owner) -> None:
        self.name = f"{owner.name} common configuration"
        self.width = 4
        self.owner = owner

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.owner.common_read(offset, size)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self.owner.common_write(offset, size, value)


cdef class IsrStatus(Region):
    def __init__(self, VirtioPci owner) -> None:
        self.name = f"{owner.name} ISR"
        self.width = 1
        self.owner = owner

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.owner.isr_read() if offset == 0 else 0


cdef class DeviceConfig(Region):
    def __init__(self, VirtioPci owner) -> None:
        self.name = f"{owner.name} device configuration"
        self.width = 4
        self.owner = owner

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.owner.device_read(offset, size)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self.owner.device_write(offset, size, value)


cdef class PciNotifier(Notifier):
    def __init__(self, VirtioPci owner) -> None:
        self.owner = owner

    cdef void used(self, uint32_t queue) noexcept nogil:
        self.owner.interrupt(ISR_QUEUE, ld16_rlx(&self.owner.registers[queue].vector))


@cython.no_gc_clear
cdef class VirtioPci(PciFunction):
    """One virtio device on the PCI bus. `on_event(bits)` runs on the loop."""

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.register_lock = Lock()
        self.isr_lock = Lock()

    def __init__(
        self,
        Vm vm,
        name: str,
        *,
        type_id: int,
        class_code: int,
        subsystem: int,
        features: int,
        config: bytes,
        queue_sizes: list[int],
        on_event: object,
        config_mask: bytes = b"",
    ) -> None:
        cdef uint32_t i
        super().__init__(
            vm, name, vendor=VENDOR, device=DEVICE_BASE + type_id, subsystem_vendor=SUBSYSTEM_VENDOR,
            subsystem=subsystem, class_code=class_code, revision=1,
        )
        if not 1 <= len(queue_sizes) <= MAX_QUEUES or len(config) > CONFIG_SPACE or len(config_mask) > len(config):
            raise ValueError(f"{name}: {len(queue_sizes)} queues, {len(config)} bytes of configuration")
        self.offered = features | <uint64_t>1 << F_VERSION_1
        self.config_length = <uint32_t>len(config)
        for i in range(<uint32_t>len(config)):
            self.device_config[i] = <uint8_t>config[i]
        for i in range(<uint32_t>len(config_mask)):
            self.config_mask[i] = <uint8_t>config_mask[i]
        self.slot_in_mailbox = vm.mailbox.register(on_event)
        self.queue_count = <uint32_t>len(queue_sizes)
        notifier = PciNotifier(self)
        self.queues = [Queue(vm.memory, notifier, i, size) for i, size in enumerate(queue_sizes)]
        self.doorbells = [Doorbell(vm, f"{name} queue {i}") for i in range(self.queue_count)]
        for i, queue in enumerate(self.queues):
            self.queue_at[i] = <void *>queue
        self._lay_out()
        self._clear()

    def _lay_out(self) -> None:
        """BARs and capabilities."""
        self.window = Window(f"{self.name} registers")
        self.window.add(CommonConfig(self), 0, PAGE)
        self.window.add(DeviceConfig(self), DEVICE_PAGE, PAGE)
        self.window.add(IsrStatus(self), ISR_PAGE, PAGE)
        for i, doorbell in enumerate(self.doorbells):
            self.window.add(doorbell, NOTIFY_PAGE + NOTIFY_STRIDE * i, NOTIFY_STRIDE)
        self.add_bar(REGISTER_BAR, "mmio32", 4 * PAGE, self.window)
        self.msix_window = Window(f"{self.name} MSI-X")
        msix = self.add_msix(self.queue_count + 1, MSIX_BAR, 0, MSIX_PBA)
        self.msix_window.add(msix.table, 0, 16 * (self.queue_count + 1))
        self.msix_window.add(msix.pba, MSIX_PBA, 8)
        self.add_bar(MSIX_BAR, "mmio32", PAGE, self.msix_window)
        self._structure(CFG_COMMON, 0, COMMON_LENGTH)
        self._structure(CFG_NOTIFY, NOTIFY_PAGE, NOTIFY_STRIDE * self.queue_count,
                        NOTIFY_STRIDE.to_bytes(4, "little"))
        self._structure(CFG_ISR, ISR_PAGE, 1)
        if self.config_length:
            self._structure(CFG_DEVICE, DEVICE_PAGE, (self.config_length + 3) & ~3)
        access = bytes([ACCESS_DATA + 4, CFG_PCI]) + bytes(16)
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 12
        self.access_capability = self.add_capability(CAPABILITY_VENDOR, access, writable)

    def _structure(self, kind: int, offset: int, length: int, extra: bytes = b"") -> None:
        body = bytes([16 + len(extra), kind, REGISTER_BAR, 0, 0, 0])
        body += offset.to_bytes(4, "little") + length.to_bytes(4, "little") + extra
        self.add_capability(CAPABILITY_VENDOR, body)

    # -- common configuration ------------------------------------------------------------------------------------------

    cdef uint64_t common_read(self, uint64_t offset, uint32_t size) noexcept nogil:
        """Any part of the structure as it stands now; bytes past its end are 0."""
        cdef uint8_t image[COMMON_LENGTH + 8]
        cdef QueueRegisters *queue
        cdef uint64_t value = 0
        cdef uint32_t word
        cdef uint16_t half
        if offset >= COMMON_LENGTH or size > 8:
            return 0
        memset(image, 0, sizeof(image))
        self.register_lock.acquire()
        memcpy(&image[DEVICE_FEATURE_SELECT], &self.device_select, 4)
        if self.device_select < 2:
            word = <uint32_t>(self.offered >> 32 * self.device_select)
            memcpy(&image[DEVICE_FEATURE], &word, 4)
        memcpy(&image[DRIVER_FEATURE_SELECT], &self.driver_select, 4)
        if self.driver_select < 2:
            word = <uint32_t>(self.accepted >> 32 * self.driver_select)
            memcpy(&image[DRIVER_FEATURE], &word, 4)
        memcpy(&image[CONFIG_VECTOR], &self.config_vector, 2)
        half = <uint16_t>self.queue_count
        memcpy(&image[NUM_QUEUES], &half, 2)
        image[DEVICE_STATUS] = <uint8_t>self.status
        image[GENERATION] = self.generation
        memcpy(&image[QUEUE_SELECT], &self.queue_select, 2)
        if self.queue_select < self.queue_count:
            queue = &self.registers[self.queue_select]
            memcpy(&image[QUEUE_SIZE], &queue.size, 2)
            memcpy(&image[QUEUE_VECTOR], &queue.vector, 2)
            memcpy(&image[QUEUE_ENABLE], &queue.enabled, 2)
            memcpy(&image[QUEUE_NOTIFY_OFF], &self.queue_select, 2)
            memcpy(&image[QUEUE_DESC], queue.address, 24)
        self.register_lock.release()
        memcpy(&value, &image[offset], size)
        return value

    cdef void common_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """Writes count when they are a field's natural access (§4.1.3.1) and the field may change now."""
        cdef bint taken = False
        cdef uint32_t shift
        self.register_lock.acquire()
        if self.resetting:
            pass
        elif size == 1:
            if offset == DEVICE_STATUS:
                self._write_status(<uint32_t>value & 0xFF)
                taken = True
        elif size == 2:
            if offset == CONFIG_VECTOR:
                st16_rlx(&self.config_vector, self._checked_vector(value))
                taken = True
            elif offset == QUEUE_SELECT:
                self.queue_select = <uint16_t>value
                taken = True
            else:
                taken = self._write_queue(offset, size, value)
        elif size == 4:
            if offset == DEVICE_FEATURE_SELECT:
                self.device_select = <uint32_t>value
                taken = True
            elif offset == DRIVER_FEATURE_SELECT:
                self.driver_select = <uint32_t>value
                taken = True
            elif offset == DRIVER_FEATURE:
                if not self.status & STATUS_FEATURES_OK and self.driver_select < 2:
                    shift = 32 * self.driver_select
                    self.accepted &= ~(<uint64_t>0xFFFFFFFF << shift)
                    self.accepted |= <uint64_t><uint32_t>value << shift
                    taken = True
            else:
                taken = self._write_queue(offset, size, value)
        if not taken:
            self.ignored += 1
        self.register_lock.release()

    cdef bint _write_queue(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """A register of the selected queue. All but its vector are frozen once it is enabled or the driver is ready."""
        cdef QueueRegisters *queue
        cdef uint64_t shift
        if self.queue_select >= self.queue_count:
            return False
        queue = &self.registers[self.queue_select]
        if offset == QUEUE_VECTOR and size == 2:
            st16_rlx(&queue.vector, self._checked_vector(value))
            return True
        if queue.enabled or self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET):
            return False
        if offset == QUEUE_SIZE and size == 2:
            value &= 0xFFFF
            if value == 0 or value & (value - 1) or value > (<Queue>self.queue_at[self.queue_select]).max_size:
                return False
            queue.size = <uint16_t>value
        elif offset == QUEUE_ENABLE and size == 2:
            if value & 0xFFFF != 1:
                return False
            self._enable_queue()
        elif QUEUE_DESC <= offset < QUEUE_DEVICE_END and size == 4 and offset & 3 == 0:
            shift = 8 * (offset & 4)
            queue.address[(offset - QUEUE_DESC) >> 3] &= ~(<uint64_t>0xFFFFFFFF << shift)
            queue.address[(offset - QUEUE_DESC) >> 3] |= <uint64_t><uint32_t>value << shift
        else:
            return False
        return True

    cdef void _enable_queue(self) noexcept nogil:
        cdef QueueRegisters *queue = &self.registers[self.queue_select]
        cdef int error = (<Queue>self.queue_at[self.queue_select]).set_up(
            queue.size, queue.address[0], queue.address[1], queue.address[2]
        )
        if error == 0:
            queue.enabled = 1
        else:
            st32_rlx(&self.bad_queue, <uint32_t>error)
            st32_rlx(&self.status, self.status | STATUS_NEEDS_RESET)
            self.vm.mailbox.post(self.slot_in_mailbox, EVENT_BROKEN)

    cdef void _write_status(self, uint32_t value) noexcept nogil:
        """§2.1, §3.1.1. Bits are only ever added, except that 0 resets."""
        cdef uint32_t new = self.status | (value & STATUS_BY_DRIVER)
        cdef uint32_t i
        if value == 0:
            if self.live:
                self.resetting = True
                self.vm.mailbox.post(self.slot_in_mailbox, EVENT_RESET)
            else:
                self._clear()
            return
        if not self.status & STATUS_FEATURES_OK and (
            self.accepted & ~self.offered or not self.accepted >> F_VERSION_1 & 1 or not new & STATUS_DRIVER
        ):
            new &= ~<uint32_t>STATUS_FEATURES_OK
        if not new & STATUS_FEATURES_OK or self.status & STATUS_NEEDS_RESET:
            new &= ~<uint32_t>STATUS_DRIVER_OK | (self.status & STATUS_DRIVER_OK)
        value = new & ~self.status & STATUS_DRIVER_OK
        if value:
            for i in range(self.queue_count):
                (<Queue>self.queue_at[i]).negotiate(self.accepted)
            self.live = True
        st32_rlx(&self.status, new)
        if value:  # after the status: the loop looks there whether the event still holds
            self.vm.mailbox.post(self.slot_in_mailbox, EVENT_ACTIVATE)

    cdef void _clear(self) noexcept nogil:
        """The state after a reset; nobody uses the queues."""
        cdef uint32_t i
        self.isr_lock.acquire()
        self.isr = 0
        self.set_intx(False)
        self.isr_lock.release()
        self.device_select = self.driver_select = 0
        self.accepted = 0
        self.queue_select = 0
        self.config_changed = False
        st16_rlx(&self.config_vector, NO_VECTOR)
        for i in range(self.queue_count):
            (<Queue>self.queue_at[i]).tear_down()
            memset(&self.registers[i], 0, sizeof(QueueRegisters))
            self.registers[i].size = <uint16_t>(<Queue>self.queue_at[i]).max_size
            st16_rlx(&self.registers[i].vector, NO_VECTOR)
        self.live = self.resetting = False
        st32_rlx(&self.status, 0)

    cdef uint16_t _checked_vector(self, uint64_t value) noexcept nogil:
        """§4.1.5.1.2: a vector that does not exist reads back as none."""
        return <uint16_t>value if value & 0xFFFF <= self.queue_count else <uint16_t>NO_VECTOR

    # -- interrupts ----------------------------------------------------------------------------------------------------

    cdef void interrupt(self, uint32_t isr_bit, uint16_t vector) noexcept nogil:
        cdef bint messages = self.msix.enabled()
        if isr_bit == ISR_CONFIG or not messages:
            # One lock for bit and wire: a read of the register between the two would lower a wire just raised.
            self.isr_lock.acquire()
            self.isr |= isr_bit
            self.set_intx(True)
            self.isr_lock.release()
        if messages and vector != NO_VECTOR:
            self.msix.fire(vector)

    cdef uint64_t isr_read(self) noexcept nogil:
        cdef uint32_t value
        self.isr_lock.acquire()
        value = self.isr
        self.isr = 0
        self.set_intx(False)
        self.isr_lock.release()
        return value

    # -- device configuration ------------------------------------------------------------------------------------------

    cdef uint64_t device_read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint64_t value = 0
        if offset >= self.config_length or size > 8:
            return 0
        self.register_lock.acquire()
        if self.config_changed:
            self.config_changed = False
            self.generation += 1
        memcpy(&value, &self.device_config[offset], min(<uint64_t>size, self.config_length - offset))
        self.register_lock.release()
        return value

    cdef void device_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t i
        cdef uint8_t mask
        cdef bint taken = False
        self.register_lock.acquire()
        for i in range(size):
            if not self.resetting and offset < self.config_length and i < self.config_length - offset:
                mask = self.config_mask[offset + i]
                self.device_config[offset + i] &= <uint8_t>(0xFF ^ mask)
                self.device_config[offset + i] |= <uint8_t>(value >> 8 * i) & mask
                taken = taken or mask != 0
        if taken:
            self.vm.mailbox.post(self.slot_in_mailbox, EVENT_CONFIG)
        else:
            self.ignored += 1
        self.register_lock.release()

    # -- PCI configuration space ---------------------------------------------------------------------------------------

    cdef uint32_t read_config(self, uint32_t offset, uint32_t size) noexcept nogil:
        if self._touches_data(offset, size):
            self._access(False)
        return PciFunction.read_config(self, offset, size)

    cdef void write_config(self, uint32_t offset, uint32_t size, uint32_t value) noexcept nogil:
        cdef bint could = self.bus_master()
        PciFunction.write_config(self, offset, size, value)
        if self._touches_data(offset, size):
            self._access(True)
        if not could and self.bus_master():
            self.vm.mailbox.post(self.slot_in_mailbox, EVENT_WAKE)

    cdef bint _touches_data(self, uint32_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t data = self.access_capability + ACCESS_DATA
        return self.access_capability != 0 and offset < data + 4 and data < offset + size

    cdef bint _access(self, bint is_write) noexcept nogil:
        """§4.1.4.9: pci_cfg_data was touched; performs the access that the capability describes, if it is one."""
        cdef uint8_t copy[ACCESS_DATA + 4]
        cdef uint32_t offset = 0
        cdef uint32_t length = 0
        cdef uint32_t data = 0
        cdef uint64_t value
        self.lock.acquire()
        memcpy(copy, &self.config[self.access_capability], sizeof(copy))
        self.lock.release()
        memcpy(&offset, &copy[ACCESS_OFFSET], 4)
        memcpy(&length, &copy[ACCESS_LENGTH], 4)
        memcpy(&data, &copy[ACCESS_DATA], 4)
        if copy[ACCESS_BAR] != REGISTER_BAR or length not in (1, 2, 4) or offset % length or offset >= 4 * PAGE:
            return False
        if is_write:
            self.window.write(offset, length, data)
            return True
        value = self.window.read(offset, length)  # not under the function's lock: the ISR takes it
        self.lock.acquire()
        memcpy(&self.config[self.access_capability + ACCESS_DATA], &value, length)
        self.lock.release()
        return True

    # -- for the device, on the loop -----------------------------------------------------------------------------------

    def finish_reset(self) -> None:
        """The device is drained: the guest sees status 0."""
        self.register_lock.acquire()
        self._clear()
        self.register_lock.release()

    def need_reset(self) -> None:
        """Sets DEVICE_NEEDS_RESET and tells the driver (§2.1.2)."""
        cdef bint tell
        self.register_lock.acquire()
        tell = self.status & STATUS_DRIVER_OK and not self.resetting
        if self.status and not self.resetting:
            st32_rlx(&self.status, self.status | STATUS_NEEDS_RESET)
        self.register_lock.release()
        if tell:
            self.interrupt(ISR_CONFIG, ld16_rlx(&self.config_vector))

    def set_config(self, offset: int, value: bytes) -> None:
        """Changes device configuration and tells a driver that is ready."""
        cdef bint tell
        if offset < 0 or offset + len(value) > self.config_length:
            raise ValueError(f"{self.name}: configuration bytes {offset}, {len(value)} long")
        self.register_lock.acquire()
        for i, byte in enumerate(value):
            self.device_config[offset + i] = byte
        self.config_changed = True
        tell = self.status & STATUS_DRIVER_OK != 0
        self.register_lock.release()
        if tell:
            self.interrupt(ISR_CONFIG, ld16_rlx(&self.config_vector))

    def get_config(self) -> bytes:
        """Device configuration as the guest sees it."""
        return bytes(self.device_config[:self.config_length])

    @property
    def device_status(self) -> int:
        return ld32_rlx(&self.status)

    @property
    def is_resetting(self) -> bool:
        """Whether the guest waits for finish_reset."""
        cdef bint answer
        self.register_lock.acquire()
        answer = self.resetting
        self.register_lock.release()
        return answer

    @property
    def features(self) -> int:
        """What the driver accepted; 0 before FEATURES_OK."""
        return self.accepted if ld32_rlx(&self.status) & STATUS_FEATURES_OK else 0

    @property
    def queue_failure(self) -> str:
        """Why a queue could not be enabled."""
        return _ERRORS[ld32_rlx(&self.bad_queue)]

    def stats(self) -> dict:
        return {"ignored": self.ignored}
