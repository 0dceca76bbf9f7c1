"""A bootrom: firmware in a ROM whose last byte is the last one below 4 GiB, where processors begin."""

from propolis._memory import GuestMemory
from propolis.firmware.image import BinaryFile, ImageFile, size_text
from propolis.firmware.layout import BOOTROM_MAX, HIGHMEM_BASE, PAGE_SIZE, Range


def load(memory: GuestMemory, file: BinaryFile) -> Range:
    """Adds the ROM to guest memory before that is mapped; where it lies. Raises ImageError."""
    image = ImageFile("bootrom", file)
    if image.size % PAGE_SIZE or image.size > BOOTROM_MAX:
        limit = size_text(BOOTROM_MAX)
        raise image.error("size", f"{image.size} bytes, expected whole pages of 4 KiB and at most {limit}")
    place = Range(HIGHMEM_BASE - image.size, image.size)
    memory.add(place.base, place.size, read_only=True)
    image.load("content", memory, place.base, 0, place.size)
    return place
