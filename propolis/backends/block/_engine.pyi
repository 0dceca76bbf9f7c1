from collections.abc import Sequence

from typing_extensions import Buffer

OPERATIONS: dict[str, int]

class Engine:
    def fileno(self) -> int: ...
    def start(self, operation: Operation) -> None: ...
    def finished(self) -> list[Operation]: ...
    @property
    def pending_count(self) -> int: ...
    def close(self) -> bool: ...

class Operation:
    def __init__(
        self,
        name: str,
        offset: int = 0,
        buffers: Sequence[Buffer] = (),
        length: int = 0,
        unmap: bool = False,
        durable: bool = False,
    ) -> None: ...
    @property
    def error(self) -> int: ...
    @property
    def message(self) -> str: ...
