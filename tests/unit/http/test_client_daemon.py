"""The client and the command line against the daemon: many VMs, and what only a daemon has."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from propolis import __version__
from propolis.errors import ConfigError
from propolis.http import v5
from propolis.http.client import Client
from propolis.http.client_replies import DeniedError, UnknownVmError, VmExistsError, VmIsOverError
from propolis.spec import DirectBoot, Spec
from tests.unit.daemons import TIMEOUT, Server, server
from tests.unit.http.serving import kernel

pytestmark = pytest.mark.program


def spec_of(folder: Path, cpus: int = 1) -> Spec:
    return Spec(name="any", cpus=cpus, memory_mib=16, boot=DirectBoot(kernel=kernel(folder)))


@contextlib.asynccontextmanager
async def daemon(folder: Path) -> AsyncIterator[tuple[Server, Client]]:
    async with server(folder) as one, Client(f"unix:{folder}/api") as client:
        async with asyncio.timeout(TIMEOUT):
            yield one, client


async def reaches(client: Client, name: str, state: v5.InstanceState) -> None:
    async with contextlib.aclosing(client.states(name)) as states:
        async for now in states:
            if now.state is state:
                return
    raise AssertionError(f"{name} is over and never was {state.value}")


async def test_the_set_of_vms(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (_, client):
        assert await client.list() == ()
        spec = spec_of(tmp_path)
        for name in ("web", "db"):
            assert await client.create(name, spec) is True
            assert await client.create(name, spec) is False  # with the UUID that it has
        identity = (await client.get("web")).properties.id
        assert await client.create("web", spec, identity=identity) is False
        with pytest.raises(VmExistsError, match="web"):
            await client.create("web", spec, identity=uuid.uuid4())
        with pytest.raises(VmExistsError, match="web"):
            await client.create("web", spec_of(tmp_path, cpus=2))
        rows = await client.list()
        assert [(row.name, row.state, row.cpus, row.memory_mib) for row in rows] == [
            ("db", v5.InstanceState.CREATING, 1, 16),
            ("web", v5.InstanceState.CREATING, 1, 16),
        ]
        assert (await client.get(str(identity))).properties.name == "web"
        for name in ("web", "db"):
            await client.delete(name)
        with pytest.raises(UnknownVmError, match="web"):
            await client.get("web")
        with pytest.raises(UnknownVmError, match="web"):
            async with client.serial("web"):
                pass
        with pytest.raises(ConfigError, match="runs many VMs: expected the name of one"):
            await client.get()


async def test_a_vm_runs_again(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (_, client):
        await client.create("web", spec_of(tmp_path), autostart=True, restart="on-failure")
        for _ in range(2):
            await client.run("web")
            await reaches(client, "web", v5.InstanceState.RUNNING)
            with pytest.raises(DeniedError, match="stop it first"):
                await client.delete("web")
            await client.stop("web")
            await reaches(client, "web", v5.InstanceState.STOPPED)
        last = (await client.state_monitor("web")).gen
        with pytest.raises(VmIsOverError):
            await client.state_monitor("web", last + 1)
        await client.keep("web", autostart=False, restart="never")
        assert "state" in (await client.log("web")).text
        await client.run("web")
        await client.delete("web", force=True)


async def test_events_of_all(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (_, client), contextlib.aclosing(client.events()) as events:
        first = asyncio.ensure_future(anext(events))
        await client.create("web", spec_of(tmp_path))
        seen = await first
        assert seen.name == "web"
        await client.run("web")
        while seen.state != "Running":
            seen = await anext(events)
        async with contextlib.aclosing(client.events(after=seen.id)) as more:
            await client.stop("web")
            async for event in more:
                assert event.id > seen.id
                if event.state == "Stopped":
                    break


async def test_the_daemon_itself(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (_, client):
        version = await client.version()
        assert (version.version, version.api) == (__version__, ("5.0.0",))
        checks = (await client.doctor()).checks
        assert {check.status for check in checks} <= {"ok", "warning", "error"}
        assert all(check.message for check in checks)


async def test_a_console_across_a_kill_of_the_daemon(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (one, client):
        await client.create("web", spec_of(tmp_path))
        await client.run("web")
        lost = asyncio.Event()
        async with client.serial("web", from_start=0, patience=TIMEOUT, on_lost=lambda error: lost.set()) as console:
            reading = asyncio.create_task(console.read())
            await one.kill()
            await lost.wait()
            await one.start()
            await client.stop("web")
            assert await reading == b""
            assert console.is_over


async def test_the_console_of_a_vm_that_does_not_run(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (_, client):
        await client.create("web", spec_of(tmp_path))
        await client.run("web")
        await client.stop("web")
        await reaches(client, "web", v5.InstanceState.STOPPED)
        for start, recent in ((0, None), (None, 100), (None, None)):
            async with client.serial("web", from_start=start, most_recent=recent) as console:
                assert await console.read() == b""
                assert console.is_over


async def test_a_raw_spec(tmp_path: Path) -> None:
    async with daemon(tmp_path) as (one, client):
        wire = one.body("web")["init"]["value"]["spec"]
        await client.create("web", msgspec.Raw(msgspec.json.encode(wire)))
        status = (await client.spec("web")).spec
        assert isinstance(status, v5.SpecPresent)
        assert msgspec.to_builtins(status.value)["board"] == wire["board"]
