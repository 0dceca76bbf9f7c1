"""Builds one VM from a Spec and owns it: memory, buses, vCPUs, board and devices, and the boot image.

The order that must hold: hold the vCPUs, pause the devices, await what is in flight, then save or reset; resume the
devices, then release the vCPUs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from propolis import __version__, offer, threads
from propolis import spec as model
from propolis.backends._iopool import IoPool
from propolis.board import Board
from propolis.board import Keeper as BoardKeeper
from propolis.devices.fw_cfg import FirmwareConfig
from propolis.devices.pflash import ParallelFlash
from propolis.devices.power import PowerEvent
from propolis.devices.ramfb import FILE as RAMFB_FILE
from propolis.devices.ramfb import SIZE as RAMFB_BYTES
from propolis.errors import HypervisorError, PauseError
from propolis.firmware import acpi, boot, layout, nvram, smbios
from propolis.firmware.boot_order import boot_order
from propolis.firmware.bootrom import load as load_bootrom
from propolis.hypervisor import hyperv, open_vm
from propolis.hypervisor.cpuid import SIGNIFICANT_INDEX, Entry, machine_cpuid, vcpu_cpuid
from propolis.hypervisor.cpuid_profile import leaves_on
from propolis.lifecycle import GuestEvent

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from io import FileIO

    from propolis._vmm import Vm
    from propolis.devices.device import Device
    from propolis.firmware.board import Board as TableBoard
    from propolis.hypervisor import MachineVcpu
    from propolis.hypervisor.state import Registers

log = logging.getLogger(__name__)

_REPORTED = (
    "rip", "rflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "cr0", "cr2", "cr3", "cr4", "efer",
)  # fmt: skip

HOLD_TIMEOUT = 10.0  # seconds for a vCPU to answer a kick: it takes one signal and one exit
DRAIN_TIMEOUT = 30.0  # seconds for a device to finish what it has in flight

# Bits of a vCPU's mailbox slot, VcpuEvent in _vmm.pxd.
VCPU_PARKED, VCPU_SHUTDOWN, VCPU_FAILED, VCPU_ENDED = 1, 2, 4, 8


class Keeper(BoardKeeper, Protocol):
    """Who opens files for the machine: propolis.keeper."""

    def open_hypervisor(self) -> int: ...
    def open_image(self, path: str, what: str) -> FileIO: ...
    def open_nvram(self, path: str, template: str | None) -> int: ...
    def open_network(self, name: str, network: model.Network, queues: int) -> list[int]: ...


class Machine:
    """One virtual machine. Built stopped; every method runs on the loop thread.

    Raises PropolisError subclasses from the constructor, having released all it took.
    """

    def __init__(
        self,
        spec: model.Spec,
        keeper: Keeper,
        on_event: Callable[[GuestEvent], None],
        *,
        hypervisor: str = "kvm",
        identity: uuid.UUID | None = None,
    ) -> None:
        """Without an `identity` of its own the guest has one that is made of its name."""
        self.spec = spec
        self.identity = identity or uuid.uuid5(uuid.NAMESPACE_URL, f"propolis:{spec.name}")
        self._on_event = on_event
        self._moved = asyncio.Event()  # a vCPU parked or ended
        self._threads: list[threading.Thread] = []
        self._failed: MachineVcpu | None = None
        self._is_panicked = False  # the guest said so, since it was last reset
        self._loop: asyncio.AbstractEventLoop | None = None
        self.vcpus: list[MachineVcpu] = []
        with ExitStack() as undo:
            self._build(spec, keeper, hypervisor, undo)
            self._undo = undo.pop_all()

    def _build(self, spec: model.Spec, keeper: Keeper, hypervisor: str, undo: ExitStack) -> None:
        memory_size = spec.memory_mib << 20

        def image(path: str | None, what: str) -> FileIO | None:
            return undo.enter_context(keeper.open_image(path, what)) if path is not None else None

        self._kernel = image(spec.boot.kernel, "kernel")
        self._initrd = image(spec.boot.initrd, "initrd")
        bootrom = image(spec.boot.bootrom, "bootrom") if isinstance(spec.boot, model.FirmwareBoot) else None
        kvm_fd = keeper.open_hypervisor() if hypervisor == "kvm" else -1
        if kvm_fd >= 0:
            undo.callback(os.close, kvm_fd)
        self.vm = open_vm(hypervisor, kvm_fd)
        undo.callback(self.vm.close)
        if spec.cpus > self.vm.max_vcpus():
            raise HypervisorError(f"{spec.cpus} CPUs: this host's hypervisor gives a VM {self.vm.max_vcpus()}")
        for ram in layout.ram_ranges(memory_size):
            self.vm.memory.add(ram.base, ram.size, spec.memory_backing)
        flash = None
        if isinstance(spec.boot, model.FirmwareBoot):
            assert bootrom is not None
            rom = load_bootrom(self.vm.memory, bootrom)
            flash = _flash(self.vm, keeper, spec.boot, rom.base, undo)
        self.vm.map_memory()
        self.vm.add_interrupt_controllers()
        leaves, deadline_timer = self.vm.supported_cpuid(), self.vm.has_deadline_timer()
        if spec.cpuid is not None:
            leaves, deadline_timer = leaves_on(leaves, _entries(spec.cpuid), deadline_timer)
        self.cpuid = machine_cpuid(leaves, spec.cpus, spec.hypervisor_interface, deadline_timer)
        if spec.hypervisor_interface == "hyper-v":
            self.cpuid += hyperv.leaves(self.vm.supported_hyperv(), spec.hyperv_features, model.MAX_CPUS)
        for index in range(spec.cpus):
            vcpu = self.vm.create_vcpu(index, self._vcpu_events(index))
            undo.callback(vcpu.close)
            vcpu.set_cpuid(vcpu_cpuid(self.cpuid, index))
            self.vcpus.append(vcpu)
        place = layout.firmware_windows if bootrom is not None else layout.device_windows
        windows = place(memory_size, _physical_bits(self.cpuid))
        self.board = Board(self.vm, spec, self.identity, keeper, windows, self._on_power, undo)
        self.devices: list[Device] = self.board.devices
        if flash is not None:
            self.devices.append(flash)
        tables = self.board.tables()
        if bootrom is None:
            built = acpi.build(tables)
            pieces = smbios.pieces(self._system(memory_size))
            self._tables = acpi.Tables(built.rsdp, (*built.pieces, *pieces))
        if bootrom is not None or self.board.ramfb is not None:
            self._offer(memory_size, tables if bootrom is not None else None)

    def _system(self, memory_size: int) -> smbios.System:
        """What the machine is called in its SMBIOS tables."""
        spec = self.spec
        names = spec.smbios or model.SystemNames(
            manufacturer="Propolis", product_name="Propolis VM", serial_number=str(self.identity), version=0
        )
        return smbios.System(
            uuid=self.identity,
            cpus=spec.cpus,
            memory_size=memory_size,
            manufacturer=names.manufacturer,
            product_name=names.product_name,
            serial_number=names.serial_number,
            version=str(names.version) if spec.smbios is not None else __version__,
            firmware_version=__version__,
            is_uefi=isinstance(spec.boot, model.FirmwareBoot),
            processor=smbios.processor(self.cpuid, spec.cpus),
        )

    def _offer(self, memory_size: int, tables: TableBoard | None) -> None:
        """What is found in fw_cfg: by firmware, for which there are `tables`, or by a guest that has a screen."""
        config = FirmwareConfig(self.vm)
        if tables is not None:
            offer.offer_machine(config, memory_size, tables)
            offer.offer_smbios(config, self._system(memory_size))
            if self._kernel is not None:
                offer.offer_kernel(config, self._kernel, self._initrd, self.spec.boot.cmdline)
            if (order := boot_order(self.spec)) is not None:
                config.add_file("bootorder", order)
        if (ramfb := self.board.ramfb) is not None:
            config.add_writable_file(RAMFB_FILE, RAMFB_BYTES, ramfb.configure)
        config.publish()
        self.devices.append(config)

    def _on_power(self, events: PowerEvent) -> None:
        if events & (PowerEvent.PANICKED | PowerEvent.CRASH_LOADED) and not self._is_panicked:
            self._is_panicked = True  # once: a guest must not fill the log
            log.warning("the guest's kernel panicked")
            self._on_event(GuestEvent.PANIC)
        # A guest that asks for both at once is off: nothing it wants afterwards can matter.
        if events & PowerEvent.POWER_OFF:
            self._on_event(GuestEvent.POWER_OFF)
        elif events & PowerEvent.RESET:
            self._on_event(GuestEvent.RESET)

    def _vcpu_events(self, index: int) -> Callable[[int], None]:
        return lambda bits: self._on_vcpu(self.vcpus[index], bits)

    def _on_vcpu(self, vcpu: MachineVcpu, bits: int) -> None:
        if bits & (VCPU_PARKED | VCPU_ENDED):
            self._moved.set()
        if bits & VCPU_SHUTDOWN:
            self._on_event(GuestEvent.TRIPLE_FAULT)
        if bits & VCPU_FAILED:
            self._failed = self._failed or vcpu
            self._on_event(GuestEvent.FAILURE)

    # -- life cycle ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Loads the boot image and runs the guest. Raises ImageError, HypervisorError or BackendError."""
        loop = asyncio.get_running_loop()
        self._power_on()
        loop.add_reader(self.vm.mailbox.fileno(), self.vm.mailbox.dispatch)
        self._loop = loop
        for device in self.devices:
            device.start(loop)
        for vcpu in self.vcpus:
            try:
                self._threads.append(threads.start("vcpu", f"vcpu-{vcpu.index}", vcpu.run))
            except RuntimeError as error:
                raise HypervisorError(f"start the thread of vCPU {vcpu.index}: {error}") from error
        self._release()

    def _power_on(self) -> None:
        """Where there is no firmware, does its work: vCPU 0 is then at the entry of the kernel, else at the ROM's."""
        if isinstance(self.spec.boot, model.FirmwareBoot):
            return
        assert self._kernel is not None
        self.board.program()
        entry = boot.load(
            self.vm.memory,
            self.spec.memory_mib << 20,
            self._kernel,
            initrd=self._initrd,
            cmdline=self.spec.boot.cmdline,
            tables=self._tables,
        )
        self.vcpus[0].set_registers(entry.registers)

    def _release(self) -> None:
        for vcpu in self.vcpus:
            vcpu.release()

    async def _hold(self) -> None:
        """Holds every vCPU at a consistent point. Raises PauseError naming one that does not answer."""
        for vcpu in self.vcpus:
            vcpu.hold()
        try:
            await self._until("answer a request to pause", lambda vcpu: vcpu.is_parked)
        except HypervisorError as error:
            raise PauseError(str(error)) from None
        # What the guest asked for before it was held has to be known before it may run on.
        self._collect_events()

    def _collect_events(self) -> None:
        """What is in the mailbox now. A callback that raises is the loop's to report, as when the loop calls it."""
        try:
            self.vm.mailbox.dispatch()
        except ExceptionGroup as errors:
            context = {"message": "an event of the guest was not handled", "exception": errors}
            asyncio.get_running_loop().call_exception_handler(context)

    async def _until(self, what: str, reached: Callable[[MachineVcpu], bool]) -> None:
        try:
            async with asyncio.timeout(HOLD_TIMEOUT):
                while True:
                    # Cleared before the look: a vCPU that moves after it sets the event again.
                    self._moved.clear()
                    if all(reached(vcpu) for vcpu in self.vcpus):
                        return
                    await self._moved.wait()
        except TimeoutError:
            late = ", ".join(str(vcpu.index) for vcpu in self.vcpus if not reached(vcpu))
            raise HypervisorError(f"vCPU {late} did not {what} within {HOLD_TIMEOUT:g} s") from None

    async def pause(self) -> None:
        """Stops the guest at a consistent point, with nothing in flight.

        Raises PauseError where that takes too long: a vCPU or the host's storage does not answer. The guest is held
        all the same; resume() lets it run on.
        """
        await self._hold()
        for device in self.devices:
            device.pause()
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT):
                for device in self.devices:
                    await device.drained()
        except TimeoutError:
            late = ", ".join(device.name for device in self.devices if device.in_flight()) or "a device"
            raise PauseError(f"{late} did not finish its requests within {DRAIN_TIMEOUT:g} s") from None

    async def resume(self) -> None:
        """Runs the guest on from where pause() left it, also where that failed."""
        for device in self.devices:
            device.resume()
        self._release()

    async def reboot(self) -> None:
        """To power-on and up again: the same boot image, devices and backends; memory is not cleared.

        Raises PauseError as pause() does; nothing is reset then.
        """
        await self.pause()
        self.vm.reset()
        for vcpu in self.vcpus:
            vcpu.reset()
        self.board.reset()
        self._is_panicked = False
        # What the guest asked for before the reset is answered by it: collect those events now.
        self._collect_events()
        self._power_on()
        await self.resume()

    async def halt(self) -> None:
        """Ends the guest and lets go of everything; called twice is fine."""
        for vcpu in self.vcpus:
            vcpu.stop()
        if self._threads:
            await self._until("end", lambda vcpu: vcpu.is_parked)
            for thread in self._threads:
                thread.join()
            self._threads.clear()
        if self._loop is not None:
            self._loop.remove_reader(self.vm.mailbox.fileno())
            self._loop = None
        # At once: one whose storage hangs takes its time.
        await asyncio.gather(*(_halt(device) for device in reversed(self.devices)))
        stuck = [device.name for device in self.devices if device.in_flight()]
        self.devices = []
        if stuck:
            # The kernel still writes to guest memory: it stays mapped until this process ends.
            log.error("host I/O does not end, guest memory is not released: devices=%s", ",".join(stuck))
            self._undo.pop_all()
        self._undo.close()

    # -- requests ------------------------------------------------------------------------------------------------------

    def press_power_button(self) -> None:
        """The guest's operating system decides what that means."""
        self.board.press_power_button()

    def inject_nmi(self) -> None:
        """An NMI for every vCPU, whatever it does. Raises HypervisorError."""
        self.vm.inject_nmi()

    def failure_text(self) -> str:
        """Why the VM cannot go on: what the hypervisor said, the registers and the instruction."""
        if self._failed is None:
            return "no vCPU has failed"
        vcpu = self._failed
        code = vcpu.instruction_bytes().hex(" ") or "not mapped"
        return f"vCPU {vcpu.index}: {vcpu.failure_text()}; {_registers_text(vcpu.get_registers())} code={code}"

    def stats(self) -> dict[str, object]:
        """Counters of the vCPUs, buses and devices; of devices, none once the machine was halted."""
        return {
            "vcpus": [vcpu.stats() for vcpu in self.vcpus],
            "pio": self.vm.pio.stats(),
            "mmio": self.vm.mmio.stats(),
            "devices": {device.name: stats for device in self.devices if (stats := device.stats())},
        }


