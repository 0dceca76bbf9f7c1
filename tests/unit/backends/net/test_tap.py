"""A card on a tap of this host's kernel, and the host at its other end."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from propolis import spec as model
from propolis.backends.net.tap import TapBackend
from propolis.devices.virtio import net
from propolis.devices.virtio.net import VirtioNet
from propolis.errors import BackendError
from propolis.host_network import open_tap
from tests.driver import until
from tests.unit.devices.virtio.card import BROADCAST, MAC, NEEDS_CSUM, OTHER, TCP4, frame, header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from propolis.hypervisor._replay import ReplayVm
    from tests.unit.devices.virtio.rig import MakeRig, Rig

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK), reason="taps need root and /dev/net/tun"
)
ETH_P_ALL = 3
KIND = 0x88B5  # IEEE 802, for experiments


def name_of(index: int) -> str:
    """The interface, which nobody else has."""
    return f"ptest{os.getpid() % 100000}-{index}"


def ip(*words: str) -> bool:
    """A command of ip(8); whether it was done."""
    return subprocess.run(["ip", *words], check=False).returncode == 0


@contextlib.contextmanager
def wire(interface: str) -> Iterator[socket.socket]:
    """Reads and writes frames at the host's side."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as end:
        end.bind((interface, ETH_P_ALL))
        end.settimeout(10)
        yield end


def received(end: socket.socket) -> bytes:
    """The next of our own frames: the host sends others when an interface comes up."""
    while True:
        data, (_, _, packet_type, _, _) = end.recvfrom(1 << 17)
        if packet_type != socket.PACKET_OUTGOING and struct.unpack_from(">H", data, 12)[0] in (KIND, 0x0800):
            return data


async def start(make_rig: MakeRig, interface: str, queues: int = 1, **how: object) -> Rig:
    """A card whose driver is ready."""

    def device_of(vm: ReplayVm) -> VirtioNet:
        fds = open_tap(model.Tap(interface=interface), queues)
        return VirtioNet(vm, "net0", TapBackend(fds), mac=MAC)

    rig = await make_rig(device_of)
    rig.driver.begin(size=64)
    return rig


async def arriving(rig: Rig, queue: int = 0) -> tuple[bytes, bytes]:
    """The next of our own frames that the guest gets, with its header."""
    ring = rig.driver.queues[queue]
    while True:
        address = rig.ram.take(66000)
        ring.add((), [(address, 66000)])
        ring.kick()
        [(_, written)] = await ring.wait()
        data = rig.vm.memory.read(address, written)
        rig.ram.next = address
        if struct.unpack_from(">H", data, 24)[0] == KIND:
            return data[:12], data[12:]


async def test_frames_both_ways(make_rig: MakeRig) -> None:
    name = name_of(1)
    rig = await start(make_rig, name)
    with wire(name) as end:
        rig.driver.queues[1].add([rig.ram.put(header() + frame(to=BROADCAST, source=MAC, kind=KIND))])
        rig.driver.queues[1].kick()
        await rig.driver.queues[1].wait()
        assert received(end) == frame(to=BROADCAST, source=MAC, kind=KIND)
        end.send(frame(200, to=MAC, kind=KIND))
        head, got = await arriving(rig)
        assert got == frame(200, to=MAC, kind=KIND)
        assert head[10:] == b"\1\0"
    assert name in {found for _, found in socket.if_nameindex()}
    assert rig.device.is_up


