"""`propolis-server run-one` as a program, with tiny guests: the life of a VM by HTTP, its console by websocket."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.machine import kernels, tiny
from tests.machine.guest import SLOWER

pytestmark = [pytest.mark.kvm, pytest.mark.program]

SOON = 20 * SLOWER
NIL = "00000000-0000-0000-0000-000000000000"
SERVER = [
    *("env", f"PYTHONPATH={tiny.TREE}", sys.executable, "-c"),
    "import sys; from propolis.daemon import main; sys.exit(main())",
    "run-one",
]


class RefusedError(Exception):
    """The status and the message of an answer that is no success."""


class Server:
    """The program and its client."""

    def __init__(self, process: asyncio.subprocess.Process, client: aiohttp.ClientSession, url: str) -> None:
        self.process = process
        self.client = client
        self.url = url

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """A request that is answered well; what was in the answer."""
        more: dict[str, Any] = {} if body is None else {"json": body}
        async with asyncio.timeout(SOON), self.client.request(method, self.url + path, **more) as reply:
            if reply.status >= 300:
                raise RefusedError(reply.status, (await reply.json())["message"])
            return await reply.json() if reply.status == 200 else None

    async def create(self, cpus: int = 1, extensions: dict[str, Any] | None = None) -> None:
        """A VM with COM1, that boots what the server was started with."""
        spec: dict[str, Any] = {} if extensions is None else {"extensions": extensions}
        metadata = dict.fromkeys(("silo_id", "project_id", "sled_id"), NIL)
        board = {"cpus": cpus, "memory_mb": 64, "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}}}
        components = {"com1": {"type": "serial_port", "component": {"num": "com1"}}}
        await self.ask(
            "PUT",
            "/instance",
            {
                "properties": {
                    "id": NIL,
                    "name": tiny.NAME,
                    "description": "",
                    "metadata": {**metadata, "sled_serial": "", "sled_revision": 0, "sled_model": ""},
                },
                "init": {"method": "Spec", "value": {"spec": {"board": board, "components": components, **spec}}},
            },
        )

    async def run(self) -> None:
        """Starts it."""
        await self.ask("PUT", "/instance/state", "Run")

    async def reaches(self, state: str) -> None:
        """Follows the VM's states as a control plane does."""
        generation = 0
        while True:
            answer = await self.ask("GET", "/instance/state-monitor", {"gen": generation})
            if answer["state"] == state:
                return
            generation = answer["gen"] + 1

    @contextlib.asynccontextmanager
    async def console(self) -> AsyncIterator["Console"]:
        """From the first byte on."""
        async with self.client.ws_connect(self.url + "/instance/serial?from_start=0") as websocket:
            yield Console(websocket)


