"""A small FAT12 volume made in memory, the same bytes for the same files.

Microsoft's "FAT: General Overview of On-Disk Format", 1.03. Only a root directory, clusters of one sector, long names.
"""

import codecs
import struct
import zlib

SECTOR = 512
RESERVED_SECTORS = 1
FATS = 2
ROOT_ENTRIES = 16  # one sector of them
ENTRY_BYTES = 32
MAX_CLUSTERS = 4084  # one more, and it is FAT16
MEDIA_FIXED = 0xF8

ATTRIBUTE_VOLUME_ID = 0x08
ATTRIBUTE_ARCHIVE = 0x20
ATTRIBUTE_LONG_NAME = 0x0F
LAST_LONG_ENTRY = 0x40
LONG_NAME_UNITS = 13  # UTF-16 code units of one entry
END_OF_CHAIN = 0xFFF
FIRST_DAY = 0x0021  # 1 January 1980: a volume of the same files is the same volume whenever it is made


def volume(label: str, files: dict[str, bytes]) -> bytes:
    """The volume; a whole number of sectors.

    `label` is up to 11 ASCII characters, upper case. Raises ValueError where the names or the contents have no room.
    """
    clusters = sum(map(_sectors, map(len, files.values())))
    if clusters > MAX_CLUSTERS:
        raise ValueError(f"{clusters * SECTOR} bytes of files: a volume has room for {MAX_CLUSTERS * SECTOR}")
    fat = [0xF00 | MEDIA_FIXED, END_OF_CHAIN]
    root = [_entry(label.encode("ascii").ljust(11), ATTRIBUTE_VOLUME_ID, 0, 0)]
    data = bytearray()
    for number, (name, content) in enumerate(files.items(), 1):
        count = _sectors(len(content))
        first = len(fat) if count else 0
        fat += [*range(first + 1, first + count), END_OF_CHAIN] if count else []
        data += content.ljust(count * SECTOR, b"\0")
        alias = _alias(name, number)
        root += [*_long_name(name, alias), _entry(alias, ATTRIBUTE_ARCHIVE, first, len(content))]
    if len(root) > ROOT_ENTRIES:
        raise ValueError(f"{len(root)} directory entries: a volume has room for {ROOT_ENTRIES}")
    data = data or bytearray(SECTOR)  # none at all would be an odd volume
    table = _packed(fat, len(data) // SECTOR + 2)
    boot = _boot_sector(label, table, bytes(data))
    return boot + table * FATS + b"".join(root).ljust(ROOT_ENTRIES * ENTRY_BYTES, b"\0") + bytes(data)


def _sectors(size: int) -> int:
    return -(-size // SECTOR)


def _boot_sector(label: str, table: bytes, data: bytes) -> bytes:
    """BPB of FAT12 and the extended one that has a serial number and a label."""
    fat_sectors = len(table) // SECTOR
    total = RESERVED_SECTORS + FATS * fat_sectors + ROOT_ENTRIES * ENTRY_BYTES // SECTOR + len(data) // SECTOR
    head = struct.pack(
        "<3s8s HBHBHHBH HHII BBBI11s8s",
        b"\xeb\x3c\x90",
        b"MSWIN4.1",  # what the specification advises, whoever made the volume
        *(SECTOR, 1, RESERVED_SECTORS, FATS, ROOT_ENTRIES, total, MEDIA_FIXED, fat_sectors),
        *(63, 255, 0, 0),  # a geometry that nobody asks for, no hidden sectors
        *(0x80, 0, 0x29, zlib.crc32(data)),
        label.encode("ascii").ljust(11),
        b"FAT12   ",
    )
    return head.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def _packed(fat: list[int], entries: int) -> bytes:
    """Entries of 12 bits, the first in the lowest; `entries` is how many there must be room for."""
    bits = sum(value << 12 * index for index, value in enumerate(fat))
    return bits.to_bytes(_sectors(-(-entries * 3 // 2)) * SECTOR, "little")


def _entry(name: bytes, attributes: int, first: int, size: int) -> bytes:
    return struct.pack("<11sBBBHHHHHHHI", name, attributes, 0, 0, 0, FIRST_DAY, FIRST_DAY, 0, 0, FIRST_DAY, first, size)


def _alias(name: str, number: int) -> bytes:
    """The short name beside a long one: unlike any other, and nobody looks at it."""
    kept = "".join(character for character in name.upper() if character.isascii() and character.isalnum())
    return f"{kept[:6]}~{number}".encode("ascii").ljust(11)


def _long_name(name: str, alias: bytes) -> list[bytes]:
    """The entries before that of the short name, the last part of the name first."""
    check = 0
    for byte in alias:
        check = ((check & 1) << 7 | check >> 1) + byte & 0xFF
    units, _ = codecs.utf_16_le_encode(name)  # by its name the codec would have to be found, which a jail forbids
    count = -(-len(units) // (2 * LONG_NAME_UNITS))
    if len(units) < count * 2 * LONG_NAME_UNITS:
        units = (units + b"\0\0").ljust(count * 2 * LONG_NAME_UNITS, b"\xff")
    entries = []
    for index in range(count):
        part = units[index * 26 : index * 26 + 26]
        order = index + 1 | (LAST_LONG_ENTRY if index == count - 1 else 0)
        entries.append(
            struct.pack("<B10sBBB12sH4s", order, part[:10], ATTRIBUTE_LONG_NAME, 0, check, part[10:22], 0, part[22:])
        )
    return entries[::-1]
