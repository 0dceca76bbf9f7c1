"""A machine reduced to what the tests of the core need: a VM, its vCPU threads and the mailbox. No event loop."""

import random
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import msgspec

from propolis._memory import GuestMemory
from propolis.hypervisor._kvm import KvmVcpu, KvmVm
from propolis.hypervisor._replay import ReplayVcpu, ReplayVm
from propolis.hypervisor.cpuid import Interface, machine_cpuid, vcpu_cpuid
from propolis.hypervisor.state import Registers, Segment

TREE = Path(__file__).resolve().parents[1]
PARKED, SHUTDOWN, FAILED, ENDED = 1, 2, 4, 8  # VcpuEvent in _vmm.pxd

CODE = 0x1000  # where tiny guests begin, in real mode
MEMORY = 1 << 20

M = TypeVar("M", ReplayVm, KvmVm)
V = TypeVar("V", ReplayVcpu, KvmVcpu)


class Rig(Generic[M, V]):
    """Runs vCPUs on threads of their own; leaves nothing behind when it is closed."""

    def __init__(self, vm: M) -> None:
        self.vm: M = vm
        self.vcpus: list[V] = []
        self.events: list[list[int]] = []  # of each vCPU, in order of arrival
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hear(self) -> Callable[[int], object]:
        """What the next vCPU's events go to."""
        events: list[int] = []
        self.events.append(events)
        return events.append

    def start(self, *, released: bool = True) -> None:
        """A thread for each vCPU."""
        for vcpu in self.vcpus:
            thread = threading.Thread(target=vcpu.run, name=f"vcpu-{vcpu.index}", daemon=True)
            thread.start()
            self.threads.append(thread)
        if released:
            self.release()

    def until(self, what: str, reached: Callable[[], bool], timeout: float = 20.0) -> None:
        """Serves the mailbox until `reached()`. Looks again after an event only: one that is lost is a failure."""
        deadline = time.monotonic() + timeout
        while True:
            self.vm.mailbox.dispatch()
            if reached():
                return
            left = max(0, deadline - time.monotonic())
            if not select.select([self.vm.mailbox.fileno()], [], [], left)[0]:
                raise AssertionError(f"missing after {timeout:g} s: {what}; events {self.events}")

    def hold(self) -> None:
        """Holds every vCPU and waits until all are parked."""
        for vcpu in self.vcpus:
            vcpu.hold()
        self.parked()

    def parked(self) -> None:
        """Waits until all vCPUs are parked."""
        self.until("every vCPU parked", lambda: all(vcpu.is_parked for vcpu in self.vcpus))

    def release(self) -> None:
        """Lets every vCPU run."""
        for vcpu in self.vcpus:
            vcpu.release()

    def saw(self, bits: int, index: int = 0) -> bool:
        """Whether this vCPU has sent all of these event bits."""
        seen = 0
        for event in self.events[index]:
            seen |= event
        return seen & bits == bits

    def exits(self, kind: str) -> int:
        """How many exits of a kind all vCPUs had."""
        return sum(vcpu.stats()[kind] for vcpu in self.vcpus)

    def spin_until(self, what: str, reached: Callable[[], bool], timeout: float = 20.0) -> None:
        """Waits for what no event announces: a counter of a running vCPU, a byte that the guest writes."""
        deadline = time.monotonic() + timeout
        while not reached():
            if time.monotonic() > deadline:
                raise AssertionError(f"missing after {timeout:g} s: {what}; events {self.events}")
            time.sleep(0.0002)

    def close(self) -> None:
        """Stops and joins the threads, closes the vCPUs and the VM."""
        for vcpu in self.vcpus:
            vcpu.stop()
        for thread in self.threads:
            thread.join(timeout=20)
            assert not thread.is_alive(), f"{thread.name} did not end"
        self.threads.clear()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()


Replayed = Rig[ReplayVm, ReplayVcpu]
OnKvm = Rig[KvmVm, KvmVcpu]


def replay(*scripts: Sequence[tuple[Any, ...]], rounds: int = 1) -> Replayed:
    """A machine with one replayed vCPU for each script."""
    rig: Replayed = Rig(ReplayVm())
    for index, script in enumerate(scripts):
        rig.vcpus.append(ReplayVcpu(rig.vm, index, rig.hear(), list(script), rounds))
    return rig


def kvm(
    kvm_fd: int,
    code: bytes = b"",
    *,
    cpus: int = 1,
    interface: Interface = "kvm",
    memory: int = MEMORY,
    read_only: tuple[int, int] | None = None,
) -> OnKvm:
    """A machine on KVM with RAM at 0; vCPU 0 is in real mode at CODE, where `code` is."""
    rig: OnKvm = Rig(KvmVm(kvm_fd))
    vm = rig.vm
    try:
        vm.memory.add(0, memory)
        if read_only is not None:
            vm.memory.add(*read_only, read_only=True)
        vm.map_memory()
        vm.add_interrupt_controllers()
        shared = machine_cpuid(vm.supported_cpuid(), cpus, interface, vm.has_deadline_timer())
        for index in range(cpus):
            vcpu = KvmVcpu(vm, index, rig.hear())
            rig.vcpus.append(vcpu)
            vcpu.set_cpuid(vcpu_cpuid(shared, index))
        vm.memory.write(CODE, code)
        rig.vcpus[0].set_registers(real_mode(CODE))
    except BaseException:
        rig.close()
        raise
    return rig


