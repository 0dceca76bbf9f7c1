"""The one vCPU loop on replayed exits: what it does with each, and hold, release and stop, which lose nothing."""

import random
import threading
import time
from typing import Any

import pytest

from propolis._interrupts import Doorbell
from propolis.devices.pci._msix import Msix
from propolis.errors import HypervisorError
from propolis.hypervisor import VCPU_NAMES, VM_NAMES, open_vm
from propolis.hypervisor._kvm import KvmVcpu, KvmVm
from propolis.hypervisor._replay import ReplayVcpu, ReplayVm
from tests import rig

FOREVER = 1 << 40
SPIN = [("out", 0x80, 1, 1), ("in", 0x80, 4), ("write", 0x1000, 8, 1), ("read", 0x2000, 8), ("retry",)]
STRINGS = [("outs", 0x80, 1, bytes(64)), ("ins", 0x80, 4, 16)]
IDLE: list[tuple[Any, ...]] = []


# -- exits -------------------------------------------------------------------------------------------------------------


def test_each_exit_reaches_its_bus_in_order() -> None:
    """With its address, width and value; reads that nobody answers are all ones of their width."""
    script = [
        ("write", 0x2000, 8, 0x1122334455667788),
        ("read", 0x2000, 8),
        ("read", 0x2004, 4),
        ("read", 0x2001, 2),
        ("write", 0x2008, 4, 0xCAFE),
        ("read", 0x2008, 1),
        ("read", 0x200E, 4),  # two bytes past the end
        ("in", 0x2000, 4),  # a port, not memory
        ("in", 0x60, 1),
        ("out", 0x60, 2, 0xFFFF),
        ("retry",),
    ]
    with rig.replay(script) as machine:
        vm, vcpu = machine.vm, machine.vcpus[0]
        msix = Msix(vm, 1)
        vm.mmio.add(msix.table, 0x2000, 16)
        machine.start()
        machine.spin_until("the end of the script", lambda: vcpu.is_done)
        machine.hold()
        assert vcpu.results()[:5] == [0x1122334455667788, 0x11223344, 0x6677, 0xFE, 0xFFFF_0000]
        assert vcpu.results()[5:] == [0xFFFF_FFFF, 0xFF]
        stats = vcpu.stats()
        assert (stats["pio"], stats["mmio"], stats["retry"], stats["shutdown"], stats["failed"]) == (3, 7, 1, 0, 0)
        assert vm.pio.stats() == {"missed": 4 + 1 + 2}
        assert vm.mmio.stats() == {"missed": 2}


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 64), (2, 32), (4, 16), (4, 3), (1, 0), (4, 0)])
def test_string_instructions_repeat_the_access(size: int, count: int) -> None:
    """As often as they say, which may be never."""
    script = [("outs", 0x80, size, bytes(size * count)), ("ins", 0x80, size, count), ("ins", 0x100, size, count)]
    with rig.replay(script) as machine:
        vcpu = machine.vcpus[0]
        bell = Doorbell(machine.vm, "bell")
        machine.vm.pio.add(bell, 0x80, 8)
        machine.start()
        machine.spin_until("the end of the script", lambda: vcpu.is_done)
        machine.hold()
        assert bell.stats() == {"rung": count}
        assert machine.vm.pio.stats() == {"missed": size * count}
        zeros, ones = (0, (1 << 8 * size) - 1) if count == 1 else (bytes(size * count), b"\xff" * (size * count))
        assert vcpu.results() == [zeros, ones]


def test_a_triple_fault_is_told_and_holds_the_vcpu() -> None:
    with rig.replay([("out", 0x80, 1, 1), ("shutdown",), ("out", 0x80, 1, 1)]) as machine:
        machine.start()
        machine.until("a shutdown event", lambda: machine.saw(rig.SHUTDOWN | rig.PARKED))
        vcpu = machine.vcpus[0]
        assert vcpu.is_parked
        assert vcpu.stats()["pio"] == 1
        vcpu.reset()
        machine.release()
        machine.spin_until("the script from its start", lambda: vcpu.stats()["shutdown"] == 2)


