"""virtio-console from both sides: the guest's driver, and the clients of its ports."""

import asyncio
import contextlib
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from propolis.devices.virtio.console import CONTROL_RX, CONTROL_TX, Event, PortSetting, VirtioConsole, receive_queue
from propolis.host_sockets import HostListener
from tests.driver import F_VERSION_1, NEEDS_RESET, until
from tests.unit.devices.virtio.hammer import hammer
from tests.unit.devices.virtio.rig import MakeRig, Rig
from tests.unit.devices.virtio.vsock_guest import read

AGENT = "org.qemu.guest_agent.0"
PORTS = (("hvc", True), (AGENT, False), ("third", False))


class Guest:
    """A driver with buffers in the receive queues."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig = rig
        self.folder = folder
        self.places: dict[tuple[int, int], tuple[int, int]] = {}

    def begin(self, wanted: int | None = None) -> None:
        self.rig.driver.begin(wanted)
        self.feed()

    def feed(self) -> None:
        """Receive buffers for everything."""
        self.places.clear()
        for queue in (CONTROL_RX, *(receive_queue(port) for port in range(len(PORTS)))):
            self.give(queue, 16, 64 if queue == CONTROL_RX else 16)

    def give(self, index: int, count: int, size: int) -> None:
        queue = self.rig.driver.queues[index]
        for _ in range(count):
            at = self.rig.ram.take(size)
            self.places[index, queue.add([], [(at, size)])] = at, size
        queue.kick()

    async def receive(self, index: int) -> bytes:
        """What came into the next buffer, which goes back."""
        queue = self.rig.driver.queues[index]
        found = await queue.wait()
        data = b""
        for head, written in found:
            at, size = self.places.pop((index, head))
            data += self.rig.vm.memory.read(at, written)
            self.places[index, queue.add([], [(at, size)])] = at, size
        queue.kick()
        return data

    async def hears(self, event: Event, port: int, value: int = 1, name: bytes = b"") -> None:
        assert await self.control() == (port, event, value, name)

    async def control(self) -> tuple[int, int, int, bytes]:
        queue = self.rig.driver.queues[CONTROL_RX]
        if not hasattr(self, "_heard"):
            self._heard: list[bytes] = []

        def there() -> bool:
            for head, written in queue.used():
                at, size = self.places.pop((CONTROL_RX, head))
                self._heard.append(self.rig.vm.memory.read(at, written))
                self.places[CONTROL_RX, queue.add([], [(at, size)])] = at, size
                queue.kick()
            return bool(self._heard)

        await until(there, "a control message")
        message = self._heard.pop(0)
        return *struct.unpack_from("<IHH", message), message[8:]

    def say(self, event: int, port: int = 0, value: int = 1) -> None:
        self.send(CONTROL_TX, struct.pack("<IHH", port, event, value))

    def send(self, index: int, data: bytes) -> None:
        queue = self.rig.driver.queues[index]
        queue.used()
        queue.add([self.rig.ram.put(data)])
        queue.kick()

    async def introduced(self) -> None:
        """The driver knows all ports, and has the agent's open."""
        self.say(Event.DEVICE_READY)
        for port in range(len(PORTS)):
            await self.hears(Event.DEVICE_ADD, port)
        for port, (name, is_console) in enumerate(PORTS):
            self.say(Event.PORT_READY, port)
            if is_console:
                await self.hears(Event.CONSOLE_PORT, port)
            await self.hears(Event.PORT_NAME, port, 1, name.encode())
        self.say(Event.PORT_OPEN, 1)

    def client(self, port: int = 1) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(self.folder / PORTS[port][0]))
        client.setblocking(False)
        return client

    @property
    def stats(self) -> dict[str, int]:
        return dict(self.rig.device.stats())

    async def idle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


@pytest_asyncio.fixture
async def guest(make_rig: MakeRig, tmp_path: Path) -> AsyncIterator[Guest]:
    with ExitStack() as stack:
        ports = []
        for name, is_console in PORTS:
            listener = HostListener(str(tmp_path / name))
            stack.callback(listener._name.release_now)
            listener.socket.setblocking(False)
            ports.append(PortSetting(name, is_console, listener.socket))
        yield Guest(await make_rig(lambda vm: VirtioConsole(vm, "console", ports)), tmp_path)


