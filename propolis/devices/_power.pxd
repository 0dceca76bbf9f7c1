"""What the guest asks of the machine as a whole: bits of one mailbox slot. propolis/devices/power.py names them."""

cdef enum PowerBits:
    POWER_RESET = 1
    POWER_OFF = 2
    POWER_PANICKED = 4
    POWER_CRASH_LOADED = 8