STARTED = 0x5000  # a word that counts application processors
_BROADCAST = bytes.fromhex(  # in protected mode: INIT, then SIPI to 0x2000, to all but self; then wait
    "c7 05 00 03 e0 fe 00 45 0c 00 c7 05 00 03 e0 fe 02 46 0c 00 eb fe"
)
_ARRIVED = bytes.fromhex("f0 ff 06 00 50 eb fe")  # in real mode: lock inc word [STARTED]; wait


def wake(machine: OnKvm) -> None:
    """Starts the threads and, by INIT and SIPI from vCPU 0, all other vCPUs; then holds them all."""
    memory = machine.vm.memory
    memory.write(0x2000, _ARRIVED)
    memory.write(0x3000, _BROADCAST)
    machine.vcpus[0].set_registers(protected_mode(0x3000))
    machine.start()
    others = (len(machine.vcpus) - 1).to_bytes(2, "little")
    machine.spin_until("every vCPU has started", lambda: memory.read(STARTED, 2) == others)
    machine.hold()


def sequence(machine: Rig[Any, Any], steps: int, running: Callable[[Any, dict[str, int]], bool]) -> None:
    """A seeded sequence of commands. Every hold is answered by its event, every release by progress."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    for _ in range(steps):
        vcpus = dice.sample(machine.vcpus, dice.randint(1, len(machine.vcpus)))
        for vcpu in vcpus:
            for _ in range(dice.randrange(4)):  # commands that overtake each other
                dice.choice((vcpu.hold, vcpu.release))()
        if dice.random() < 0.2:
            time.sleep(dice.random() * 0.0003)
        wanted = dice.random() < 0.5
        for vcpu in vcpus:
            (vcpu.hold if wanted else vcpu.release)()
        if wanted:
            machine.until("held vCPUs parked", lambda: all(vcpu.is_parked for vcpu in vcpus))
        else:
            before = [(vcpu, vcpu.stats()) for vcpu in vcpus]
            machine.spin_until("released vCPUs ran", lambda: all(running(vcpu, then) for vcpu, then in before))


def real_mode(ip: int, *, rsp: int = 0x8000, **values: Any) -> Registers:
    """Registers of flat real mode: every segment at 0."""
    data = Segment(limit=0xFFFF, type=3, s=1, present=1)
    return Registers(
        rip=ip,
        rsp=rsp,
        cs=Segment(limit=0xFFFF, type=0xB, s=1, present=1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(limit=0xFFFF, type=0xB, present=1),
        ldt=Segment(limit=0xFFFF, type=2, present=1),
        **values,
    )


def protected_mode(ip: int, *, rsp: int = 0x8000, cr0: int = 0x11, **values: Any) -> Registers:
    """Registers of flat 32-bit protected mode without paging: 4 GiB segments, selectors 8 and 0x10."""
    data = Segment(limit=0xFFFF_FFFF, selector=0x10, type=3, s=1, present=1, db=1, g=1)
    return Registers(
        rip=ip,
        rsp=rsp,
        cr0=cr0,
        cs=Segment(limit=0xFFFF_FFFF, selector=8, type=0xB, s=1, present=1, db=1, g=1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(limit=0xFFFF, type=0xB, present=1),
        ldt=Segment(limit=0xFFFF, type=2, present=1),
        **values,
    )


def long_mode(memory: GuestMemory, ip: int, **values: Any) -> Registers:
    """Registers of 64-bit mode, the first 4 GiB mapped one to one; its page tables are put at 0x70000."""
    tables = 0x7_0000
    memory.write(tables, (tables + 0x1000 | 3).to_bytes(8, "little"))
    for number in range(4):
        memory.write(tables + 0x1000 + 8 * number, (tables + 0x2000 + 0x1000 * number | 3).to_bytes(8, "little"))
        entries = (number << 30 | entry << 21 | 0x83 for entry in range(512))
        memory.write(tables + 0x2000 + 0x1000 * number, b"".join(entry.to_bytes(8, "little") for entry in entries))
    flat = protected_mode(ip, cr0=0x8000_0011, cr3=tables, cr4=0x20, efer=0x500, **values)
    return msgspec.structs.replace(
        flat, cs=msgspec.structs.replace(flat.cs, l=1, db=0), tr=msgspec.structs.replace(flat.tr, limit=0x67)
    )