RX, TX = receive_queue(1), receive_queue(1) + 1


async def test_a_client_and_a_program_of_the_guest(guest: Guest) -> None:
    guest.begin()
    assert guest.rig.driver.device_config(4, 4) == len(PORTS)
    await guest.introduced()
    with guest.client() as client:
        await guest.hears(Event.PORT_OPEN, 1)
        client.send(b"question")
        assert await guest.receive(RX) == b"question"
        guest.send(TX, b"answer")
        assert await read(client, 6) == b"answer"
    await guest.hears(Event.PORT_OPEN, 1, 0)
    with guest.client() as client:
        await guest.hears(Event.PORT_OPEN, 1)
        client.send(b"again")
        assert await guest.receive(RX) == b"again"


async def test_a_client_that_was_there_before(guest: Guest) -> None:
    """What it sent waits for the program of the guest."""
    with guest.client() as client:
        client.send(b"early")
        guest.begin()
        guest.say(Event.DEVICE_READY)
        for port in range(len(PORTS)):
            await guest.hears(Event.DEVICE_ADD, port)
        guest.say(Event.PORT_READY, 1)
        await guest.hears(Event.PORT_NAME, 1, 1, AGENT.encode())
        await guest.hears(Event.PORT_OPEN, 1)
        await guest.idle()
        assert guest.rig.driver.queues[RX].used() == []
        guest.say(Event.PORT_OPEN, 1)
        assert await guest.receive(RX) == b"early"


async def test_much_through_small_buffers(guest: Guest) -> None:
    guest.begin()
    await guest.introduced()
    content = random.Random(1).randbytes(20_000)
    with guest.client() as client:
        await guest.hears(Event.PORT_OPEN, 1)
        sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(client, content))
        got = b""
        while len(got) < len(content):
            got += await guest.receive(RX)
        await sending
        assert got == content


async def test_one_client_at_a_time(guest: Guest) -> None:
    """The second is sent away; the next one is not, also while the guest does not look and the first left data."""
    guest.begin()
    await guest.introduced()
    guest.say(Event.PORT_OPEN, 1, 0)
    with guest.client() as first:
        await guest.hears(Event.PORT_OPEN, 1)
        with guest.client() as second:
            assert await read(second, 1) == b""
        first.send(b"nobody reads this")
        await guest.idle()
    with guest.client() as third:
        await until(lambda: guest.stats["clients"] == 1, "the third client")
        guest.say(Event.PORT_OPEN, 1)
        third.send(b"from the third")
        assert await guest.receive(RX) == b"from the third"


async def test_a_port_without_a_client(guest: Guest) -> None:
    guest.begin()
    await guest.introduced()
    guest.send(TX, b"x" * 1000)
    await until(lambda: guest.stats["dropped_bytes"] == 1000, "what was dropped")


async def test_a_client_that_does_not_read(guest: Guest) -> None:
    """It holds its port up, bounded by one buffer, and no other; nothing is lost."""
    guest.begin()
    await guest.introduced()
    with guest.client() as client, guest.client(2) as other:
        queue = guest.rig.driver.queues[TX]
        pieces = 100
        for number in range(pieces):
            queue.add([guest.rig.ram.put(bytes([number]) * 20_000)])
        queue.kick()
        await guest.idle()
        assert len(queue.chains) - len(queue.used()) > 0
        assert len(guest.rig.device._ports[1]._outgoing) <= 20_000
        guest.send(receive_queue(2) + 1, b"another port")
        assert await read(other, 12) == b"another port"
        assert await read(client, pieces * 20_000) == b"".join(bytes([n]) * 20_000 for n in range(pieces))


async def test_a_client_goes_while_it_holds_up(guest: Guest) -> None:
    guest.begin()
    await guest.introduced()
    queue = guest.rig.driver.queues[TX]
    with guest.client():
        for _ in range(100):
            queue.add([guest.rig.ram.put(bytes(20_000))])
        queue.kick()
        await guest.idle()
    await until(lambda: queue.used() is not None and not queue.chains, "the last buffer")


