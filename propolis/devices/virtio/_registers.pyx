"""The structures of virtio-pci: ISR status, common configuration, device configuration.

What must be answered at once is decided here, on the vCPU thread: feature check, queue addresses, which writes count.
What may come later is an event for the loop: activation and reset. A driver polls the status register after a reset, so
it keeps its old value until the loop has drained the device.
"""

from libc.string cimport memcpy, memset

from propolis._atomic cimport ld32_rlx, st16_rlx, st32_rlx
from propolis._lock cimport Lock
from propolis._vmm cimport Vm
from propolis.devices.pci._function cimport PciFunction
from propolis.devices.pci._msix cimport NO_VECTOR
from propolis.devices.virtio._queue cimport Queue

from propolis.devices.virtio._queue import ERRORS as _ERRORS

cdef enum:
    # §2.1
    STATUS_ACKNOWLEDGE = 1
    STATUS_DRIVER = 2
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


cdef class IsrStatus(Region):
    """§4.1.4.5: which kinds of interrupt are due, for the interrupt pin. Reading clears it and lowers the pin.

    One lock for bits and pin: a read between the two would lower a pin just raised.
    """

    def __init__(self, PciFunction function) -> None:
        self.name = f"{function.name} ISR"
        self.width = 1
        self.function = function
        self.lock = Lock()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return self.take() if offset == 0 else 0

    cdef void put(self, uint32_t bits) noexcept nogil:
        self.lock.acquire()
        self.bits |= bits
        self.function.set_intx(True)
        self.lock.release()

    cdef uint32_t take(self) noexcept nogil:
        cdef uint32_t bits
        self.lock.acquire()
        bits = self.bits
        self.bits = 0
        self.function.set_intx(False)
        self.lock.release()
        return bits


cdef class CommonConfig(Region):
    """§4.1.4.3: status, features and the registers of the queues."""

    def __init__(self, Vm vm, IsrStatus isr, slot: int, queues: list[Queue], features: int) -> None:
        self.name = f"{isr.function.name} common configuration"
        self.width = 4
        self.lock = Lock()
        self.vm = vm
        self.isr = isr
        self.slot = slot
        self.offered = features | <uint64_t>1 << F_VERSION_1
        if not 1 <= len(queues) <= MAX_QUEUES:
            raise ValueError(f"{isr.function.name}: {len(queues)} queues, expected 1 to {MAX_QUEUES}")
        self.queues = queues
        self.queue_count = <uint32_t>len(queues)
        for i, queue in enumerate(queues):
            self.queue_at[i] = <void *>queue
        self._clear()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        """Any part of the structure as it stands now; bytes past its end are 0."""
        cdef uint8_t image[COMMON_LENGTH + 8]
        cdef QueueRegisters *queue
        cdef uint64_t value = 0
        cdef uint32_t word
        cdef uint16_t half
        if offset >= COMMON_LENGTH or size > 8:
            return 0
        memset(image, 0, sizeof(image))
        self.lock.acquire()
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
        self.lock.release()
        memcpy(&value, &image[offset], size)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        """Writes count when they are a field's natural access (§4.1.3.1) and the field may change now."""
        cdef bint taken = False
        cdef uint32_t shift
        self.lock.acquire()
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
        self.lock.release()

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
            self.vm.mailbox.post(self.slot, EVENT_BROKEN)

    cdef void _write_status(self, uint32_t value) noexcept nogil:
        """§2.1, §3.1.1. Bits are only ever added, except that 0 resets."""
        cdef uint32_t new = self.status | (value & STATUS_BY_DRIVER)
        cdef uint32_t i
        if value == 0:
            if self.live:
                self.resetting = True
                self.vm.mailbox.post(self.slot, EVENT_RESET)
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
            self.vm.mailbox.post(self.slot, EVENT_ACTIVATE)

    cdef void _clear(self) noexcept nogil:
        """The state after a reset; nobody uses the queues."""
        cdef uint32_t i
        self.isr.take()
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

    cdef bint need_reset(self) noexcept nogil:
        cdef bint tell
        self.lock.acquire()
        tell = self.status & STATUS_DRIVER_OK and not self.resetting
        if self.status and not self.resetting:
            st32_rlx(&self.status, self.status | STATUS_NEEDS_RESET)
        self.lock.release()
        return tell

    # -- for the device, on the loop -----------------------------------------------------------------------------------

    def finish_reset(self) -> None:
        """The device is drained: the guest sees status 0."""
        self.lock.acquire()
        self._clear()
        self.lock.release()

    @property
    def device_status(self) -> int:
        return ld32_rlx(&self.status)

    @property
    def is_resetting(self) -> bool:
        """Whether the guest waits for the end of a reset."""
        cdef bint answer
        self.lock.acquire()
        answer = self.resetting
        self.lock.release()
        return answer

    @property
    def features(self) -> int:
        """What the driver accepted; 0 before FEATURES_OK."""
        return self.accepted if ld32_rlx(&self.status) & STATUS_FEATURES_OK else 0

    @property
    def queue_failure(self) -> str:
        """Why a queue could not be enabled."""
        return _ERRORS[ld32_rlx(&self.bad_queue)]


cdef class DeviceConfig(Region):
    """§4.1.4.6: what the type of device says of itself."""

    def __init__(self, CommonConfig common, config: bytes, mask: bytes) -> None:
        cdef uint32_t i
        self.name = f"{common.isr.function.name} device configuration"
        self.width = 4
        self.common = common
        if len(config) > CONFIG_SPACE or len(mask) > len(config):
            raise ValueError(f"{self.name}: {len(config)} bytes, {len(mask)} of mask")
        self.length = <uint32_t>len(config)
        for i in range(<uint32_t>len(config)):
            self.data[i] = <uint8_t>config[i]
        for i in range(<uint32_t>len(mask)):
            self.mask[i] = <uint8_t>mask[i]

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint64_t value = 0
        if offset >= self.length or size > 8:
            return 0
        self.common.lock.acquire()
        if self.common.config_changed:
            self.common.config_changed = False
            self.common.generation += 1
        memcpy(&value, &self.data[offset], min(<uint64_t>size, self.length - offset))
        self.common.lock.release()
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t i
        cdef uint8_t mask
        cdef bint taken = False
        self.common.lock.acquire()
        for i in range(size):
            if not self.common.resetting and offset < self.length and i < self.length - offset:
                mask = self.mask[offset + i]
                self.data[offset + i] &= <uint8_t>(0xFF ^ mask)
                self.data[offset + i] |= <uint8_t>(value >> 8 * i) & mask
                taken = taken or mask != 0
        if taken:
            self.common.vm.mailbox.post(self.common.slot, EVENT_CONFIG)
        else:
            self.common.ignored += 1
        self.common.lock.release()

    def change(self, offset: int, value: bytes) -> bool:
        """Changes it for the device. True: the driver is to be told."""
        cdef bint tell
        if offset < 0 or offset + len(value) > self.length:
            raise ValueError(f"{self.name}: bytes {offset}, {len(value)} long")
        self.common.lock.acquire()
        for i, byte in enumerate(value):
            self.data[offset + i] = byte
        self.common.config_changed = True
        tell = self.common.status & STATUS_DRIVER_OK != 0
        self.common.lock.release()
        return tell
