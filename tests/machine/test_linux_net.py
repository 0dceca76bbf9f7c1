"""Linux on the network: by passt as a user has it, and by a tap with two pairs of queues. Its own host: the lab.

Where tests are repeated many times only (make soak): it takes a start of the lab for itself, with the kernel's modules
for networks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.machine.complaints import check_complaints
from tests.machine.linux import TIMEOUT, linux

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.machine.guest import Guest

ROUNDS = int(os.environ.get("ROUNDS", "2"))
if ROUNDS < 10 or not os.environ.get("KVM_LAB") or not os.path.exists("/dev/net/tun"):
    pytest.skip("make soak runs this in the lab", allow_module_level=True)

pytestmark = [
    pytest.mark.os,
    pytest.mark.shared,
    pytest.mark.timeout(TIMEOUT),
    pytest.mark.asyncio(loop_scope="module"),
]

MORE = """
[net_dev.outside]
type = "user"
host = true
forward = ["127.0.0.1/2222:22"]
[dev.outside]
driver = "pci-virtio-net"
net_dev = "outside"
pci-path = "0.5.0"

[net_dev.beside]
type = "tap"
interface = "vm0"
[dev.beside]
driver = "pci-virtio-net"
net_dev = "beside"
pci-path = "0.6.0"
queues = 2
mtu = 9000
"""
LEASE = '[ "$1" != bound ] && exit; ip addr add $ip/$mask dev $interface && ip route add default via $router'
HOST = "10.55.0.1"  # the gateway of the guest, which is this host
DATA = random.Random(1).randbytes(8 << 20)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """The guest, logged in, its cards found."""
    ip("link", "add", "outside", "type", "dummy")
    ip("addr", "add", "10.55.0.2/24", "dev", "outside")
    ip("link", "set", "outside", "up")
    ip("route", "add", "default", "via", HOST)
    directory: Path = tmp_path_factory.mktemp("net")
    async with linux(directory, cpus=2, more=MORE) as guest:
        ip("addr", "add", "10.66.0.1/24", "dev", "vm0")
        ip("link", "set", "vm0", "mtu", "9000")
        await guest.boot()
        await guest.login()
        (await guest.run("modprobe virtio_net")).check()
        yield guest
        await check_complaints(guest)
        assert await guest.poweroff() == 0


async def serve(host: str, port: int) -> tuple[asyncio.Server, list[bytes]]:
    """Sends DATA to whoever connects, and keeps what comes."""
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(DATA)
        await writer.drain()
        writer.write_eof()
        heard.append(await reader.read(-1))
        writer.close()

    return await asyncio.start_server(talk, host, port), heard


async def test_cards(vm: Guest) -> None:
    (await vm.run("ip link set eth0 up; ip link set eth1 up")).check()
    assert (await vm.run("cat /sys/class/net/eth0/carrier /sys/class/net/eth1/carrier")).check().split() == ["1", "1"]
    assert (await vm.run("cat /sys/class/net/eth1/mtu")).check().strip() == "9000"
    assert (await vm.run("ls -d /sys/class/net/eth1/queues/rx-* | wc -l")).check().strip() == "2"


async def test_dhcp_and_tcp_through_passt(vm: Guest) -> None:
    (await vm.run(f"(echo '#!/bin/sh'; echo '{LEASE}') >/tmp/lease; chmod +x /tmp/lease; ip link set eth0 up")).check()
    (await vm.run("udhcpc -n -q -i eth0 -s /tmp/lease")).check()
    assert "10.55.0.2/24" in (await vm.run("ip addr show eth0")).check()
    server, heard = await serve("127.0.0.1", 4000)
    async with server:
        got = (await vm.run(f"dd if=/dev/zero bs=1000 count=1000 | nc {HOST} 4000 | md5sum", 120)).check()
    assert hashlib.md5(DATA, usedforsecurity=False).hexdigest() in got
    assert [len(part) for part in heard] == [1000000]


async def test_a_forwarded_port(vm: Guest) -> None:
    (await vm.run("(echo hello from the guest | nc -l -p 22 >/dev/null 2>&1) & true")).check()
    said = b""
    for _ in range(100):
        with contextlib.suppress(ConnectionError):
            reader, writer = await asyncio.open_connection("127.0.0.1", 2222)
            said = await asyncio.wait_for(reader.read(-1), 30)
            writer.close()
        if said:
            break
        await asyncio.sleep(0.2)
    assert said == b"hello from the guest\n"


async def test_tap(vm: Guest) -> None:
    (await vm.run("ip addr add 10.66.0.2/24 dev eth1; ip link set eth1 up")).check()
    (await vm.run("ping -c 5 -s 8900 10.66.0.1")).check()
    server, heard = await serve("10.66.0.1", 4001)
    async with server:
        got = (await vm.run("dd if=/dev/zero bs=1000 count=1000 | nc 10.66.0.1 4001 | md5sum", 120)).check()
    assert hashlib.md5(DATA, usedforsecurity=False).hexdigest() in got
    assert [len(part) for part in heard] == [1000000]


async def test_the_cards_are_let_go_and_found_again(vm: Guest) -> None:
    for _ in range(ROUNDS):
        (await vm.run("modprobe -r virtio_net && modprobe virtio_net")).check()
    (await vm.run("ip addr add 10.66.0.2/24 dev eth1; ip link set eth1 up")).check()
    (await vm.run("ping -c 2 10.66.0.1")).check()
