"""Interrupt lines, message-signalled vectors and doorbells, on the replay back end, which records what was raised."""

import functools
import os
import random
import select
import threading

import pytest

from propolis._bus import Window
from propolis._interrupts import Doorbell, IrqLine, MsiVector
from propolis.hypervisor._replay import ReplayVm
from tests import rig


def lines(vm: ReplayVm) -> list[tuple[int, int]]:
    """(input, level) of each change of a line since the last call."""
    return [(pin, level) for kind, pin, level in vm.take_interrupts() if kind == "line"]


# -- lines -------------------------------------------------------------------------------------------------------------


def test_an_input_follows_its_line_and_repeats_nothing() -> None:
    vm = ReplayVm()
    line = IrqLine(vm, 5)
    for level in (False, True, True, False, False, True):
        line.drive(level)
        assert line.state() == (5, level)
        assert vm.line_level(5) == level
    assert lines(vm) == [(5, 1), (5, 0), (5, 1)]


def test_lines_on_one_input_are_ored() -> None:
    vm = ReplayVm()
    first, second, other = IrqLine(vm, 9), IrqLine(vm, 9), IrqLine(vm, 10)
    first.drive(True)
    second.drive(True)
    other.drive(True)
    first.drive(False)
    assert vm.line_level(9)
    assert lines(vm) == [(9, 1), (10, 1)]
    second.drive(False)
    assert lines(vm) == [(9, 0)]
    assert not vm.line_level(9)
    assert vm.line_level(10)


@pytest.mark.parametrize("pin", [-1, -2, 24, 1 << 20])
def test_a_line_that_is_routed_nowhere_raises_nothing(pin: int) -> None:
    """Its level is remembered all the same."""
    vm = ReplayVm()
    line = IrqLine(vm)
    line.reroute(pin)
    line.drive(True)
    assert line.state() == (-1, True)
    assert lines(vm) == []


def test_rerouting_moves_an_asserted_level() -> None:
    """Down at the old input, unless another line holds it up, then up at the new one."""
    vm = ReplayVm()
    line, other = IrqLine(vm, 10), IrqLine(vm, 10)
    line.drive(True)
    line.reroute(11)
    line.reroute(11)
    assert lines(vm) == [(10, 1), (10, 0), (11, 1)]
    line.reroute(-1)
    assert lines(vm) == [(11, 0)]
    other.drive(True)
    line.reroute(10)
    assert lines(vm) == [(10, 1)]
    line.reroute(5)
    assert lines(vm) == [(5, 1)]
    line.drive(False)
    line.reroute(10)
    assert lines(vm) == [(5, 0)]


