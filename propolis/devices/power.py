"""What the guest asks of the machine as a whole.

The machine registers one mailbox slot, gives it to every device that may ask, and gets these bits there.
"""

import enum


class PowerEvent(enum.IntFlag):
    """Bits of the machine's mailbox slot; the numbers are those of _power.pxd."""

    RESET = 1  # 0xCF9, port 0x92 or the keyboard controller
    POWER_OFF = 2  # ACPI S5
    PANICKED = 4  # the guest's kernel panicked, and says so by pvpanic
    CRASH_LOADED = 8  # it panicked and runs its crash kernel
