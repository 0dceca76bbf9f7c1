"""A card on the network of a user: passt is started, answers, ends with its socket, and is started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from propolis import host_network
from propolis import spec as model
from propolis.backends.net.peer import PeerBackend
from propolis.devices.virtio import net
from propolis.devices.virtio.net import VirtioNet
from propolis.errors import BackendError
from propolis.host_network import passt_options, start_passt
from tests.driver import until
from tests.unit.devices.virtio.card import BROADCAST, MAC

if TYPE_CHECKING:
    from collections.abc import Iterator

    from propolis.hypervisor._replay import ReplayVm
    from tests.unit.devices.virtio.rig import MakeRig, Rig


def has_default_route() -> bool:
    """Of this host: passt gives the guest the network that it leads to, and does not start without one."""
    with open("/proc/net/route", encoding="ascii") as routes:
        return any(line.split()[1] == "00000000" for line in routes)


pytestmark = [
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed"),
    pytest.mark.skipif(not has_default_route(), reason="passt needs a default route of this host, and there is none"),
]


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """No passt outlives its socket."""
    yield
    for pid in tuple(host_network._running):
        os.waitpid(pid, 0)
        host_network._running.discard(pid)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def discover() -> bytes:
    """A frame with DHCPDISCOVER, RFC 2131."""
    bootp = struct.pack(">BBBBIHHIIII16s192sI", 1, 1, 6, 0, 0x1234, 0, 0, 0, 0, 0, 0, MAC, b"", 0x6382_5363)
    bootp += bytes([53, 1, 1, 255])
    udp = struct.pack(">HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    ip = struct.pack(">BBHHHBBHI4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, 0, b"\xff" * 4)
    total = sum(struct.unpack(">10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    return BROADCAST + MAC + b"\x08\0" + ip[:10] + struct.pack(">H", ~total & 0xFFFF) + ip[12:] + udp


async def offer(rig: Rig) -> bytes:
    """Asks for an address until there is an answer: its DHCP message."""
    rx, tx = rig.driver.queues[0], rig.driver.queues[1]
    tx.add([rig.ram.put(bytes(12) + discover())])
    tx.kick()
    while True:
        address = rig.ram.take(2048)
        rx.add((), [(address, 2048)])
        rx.kick()
        [(_, written)] = await rx.wait()
        data = rig.vm.memory.read(address, written)[12:]
        if data[12:14] == b"\x08\0" and data[23] == 17 and data[34:38] == struct.pack(">HH", 67, 68):
            return data[42:]


async def start(make_rig: MakeRig, network: model.UserNetwork) -> Rig:
    def device_of(vm: ReplayVm) -> VirtioNet:
        return VirtioNet(vm, "net0", PeerBackend(start_passt(network), lambda: start_passt(network)), mac=MAC)

    rig = await make_rig(device_of)
    rig.driver.begin(size=64)
    return rig


async def test_dhcp_and_a_passt_that_is_killed(
    make_rig: MakeRig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(net, "RECONNECT", 0.02)
    port = free_port()
    rig = await start(make_rig, model.UserNetwork(forward=(f"127.0.0.1/{port}:22",)))
    message = await offer(rig)
    assert message[:4] == b"\2\1\6\0"
    assert message[16:20] != bytes(4)  # an address
    socket.create_connection(("127.0.0.1", port), timeout=5).close()  # it listens there
    [pid] = host_network._running
    os.kill(pid, signal.SIGKILL)
    for _ in range(20):  # also for what passt had sent before
        rig.driver.queues[0].add((), [(rig.ram.take(2048), 2048)])
    rig.driver.queues[0].kick()
    await until(lambda: not rig.device.is_up, "a link that is down")
    await until(lambda: rig.device.is_up, "a link that is up")
    assert pid not in host_network._running
    assert rig.device.stats()["link_breaks"] == 1
    await rig.driver.reset()
    rig.driver.restart(size=64)
    await offer(rig)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(BackendError, match=f"start passt: Failed to bind .*{port}"):
            start_passt(model.UserNetwork(forward=(f"127.0.0.1/{port}:22",)))
    assert not host_network._running


def test_without_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BackendError, match="apt-get install passt"):
        start_passt(model.UserNetwork())


def test_options() -> None:
    """The host itself is reached only where that was asked for."""
    assert passt_options(model.UserNetwork()) == ["--no-map-gw"]
    network = model.UserNetwork(forward=("2222:22", "tcp 127.0.0.1/8080:80", "udp 53"), host=True)
    assert passt_options(network) == ["-t", "2222:22", "-t", "127.0.0.1/8080:80", "-u", "53"]
