"""The receive filter of a network card: looked up for each frame, changed by the control queue on the same thread."""

from libc.string cimport memcmp, memcpy, memset

cdef enum:
    TAGGED = 0x8100              # IEEE 802.1Q


cdef bint contains(const uint8_t *table, uint32_t count, const uint8_t *address) noexcept nogil:
    cdef uint32_t i
    for i in range(count):
        if memcmp(table + MAC * i, address, MAC) == 0:
            return True
    return False


cdef class ReceiveFilter:
    """Takes everything until the driver says otherwise."""

    def __cinit__(self, mac: bytes) -> None:
        self.reset(mac)

    cdef bint accepts(self, const uint8_t *frame) noexcept nogil:
        cdef uint32_t vlan
        if self.promiscuous:
            return True
        if self.has_vlans and (<uint32_t>frame[12] << 8 | frame[13]) == TAGGED:
            vlan = (<uint32_t>frame[14] << 8 | frame[15]) & 0xFFF
            if not self.vlans[vlan >> 6] >> (vlan & 63) & 1:
                return False
        if frame[0] & 1:
            if frame[0] & frame[1] & frame[2] & frame[3] & frame[4] & frame[5] == 0xFF:
                return not self.no_broadcast
            if self.no_multicast:
                return False
            return self.all_multicast or self.many_multicast or contains(self.multicast, self.multicast_count, frame)
        if self.no_unicast:
            return False
        if self.all_unicast or self.many_unicast or self.is_own(frame):
            return True
        return contains(self.unicast, self.unicast_count, frame)

    cdef bint is_own(self, const uint8_t *address) noexcept nogil:
        return memcmp(self.mac, address, MAC) == 0

    def reset(self, mac: bytes, vlans: bool = False) -> None:
        """To what holds before the driver's first command; with `vlans` tagged frames need one."""
        self.set_mac(mac)
        self.promiscuous = True
        self.all_multicast = self.all_unicast = False
        self.no_multicast = self.no_unicast = self.no_broadcast = False
        self.many_unicast = self.many_multicast = False
        self.has_vlans = vlans
        self.unicast_count = self.multicast_count = 0
        memset(self.vlans, 0, sizeof(self.vlans))

    def set_mac(self, mac: bytes) -> None:
        """Six bytes."""
        cdef const uint8_t[::1] source = mac
        if source.shape[0] != MAC:
            raise ValueError(f"a MAC address of {len(mac)} bytes")
        memcpy(self.mac, &source[0], MAC)

    def set_mode(self, command: int, on: bool) -> bool:
        """One of the commands of class RX, §5.1.6.5.1. False: there is no such command."""
        if command == 0:
            self.promiscuous = on
        elif command == 1:
            self.all_multicast = on
        elif command == 2:
            self.all_unicast = on
        elif command == 3:
            self.no_multicast = on
        elif command == 4:
            self.no_unicast = on
        elif command == 5:
            self.no_broadcast = on
        else:
            return False
        return True

    def set_tables(self, unicast: bytes, multicast: bytes) -> None:
        """Addresses after each other. Of a kind with too many all are taken, as §5.1.6.5.2 asks."""
        self.unicast_count = self._set_table(self.unicast, unicast)
        self.multicast_count = self._set_table(self.multicast, multicast)
        self.many_unicast = len(unicast) > MAX_TABLE * MAC
        self.many_multicast = len(multicast) > MAX_TABLE * MAC

    cdef uint32_t _set_table(self, uint8_t *table, bytes addresses) noexcept:
        cdef uint32_t count = <uint32_t>(len(addresses) // MAC)
        if count > MAX_TABLE:
            return 0
        memcpy(table, <const uint8_t *>addresses, count * MAC)
        return count

    def set_vlan(self, vlan: int, on: bool) -> None:
        """Below 4096."""
        cdef uint32_t at = <uint32_t>vlan & 0xFFF
        if on:
            self.vlans[at >> 6] |= <uint64_t>1 << (at & 63)
        else:
            self.vlans[at >> 6] &= ~(<uint64_t>1 << (at & 63))
