"""A machine without a processor: RAM, a PCI bus, one virtio device in slot 4 and its driver."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from propolis.devices.pci.bus import PciBus
from propolis.devices.virtio.device import VirtioDevice
from propolis.hypervisor._replay import ReplayVm
from tests.driver import Ram, VirtioDriver

RAM = 16 << 20
ROM_BASE = 0xFFFC_0000
HIGH_BASE = 1 << 32
SLOT = 4


class Rig:
    """One device on its bus. `vm.mailbox` is dispatched by the loop, as the machine does it."""

    def __init__(self, device_of: Callable[[ReplayVm], Any]) -> None:
        self.vm = ReplayVm()
        self.vm.memory.add(0, RAM)
        self.vm.memory.add(HIGH_BASE, 1 << 20)
        self.vm.memory.add(ROM_BASE, 0x40000, read_only=True)
        self.bus = PciBus(self.vm)
        self.device = device_of(self.vm)
        self.bus.add(self.device.function, SLOT)
        self.ram = Ram(self.vm, 0x1000, RAM - 0x1000)
        self.driver = VirtioDriver(self.vm, SLOT, self.ram)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.vm.mailbox.fileno(), self.vm.mailbox.dispatch)
        self.device.start(loop)

    async def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self.vm.mailbox.fileno())
        await self.device.halt()
        self.vm.close()
        # pytest keeps what a fixture returned; nothing may keep the machine's descriptors.
        del self.vm, self.bus, self.device, self.driver, self.ram


class Echo(VirtioDevice):
    """A device in Python: gives each request's readable bytes back, backwards, up to the room there is."""

    budget = 64

    def __init__(self, vm: ReplayVm, *, queues: int = 1, queue_size: int = 256) -> None:
        self.heads = 0
        self.activations: list[int] = []
        self.deactivations = 0
        super().__init__(
            vm,
            "echo",
            type_id=42,
            class_code=0xFF0000,
            subsystem=0x40,
            features=0,
            config=bytes(range(20)),
            queue_sizes=[queue_size] * queues,
        )

    def activate(self, features: int) -> None:
        self.activations.append(features)

    def deactivate(self) -> None:
        self.deactivations += 1

    def kick(self, index: int) -> None:
        queue = self.queues[index]
        left = self.budget
        while True:
            queue.hush()
            while left and (buffers := queue.take()) is not None:
                left -= 1
                self.heads += 1
                buffers.write(buffers.read(4096)[::-1])
                buffers.finish()
            if queue.failure is not None:
                self.broken(index, queue.failure)
                break
            if not left:
                self.again(index)
                break
            if not queue.watch():
                break
        queue.interrupt()


MakeRig = Callable[..., Awaitable[Rig]]
