"""A whole VM behind its API in a jail: every route, and nothing that would have been loaded too late."""

import asyncio
import contextlib
import importlib
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import msgspec
import pytest

from propolis import jail, worker
from propolis.http import v5
from propolis.http.app import make_app, serve
from propolis.jail import JailSettings
from propolis.keeper_protocol import StartOptions
from propolis.lifecycle import Request
from propolis.run_directory import RunDirectory
from propolis.spec import CloudInit, DirectBoot, FileBlock, PciPath, Screen, Spec, VirtioBlock
from propolis.virtual_machine import VirtualMachine
from propolis.zygote import Zygote
from tests.machine import kernels
from tests.unit.test_jail import IS_ROOT, LOOPS, USER, Handed, Jails, Outcome, jails

__all__ = ["jails"]  # a fixture

pytestmark = pytest.mark.kvm

PROPERTIES = v5.InstanceProperties(
    id=uuid.UUID(int=7),
    name="jailed",
    description="",
    metadata=v5.InstanceMetadata(
        silo_id=uuid.UUID(int=1),
        project_id=uuid.UUID(int=2),
        sled_id=uuid.UUID(int=3),
        sled_serial="",
        sled_revision=0,
        sled_model="",
    ),
)
SPEC = Spec(
    name="jailed",
    cpus=2,
    memory_mib=64,
    boot=DirectBoot(kernel="kernel"),
    devices=(
        VirtioBlock(name="disk", backend="disk", pci_path=PciPath(0, 4, 0)),
        VirtioBlock(name="seed", backend="seed", pci_path=PciPath(0, 24, 0)),
        Screen(name="screen"),
    ),
    backends={"disk": FileBlock(path="disk"), "seed": CloudInit(user_data="#cloud-config")},
)

late: list[str] = []
"""What is imported inside."""


def _note_import(event: str, arguments: Sequence[object]) -> None:
    if event == "import":
        late.append(str(arguments[0]))


async def _serve(keeper: Handed, listener: socket.socket, ready: int) -> object:
    vm = VirtualMachine(SPEC, PROPERTIES, keeper)
    runner = await serve(make_app(vm), listener)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, vm.lifecycle.request, Request.STOP)
    os.write(ready, b"x")
    record = await vm.run()
    await runner.cleanup()
    return [record.state.value, late]


@pytest.mark.parametrize("loop", LOOPS)
def test_every_route_is_served_from_a_jail(jails: Jails, tmp_path: Path, loop: str) -> None:
    """The VM runs, pauses, is reset, is typed at and stops; clients do what is wrong too."""
    (tmp_path / "kernel").write_bytes(kernels.monitor())
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    keeper = Handed(tmp_path / "kernel", tmp_path / "disk")
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/http"
        listener.bind(path)
        listener.listen()
        begin, ready = os.pipe()

        def live() -> object:
            sys.addaudithook(_note_import)
            with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                return runner.run(_serve(keeper, listener, ready))

        child = jails.start(live, keep=[*keeper.descriptors(), listener.fileno(), ready])
        os.read(begin, 1)
        os.close(begin)
        os.close(ready)
        keeper.close()
        asyncio.run(_drive(path))
        os.kill(child.pid, signal.SIGTERM)
        assert child.finish() == Outcome(["Stopped", []], 0, "")


