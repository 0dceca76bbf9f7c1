"""What the loaders need of guest memory."""

from typing import Protocol


class Memory(Protocol):
    """Guest RAM by guest-physical address; every method raises GuestMemoryError unless the range is wholly RAM."""

    def write(self, gpa: int, data: bytes, /) -> None: ...

    def read(self, gpa: int, length: int, /) -> bytes: ...

    def view(self, gpa: int, length: int, /) -> memoryview: ...  # writable, to be released before the memory closes
