"""Configuration mechanism 1 (PCI 3.0 §3.2.2.3.2): the address latch and the data window at 0xCF8 to 0xCFF."""

from propolis._atomic cimport ld32_rlx, ldptr_acq, st32_rlx, stptr_rel

cdef enum:
    ADDRESS_ENABLE = 0x80000000
    ADDRESS_BUS = 0x00FF0000
    ADDRESS_KEPT = 0x80FFFFFC  # the other bits are reserved and read 0


cdef class ConfigPorts(Region):
    def __init__(self, Region reset_control=None) -> None:
        self.name = "pci configuration"
        self.width = 4
        self.owned = []
        self.reset_control = reset_control
        self.has_reset_control = reset_control is not None

    def install(self, slot: int, number: int, PciFunction function=None) -> None:
        """Puts a function, or nothing, at a device and function number."""
        cdef uint32_t index = slot << 3 | number
        if not (0 <= slot < 32 and 0 <= number < 8):
            raise ValueError(f"no PCI device {slot}.{number}")
        if function is not None:
            self.owned.append(function)  # for good: a vCPU may be inside it when it leaves
        stptr_rel(&self.functions[index], <void *>function if function is not None else NULL)  # pairs with _data

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        if offset == 0 and size == 4:
            return ld32_rlx(&self.address)
        if offset == 1 and size == 1 and self.has_reset_control:
            return self.reset_control.read(0, 1)
        return self._data(offset, size, False, ~<uint64_t>0)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        if offset == 0 and size == 4:
            st32_rlx(&self.address, <uint32_t>value & ADDRESS_KEPT)
        elif offset == 1 and size == 1 and self.has_reset_control:
            self.reset_control.write(0, 1, value)
        else:
            self._data(offset, size, True, value)

    cdef uint64_t _data(self, uint64_t offset, uint32_t size, bint is_write, uint64_t value) noexcept nogil:
        """An access to the data ports; bytes of it that lie below them are not answered."""
        cdef uint32_t address = ld32_rlx(&self.address)
        cdef uint32_t below = <uint32_t>(4 - offset) if offset < 4 else 0
        cdef uint32_t where
        cdef void *function
        if below >= size or not address & ADDRESS_ENABLE or address & ADDRESS_BUS:
            return ~<uint64_t>0
        function = ldptr_acq(&self.functions[address >> 8 & 0xFF])  # pairs with install
        if function == NULL:
            return ~<uint64_t>0
        where = (address & 0xFC) + <uint32_t>(offset + below - 4)
        size -= below
        if is_write:
            (<PciFunction>function).write_config(where, size, <uint32_t>(value >> 8 * below))
            return 0
        value = (<PciFunction>function).read_config(where, size)
        return value << 8 * below | ((<uint64_t>1 << 8 * below) - 1)

    def reset(self) -> None:
        self.address = 0