def test_a_failure_is_told_and_holds_the_vcpu() -> None:
    """With its reason; the other vCPUs run on."""
    with rig.replay([("fail", 17)], SPIN, rounds=FOREVER) as machine:
        machine.start()
        machine.until("a failure", lambda: machine.saw(rig.FAILED | rig.PARKED))
        failed, other = machine.vcpus
        assert failed.is_parked
        assert not other.is_parked
        assert failed.failure()[0] == 17
        assert failed.failure_text() == "replayed failure 17"
        assert failed.stats()["failed"] == 1
        before = other.stats()["pio"]
        machine.spin_until("exits of the other vCPU", lambda: other.stats()["pio"] > before)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_a_vcpu_is_created_held() -> None:
    with rig.replay(SPIN) as machine:
        vcpu = machine.vcpus[0]
        assert vcpu.is_parked
        machine.start(released=False)
        machine.until("the thread parked", lambda: machine.saw(rig.PARKED))
        assert vcpu.stats() == {"interrupted": 1, "pio": 0, "mmio": 0, "retry": 0, "shutdown": 0, "failed": 0}
        machine.release()
        machine.spin_until("the end of the script", lambda: vcpu.is_done)
        assert not vcpu.is_parked


def test_a_vcpu_has_one_thread() -> None:
    with rig.replay(IDLE) as machine:
        machine.start()
        vcpu = machine.vcpus[0]
        machine.hold()
        caught: list[BaseException] = []

        def second() -> None:
            try:
                vcpu.run()
            except HypervisorError as error:
                caught.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert "vCPU 0 already has a thread" in str(caught[0])
        with pytest.raises(HypervisorError, match="still running"):
            vcpu.close()


@pytest.mark.parametrize("script", [SPIN, STRINGS, IDLE])
@pytest.mark.parametrize("state", ["new", "held", "running", "holding"])
def test_stop_ends_the_thread_whatever_it_does(script: list[tuple[Any, ...]], state: str) -> None:
    """Once and for good: what is asked of it later changes nothing, and ENDED comes once."""
    with rig.replay(script, rounds=FOREVER) as machine:
        vcpu = machine.vcpus[0]
        if state == "new":
            vcpu.stop()
            machine.start()
        else:
            machine.start(released=state != "held")
            if state == "held":
                machine.parked()
            else:
                machine.spin_until("it runs", lambda: vcpu.stats()["interrupted"] > 0)
        if state == "holding":
            vcpu.hold()
        vcpu.stop()
        vcpu.release()
        vcpu.hold()
        machine.until("the thread's end", lambda: machine.saw(rig.ENDED))
        machine.threads[0].join(20)
        assert vcpu.is_parked
        vcpu.hold()
        vcpu.release()
        vcpu.stop()
        machine.vm.mailbox.dispatch()
        assert sum(bits & rig.ENDED for bits in machine.events[0]) == rig.ENDED
        vcpu.close()
        vcpu.close()


def test_vcpus_come_and_go() -> None:
    """Those that are gone hold up no change of the bus: their counters are no longer looked at."""
    vm = ReplayVm()
    bell = Doorbell(vm, "bell")
    for index in range(100):
        vcpu = ReplayVcpu(vm, index, print, IDLE)
        thread = threading.Thread(target=vcpu.run)
        thread.start()
        vcpu.stop()
        thread.join()
        vcpu.close()
        del vcpu, thread
        vm.pio.add(bell, 0x80, 1)
        vm.pio.discard(bell)
    vm.close()


def test_the_back_end_is_chosen_by_name() -> None:
    vm = open_vm("replay")
    vcpu = vm.create_vcpu(3, print)
    assert (type(vm), type(vcpu), vcpu.index) == (ReplayVm, ReplayVcpu, 3)
    vcpu.close()
    vm.close()
    with pytest.raises(HypervisorError, match="expected kvm or replay"):
        open_vm("xen")