def test_random_lines_equal_a_plain_model() -> None:
    """The level of every input is the OR of the lines routed to it, after every step."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    vm = ReplayVm()
    made = [IrqLine(vm, dice.randrange(-1, 24)) for _ in range(12)]
    state = [line.state() for line in made]
    levels = dict.fromkeys(range(24), 0)
    for _ in range(5000):
        number = dice.randrange(len(made))
        pin, level = state[number]
        if dice.random() < 0.5:
            level = dice.random() < 0.5
            made[number].drive(level)
        else:
            pin = dice.randrange(-1, 24)
            made[number].reroute(pin)
        state[number] = pin, level
        for changed, value in lines(vm):
            assert levels[changed] != value, "a level that is there already was set again"
            levels[changed] = value
        assert levels == {n: int(any(up and p == n for p, up in state)) for n in range(24)}


# -- message-signalled -------------------------------------------------------------------------------------------------


def test_a_vector_sends_its_present_message() -> None:
    vm = ReplayVm()
    vector = MsiVector(vm)
    vector.configure(0xFEE0_1000, 0x41)
    vector.trigger()
    vector.configure(0xFEE0_2000, 0x42)
    vector.trigger()
    vector.trigger()
    messages = [(0xFEE0_1000, 0x41), (0xFEE0_2000, 0x42), (0xFEE0_2000, 0x42)]
    assert vm.take_interrupts() == [("msi", *message) for message in messages]


def test_a_lent_vector_rings_its_descriptor() -> None:
    """One descriptor for good, which the kernel turns into the interrupt."""
    vm = ReplayVm()
    vector, other = MsiVector(vm), MsiVector(vm)
    vector.configure(0xFEE0_1000, 0x41)
    fd = vector.lend()
    assert vector.lend() == fd != other.lend()
    assert not os.get_inheritable(fd)
    vector.trigger()
    vector.trigger()
    assert os.eventfd_read(fd) == 2
    assert vm.take_interrupts() == []


# -- doorbells ---------------------------------------------------------------------------------------------------------


def test_a_doorbell_counts_and_wakes() -> None:
    vm = ReplayVm()
    bell = Doorbell(vm, "bell")
    vm.mmio.add(bell, 0x1000, 4)
    assert select.select([bell], [], [], 0)[0] == []
    assert bell.drain() == 0
    vm.mmio.write(0x1000, 2, 7)
    vm.mmio.write(0x1002, 2, 7)
    assert select.select([bell], [], [], 0)[0] == [bell]
    assert bell.drain() == 2
    assert bell.drain() == 0
    assert vm.mmio.read(0x1000, 4) == 0
    assert bell.stats() == {"rung": 2}


def test_a_full_doorbell_does_not_block() -> None:
    """A guest that rings 2^64 times without being served stalls nobody."""
    vm = ReplayVm()
    bell = Doorbell(vm, "bell")
    vm.mmio.add(bell, 0x1000, 4)
    os.eventfd_write(bell.fileno(), (1 << 64) - 2)
    vm.mmio.write(0x1000, 4, 0)
    assert bell.drain() == (1 << 64) - 2


def test_every_ring_of_many_vcpus_counts() -> None:
    """In a BAR's window, too."""
    script = [("write", 0x5010, 4, 1), ("retry",), ("out", 0x80, 1, 1)]
    with rig.replay(*[script] * 4, rounds=2000) as machine:
        memory, port = Doorbell(machine.vm, "memory"), Doorbell(machine.vm, "port")
        window = Window("bar")
        window.add(memory, 0x10, 4)
        machine.vm.mmio.add(window, 0x5000, 0x1000)
        machine.vm.pio.add(port, 0x80, 1)
        machine.start()
        got = [0, 0]
        while min(got) < 8000:
            ready = select.select([memory, port], [], [], 20)[0]
            assert ready, f"rings are missing: {got}"
            got = [got[0] + memory.drain(), got[1] + port.drain()]
        machine.hold()
        assert [got[0] + memory.drain(), got[1] + port.drain()] == [8000, 8000]
        assert all(vcpu.is_done for vcpu in machine.vcpus)


# -- the mailbox -------------------------------------------------------------------------------------------------------


def test_events_reach_the_callback_of_their_slot_once() -> None:
    """Bits of one slot add up until they are collected."""
    vm = ReplayVm()
    heard: list[tuple[str, int]] = []
    first = vm.mailbox.register(lambda bits: heard.append(("first", bits)))
    second = vm.mailbox.register(lambda bits: heard.append(("second", bits)))
    vm.mailbox.dispatch()
    vm.mailbox.send(second, 1)
    vm.mailbox.send(first, 1)
    vm.mailbox.send(second, 4)
    vm.mailbox.send(second, 1)
    assert select.select([vm.mailbox], [], [], 0)[0]
    vm.mailbox.dispatch()
    assert heard == [("first", 1), ("second", 5)]
    vm.mailbox.dispatch()
    assert len(heard) == 2
    assert not select.select([vm.mailbox], [], [], 0)[0]


