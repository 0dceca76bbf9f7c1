"""A virtio device as a PCI function (virtio 1.2 §4.1): BARs, capabilities, interrupts, PCI configuration access."""

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from propolis._atomic cimport ld16_rlx
from propolis._bus cimport Window
from propolis._interrupts cimport Doorbell
from propolis._vmm cimport Vm
from propolis.devices.pci._msix cimport NO_VECTOR
from propolis.devices.virtio._queue cimport Queue
from propolis.devices.virtio._registers cimport (
    COMMON_LENGTH,
    EVENT_WAKE,
    ISR_CONFIG,
    ISR_QUEUE,
    CommonConfig,
    DeviceConfig,
    IsrStatus,
)

cdef enum:
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


cdef class PciNotifier(Notifier):
    def __init__(self, VirtioPci owner) -> None:
        self.owner = owner

    cdef void used(self, uint32_t queue) noexcept nogil:
        self.owner.interrupt(ISR_QUEUE, ld16_rlx(&self.owner.common.registers[queue].vector))


@cython.no_gc_clear
cdef class VirtioPci(PciFunction):
    """One virtio device on the PCI bus. `on_event(bits)` runs on the loop."""

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
        super().__init__(
            vm, name, vendor=VENDOR, device=DEVICE_BASE + type_id, subsystem_vendor=SUBSYSTEM_VENDOR,
            subsystem=subsystem, class_code=class_code, revision=1,
        )
        notifier = PciNotifier(self)
        self.queues = [Queue(vm.memory, notifier, i, size) for i, size in enumerate(queue_sizes)]
        self.doorbells = [Doorbell(vm, f"{name} queue {i}") for i in range(len(queue_sizes))]
        self.isr = IsrStatus(self)
        self.common = CommonConfig(vm, self.isr, vm.mailbox.register(on_event), self.queues, features)
        self.device_config = DeviceConfig(self.common, config, config_mask)
        self._lay_out()

    def _lay_out(self) -> None:
        """BARs and capabilities."""
        self.window = Window(f"{self.name} registers")
        self.window.add(self.common, 0, PAGE)
        self.window.add(self.device_config, DEVICE_PAGE, PAGE)
        self.window.add(self.isr, ISR_PAGE, PAGE)
        for i, doorbell in enumerate(self.doorbells):
            self.window.add(doorbell, NOTIFY_PAGE + NOTIFY_STRIDE * i, NOTIFY_STRIDE)
        self.add_bar(REGISTER_BAR, "mmio32", 4 * PAGE, self.window)
        self.msix_window = Window(f"{self.name} MSI-X")
        msix = self.add_msix(len(self.queues) + 1, MSIX_BAR, 0, MSIX_PBA)
        self.msix_window.add(msix.table, 0, 16 * (len(self.queues) + 1))
        self.msix_window.add(msix.pba, MSIX_PBA, 8)
        self.add_bar(MSIX_BAR, "mmio32", PAGE, self.msix_window)
        self._structure(CFG_COMMON, 0, COMMON_LENGTH)
        self._structure(CFG_NOTIFY, NOTIFY_PAGE, NOTIFY_STRIDE * len(self.queues),
                        NOTIFY_STRIDE.to_bytes(4, "little"))
        self._structure(CFG_ISR, ISR_PAGE, 1)
        if self.device_config.length:
            self._structure(CFG_DEVICE, DEVICE_PAGE, (self.device_config.length + 3) & ~3)
        access = bytes([ACCESS_DATA + 4, CFG_PCI]) + bytes(16)
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 12
        self.access_capability = self.add_capability(CAPABILITY_VENDOR, access, writable)

    def _structure(self, kind: int, offset: int, length: int, extra: bytes = b"") -> None:
        body = bytes([16 + len(extra), kind, REGISTER_BAR, 0, 0, 0])
        body += offset.to_bytes(4, "little") + length.to_bytes(4, "little") + extra
        self.add_capability(CAPABILITY_VENDOR, body)

    cdef void interrupt(self, uint32_t isr_bit, uint16_t vector) noexcept nogil:
        cdef bint messages = self.msix.enabled()
        if isr_bit == ISR_CONFIG or not messages:
            self.isr.put(isr_bit)
        if messages and vector != NO_VECTOR:
            self.msix.fire(vector)

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
            self.vm.mailbox.post(self.common.slot, EVENT_WAKE)

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

    def need_reset(self) -> None:
        """Sets DEVICE_NEEDS_RESET and tells the driver (§2.1.2)."""
        if self.common.need_reset():
            self.interrupt(ISR_CONFIG, ld16_rlx(&self.common.config_vector))

    def set_config(self, offset: int, value: bytes) -> None:
        """Changes device configuration and tells a driver that is ready."""
        if self.device_config.change(offset, value):
            self.interrupt(ISR_CONFIG, ld16_rlx(&self.common.config_vector))

    def stats(self) -> dict:
        return {"ignored": self.common.ignored}
