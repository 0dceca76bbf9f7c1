"""Direct boot: tells what kind of kernel it was given, loads it with its companions, says how to enter it."""

from propolis.firmware import elf, linux, pvh
from propolis.firmware.acpi import Tables
from propolis.firmware.entry import Entry
from propolis.firmware.image import BinaryFile, ImageFile, size_text
from propolis.firmware.memory import Memory

_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x02\x21\x4c\x18", "lz4"),
)


def load(
    memory: Memory,
    memory_size: int,
    kernel: BinaryFile,
    *,
    initrd: BinaryFile | None = None,
    cmdline: str = "",
    tables: Tables | None = None,
) -> Entry:
    """Loads everything into `memory` and returns how the boot processor starts.

    May be called again on the same memory for a reboot: it relies on nothing that the guest may have left there.
    """
    kernel_file = ImageFile("kernel", kernel)
    initrd_file = ImageFile("initrd", initrd) if initrd is not None else None
    head = kernel_file.read(0, linux.HEADER_MAX_END)
    for magic, name in _COMPRESSED:
        if head.startswith(magic):
            raise kernel_file.error("magic", f"{name}-compressed, expected a bzImage or an ELF file as it is")
    if head.startswith(elf.MAGIC):
        load_kernel = pvh.load
    elif head[0x1FE:0x200] == b"\x55\xaa" or head[0x202:0x206] == b"HdrS":
        load_kernel = linux.load
    else:
        raise kernel_file.error("magic", f"neither a bzImage nor an ELF file in its {size_text(kernel_file.size)}")
    loaded = load_kernel(
        memory, memory_size, kernel_file, initrd_file, cmdline, tables.rsdp if tables is not None else 0
    )
    if tables is not None:
        for gpa, content in tables.pieces:
            memory.write(gpa, content)
    return loaded
