"""Telling kernels apart, and errors of the files themselves."""

import gzip
import io
import os
from pathlib import Path

import pytest

from propolis.errors import ImageError
from propolis.firmware import acpi, boot, layout
from propolis.firmware.board import Board
from tests.unit.firmware.conftest import RAM_SIZE
from tests.unit.firmware.images import File, Ram, bzimage, elf


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "size: the file is empty"),
        (b"M", "magic: neither a bzImage nor an ELF file in its 1 bytes"),
        (b"MZ" + bytes(100_000), "magic: neither a bzImage nor an ELF file"),
        (gzip.compress(bzimage()), "magic: gzip-compressed"),
        (b"\xfd7zXZ\0" + bytes(100), "magic: xz-compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(100), "magic: zstd-compressed"),
        (b"\x02\x21\x4c\x18" + bytes(100), "magic: lz4-compressed"),
    ],
)
def test_other_files_are_refused(ram: Ram, data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=f"^kernel '/x/kernel': {message}"):
        boot.load(ram, RAM_SIZE, File(data))


@pytest.mark.parametrize(("image", "protocol"), [(bzimage(), "linux64"), (elf(), "pvh")])
def test_real_files_buffered_and_raw(ram: Ram, tmp_path: Path, image: bytes, protocol: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image)
    with path.open("rb") as file:
        assert boot.load(ram, RAM_SIZE, file).protocol == protocol
    with path.open("rb", buffering=0) as raw:
        assert boot.load(ram, RAM_SIZE, raw).protocol == protocol


def test_descriptor_without_a_path_keeps_its_name(ram: Ram, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"nothing")
    descriptor = os.open(tmp_path / "other", os.O_RDONLY)
    with open("/x/given", "rb", opener=lambda *_: descriptor) as file, pytest.raises(ImageError, match="'/x/given'"):
        boot.load(ram, RAM_SIZE, file)


def test_control_characters_in_a_name_stay_out_of_the_line(ram: Ram) -> None:
    with pytest.raises(ImageError) as caught:
        boot.load(ram, RAM_SIZE, File(b"", "/x/a\nb\x1b[31m"))
    assert str(caught.value).isprintable()


def test_pipe_is_refused(ram: Ram) -> None:
    read, write = os.pipe()
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as file, pytest.raises(ImageError, match=r"kernel .*: size: "):
        boot.load(ram, RAM_SIZE, file)


class Shrinking(File):
    """A file that is cut while it is being read."""

    def readinto(self, buffer: object, /) -> int:
        self.truncate(700)
        return super().readinto(buffer)  # type: ignore[arg-type]  # whatever the loader passes


class Failing(File):
    """A file on a broken disk: its headers can be read, its code cannot."""

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if offset == 1024:
            raise OSError(5, "Input/output error")
        return super().seek(offset, whence)


class Trickling(File):
    """A file system that returns a few bytes at a time."""

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # narrower, as the loaders use it
        return super().readinto(buffer[:100])


def test_file_that_shrinks(ram: Ram) -> None:
    with pytest.raises(ImageError, match="syssize: the file ended early"):
        boot.load(ram, RAM_SIZE, Shrinking(bzimage()))


def test_file_that_cannot_be_read(ram: Ram) -> None:
    with pytest.raises(ImageError, match="syssize: read at 0x400: Input/output error"):
        boot.load(ram, RAM_SIZE, Failing(bzimage()))


def test_short_reads_are_continued(ram: Ram) -> None:
    entry = boot.load(ram, RAM_SIZE, Trickling(bzimage()))
    assert ram.read(entry.kernel.base, 2048) == bzimage()[1024:]


def test_tables_are_written_and_announced(ram: Ram) -> None:
    tables = acpi.build(Board(cpus=2, windows=layout.device_windows(RAM_SIZE, 40)))
    boot.load(ram, RAM_SIZE, File(bzimage()), tables=tables)
    assert ram.number(layout.ZERO_PAGE + 0x70, "Q") == tables.rsdp
    for gpa, content in tables.pieces:
        assert ram.read(gpa, len(content)) == content


def test_loading_again_gives_the_same(ram: Ram) -> None:
    """A guest that reboots has overwritten everything."""
    tables = acpi.build(Board(cpus=2, windows=layout.device_windows(RAM_SIZE, 40)))

    def load(image: bytes) -> tuple[object, bytes]:
        entry = boot.load(ram, RAM_SIZE, File(image), initrd=File(b"i" * 99), cmdline="c", tables=tables)
        last = layout.CMDLINE.base + 2
        return entry, ram.read(layout.GDT, 0x9000) + ram.read(layout.CMDLINE.base, 2) + ram.read(last, 0)

    for image in (bzimage(), elf()):
        ram.write(0, bytes(RAM_SIZE))
        first = load(image)
        ram.write(0, b"\xa5" * RAM_SIZE)
        ram.write(layout.PVH_START_INFO, bytes(0x1000))
        ram.write(layout.GDT, bytes(0x1000))
        if image[:4] == b"\x7fELF":  # the other protocol's pages are nobody's then
            ram.write(layout.ZERO_PAGE, bytes(0x1000))
            ram.write(layout.PML4, bytes(0x6000))
        assert load(image) == first
