from collections.abc import Callable

from propolis._interrupts import Doorbell
from propolis._vmm import Vm
from propolis.devices.pci._function import PciFunction
from propolis.devices.virtio._queue import Notifier, Queue
from propolis.devices.virtio._registers import CommonConfig

class PciNotifier(Notifier):
    def __init__(self, owner: VirtioPci) -> None: ...

class VirtioPci(PciFunction):
    @property
    def queues(self) -> list[Queue]: ...
    @property
    def doorbells(self) -> list[Doorbell]: ...
    @property
    def common(self) -> CommonConfig: ...
    def __init__(
        self,
        vm: Vm,
        name: str,
        *,
        type_id: int,
        class_code: int,
        subsystem: int,
        features: int,
        config: bytes,
        queue_sizes: list[int],
        on_event: Callable[[int], object],
        config_mask: bytes = b"",
    ) -> None: ...
    def need_reset(self) -> None: ...
    def set_config(self, offset: int, value: bytes) -> None: ...
    def stats(self) -> dict[str, int]: ...