class Console:
    """COM1, and the person in front of it."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self.websocket = websocket
        self.output = b""

    async def expect(self, text: bytes) -> None:
        """Reads until it says so, and forgets what was before."""
        async with asyncio.timeout(SOON):
            while text not in self.output:
                message = await self.websocket.receive()
                assert message.type is aiohttp.WSMsgType.BINARY, (message, self.output)
                self.output += message.data
        self.output = self.output.partition(text)[2]


@contextlib.asynccontextmanager
async def serving(directory: Path, kernel: bytes = tiny.MONITOR, address: str = "") -> AsyncIterator[Server]:
    """Starts the program; ends it by SIGTERM, and expects that to be enough."""
    image = directory / "kernel"
    image.write_bytes(kernel)
    path = str(directory / "http")
    process = await asyncio.create_subprocess_exec(
        *SERVER, "--kernel", str(image), address or f"unix:{path}", stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(SOON):
            while b"listening" not in (line := await process.stderr.readline()):
                assert line, "the server ended"
        connector = aiohttp.TCPConnector() if address else aiohttp.UnixConnector(path)
        reading = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession(connector=connector) as client:
            yield Server(process, client, f"http://{line.split()[-1].decode() if address else 'vm'}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(SOON):
            log = await reading
            status = await process.wait()
    assert status == 0, log.decode()
    assert not (directory / "http").exists()


async def test_a_life(tmp_path: Path) -> None:
    """Created, run, typed at, reset, paused, powered off by the guest; then another VM in its place."""
    async with serving(tmp_path) as server:
        for _ in range(2):
            await server.create()
            async with server.console() as console:
                await server.run()
                await console.expect(b"ready\r\n")
                await console.websocket.send_bytes(b"hello")
                await console.expect(b"hello")
                await server.ask("PUT", "/instance/reset")
                await console.expect(b"ready\r\n")
                await server.ask("PUT", "/instance/pause")
                await console.websocket.send_bytes(b"later")
                await server.ask("PUT", "/instance/resume")
                await console.expect(b"later")
                await console.websocket.send_str("P")
                message = await console.websocket.receive(timeout=SOON)
                assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 1001, "VM stopped")
            await server.reaches("Destroyed")


async def test_the_power_button(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        await server.create()
        async with server.console() as console:
            await server.run()
            await console.expect(b"ready\r\n")
            await server.ask("PUT", "/instance/shutdown", {"deadline_seconds": 3600})
            await console.expect(b"button\r\n")
        await server.reaches("Destroyed")


async def test_a_guest_that_does_not_heed_it(tmp_path: Path) -> None:
    async with serving(tmp_path, tiny.DEAF) as server:
        await server.create()
        async with server.console() as console:
            await server.run()
            await console.expect(b"ready\r\n")
            await console.websocket.send_bytes(b"S")  # spins with deaf ears
            await server.ask("PUT", "/instance/shutdown", {"deadline_seconds": 0.2})
        await server.reaches("Destroyed")


async def test_a_name_is_held(tmp_path: Path) -> None:
    """From the VM's creation to its end; what has it is named to others, and not ended for them."""
    (tmp_path / "other").mkdir()
    async with serving(tmp_path) as server, serving(tmp_path / "other") as other:
        await server.create()
        with pytest.raises(RefusedError) as refused:
            await other.create()
        holder = f"propolis-server run-one, process {server.process.pid}"
        assert refused.value.args == (409, f"VM {tiny.NAME!r} belongs to {holder}")
        await server.ask("PUT", "/instance/state", "Stop")
        await server.reaches("Destroyed")
        await other.create()


async def test_a_standalone_vm_of_the_name_is_ended(tmp_path: Path) -> None:
    """As by another standalone VM."""
    (tmp_path / "alone").mkdir()
    async with tiny.guest(tmp_path / "alone") as alone, serving(tmp_path) as server:
        await alone.expect("ready", SOON, "the guest's greeting")
        await server.create()
        assert await alone.exit_status() == 0  # its button was pressed
        async with server.console() as console:
            await server.run()
            await console.expect(b"ready\r\n")


async def test_an_nmi_reaches_the_guest(tmp_path: Path) -> None:
    """While it spins with interrupts off, its local APIC not enabled."""
    handler = kernels.say("nmi\r\n") + kernels.power_off()
    kernel = kernels.kernel(kernels.on_nmi(handler) + kernels.say("ready\r\n") + kernels.SPIN)
    async with serving(tmp_path, kernel) as server:
        await server.create()
        async with server.console() as console:
            await server.run()
            await console.expect(b"ready\r\n")
            await server.ask("POST", "/instance/nmi")
            await console.expect(b"nmi\r\n")
        await server.reaches("Destroyed")


async def test_a_running_vm_ends_with_the_server(tmp_path: Path) -> None:
    """On TCP this time."""
    async with serving(tmp_path, address="127.0.0.1:0") as server:
        await server.create(cpus=2)
        async with server.console() as console:
            await server.run()
            await console.expect(b"ready\r\n")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["nowhere"], 2, "expected IP:PORT or unix:PATH"),
        (["127.0.0.1:99999"], 2, "expected IP:PORT or unix:PATH"),
        (["--cmdline", "x", "127.0.0.1:0"], 2, "belong to --kernel"),
        (["192.0.2.1:1"], 1, "listen on 192.0.2.1:1"),
        (["unix:/nowhere/http"], 1, "listen on unix:/nowhere/http"),
    ],
)
async def test_what_cannot_be_served(words: list[str], status: int, message: str) -> None:
    process = await asyncio.create_subprocess_exec(*SERVER, *words, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(SOON):
        _, errors = await process.communicate()
    assert (process.returncode, message in errors.decode()) == (status, True), errors


async def test_an_address_that_is_taken(tmp_path: Path) -> None:
    async with serving(tmp_path):
        process = await asyncio.create_subprocess_exec(
            *SERVER, f"unix:{tmp_path / 'http'}", stderr=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(SOON):
            _, errors = await process.communicate()
        assert process.returncode == 1
        assert b"another program" in errors