async def _halt(device: Device) -> None:
    try:
        await device.halt()
    except Exception as error:  # noqa: BLE001 -- whatever one device does, the others are let go
        # Its text alone: with its traceback a record would keep this machine's descriptors open.
        log.error("a device did not halt: device=%s reason=%s", device.name, repr(error))  # noqa: TRY400


def _entries(profile: model.CpuidProfile) -> list[Entry]:
    return [
        Entry(e.leaf, e.subleaf or 0, 0 if e.subleaf is None else SIGNIFICANT_INDEX, e.eax, e.ebx, e.ecx, e.edx)
        for e in profile.leaves
    ]


def _flash(vm: Vm, keeper: Keeper, spec: model.FirmwareBoot, end: int, undo: ExitStack) -> ParallelFlash | None:
    """The flash below the bootrom, if there is one."""
    if spec.nvram is None:
        return None
    fd = keeper.open_nvram(spec.nvram, spec.nvram_template)
    pool = IoPool(1)

    def let_go() -> None:
        if pool.close():  # else its storage hangs, and closing it may too
            os.close(fd)

    undo.callback(let_go)
    place = nvram.load(vm.memory, fd, spec.nvram, end)
    return ParallelFlash(vm, place.base, place.size, fd, spec.nvram, pool)


def _physical_bits(cpuid: list[Entry]) -> int:
    """The guest's physical address width: CPUID leaf 8000_0008 EAX[7:0], 36 where it is missing."""
    return next((entry.eax & 0xFF for entry in cpuid if entry.function == 0x8000_0008), 36)


def _registers_text(r: Registers) -> str:
    values = " ".join(f"{name}={getattr(r, name):#x}" for name in _REPORTED)
    return f"{values} cs={r.cs.selector:#x}:{r.cs.base:#x}"