async def test_a_large_segment_is_taken_whole(make_rig: MakeRig) -> None:
    """TCP segmentation is left to the host: it sees one segment of 30000 bytes."""
    name = name_of(2)
    rig = await start(make_rig, name)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + 30000, 1, 0, 64, 6, 0, bytes([10, 9, 8, 7]), bytes([10, 9, 8, 6]))
    total = sum(struct.unpack(">10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack(">H", ~total & 0xFFFF) + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 512, 0, 0)
    data = BROADCAST + MAC + b"\x08\0" + ip + tcp + bytes(30000)
    with wire(name) as end:
        rig.driver.queues[1].add([rig.ram.put(header(NEEDS_CSUM, TCP4, 54, 1448, 34, 16) + data)])
        rig.driver.queues[1].kick()
        await rig.driver.queues[1].wait()
        assert received(end)[:54] == data[:54]


async def test_59_what_the_kernel_refuses_is_counted(make_rig: MakeRig) -> None:
    """EIO: the host took the interface down; it works again once that is up."""
    name = name_of(8)
    rig = await start(make_rig, name)
    for state in ("down", "up"):
        assert ip("link", "set", name, state)
        rig.driver.queues[1].add([rig.ram.put(header() + frame(60))])
        rig.driver.queues[1].kick()
        await rig.driver.queues[1].wait()
    stats = rig.device.stats()
    assert (stats["tx_packets"], stats["tx_errors"], stats["link_up"]) == (1, 1, 1)


async def test_pairs(make_rig: MakeRig) -> None:
    """Queues that the driver does not use get no frames."""
    name = name_of(3)
    rig = await start(make_rig, name, queues=3)
    with wire(name) as end:
        for number in range(30):
            end.send(frame(100, to=MAC, source=OTHER[:5] + bytes([number]), kind=KIND))
        for _ in range(30):
            await arriving(rig)
        answer = rig.ram.put(b"\xee")
        control = rig.driver.queues[6]
        control.add([rig.ram.put(b"\4\0\3\0")], [answer])
        control.kick()
        await control.wait()
        assert rig.vm.memory.read(answer[0], 1) == b"\0"
        for queue in (1, 3, 5):
            data = frame(60 + queue, to=BROADCAST, source=MAC, kind=KIND)
            rig.driver.queues[queue].add([rig.ram.put(header() + data)])
            rig.driver.queues[queue].kick()
            await rig.driver.queues[queue].wait()
            assert received(end) == data
    await rig.driver.reset()


async def test_without_offloads_none_come(make_rig: MakeRig) -> None:
    """The kernel completes checksums for a driver that cannot."""
    name = name_of(4)

    def device_of(vm: ReplayVm) -> VirtioNet:
        return VirtioNet(vm, "net0", TapBackend(open_tap(model.Tap(interface=name), 1)), mac=MAC)

    rig = await make_rig(device_of)
    rig.driver.begin(net.F_MRG_RXBUF, size=64)
    with wire(name) as end:
        end.send(frame(100, to=MAC, kind=KIND))
        assert (await arriving(rig))[0] == header(buffers=1)


async def test_a_tap_that_is_deleted(make_rig: MakeRig) -> None:
    name = name_of(5)
    rig = await start(make_rig, name)
    for _ in range(64):  # also for what the host sends by itself
        rig.driver.queues[0].add((), [(rig.ram.take(2048), 2048)])
    rig.driver.queues[0].kick()
    await until(lambda: rig.device._reading, "a card that waits for frames")
    assert ip("link", "delete", name)
    rig.driver.queues[1].add([rig.ram.put(header() + frame())])
    rig.driver.queues[1].kick()
    await until(lambda: not rig.device.is_up, "a link that is down")
    assert rig.driver.device_config(6, 2) & 1 == 0


def test_refusals() -> None:
    name = name_of(6)
    with pytest.raises(BackendError, match="put it on bridge 'nosuchbridge'"):
        open_tap(model.Tap(interface=name, bridge="nosuchbridge"), 1)
    first = open_tap(model.Tap(interface=name), 1)
    with pytest.raises(BackendError, match=f"open tap '{name}': Device or resource busy"):
        open_tap(model.Tap(interface=name), 1)
    for fd in first:
        os.close(fd)
    with pytest.raises(BackendError, match="open tap 'lo'"):
        open_tap(model.Tap(interface="lo"), 1)


def test_a_name_by_the_kernel_and_a_bridge() -> None:
    bridge = name_of(7)
    assert ip("link", "add", bridge, "type", "bridge")
    try:
        [fd] = open_tap(model.Tap(bridge=bridge), 1)
        try:
            [port] = os.listdir(f"/sys/class/net/{bridge}/brif")
            assert port.startswith("tap")
            assert int(Path(f"/sys/class/net/{port}/flags").read_text(), 16) & 1
        finally:
            os.close(fd)
    finally:
        ip("link", "delete", bridge)
