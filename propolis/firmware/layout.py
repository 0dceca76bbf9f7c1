"""Guest-physical layout: RAM, device windows, and where direct boot puts what it hands to the kernel.

Low RAM runs from 0 to at most 3 GiB, the rest continues at 4 GiB; between them lie the 32-bit PCI window, the
range kept for ECAM and the interrupt controllers.
"""

from msgspec import Struct

from propolis.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

PAGE_SIZE = 4 * KIB


class Range(Struct, frozen=True):
    """A guest-physical range; `end` is the first address after it."""

    base: int
    size: int

    @property
    def end(self) -> int:
        return self.base + self.size


# RAM
LOWMEM_MAX = 3 * GIB
HIGHMEM_BASE = 4 * GIB
EBDA = Range(0x9_FC00, 0x400)  # kept free of RAM as on every PC, although no BIOS writes one
LEGACY_HOLE = Range(0xA_0000, 0x6_0000)  # VGA memory and option ROMs: an OS looks for neither RAM nor devices there
BIOS_SEGMENT = Range(0xF_0000, 0x1_0000)
KERNEL_MIN = 1 * MIB

# Devices
MMIO32 = Range(0xC000_0000, 512 * MIB)
ECAM = Range(0xE000_0000, 256 * MIB)  # kept for 256 buses; nothing decodes it while only mechanism 1 exists
IOAPIC = Range(0xFEC0_0000, PAGE_SIZE)
LAPIC = Range(0xFEE0_0000, PAGE_SIZE)
BOOTROM_MAX = 16 * MIB  # below 4 GiB; what lies below that belongs to interrupt controllers and to KVM

MMIO64_ALIGN = 1 * GIB
MMIO64_MAX = 256 * GIB
HYPERTRANSPORT = Range(0xFD_0000_0000, 12 * GIB)  # AMD processors without 1 TiB support fault on it, guest or not
PHYS_BITS_MIN = 36
PHYS_BITS_MAX = 52

# Direct boot. All of it lies in the first 640 KiB, below any kernel, and is dead once the kernel has read it.
BOOT_STACK_TOP = 0x6000  # grows down to 0x1000; Linux brings its own stack, smaller kernels may not
GDT = 0x6000
ZERO_PAGE = 0x7000
PVH_START_INFO = 0x8000
PML4 = 0x9000
PDPT = 0xA000
PAGE_DIRECTORIES = 0xB000  # four of them, one for each GiB
CMDLINE = Range(0x2_0000, 64 * KIB)  # with the terminating NUL

# The RSDP is found here by a scan as well (ACPI 6.5 §5.2.5.1: 0xE0000 to 0xFFFFF on a 16-byte boundary).
ACPI_TABLES = Range(0xF_0000, 56 * KIB)
SMBIOS_TABLES = Range(0xF_E000, 8 * KIB)  # found by a scan of the segment too (DSP0134 §5.2)


def align_up(value: int, alignment: int) -> int:
    return (value + alignment - 1) & -alignment


def align_down(value: int, alignment: int) -> int:
    return value & -alignment


def ram_ranges(memory_size: int) -> tuple[Range, ...]:
    """The RAM of a guest with `memory_size` bytes: one range, or two when it does not all fit below 3 GiB."""
    if memory_size < KERNEL_MIN or memory_size % PAGE_SIZE:
        raise ConfigError(f"memory: {memory_size} bytes, but it must be at least 1 MiB and whole pages of 4 KiB")
    low = Range(0, min(memory_size, LOWMEM_MAX))
    if low.size == memory_size:
        return (low,)
    return low, Range(HIGHMEM_BASE, memory_size - low.size)


def mmio64_window(memory_size: int, phys_bits: int) -> Range:
    """The 64-bit PCI window: from the first whole GiB after RAM, at most 256 GiB, within the guest's address width.

    The width must be the one the guest's CPUID leaf 0x80000008 gives: a BAR above it cannot be mapped.
    """
    if not PHYS_BITS_MIN <= phys_bits <= PHYS_BITS_MAX:
        raise ConfigError(f"physical address width: {phys_bits} bits, expected {PHYS_BITS_MIN} to {PHYS_BITS_MAX}")
    base = align_up(max(ram_ranges(memory_size)[-1].end, HIGHMEM_BASE), MMIO64_ALIGN)
    end = min(base + MMIO64_MAX, 1 << phys_bits)
    if base < HYPERTRANSPORT.base < end:
        end = HYPERTRANSPORT.base
    if end - base < MMIO64_ALIGN:
        raise ConfigError(
            f"memory: {memory_size} bytes leave no room for the 64-bit PCI window within {phys_bits} address bits"
        )
    return Range(base, end - base)


class DeviceWindows(Struct, frozen=True):
    """Where PCI devices may have their memory, as the operating system is told."""

    mmio32: Range
    mmio64: Range


def device_windows(memory_size: int, phys_bits: int) -> DeviceWindows:
    """Those in which the VMM itself places devices, under direct boot."""
    return DeviceWindows(MMIO32, mmio64_window(memory_size, phys_bits))


def firmware_windows(memory_size: int, phys_bits: int) -> DeviceWindows:
    """Those in which firmware may have placed them: it avoids RAM and the interrupt controllers, and no more."""
    low = ram_ranges(memory_size)[0]
    high = mmio64_window(memory_size, phys_bits)
    return DeviceWindows(Range(low.end, IOAPIC.base - low.end), Range(high.base, (1 << phys_bits) - high.base))
