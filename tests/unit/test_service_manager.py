"""What the service manager hears, on a socket of the kind that it listens on."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis.service_manager import ServiceManager

TIMEOUT = 20


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(TIMEOUT)
        if request.param == "path":
            listener.bind(f"{tmp_path}/notify")
            yield listener, f"{tmp_path}/notify"
        else:
            listener.bind(f"\0{tmp_path}/notify")
            yield listener, f"@{tmp_path}/notify"


async def test_what_it_hears(manager: tuple[socket.socket, str]) -> None:
    listener, address = manager
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    told = ServiceManager.take(environ)
    assert environ == {"HOME": "/"}
    told.ready("well")
    assert listener.recv(100) == b"READY=1\nSTATUS=well"
    told.reloading()
    assert listener.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    told.stopping()
    assert listener.recv(100) == b"STOPPING=1"
    listener.setblocking(False)
    alive = asyncio.create_task(told.keep_alive())
    for _ in range(3):
        async with asyncio.timeout(TIMEOUT):
            assert await asyncio.get_running_loop().sock_recv(listener, 100) == b"WATCHDOG=1"
    alive.cancel()
    await asyncio.gather(alive, return_exceptions=True)


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "2000000"}, 2.0),
        ({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"NOTIFY_SOCKET": "vsock:1:2"}, None),
    ],
)
async def test_without_one(environ: dict[str, str], seconds: float | None) -> None:
    told = ServiceManager.take(dict(environ))
    assert told.watchdog_seconds == seconds
    told.ready("nobody hears it")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await ServiceManager.take({}).keep_alive()


async def test_a_manager_that_is_gone(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    ServiceManager.take({"NOTIFY_SOCKET": f"{tmp_path}/none"}).ready("x")
    assert "service manager not told" in caplog.text