def test_every_slot_there_is() -> None:
    """Also those at the edges of the words that say which are ready."""
    vm = ReplayVm()
    heard: list[int] = []

    def note(number: int, bits: int) -> None:
        heard.append(number)

    for number in range(256):
        assert vm.mailbox.register(functools.partial(note, number)) == number
    with pytest.raises(Exception, match="more than 256 event sources"):
        vm.mailbox.register(print)
    for number in random.Random(1).sample(range(256), 256):
        vm.mailbox.send(number, 1 << 31)
    vm.mailbox.dispatch()
    assert heard == list(range(256))


@pytest.mark.parametrize("slot", [-1, 0, 1, 255, 256])
def test_a_slot_that_nobody_registered_is_refused(slot: int) -> None:
    with pytest.raises(ValueError, match="no slot"):
        ReplayVm().mailbox.send(slot, 1)


def test_one_callback_that_fails_does_not_lose_the_others() -> None:
    vm = ReplayVm()
    heard: list[int] = []

    def fail(bits: int) -> None:
        raise RuntimeError("a bug")

    for callback in (heard.append, fail, heard.append, fail):
        vm.mailbox.send(vm.mailbox.register(callback), 2)
    with pytest.raises(ExceptionGroup, match="event callbacks") as caught:
        vm.mailbox.dispatch()
    assert len(caught.value.exceptions) == 2
    assert heard == [2, 2]


def test_an_event_that_a_callback_sends_is_not_lost() -> None:
    """It is served by the next collection, which the descriptor asks for."""
    vm = ReplayVm()
    heard: list[int] = []

    def again(bits: int) -> None:
        heard.append(bits)
        if len(heard) < 3:
            vm.mailbox.send(0, bits + 1)

    vm.mailbox.register(again)
    vm.mailbox.send(0, 1)
    while select.select([vm.mailbox], [], [], 0)[0]:
        vm.mailbox.dispatch()
    assert heard == [1, 2, 3]


def test_no_event_is_lost_or_doubled_under_threads() -> None:
    """Each of eight threads sends its next event only once its last one was heard: one that is lost is a hang.

    They send without a pause, so most meet a collection that is under way.
    """
    vm = ReplayVm()
    rounds, threads = 2000, 8
    heard = [0] * threads
    turns = [threading.Semaphore(1) for _ in range(threads)]

    def hear(number: int, bits: int) -> None:
        assert bits == 1 << heard[number] % 32
        heard[number] += 1
        turns[number].release()

    def send(number: int) -> None:
        for count in range(rounds):
            if not turns[number].acquire(timeout=20):
                return
            vm.mailbox.send(number, 1 << count % 32)

    for number in range(threads):
        vm.mailbox.register(functools.partial(hear, number))
    senders = [threading.Thread(target=send, args=(number,)) for number in range(threads)]
    for sender in senders:
        sender.start()
    while sum(heard) < rounds * threads:
        assert select.select([vm.mailbox], [], [], 20)[0], f"an event was lost: {heard}"
        vm.mailbox.dispatch()
    for sender in senders:
        sender.join()
    vm.mailbox.dispatch()
    assert heard == [rounds] * threads


def test_no_event_of_a_vcpu_is_lost() -> None:
    """Sixteen vCPUs fail, are released, fail again: each failure is heard once, from threads without the GIL."""
    count, failures = 16, 50
    script = [("retry",), ("fail", 7)]
    with rig.replay(*[script] * count, rounds=failures) as machine:
        machine.start()
        for number in range(failures):
            machine.until(
                f"failure {number} of every vCPU",
                lambda: all(vcpu.is_parked and machine.saw(rig.FAILED, vcpu.index) for vcpu in machine.vcpus),
            )
            assert [vcpu.stats()["failed"] for vcpu in machine.vcpus] == [number + 1] * count
            assert all(sum(bits & rig.FAILED for bits in heard) == rig.FAILED for heard in machine.events)
            for heard in machine.events:
                heard.clear()
            machine.release()
        machine.hold()
        assert all(vcpu.is_done for vcpu in machine.vcpus)
