"""Configuration mechanism 1."""

from libc.stdint cimport uint32_t, uint64_t

from propolis._bus cimport Region
from propolis.devices.pci._function cimport PciFunction

cdef class ConfigPorts(Region):
    """0xCF8 to 0xCFF: configuration mechanism 1, and the reset control register inside it at 0xCF9."""
    cdef uint32_t address                # relaxed: a guest that shares it between vCPUs locks it itself
    cdef void *functions[256]            # borrowed PciFunction by device and function; written by: loop (release)
    cdef list owned
    cdef Region reset_control
    cdef bint has_reset_control

    cdef uint64_t _data(self, uint64_t offset, uint32_t size, bint is_write, uint64_t value) noexcept nogil
