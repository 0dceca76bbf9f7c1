"""What both boot protocols load beside the kernel: the command line and the initrd."""

from propolis.errors import ImageError
from propolis.firmware import layout
from propolis.firmware.image import ImageFile, size_text
from propolis.firmware.layout import Range
from propolis.firmware.memory import Memory


def load_cmdline(memory: Memory, cmdline: str, limit: int, limit_of: str) -> None:
    """Writes the command line with its NUL to its fixed place. `limit` is the kernel's, `limit_of` says whose."""
    try:
        data = cmdline.encode()
    except UnicodeEncodeError as error:
        raise ImageError(f"cmdline: character {error.start} cannot be encoded as UTF-8") from error
    if b"\0" in data:
        raise ImageError(f"cmdline: a NUL byte at {data.index(0)}, which would end it early")
    if len(data) > limit:
        raise ImageError(f"cmdline: {len(data)} bytes, but {limit_of} takes at most {limit}")
    memory.write(layout.CMDLINE.base, data + b"\0")


def load_initrd(memory: Memory, initrd: ImageFile, rooms: list[Range]) -> Range:
    """Loads the initrd at the top of the first of `rooms` that holds it, page-aligned.

    At the top because kernels decompress and allocate upward from their own end.
    """
    for room in rooms:
        base = layout.align_down(room.end - initrd.size, layout.PAGE_SIZE)
        if base >= room.base:
            initrd.load("size", memory, base, 0, initrd.size)
            return Range(base, initrd.size)
    largest = max((room.size for room in rooms), default=0)
    raise initrd.error(
        "size", f"{size_text(initrd.size)}, but beside the kernel only {size_text(max(largest, 0))} are free"
    )
