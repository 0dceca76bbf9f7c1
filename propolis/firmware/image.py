"""A kernel or initrd file: bounded reads from it, and errors that name the file and the field."""

import io
from typing import Protocol

from propolis.errors import ImageError
from propolis.firmware.layout import KIB, MIB
from propolis.firmware.memory import Memory


class BinaryFile(Protocol):
    """What `open(path, "rb")` returns, buffered or not; its `name` is used where it is a string."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class ImageFile:
    """An open file with its size taken once; the loaders check everything against that size before they read.

    A process that may not open paths can still give the file its name: `open(path, "rb", opener=lambda *_: fd)`.
    """

    __slots__ = ("_file", "kind", "name", "size")

    def __init__(self, kind: str, file: BinaryFile) -> None:
        name: object = getattr(file, "name", None)
        self.kind = kind
        self.name = f"'{name}'" if isinstance(name, str) and name.isprintable() else repr(name)
        self._file = file
        try:
            self.size = file.seek(0, io.SEEK_END)
        except OSError as error:
            raise self.error("size", _reason(error)) from error
        if not self.size:
            raise self.error("size", "the file is empty")

    def error(self, field: str, problem: str) -> ImageError:
        return ImageError(f"{self.kind} {self.name}: {field}: {problem}")

    def ends(self) -> str:
        """The half-sentence of most errors here."""
        return f"but the file ends after {size_text(self.size)}"

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset`; fewer where the file ends. For headers, so `length` is small."""
        data = bytearray(min(length, max(self.size - offset, 0)))
        if data:
            self._fill("header", memoryview(data), offset)
        return bytes(data)

    def load(self, field: str, memory: Memory, gpa: int, offset: int, length: int) -> None:
        """Reads `length` bytes at `offset` straight into guest memory at `gpa`."""
        if offset + length > self.size:
            raise self.error(field, f"{size_text(length)} at offset {offset:#x}, {self.ends()}")
        if length:
            with memory.view(gpa, length) as view:
                self._fill(field, view, offset)

    def _fill(self, field: str, view: memoryview, offset: int) -> None:
        done = 0
        try:
            self._file.seek(offset)
            while done < len(view):  # one read returns at most 2 GiB on Linux, and less from some file systems
                with view[done:] as rest:
                    count = self._file.readinto(rest)
                if not count:
                    raise self.error(field, f"the file ended early, at {offset + done:#x}: it changed while being read")
                done += count
        except OSError as error:
            raise self.error(field, f"read at {offset + done:#x}: {_reason(error)}") from error


def size_text(size: int) -> str:
    """A size for people: exact in bytes where small, otherwise in the unit that keeps it short."""
    if size < 10 * KIB:
        return f"{size} bytes"
    if size < 10 * MIB:
        return f"{size // KIB} KiB"
    return f"{size // MIB} MiB"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