async def test_a_driver_without_ports(guest: Guest) -> None:
    """It has the first one alone, without anything being said."""
    guest.begin(1 << F_VERSION_1)
    with guest.client(0) as client:
        client.send(b"hello")
        assert await guest.receive(0) == b"hello"
        guest.send(1, b"and you")
        assert await read(client, 7) == b"and you"
    guest.say(Event.DEVICE_READY)
    await until(lambda: guest.stats["bad_messages"] == 1, "a message that is none")


@pytest.mark.parametrize(
    ("port", "event"), [(len(PORTS), Event.PORT_READY), (0xFFFF_FFFF, Event.PORT_OPEN), (0, 99), (0, Event.DEVICE_ADD)]
)
async def test_control_that_makes_no_sense(guest: Guest, port: int, event: int) -> None:
    guest.begin()
    guest.say(event, port)
    guest.send(CONTROL_TX, b"short")
    await until(lambda: guest.stats["bad_messages"] == 2, "messages that are none")
    await guest.introduced()


async def test_a_flood_of_control_is_bounded(guest: Guest) -> None:
    """A driver that asks without taking answers: each question is answered once in the end."""
    guest.rig.driver.begin()
    queue = guest.rig.driver.queues[CONTROL_TX]
    for _ in range(10):
        for port in range(len(PORTS)):
            for event in (Event.DEVICE_READY, Event.PORT_READY):
                queue.used()
                queue.add([guest.rig.ram.put(struct.pack("<IHH", port, event, 1))])
        queue.kick()
        await until(lambda: queue.used() is not None and not queue.chains, "the last message being taken")
    assert len(guest.rig.device._control) == 2 * len(PORTS) + 1


async def test_a_reset_keeps_the_client(guest: Guest) -> None:
    guest.begin()
    await guest.introduced()
    with guest.client() as client:
        await guest.hears(Event.PORT_OPEN, 1)
        await guest.rig.driver.reset()
        guest.rig.driver.restart()
        guest.feed()
        client.send(b"still here")
        guest.say(Event.PORT_READY, 1)
        await guest.hears(Event.PORT_NAME, 1, 1, AGENT.encode())
        await guest.hears(Event.PORT_OPEN, 1)
        guest.say(Event.PORT_OPEN, 1)
        assert await guest.receive(RX) == b"still here"


async def test_a_pause_keeps_all(guest: Guest) -> None:
    guest.begin()
    await guest.introduced()
    with guest.client() as client:
        await guest.hears(Event.PORT_OPEN, 1)
        guest.rig.device.pause()
        await guest.rig.device.drained()
        client.send(b"meanwhile")
        guest.send(TX, b"from the guest")
        await guest.idle()
        assert guest.rig.driver.queues[RX].used() == []
        guest.rig.device.resume()
        assert await guest.receive(RX) == b"meanwhile"
        assert await read(client, 14) == b"from the guest"


async def test_broken_rings(guest: Guest) -> None:
    for index in (CONTROL_TX, TX):
        guest.begin()
        queue = guest.rig.driver.queues[index]
        queue.set_desc(0, 1 << 50, 64)
        queue.offer(0)
        queue.kick()
        await until(lambda: guest.rig.driver.status & NEEDS_RESET, "a device that needs a reset")
        await guest.rig.driver.reset()


def _control(chance: random.Random) -> bytes:
    port = chance.choice((0, 1, 2, 3, chance.getrandbits(32)))
    return struct.pack("<IHH", port, chance.choice((0, 3, 6, chance.getrandbits(16))), chance.choice((0, 1, 1)))


async def test_random_drivers(guest: Guest, rounds: int) -> None:
    """Beside clients that talk, come and go."""
    for seed in [7, *(random.randrange(1 << 32) for _ in range(rounds - 1))]:
        clients = [guest.client(port) for port in range(3)]
        for client in clients:
            client.send(os.urandom(5000))
        await hammer(guest.rig, seed, {CONTROL_TX: _control})
        for client in clients:
            with contextlib.suppress(BlockingIOError):
                client.recv(1 << 20)
            client.close()
        await guest.rig.driver.reset()
        guest.rig.driver.queues.clear()
        guest.rig.ram.next = guest.rig.ram.base