def test_every_back_end_has_the_same_names() -> None:
    """What machine.py may ask for."""
    for vm, vcpu in ((ReplayVm, ReplayVcpu), (KvmVm, KvmVcpu)):
        assert all(callable(getattr(vm, name)) for name in VM_NAMES)
        assert all(callable(getattr(vcpu, name)) for name in VCPU_NAMES)


@pytest.mark.parametrize("script", [[("jump", 1)], [("outs", 0x80, 1, bytes(65))], [("ins", 0x80, 4, 17)]])
def test_a_script_that_cannot_be_replayed_is_refused(script: list[tuple[Any, ...]]) -> None:
    vm = ReplayVm()
    with pytest.raises(HypervisorError, match="replay"):
        ReplayVcpu(vm, 0, print, script)
    vm.close()


# -- hold and release --------------------------------------------------------------------------------------------------


def test_a_held_vcpu_does_nothing() -> None:
    with rig.replay(SPIN, SPIN, rounds=FOREVER) as machine:
        machine.start()
        for _ in range(50):
            machine.hold()
            before = [vcpu.stats() for vcpu in machine.vcpus]
            results = [vcpu.results() for vcpu in machine.vcpus]
            time.sleep(0.001)
            assert [vcpu.stats() for vcpu in machine.vcpus] == before
            assert [vcpu.results() for vcpu in machine.vcpus] == results
            machine.release()
            machine.spin_until(
                "exits", lambda: all(v.stats()["pio"] > b["pio"] for v, b in zip(machine.vcpus, before, strict=True))
            )


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize(("name", "script"), [("exits", SPIN), ("strings", STRINGS), ("retries", [("retry",)])])
def test_no_wake_up_is_lost_with_exits_in_flight(name: str, script: list[tuple[Any, ...]], cpus: int) -> None:
    """A thousand steps each, while every vCPU goes from exit to exit."""
    kind = {"exits": "pio", "strings": "pio", "retries": "retry"}[name]
    with rig.replay(*[script] * cpus, rounds=FOREVER) as machine:
        machine.start()
        rig.sequence(machine, 1000, lambda vcpu, then: vcpu.stats()[kind] > then[kind])


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_no_wake_up_is_lost_while_idle(cpus: int) -> None:
    """A vCPU that waits inside the hypervisor, as one that executed HLT does."""
    with rig.replay(*[IDLE] * cpus) as machine:
        machine.start()
        rig.sequence(machine, 1000, lambda vcpu, then: not vcpu.is_parked)


@pytest.mark.parametrize("script", [SPIN, IDLE])
def test_no_stop_is_lost(script: list[tuple[Any, ...]]) -> None:
    """Hundreds of threads, stopped at any moment of their lives, after any commands."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    for _ in range(300):
        with rig.replay(script, script, rounds=FOREVER) as machine:
            machine.start(released=dice.random() < 0.8)
            for _ in range(dice.randrange(6)):
                vcpu = dice.choice(machine.vcpus)
                dice.choice((vcpu.hold, vcpu.release, lambda: time.sleep(0.0001)))()
            for vcpu in machine.vcpus:
                vcpu.stop()
            machine.until(
                "both threads ended", lambda: all(machine.saw(rig.ENDED, index) for index in range(2)), timeout=20
            )


def test_parked_is_told_once_for_each_time() -> None:
    """Not again when a parked vCPU is asked again."""
    with rig.replay(IDLE) as machine:
        machine.start(released=False)
        for number in range(200):
            machine.until("parked", lambda: len(machine.events[0]) == number + 1)
            vcpu = machine.vcpus[0]
            vcpu.hold()
            vcpu.hold()
            machine.vm.mailbox.dispatch()
            assert machine.events[0] == [rig.PARKED] * (number + 1)
            before = vcpu.stats()["interrupted"]
            vcpu.release()
            machine.spin_until("it left", lambda: vcpu.stats()["interrupted"] > before)
            vcpu.hold()
