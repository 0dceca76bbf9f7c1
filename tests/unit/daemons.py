"""The daemon as a process, on the replay hypervisor, with a client on its unix socket."""

import asyncio
import copy
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from propolis.errors import PropolisError
from propolis.run_directory import RunDirectory
from propolis.running_vm import find_running
from tests.source.tree import TREE
from tests.unit.http.serving import ensure_body

TIMEOUT = 100.0  # a host that compiles and emulates beside the tests is slow


class Reply(NamedTuple):
    """What the daemon said."""

    status: int
    body: Any
    headers: Any


class Server:
    """One daemon after another on the same directories."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.session = session
        self.process: subprocess.Popen[bytes] | None = None
        self._notices: socket.socket | None = None

    @property
    def log(self) -> str:
        """All that the daemons wrote."""
        return (self.folder / "stderr").read_text()

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self.process is not None
        return self.process.pid

    async def start(self, *arguments: str) -> None:
        """Returns once it says that it is ready."""
        self._spawn(*arguments)
        notice = await self.notice()
        while not notice.startswith("READY=1"):
            notice = await self.notice()

    def _spawn(self, *arguments: str) -> None:
        notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        name = f"\0propolis-test-{uuid.uuid4()}"
        notices.bind(name)
        self._notices = notices
        command = [sys.executable, "-m", "propolis.daemon", "run", str(self.folder / "server.toml")]
        with open(self.folder / "stderr", "ab") as stderr:
            self.process = subprocess.Popen(
                [*command, "--hypervisor", "replay", "--jail", "off", *arguments],
                cwd=TREE,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "NOTIFY_SOCKET": "@" + name[1:]},
            )

    async def notice(self) -> str:
        """The next thing that the service manager is told."""
        assert self._notices is not None
        assert self.process is not None
        try:
            async with asyncio.timeout(TIMEOUT):
                while True:
                    try:
                        return self._notices.recv(4096).decode()
                    except BlockingIOError:
                        assert self.process.poll() is None, f"the daemon ended: {self.log}"
                        await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"nothing was said for {TIMEOUT:g} s: {self.log}") from None

    def signal(self, number: signal.Signals) -> None:
        """To the daemon alone."""
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Its exit status."""
        assert self.process is not None
        process = self.process
        async with asyncio.timeout(TIMEOUT):
            while process.poll() is None:  # noqa: ASYNC110 -- asyncio's own processes need a child watcher
                await asyncio.sleep(0.01)
        self.process = None
        if self._notices is not None:
            self._notices.close()
            self._notices = None
        return int(process.returncode)

    async def stop(self) -> int:
        """As its service manager would."""
        self.signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        """As nobody should."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def ask(self, method: str, path: str, **more: Any) -> Reply:
        """A request, and its reply with the JSON in it."""
        async with self.session.request(method, f"http://daemon{path}", **more) as reply:
            is_json = reply.content_type == "application/json"
            return Reply(reply.status, await (reply.json() if is_json else reply.text()), reply.headers)

    async def create(self, name: str = "web", query: str = "", **changes: Any) -> Reply:
        """A VM that has a UUID of its own."""
        return await self.ask("PUT", f"/instances/{name}{query}", json=self.body(name, **changes))

    def body(self, name: str, **changes: Any) -> dict[str, Any]:
        """The body of a request that creates such a VM."""
        body = ensure_body(self.folder)
        body["properties"].update(name=name, id=str(uuid.uuid5(uuid.NAMESPACE_DNS, name)))
        body["init"]["value"]["spec"]["board"].update(changes)
        return copy.deepcopy(body)

    async def run(self, name: str = "web") -> None:
        """Until it runs."""
        reply = await self.ask("PUT", f"/instances/{name}/state", json="Run")
        assert reply.status == 204, reply
        await self.until(name, "Running")

    async def until(self, name: str, *states: str) -> dict[str, Any]:
        """Follows the VM's states up to one of these."""
        generation = 0
        async with asyncio.timeout(TIMEOUT):
            while True:
                reply = await self.ask("GET", f"/instances/{name}/state-monitor?gen={generation}")
                assert reply.status == 200, f"on the way to {states}: {reply}"
                if reply.body["state"] in states:
                    found: dict[str, Any] = reply.body
                    return found
                generation = reply.body["gen"] + 1

    def directory(self, name: str) -> RunDirectory:
        """A VM's run directory; the caller closes it."""
        return RunDirectory.open(str(self.folder / "run" / "vms" / name))

    def worker(self, name: str = "web") -> int:
        """The process of a VM's worker."""
        with self.directory(name) as directory:
            processes = directory.processes()
            assert processes is not None
            return processes.worker.pid

    def keeper(self, name: str = "web") -> int:
        """The process of a VM's keeper."""
        with self.directory(name) as directory:
            processes = directory.processes()
            assert processes is not None
            return processes.keeper.pid

    def processes(self) -> list[str]:
        """All that have something open here, but for the test's own."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                opened = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
                opened.add(Path(f"/proc/{pid}/maps").read_text())
                if pid != str(os.getpid()) and any(str(self.folder) in entry for entry in opened):
                    found.append(Path(f"/proc/{pid}/comm").read_text())
        return found

    async def clear(self) -> None:
        """Nothing is left of any VM, nor of the daemon."""
        if self.process is not None:
            self.process.kill()
            await self.ended()
        vms = self.folder / "run" / "vms"
        for path in vms.iterdir() if vms.exists() else ():
            try:
                directory = RunDirectory.open(str(path))
            except PropolisError:
                continue
            with directory:
                if (running := find_running(directory)) is not None:
                    running.kill_all()
                    await running.wait()
                    running.close()


@asynccontextmanager
async def server(
    folder: Path, *arguments: str, config: str = "", port: int | None = None, is_started: bool = True
) -> AsyncIterator[Server]:
    """A daemon, with all of its VMs gone at the end. It listens on a port as well where there is one."""
    listen = ["unix:api"] if port is None else ["unix:api", f"127.0.0.1:{port}"]
    (folder / "server.toml").write_text(
        f'{config}\n[server]\nlisten = {listen}\nstate_directory = "state"\nrun_directory = "run"\n'
    )
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    connector = aiohttp.UnixConnector(str(folder / "api"), force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        one = Server(folder, session)
        try:
            if is_started:
                await one.start(*arguments)
            yield one
        finally:
            await one.clear()
