from propolis._bus import Region
from propolis._vmm import Vm

WRITTEN: int
BLOCK: int

class Flash(Region):
    def __init__(self, vm: Vm, slot: int, base: int, length: int, fd: int) -> None: ...
    def reset(self) -> None: ...
    def failures(self) -> int: ...
