"""A VM on the replay hypervisor, served on a unix socket, and a client of it."""

import asyncio
import copy
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import msgspec
from aiohttp import web

from propolis.console.history import ConsoleHistory
from propolis.http import v5, v5_spec
from propolis.http.app import make_app, serve
from propolis.keeper import LocalKeeper
from propolis.lifecycle import Record, Request, State
from propolis.virtual_machine import VirtualMachine
from tests.unit.firmware import images

if TYPE_CHECKING:
    from propolis.http.slot import Create

TIMEOUT = 10.0
URL = "http://vm"
NIL = "00000000-0000-0000-0000-000000000000"
UUID = "6f3c5a3e-1f0e-4b5e-9d0f-0a4b6c2d1e11"

PROPERTIES: dict[str, Any] = {
    "id": UUID,
    "name": "web",
    "description": "a VM of the tests",
    "metadata": {
        "silo_id": NIL,
        "project_id": NIL,
        "sled_id": NIL,
        "sled_serial": "serial",
        "sled_revision": 1,
        "sled_model": "model",
    },
}
BOARD: dict[str, Any] = {
    "cpus": 1,
    "memory_mb": 16,
    "chipset": {"type": "i440_fx", "value": {"enable_pcie": False}},
}


def kernel(tmp_path: Path) -> str:
    """A file that the loaders take for a kernel."""
    path = tmp_path / "kernel"
    if not path.exists():
        path.write_bytes(images.elf())
    return str(path)


def wire_spec(tmp_path: Path) -> dict[str, Any]:
    """The spec of a VM with COM1 and COM2, as JSON."""
    return {
        "board": copy.deepcopy(BOARD),
        "components": {
            "com1": {"type": "serial_port", "component": {"num": "com1"}},
            "com2": {"type": "serial_port", "component": {"num": "com2"}},
            "panic": {"type": "qemu_pvpanic", "component": {"enable_isa": True}},
        },
        "extensions": {"boot": {"type": "direct", "kernel": kernel(tmp_path)}},
    }


def ensure_body(tmp_path: Path) -> dict[str, Any]:
    """The body of PUT /instance for that VM."""
    init = {"method": "Spec", "value": {"spec": wire_spec(tmp_path)}}
    return {"properties": copy.deepcopy(PROPERTIES), "init": init}


class Answer(NamedTuple):
    """A reply, its body decoded."""

    status: int
    body: Any
    headers: Any


class Served:
    """A VM and its client."""

    def __init__(self, client: aiohttp.ClientSession, path: str, app: web.Application) -> None:
        self.app = app
        self.client = client
        self.path = path
        self.made: list[VirtualMachine] = []
        self.tasks: list[asyncio.Task[Record]] = []

    @property
    def vm(self) -> VirtualMachine:
        """The latest VM."""
        return self.made[-1]

    def run(self, vm: VirtualMachine) -> VirtualMachine:
        """Starts the VM's task."""
        self.made.append(vm)
        self.tasks.append(asyncio.create_task(vm.run()))
        return vm

    async def ask(self, method: str, path: str, body: object = None, **more: Any) -> Answer:
        """A request; `body` becomes JSON."""
        if body is not None:
            more["data"] = msgspec.json.encode(body)
            more["headers"] = {"Content-Type": "application/json", **more.get("headers", {})}
        async with asyncio.timeout(TIMEOUT), self.client.request(method, URL + path, **more) as reply:
            data = await reply.read()
            is_json = reply.content_type == "application/json"
            return Answer(reply.status, msgspec.json.decode(data) if is_json else data, reply.headers)

    async def put(self, path: str, body: object = None) -> Answer:
        """PUT."""
        return await self.ask("PUT", path, body)

    async def get(self, path: str) -> Answer:
        """GET."""
        return await self.ask("GET", path)

    async def reaches(self, state: State) -> Record:
        """Waits for a state of the VM."""
        lifecycle = self.vm.lifecycle
        async with asyncio.timeout(TIMEOUT):
            while (record := lifecycle.record).state is not state:
                assert not lifecycle.is_over, record
                await lifecycle.wait_for(record.generation + 1)
        return record

    async def running(self) -> None:
        """The VM runs."""
        assert (await self.put("/instance/state", "Run")).status == 204
        await self.reaches(State.RUNNING)


async def until(is_so: Callable[[], bool], what: str) -> None:
    """Waits for what nothing tells of."""
    try:
        async with asyncio.timeout(TIMEOUT):
            while not is_so():  # noqa: ASYNC110 -- nobody sets an event for it
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"missing: {what}") from None


@asynccontextmanager
async def serving(
    tmp_path: Path, vm: VirtualMachine | None = None, *, create: "Create | None" = None, **options: Any
) -> AsyncIterator[Served]:
    """Serves what is given, on a unix socket; the VM is stopped at the end."""
    path = str(tmp_path / "http")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    app = make_app(vm, create=create, **options)
    runner = await serve(app, listener)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as client:
        served = Served(client, path, app)
        if vm is not None:
            served.run(vm)
        try:
            yield served
        finally:
            for made in served.made:
                made.lifecycle.request(Request.STOP)
            async with asyncio.timeout(TIMEOUT):
                await asyncio.gather(*served.tasks)
                await runner.cleanup()


def build(tmp_path: Path, *, history: ConsoleHistory | None = None, is_destroyed: bool = False) -> VirtualMachine:
    """That VM."""
    request = msgspec.convert(ensure_body(tmp_path), v5.InstanceEnsureRequest)
    assert isinstance(request.init, v5.InitializeBySpec)
    spec = v5_spec.to_spec(request.init.value.spec, request.properties.name)
    return VirtualMachine(
        spec, request.properties, LocalKeeper(), history=history, is_destroyed=is_destroyed, hypervisor="replay"
    )


@asynccontextmanager
async def one_vm(tmp_path: Path, **options: Any) -> AsyncIterator[Served]:
    """Serves that VM, created and not started."""
    history = options.pop("history", None)
    async with serving(tmp_path, build(tmp_path, history=history), **options) as served:
        yield served


@asynccontextmanager
async def empty(tmp_path: Path, **options: Any) -> AsyncIterator[Served]:
    """Serves no VM yet; PUT /instance makes one, as propolis-server run-one does."""
    servers: list[Served] = []

    async def create(request: v5.InstanceEnsureRequest) -> VirtualMachine:
        if isinstance(request.init, v5.InitializeAsMigrationTarget):
            raise v5_spec.no_migration()
        spec = v5_spec.to_spec(request.init.value.spec, request.properties.name)
        vm = VirtualMachine(spec, request.properties, LocalKeeper(), is_destroyed=True, hypervisor="replay")
        return servers[0].run(vm)

    async with serving(tmp_path, create=create, extra_fields=False, **options) as served:
        servers.append(served)
        yield served
