"""The daemon with real workers: VMs are made, run, ended, and found again, whatever happens to which process."""

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from propolis.errors import BusyError, PropolisError
from propolis.names import NameLock
from tests.unit.daemons import TIMEOUT, Server, server
from tests.unit.http.serving import kernel

pytestmark = [pytest.mark.program, pytest.mark.timeout(400)]


async def test_a_life(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        assert (await one.create()).status == 201
        assert (await one.ask("GET", "/instances/web")).body["instance"]["state"] == "Creating"
        await one.run()
        listed = (await one.ask("GET", "/instances")).body["instances"]
        assert [(vm["name"], vm["state"]) for vm in listed] == [("web", "Running")]
        assert (await one.ask("DELETE", "/instances/web")).status == 409
        assert (await one.ask("PUT", "/instances/web/state", json="Stop")).status == 204
        await one.until("web", "Stopped")
        assert (await one.ask("DELETE", "/instances/web")).status == 204
        assert (await one.ask("GET", "/instances/web")).status == 404
        assert await one.stop() == 0
    assert os.listdir(tmp_path / "state/vms") == []
    assert os.listdir(tmp_path / "run/vms") == []


async def test_creation_is_idempotent(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        many = await asyncio.gather(*(one.create() for _ in range(8)))
        assert sorted(reply.status for reply in many) == [200] * 7 + [201]
        reply = await one.create(cpus=2)
        assert (reply.status, reply.body["error_code"]) == (409, "AlreadyInitialized")
        body = one.body("other")
        body["properties"]["id"] = one.body("web")["properties"]["id"]
        assert (await one.ask("PUT", "/instances/other", json=body)).status == 409
        assert len((await one.ask("GET", "/instances")).body["instances"]) == 1
        assert (await one.ask("GET", f"/instances/{body['properties']['id']}")).body["name"] == "web"

        # What cannot be made is not there, and says why.
        body = one.body("ghost")
        body["init"]["value"]["spec"]["extensions"]["boot"]["kernel"] = "/no/such/kernel"
        reply = await one.ask("PUT", "/instances/ghost", json=body)
        assert (reply.status, reply.body["error_code"]) == (400, "image")
        assert "/no/such/kernel" in reply.body["message"]
        assert (await one.ask("GET", "/instances/ghost")).status == 404
        assert os.listdir(tmp_path / "run/vms") == ["web"]

        # How it is kept is not part of what it is.
        assert (await one.create(query="?restart=always&autostart=true")).status == 200
        assert (await one.ask("PATCH", "/instances/web", json={"autostart": False})).status == 204
        found = (await one.ask("GET", "/instances/web")).body
        assert (found["restart"], found["autostart"]) == ("always", False)


async def test_a_dead_worker_is_told_of(tmp_path: Path) -> None:
    """Its VM is failed, nothing else is; polls end, and what was known still is."""
    async with server(tmp_path) as one:
        await one.create("web")
        await one.create("db")
        await one.run("web")
        await one.run("db")
        generation = (await one.ask("GET", "/instances/web")).body["generation"]
        poll = asyncio.create_task(one.ask("GET", "/instances/web/state-monitor", json={"gen": generation + 1}))
        async with one.session.ws_connect("http://daemon/instances/web/serial") as console:
            os.kill(one.worker("web"), signal.SIGKILL)
            reply = await poll
            assert (reply.status, reply.body["state"], reply.body["gen"]) == (200, "Failed", generation + 1)
            assert "SIGKILL" in reply.body["detail"]
            assert (await console.receive(TIMEOUT)).type.name in ("CLOSE", "CLOSED", "ERROR")
        found = (await one.ask("GET", "/instances/web")).body
        assert found["instance"]["state"] == "Failed"
        assert any("state Running" in line for line in found["log"])
        assert (await one.ask("GET", "/instances/web/spec")).body["spec"]["type"] == "Present"
        assert (await one.ask("GET", "/instances/web/serial/history?from_start=0")).status == 200
        assert "state Running" in (await one.ask("GET", "/instances/web/log")).body["text"]
        assert (await one.ask("GET", f"/instances/web/state-monitor?gen={generation + 2}")).status == 410
        reply = await one.ask("PUT", "/instances/web/pause")
        assert (reply.status, reply.body["state"]) == (409, "Failed")
        assert (await one.ask("PUT", "/instances/web/state", json="Reboot")).status == 403
        assert (await one.ask("PUT", "/instances/web/stop")).status == 204
        assert (await one.ask("GET", "/instances/db")).body["instance"]["state"] == "Running"

        # A fresh worker goes on counting.
        await one.run("web")
        assert (await one.ask("GET", "/instances/web")).body["generation"] > generation + 1
        os.kill(one.keeper("web"), signal.SIGKILL)
        assert "keeper was killed" in (await one.until("web", "Failed"))["detail"]
        assert (await one.ask("DELETE", "/instances/web")).status == 204


@pytest.mark.parametrize("ending", ["terminated", "killed"])
async def test_vms_outlive_the_daemon(tmp_path: Path, ending: str) -> None:
    async with server(tmp_path) as one:
        for name in ("runs", "dies", "waits"):
            await one.create(name)
        await one.run("runs")
        await one.run("dies")
        before = (await one.ask("GET", "/instances/runs")).body
        workers = {name: one.worker(name) for name in ("runs", "waits")}
        if ending == "killed":
            await one.kill()
        else:
            assert await one.stop() == 0
        os.kill(one.worker("dies"), signal.SIGKILL)
        await one.start()
        assert {name: one.worker(name) for name in workers} == workers
        after = (await one.ask("GET", "/instances/runs")).body
        assert after == before
        assert (await one.ask("GET", "/instances/waits")).body["instance"]["state"] == "Creating"
        assert "SIGKILL" in (await one.until("dies", "Failed"))["detail"]
        await one.run("waits")
        assert (await one.ask("DELETE", "/instances/runs?force=true")).status == 204
        assert str(workers["runs"]) not in os.listdir("/proc")


async def test_a_worker_extends_no_file(tmp_path: Path) -> None:
    """Its files end where the largest disk does that it may write to, or memory that is a file."""
    toml = f'[main]\nname = "web"\ncpus = 1\nmemory = 16\nkernel = "{kernel(tmp_path)}"\n'
    disks = ""
    for slot, (name, size, more) in enumerate(
        (("small", 1 << 20, ""), ("large", 3 << 20, ""), ("fixed", 9 << 20, "readonly = true")), 4
    ):
        path = tmp_path / name
        path.touch()
        os.truncate(path, size)
        disks += f'[block_dev.{name}]\ntype = "file"\npath = "{path}"\n{more}\n'
        disks += f'[dev.{name}]\ndriver = "pci-virtio-block"\nblock_dev = "{name}"\npci-path = "0.{slot}.0"\n'
    async with server(tmp_path, "--jail", "on") as one:
        for memory, size in (("anonymous", 3 << 20), ("memfd", 16 << 20)):
            body = toml + f'memory_backing = "{memory}"\n' + disks
            kind = {"Content-Type": "application/toml"}
            assert (await one.ask("PUT", "/instances/web", data=body, headers=kind)).status == 201
            assert file_limits(one.worker()) == [str(size), str(size)]
            assert (await one.ask("DELETE", "/instances/web")).status == 204


def file_limits(pid: int) -> list[str]:
    """How far this process may extend files, and may let itself: proc(5)."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line for line in lines if line.startswith("Max file size")).split()[3:5]


async def test_a_vm_holds_its_name(tmp_path: Path) -> None:
    """As long as it has processes, whatever becomes of the daemon; a standalone VM is refused then, and not ended."""
    names = str(tmp_path / "run")
    async with server(tmp_path) as one:
        with await NameLock.acquire("web", folder=names):
            reply = await one.create()
            assert (reply.status, reply.body["error_code"]) == (409, "busy")
            assert f"VM 'web' belongs to a standalone VM, process {os.getpid()}" in reply.body["message"]
        assert (await one.create()).status == 201
        for _ in range(2):
            refused = f"VM 'web' belongs to the daemon's keeper, process {one.keeper()}$"
            with pytest.raises(BusyError, match=refused):
                await NameLock.acquire("web", folder=names)
            await one.kill()
            with pytest.raises(BusyError, match=refused):
                await NameLock.acquire("web", folder=names)
            await one.start()
            await one.run()
        await one.ask("PUT", "/instances/web/stop")
        await one.until("web", "Stopped")
        async with asyncio.timeout(TIMEOUT):
            while (tmp_path / "run/web.lock").exists():  # noqa: ASYNC110 -- the keeper goes a little later
                await asyncio.sleep(0.01)
        with await NameLock.acquire("web", folder=names):
            assert (await one.ask("PUT", "/instances/web/state", json="Run")).status == 409
        await one.run()
        os.kill(one.keeper(), signal.SIGKILL)
        await one.until("web", "Failed")
        async with asyncio.timeout(TIMEOUT):
            while (tmp_path / "run/web.lock").exists():  # noqa: ASYNC110 -- there is nothing that tells
                await asyncio.sleep(0.01)
        assert await one.stop() == 0


async def test_policies(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("always", "?restart=always")
        await one.create("never", "?autostart=true")
        for name in ("always", "never"):
            await one.run(name)
            generation = (await one.ask("GET", f"/instances/{name}")).body["generation"]
            os.kill(one.worker(name), signal.SIGKILL)
            await one.until(name, "Failed")
            if name == "always":
                async with asyncio.timeout(TIMEOUT):
                    reply = await one.ask("GET", f"/instances/{name}/state-monitor?gen={generation + 4}")
                assert reply.body["state"] == "Running"
        assert (await one.ask("GET", "/instances/always")).body["restarts"] == 1

        # What somebody stopped stays so, also over a restart of the daemon.
        await one.ask("PUT", "/instances/always/state", json="Stop")
        await one.until("always", "Stopped")
        await one.stop()

        # As after the host's restart: nothing of a run is left.
        with one.directory("never") as directory:
            path = directory.path
            for entry in os.scandir(directory.path):
                os.unlink(entry.path)
        os.rmdir(path)
        await one.start()
        found = (await one.ask("GET", "/instances/always")).body
        assert (found["instance"]["state"], found.get("starts_again_in")) == ("Stopped", None)
        await one.until("never", "Running")


async def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        second = Server(tmp_path, one.session)
        with pytest.raises(AssertionError, match=f"in use by propolis-server, process {one.pid}: one daemon at a time"):
            await second.start()
        assert await second.ended() == 1
        assert (await one.ask("GET", "/readyz")).status == 200


async def test_a_broken_definition_takes_no_other_along(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("good")
        await one.create("bad")
        await one.run("bad")
        await one.stop()
        path = tmp_path / "state/vms/bad.json"
        path.write_bytes(path.read_bytes()[:100])
        await one.start()
        assert [vm["name"] for vm in (await one.ask("GET", "/instances")).body["instances"]] == ["good"]
        assert "definition set aside" in one.log
        assert "a VM without a definition runs" in one.log
        assert "bad.json.unreadable" in os.listdir(tmp_path / "state/vms")


async def test_reload(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        file = tmp_path / "server.toml"
        good = file.read_text()
        file.write_text(good + "\n[limits]\nvms = 0\n")
        one.signal(signal.SIGHUP)
        assert (await one.notice()).startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert (await one.notice()).startswith("READY=1")
        assert "not reloaded" in one.log
        assert "vms: expected 1 to 65536, not 0" in one.log
        file.write_text(good + "\n[limits]\nvms = 1\n[log]\nformat = 'json'\n")
        one.signal(signal.SIGHUP)
        assert (await one.notice()).startswith("RELOADING=1")
        assert (await one.notice()).startswith("READY=1")
        assert (await one.create("a")).status == 201
        assert (await one.create("b")).status == 409
        assert '"message": "created"' in one.log
        one.signal(signal.SIGTERM)
        assert await one.notice() == "STOPPING=1"
        assert await one.ended() == 0


async def test_events_of_all_vms(tmp_path: Path) -> None:
    async with server(tmp_path) as one, one.session.get("http://daemon/events") as stream:
        events = Events(stream)
        await one.create("a")
        await one.run("a")
        await events.until(lambda event: event.get("state") == "Running")
        os.kill(one.worker("a"), signal.SIGKILL)
        await events.until(lambda event: event.get("state") == "Failed")
        await one.ask("DELETE", "/instances/a")
        await events.until(lambda event: event["kind"] == "deleted")
        assert [event["id"] for event in events.seen] == sorted({event["id"] for event in events.seen})
        told = [event["state"] for event in events.seen if event["kind"] == "state"]
        assert told == ["Creating", "Starting", "Running", "Failed"]
        kinds = {event["kind"] for event in events.seen}
        assert {"created", "state", "deleted"} <= kinds

        # One that was away goes on where it was.
        for start, headers in (
            (f"?after={events.seen[1]['id']}", {}),
            ("", {"Last-Event-ID": str(events.seen[1]["id"])}),
        ):
            async with one.session.get(f"http://daemon/events{start}", headers=headers) as again:
                later = Events(again)
                await later.until(lambda event: event["kind"] == "deleted")
                assert later.seen == events.seen[2:]
        # One with a number of an earlier daemon, before the clock was set back, is told that it may have missed some.
        async with one.session.get(f"http://daemon/events?after={events.seen[-1]['id'] + 1_000_000}") as again:
            later = Events(again)
            await later.until(lambda event: event["kind"] == "deleted")
            assert later.seen[0]["kind"] == "gap"
            assert later.seen[1:] == events.seen
        async with one.session.ws_connect(f"http://daemon/events?after={events.seen[-2]['id']}") as channel:
            assert (await channel.receive_json(timeout=TIMEOUT)) == events.seen[-1]


class Events:
    """A stream of server-sent events, as a client reads it."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self.seen: list[dict[str, Any]] = []
        self._reply = reply

    async def until(self, is_wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Reads up to an event."""
        async with asyncio.timeout(TIMEOUT):
            async for line in self._reply.content:
                if line.startswith(b'data: {"'):
                    self.seen.append(json.loads(line[6:]))
                    if is_wanted(self.seen[-1]):
                        return
        raise AssertionError(f"the stream ended: {self.seen}")


async def test_metrics(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("web")
        await one.create("hung")
        await one.run("web")
        os.kill(one.worker("hung"), signal.SIGSTOP)
        try:
            text = (await one.ask("GET", "/metrics")).body
        finally:
            os.kill(one.worker("hung"), signal.SIGCONT)
        for line in (
            'propolis_vm_state{state="Running",vm="web"} 1.0',
            'propolis_vm_up{vm="web"} 1.0',
            'propolis_vm_up{vm="hung"} 0.0',
            'propolis_vm_memory_bytes{vm="web"} 1.6777216e+07',
            'propolis_http_request_seconds_count{method="PUT",route="/instances/{key}",status="2xx"} 2.0',
        ):
            assert line in text.splitlines()
        assert 'propolis_vm_vcpu_exits_total{kind="pio",vcpu="0",vm="web"}' in text


async def test_kills_at_any_moment(tmp_path: Path, rounds: int) -> None:
    """Of daemon, keeper and worker, while VMs are made, run and deleted: nothing is lost and nothing is left."""
    chance = random.Random(seed := int(os.environ.get("SEED", random.randrange(1 << 32))))
    print(f"SEED={seed}")
    async with server(tmp_path) as one:
        wanted: set[str] = set()
        for number in range(4 * rounds):
            name = f"vm{number}"
            work = asyncio.create_task(_live(one, name, wanted))
            await asyncio.sleep(chance.random() * 0.3)
            victim = chance.choice(("daemon", "worker", "keeper"))
            if victim == "daemon":
                await one.kill()
                await asyncio.gather(work, return_exceptions=True)
                await one.start()
            else:
                with contextlib.suppress(PropolisError, ProcessLookupError, AssertionError):
                    os.kill(one.worker(name) if victim == "worker" else one.keeper(name), signal.SIGKILL)
                await asyncio.gather(work, return_exceptions=True)
            there = {vm["name"]: vm["state"] for vm in (await one.ask("GET", "/instances")).body["instances"]}
            assert wanted <= set(there), f"lost after the {victim} was killed"
        # Whatever they went through, all of them can be run and deleted.
        for name in there:
            await one.run(name)
            assert (await one.ask("DELETE", f"/instances/{name}?force=true")).status == 204
        assert await one.stop() == 0
    assert os.listdir(tmp_path / "state/vms") == []
    assert os.listdir(tmp_path / "run") == ["vms"]
    assert os.listdir(tmp_path / "run/vms") == []
    assert one.processes() == []


async def _live(one: Server, name: str, wanted: set[str]) -> None:
    """What is in `wanted` was promised to be there."""
    if (await one.create(name)).status in (200, 201):
        wanted.add(name)
    await one.run(name)
    await one.ask("PUT", f"/instances/{name}/state", json="Stop")
    await one.until(name, "Stopped")
    wanted.discard(name)
    await one.ask("DELETE", f"/instances/{name}")
