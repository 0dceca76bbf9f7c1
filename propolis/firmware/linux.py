"""Linux bzImage by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst and zero-page.rst)."""

import struct

from msgspec import Struct

from propolis.firmware import e820, entry, layout
from propolis.firmware.entry import Entry
from propolis.firmware.image import ImageFile, size_text
from propolis.firmware.layout import Range
from propolis.firmware.memory import Memory
from propolis.firmware.payload import load_cmdline, load_initrd

HEADER_START = 0x1F1
HEADER_MAX_END = 0x282  # the jump over the header reaches at most 0x202 + 127, one byte more never matters
BOOT_FLAG = 0xAA55
MAGIC = 0x53726448  # "HdrS"
VERSION_MIN = 0x020C  # 2.12 brought xloadflags, without which the 64-bit entry point is a guess

LOADED_HIGH = 1 << 0  # loadflags
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1

SECTOR = 512
PARAGRAPH = 16
ENTRY_64 = 0x200  # from the start of the protected-mode code

# "The Real-Mode Kernel Header": the fields that are read, in file order
_FIELDS = (
    ("setup_sects", 0x1F1, "B"),
    ("syssize", 0x1F4, "I"),
    ("boot_flag", 0x1FE, "H"),
    ("jump", 0x200, "H"),
    ("header", 0x202, "I"),
    ("version", 0x206, "H"),
    ("loadflags", 0x211, "B"),
    ("initrd_addr_max", 0x22C, "I"),
    ("kernel_alignment", 0x230, "I"),
    ("relocatable_kernel", 0x234, "B"),
    ("xloadflags", 0x236, "H"),
    ("cmdline_size", 0x238, "I"),
    ("pref_address", 0x258, "Q"),
    ("init_size", 0x260, "I"),
)
_FIELDS_END = 0x264

# Written into the zero page: the header's own fields, then those of struct boot_params (zero-page.rst)
_VID_MODE = 0x1FA
_TYPE_OF_LOADER = 0x210
_CODE32_START = 0x214
_RAMDISK_IMAGE = 0x218
_RAMDISK_SIZE = 0x21C
_CMD_LINE_PTR = 0x228
_SETUP_DATA = 0x250
_ACPI_RSDP_ADDR = 0x070
_EXT_RAMDISK_IMAGE = 0x0C0
_EXT_RAMDISK_SIZE = 0x0C4
_E820_ENTRIES = 0x1E8
_E820_TABLE = 0x2D0

_VID_MODE_NORMAL = 0xFFFF
_LOADER_UNDEFINED = 0xFF


class SetupHeader(Struct, frozen=True, kw_only=True):
    """The header's fields under the names the protocol gives them."""

    setup_sects: int
    syssize: int
    boot_flag: int
    jump: int
    header: int
    version: int
    loadflags: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable_kernel: int
    xloadflags: int
    cmdline_size: int
    pref_address: int
    init_size: int

    @property
    def code_offset(self) -> int:
        """Where the protected-mode code starts in the file: after the boot sector and the setup sectors."""
        return ((self.setup_sects or 4) + 1) * SECTOR

    @property
    def code_size(self) -> int:
        return self.syssize * PARAGRAPH

    @property
    def end(self) -> int:
        """Where the header ends: at the target of the jump over it."""
        return 0x202 + (self.jump >> 8)

    @property
    def can_be_above_4g(self) -> bool:
        return bool(self.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G)


def load(
    memory: Memory, memory_size: int, kernel: ImageFile, initrd: ImageFile | None, cmdline: str, rsdp: int
) -> Entry:
    """Loads `kernel` and what belongs to it; the vCPU then starts at the returned entry."""
    raw = kernel.read(0, HEADER_MAX_END)
    header = parse(kernel, raw)
    low, *high = layout.ram_ranges(memory_size)
    runtime = _place(kernel, header, low)

    load_cmdline(
        memory, cmdline, min(header.cmdline_size, layout.CMDLINE.size - 1), f"cmdline_size of kernel {kernel.name}"
    )
    kernel.load("syssize", memory, runtime.base, header.code_offset, header.code_size)
    ramdisk = None
    if initrd is not None:
        ramdisk = load_initrd(memory, initrd, _initrd_rooms(header, runtime, low, high))
    memory.write(layout.ZERO_PAGE, _zero_page(raw, header, runtime, ramdisk, memory_size, rsdp))
    registers = entry.long_mode(memory, rip=runtime.base + ENTRY_64, rsi=layout.ZERO_PAGE)
    return Entry(registers=registers, protocol="linux64", kernel=runtime, initrd=ramdisk)


