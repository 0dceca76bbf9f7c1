"""The whole board under vCPUs that access it at random, all at once, while the loop does its part. For sanitizers too.

What must hold: every hold is answered, nothing raises, and after a reset every wire is low and no BAR answers.
"""

import random
from collections.abc import Callable

import pytest

from propolis._bus import Window
from propolis._interrupts import Doorbell
from propolis.devices.keyboard_controller import KeyboardController
from propolis.devices.pci._function import PciFunction
from propolis.devices.pci.chipset import Chipset
from propolis.devices.pm import PowerManagement
from propolis.devices.ports import DebugConsole, LegacyPorts, Pvpanic
from propolis.devices.rtc import MIB, RealTimeClock
from propolis.devices.serial import Serial
from propolis.hypervisor._replay import ReplayVcpu, ReplayVm
from tests import rig

PORTS = (
    *range(0x60, 0x65), 0x70, 0x71, 0x80, 0x92, 0x402, 0x505, *range(0x2F8, 0x300), *range(0x3F8, 0x400),
    *range(0xB000, 0xB00C), *range(0xAFE0, 0xAFE4), *range(0xAE00, 0xAE0C),
)  # fmt: skip
BARS = (0, 0xC000_0000, 0xC000_1000, 0xC001_0000, 0xFFFF_FFFF, 0xFEE0_0000)
FUNCTIONS = (0, 1, 2)  # of device 5
SLOTS = ((0, 0), (1, 0), (1, 3), *((5, number) for number in FUNCTIONS), (9, 0))
FOREVER = 1 << 60
Step = tuple[object, ...]


class Board:
    """All devices but disks, and three functions with BARs, doorbells, MSI-X and an interrupt pin."""

    def __init__(self, vm: ReplayVm) -> None:
        self.vm = vm
        power = vm.mailbox.register(int)
        legacy = LegacyPorts(vm, power)
        self.keyboard = KeyboardController(vm, power, has_devices=True)
        self.pm = PowerManagement(vm, power)
        self.rtc = RealTimeClock(vm, 64 * MIB, 0)
        self.debug = DebugConsole(vm)
        self.serials = [Serial(vm, 1), Serial(vm, 2)]
        self.devices = [legacy, self.keyboard, self.pm, self.rtc, self.debug, Pvpanic(vm, power), *self.serials]
        self.chipset = Chipset(vm, legacy.reset_control)
        self.functions = [self._function(number) for number in FUNCTIONS]

    def _function(self, number: int) -> PciFunction:
        function = PciFunction(self.vm, f"function {number}", vendor=1, device=2)
        msix = function.add_msix(4, 0, 0, 0x800)
        window = Window(f"window {number}")
        window.add(msix.table, 0, 64)
        window.add(msix.pba, 0x800, 8)
        window.add(Doorbell(self.vm, f"bell {number}"), 0xC00, 4)
        function.add_bar(0, "mmio64", 0x1000, window)
        function.add_bar(2, "io", 0x20, Doorbell(self.vm, f"port {number}"))
        self.chipset.bus.add(function, 5, number)
        return function

    def reset(self) -> None:
        self.chipset.reset()
        for device in self.devices:
            device.reset()


def script(dice: random.Random) -> list[Step]:
    """Some hundred accesses: ports at random, configuration space with purpose, BARs where they may be."""
    steps: list[Step] = []
    while len(steps) < 400:
        kind = dice.randrange(8)
        size = dice.choice((1, 1, 1, 2, 4))
        if kind < 4:
            port = dice.choice(PORTS)
            steps.append(dice.choice((("in", port, size), ("out", port, size, dice.getrandbits(8 * size)))))
        elif kind < 6:
            slot, number = dice.choice(SLOTS)
            where = dice.choice((4, 0x10, 0x14, 0x18, 0x3C, 0x40, 0x60, dice.randrange(0, 256, 4)))
            steps.append(("out", 0xCF8, 4, 0x8000_0000 | slot << 11 | number << 8 | where))
            value = dice.choice((*BARS, 0xC001, 7, 0, 0x8000_0000, dice.getrandbits(32)))
            steps.append(dice.choice((("in", 0xCFC, 4), ("out", 0xCFC, 4, value), ("out", 0xCFC, 4, value))))
        else:
            gpa = dice.choice(BARS[1:]) + dice.choice((dice.randrange(64), 0x800, 0xC00))
            value = dice.choice((0xFEE0_0000, 0, dice.getrandbits(64)))
            width = dice.choice((4, 4, 8, 2))
            steps.append(dice.choice((("read", gpa, width), ("write", gpa, width, value & ((1 << 8 * width) - 1)))))
    return steps


def loop_side(board: Board, dice: random.Random) -> list[Callable[[], object]]:
    """What the loop thread may do at any time."""
    function = dice.choice(board.functions)
    serial = dice.choice(board.serials)
    msix = function.msix
    assert msix is not None
    return [
        board.vm.mailbox.dispatch, board.vm.mmio.mappings, board.vm.pio.mappings, board.vm.take_interrupts,
        lambda: serial.feed(dice.randbytes(dice.randrange(40))), serial.feed_break, serial.stats, board.debug.stats,
        board.pm.press_power_button, lambda: board.pm.raise_gpe(dice.randrange(16)),
        lambda: board.pm.announce_hotplug(added=1 << dice.randrange(32), unwanted=dice.getrandbits(32)),
        lambda: board.keyboard.key(dice.randrange(256), dice.random() < 0.5),
        lambda: board.keyboard.move(dice.randint(-300, 300), dice.randint(-300, 300), 0, dice.randrange(8)),
        board.rtc._rtc.tick, board.pm._pm1.tick, function.bar_list, msix.stats,
        lambda: function.drive_intx(dice.random() < 0.5),
        lambda: msix.trigger(dice.randrange(5)),
        board.chipset.bus.describe, board.chipset.bus.router.routes,
    ]  # fmt: skip


@pytest.mark.parametrize("cpus", [2, 4])
def test_the_board_under_many_vcpus(cpus: int) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    machine: rig.Replayed = rig.Rig(ReplayVm())
    with machine:
        board = Board(machine.vm)
        for index in range(cpus):
            machine.vcpus.append(ReplayVcpu(machine.vm, index, machine.hear(), script(dice), FOREVER))
        fixed = machine.vm.pio.mappings()
        machine.start()
        for _ in range(40):
            for _ in range(50):
                dice.choice(loop_side(board, dice))()
            machine.hold()
            board.reset()
            machine.vm.mailbox.dispatch()
            assert machine.vm.mmio.mappings() == []
            assert machine.vm.pio.mappings() == fixed
            assert [pin for pin in range(24) if machine.vm.line_level(pin)] == []
            machine.release()
    board.__dict__.clear()