async def _drive(path: str) -> None:
    async with aiohttp.ClientSession("http://worker", connector=aiohttp.UnixConnector(path)) as client:

        async def ask(
            method: str, what: str, body: object = None, *, raw: bytes | None = None, kind: str = "application/json"
        ) -> int:
            data = raw if raw is not None else b"" if body is None else msgspec.json.encode(body)
            async with client.request(method, f"/instance{what}", data=data, headers={"content-type": kind}) as reply:
                await reply.read()
                assert reply.status < 500, (what, reply.status, await reply.text())
                return reply.status

        assert await ask("PUT", "/state", "Run") == 204
        async with client.ws_connect("/instance/serial?from_start=0") as console:
            await _says(console, b"ready")
            await console.send_bytes(b"hello")
            await _says(console, b"hello")
            await console.send_str("grüße")
            assert await ask("PUT", "/pause") == 204
            assert await ask("PUT", "/resume") == 204
            assert await ask("PUT", "/state", "Reboot") == 204
            await _says(console, b"ready")
            assert await ask("PUT", "/reset") == 204
            await _says(console, b"ready")
        async with client.get("/instance/events?after=0", headers={"accept": "text/event-stream"}) as stream:
            while b"event:" not in await stream.content.readuntil(b"\n\n"):
                pass
        with contextlib.suppress(aiohttp.ClientError):
            async with client.ws_connect("/instance/events?after=0") as events:
                await events.receive(timeout=5)
        for what in (
            "",
            "/spec",
            "/state-monitor?gen=0",
            "/serial/history?from_start=0",
            "/metrics",
            "/log",
            "/migration-status",
        ):
            await ask("GET", what)
        for what in ("/serial/history", "/nothing", "/migrate/x/start", "/disk/disk/status", "/log?most_recent=x"):
            await ask("GET", what)
        assert await ask("GET", "/screenshot") == 200
        await _look(client)
        assert await ask("POST", "/nmi") == 200
        for raw, kind in (
            (b"{", "application/json"),
            (b"\xff\xfe", "application/json; charset=utf-16"),
            (b"x=1", "application/toml"),
        ):
            await ask("PUT", "/state", raw=raw, kind=kind)
            await ask("PUT", "", raw=raw, kind=kind)
        await ask("PUT", "", raw=b" " * 1_000_000)
        assert await ask("PUT", "/shutdown", {"deadline_seconds": 300}) == 204


async def _look(client: aiohttp.ClientSession) -> None:
    """At the screen, compressed; and types something."""
    async with client.ws_connect("/instance/vnc") as viewer, asyncio.timeout(30):
        hello = b"RFB 003.008\n", b"\1", b"\1"
        for said in (*hello, b"\2\0\0\1\0\0\0\x10\3\0\0\0\0\0\2\x80\1\xe0"):
            await viewer.receive()
            await viewer.send_bytes(said)
        await viewer.send_bytes(b"\4\1\0\0\0\0\0a")
        while not (message := await viewer.receive()).data.endswith(b"\0\0\xff\xff"):  # the end of a flush
            assert message.type is aiohttp.WSMsgType.BINARY, message


async def _says(console: aiohttp.ClientWebSocketResponse, words: bytes) -> None:
    said = b""
    async with asyncio.timeout(30):
        while words not in said:
            message = await console.receive()
            assert message.type is aiohttp.WSMsgType.BINARY, message
            said += message.data


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    """As the zygote does it."""
    for name in worker._LATER:
        importlib.import_module(name)
    jail.prepare()


async def test_a_worker_holds_nothing_but_its_vm(tmp_path: Path) -> None:
    """As the zygote makes it: its user, its privileges and what it has open while its guest runs on KVM."""
    uid = USER if IS_ROOT else None
    options = StartOptions(jail=msgspec.Raw(msgspec.json.encode(JailSettings(uid=uid))))
    spec = msgspec.structs.replace(
        SPEC,
        boot=DirectBoot(kernel=str(tmp_path / "kernel")),
        backends={**SPEC.backends, "disk": FileBlock(path=str(tmp_path / "disk"))},
    )
    (tmp_path / "kernel").write_bytes(kernels.monitor())
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with RunDirectory.create(str(tmp_path / "run")) as directory:
        async with await Zygote.spawn() as zygote:
            vm = await zygote.start_vm(directory, spec, PROPERTIES, options)
            try:
                async with (
                    aiohttp.ClientSession(
                        "http://vm", connector=aiohttp.UnixConnector(directory.socket_path)
                    ) as client,
                    client.put("/instance/state", json="Run"),
                    client.ws_connect("/instance/serial?from_start=0") as console,
                ):
                    await _says(console, b"ready")
                    status, open_files = _facts(vm.worker_pid or 0)
            finally:
                vm.kill_all()
                await vm.wait()
                vm.close()
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    if IS_ROOT:
        assert status["Uid"].split() == status["Gid"].split() == [str(USER)] * 4
        assert int(status["CapBnd"], 16) == 0
        paths = [name for name in open_files if name.startswith("/") and not name.startswith(("/dev/null", "/memfd:"))]
        assert sorted(paths) == sorted(["/dev/kvm", str(tmp_path / "disk"), str(tmp_path / "kernel")])


def _facts(pid: int) -> tuple[dict[str, str], list[str]]:
    text = Path(f"/proc/{pid}/status").read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    return status, [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()] if IS_ROOT else []