def parse(kernel: ImageFile, raw: bytes) -> SetupHeader:
    """Reads the setup header out of the file's first bytes and checks all that does not depend on the machine."""
    values: dict[str, int] = {}
    for name, offset, code in _FIELDS:
        if offset + struct.calcsize(code) > len(raw):
            raise kernel.error(name, f"at offset {offset:#x}, {kernel.ends()}")
        (values[name],) = struct.unpack_from(f"<{code}", raw, offset)
    header = SetupHeader(**values)

    if header.boot_flag != BOOT_FLAG:
        raise kernel.error("boot_flag", f"{header.boot_flag:#06x}, expected {BOOT_FLAG:#06x}")
    if header.header != MAGIC:
        raise kernel.error("header", f"{header.header:#010x}, expected {MAGIC:#010x} ('HdrS')")
    if header.version < VERSION_MIN:
        raise kernel.error("version", f"boot protocol {_version(header.version)}, needs at least 2.12 (Linux 3.8)")
    if header.jump & 0xFF != 0xEB or not _FIELDS_END <= header.end < HEADER_MAX_END:
        raise kernel.error("jump", f"{header.jump:#06x} is not a short jump to the end of a 2.12 header")
    if header.end > len(raw):
        raise kernel.error("jump", f"the header reaches to {header.end:#x}, {kernel.ends()}")
    if not header.loadflags & LOADED_HIGH:
        raise kernel.error("loadflags", "LOADED_HIGH is clear: a zImage, only bzImage can be booted")
    if not header.xloadflags & XLF_KERNEL_64:
        raise kernel.error("xloadflags", "XLF_KERNEL_64 is clear: the kernel has no 64-bit entry point")
    if header.code_offset >= kernel.size:
        raise kernel.error("setup_sects", f"{header.setup_sects or 4} sectors, {kernel.ends()}")
    if header.code_size <= ENTRY_64:
        raise kernel.error("syssize", f"{header.code_size} bytes of code end before the 64-bit entry point at 0x200")
    if header.code_offset + header.code_size > kernel.size:
        raise kernel.error(
            "syssize", f"{size_text(header.code_size)} of code at offset {header.code_offset:#x}, {kernel.ends()}"
        )
    if header.init_size < header.code_size:
        raise kernel.error(
            "init_size", f"{header.init_size} bytes, less than the {header.code_size} bytes of code (syssize)"
        )
    if header.kernel_alignment & (header.kernel_alignment - 1) or not header.kernel_alignment:
        raise kernel.error("kernel_alignment", f"{header.kernel_alignment:#x} is not a power of two")
    return header


def setup_size(kernel: ImageFile) -> int:
    """Bytes of a bzImage that lie before its protected-mode code. Raises ImageError."""
    return parse(kernel, kernel.read(0, HEADER_MAX_END)).code_offset


def _version(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF:02}"


def _place(kernel: ImageFile, header: SetupHeader, low: Range) -> Range:
    """Where the kernel runs, with all the memory it uses before it can read its memory map.

    Always at pref_address: a kernel loaded lower moves itself up there, so a lower place would save nothing.
    """
    base = header.pref_address or layout.KERNEL_MIN
    if header.relocatable_kernel:
        base = layout.align_up(base, header.kernel_alignment)
    if base < layout.KERNEL_MIN:
        raise kernel.error("pref_address", f"{base:#x} lies below 1 MiB")
    if base >= low.end:
        raise kernel.error("pref_address", f"{base:#x}, but memory ends at {low.end:#x}")
    if base + header.init_size > low.end:
        raise kernel.error(
            "init_size",
            f"{size_text(header.init_size)} from {base:#x}, but memory ends at {low.end:#x}",
        )
    return Range(base, header.init_size)


def _initrd_rooms(header: SetupHeader, runtime: Range, low: Range, high: list[Range]) -> list[Range]:
    """Where an initrd may lie, best first. A kernel that can be above 4 GiB has no use for initrd_addr_max."""
    limit = low.end if header.can_be_above_4g else min(low.end, header.initrd_addr_max + 1)
    below = Range(runtime.end, max(limit - runtime.end, 0))
    return [below, *high] if header.can_be_above_4g else [below]


def _zero_page(
    raw: bytes, header: SetupHeader, runtime: Range, ramdisk: Range | None, memory_size: int, rsdp: int
) -> bytes:
    """struct boot_params: all zero but for the header and what a loader has to tell."""
    page = bytearray(layout.PAGE_SIZE)
    page[HEADER_START : header.end] = raw[HEADER_START : header.end]
    put = struct.pack_into
    put("<H", page, _VID_MODE, _VID_MODE_NORMAL)
    put("<B", page, _TYPE_OF_LOADER, _LOADER_UNDEFINED)
    put("<I", page, _CODE32_START, runtime.base)
    put("<I", page, _CMD_LINE_PTR, layout.CMDLINE.base)
    put("<Q", page, _SETUP_DATA, 0)  # a list in guest memory; the file's value could only be garbage
    base, size = (ramdisk.base, ramdisk.size) if ramdisk else (0, 0)
    put("<I", page, _RAMDISK_IMAGE, base & 0xFFFF_FFFF)
    put("<I", page, _RAMDISK_SIZE, size & 0xFFFF_FFFF)
    put("<I", page, _EXT_RAMDISK_IMAGE, base >> 32)
    put("<I", page, _EXT_RAMDISK_SIZE, size >> 32)
    put("<Q", page, _ACPI_RSDP_ADDR, rsdp)
    entries = e820.build(memory_size)
    table = e820.encode(entries)
    put("<B", page, _E820_ENTRIES, len(entries))
    page[_E820_TABLE : _E820_TABLE + len(table)] = table
    return bytes(page)
