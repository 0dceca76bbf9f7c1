"""The README's quick start, as typed: a daemon, the command line, curl and the Python client, with a tiny guest.

The guest's kernel stands in for Linux: it greets, echoes what is typed and powers off by its button.
"""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import tiny
from tests.source.tree import TREE
from tests.unit.cli.program import Forge, at_terminal, cli, forge
from tests.unit.console.terminals import Pty, until
from tests.unit.daemons import TIMEOUT, Server, server

pytestmark = [pytest.mark.kvm, pytest.mark.program]

ARGUMENTS = ("--hypervisor", "kvm")


@pytest.fixture(autouse=True)
def program() -> Iterator[None]:
    """What the command line is forked from, where tests/unit/cli has not brought it."""
    if forge:
        yield
        return
    forge.append(Forge())
    yield
    forge.pop().close()


@pytest.fixture
def tty() -> Iterator[Pty]:
    tty = Pty()
    yield tty
    tty.close()


async def typed(daemon: Server, *words: str) -> str:
    """The standard output of a command that succeeds."""
    ended = await cli(*words, server=str(daemon.folder / "api"))
    assert ended.status == 0, ended
    return ended.out


async def curl(daemon: Server, path: str, *options: str) -> str:
    """What curl prints for a path of the API."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--show-error", "--fail-with-body"),
        *("--unix-socket", str(daemon.folder / "api"), f"http://localhost{path}", *options),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT):
        out, _ = await process.communicate()
    assert process.returncode == 0, out
    return out.decode()


async def test_the_command_line(tmp_path: Path, tty: Pty) -> None:
    """Create, run, attach, type, restart the daemon beneath it, shut down, delete."""
    tiny.write(tmp_path)
    async with server(tmp_path, *ARGUMENTS) as daemon:
        socket = str(tmp_path / "api")
        await typed(daemon, "new", "web", "-t", str(tmp_path / "vm.toml"))
        assert "Creating" in await typed(daemon, "ls")
        await typed(daemon, "state", "web", "run", "--wait")
        async with at_terminal(tty, "serial", "web", server=socket) as program:
            await until(lambda: b"ready\r\n" in tty.look(), "the guest's greeting")
            tty.type(b"hello")
            await until(lambda: tty.look().endswith(b"hello"), "the echo")
            await daemon.kill()
            await until(lambda: b"connecting again]" in tty.look(), "the word about it")
            tty.type(b"again")
            await daemon.start(*ARGUMENTS)
            await until(lambda: tty.look().endswith(b"[connected again]\r\nagain"), "the echo, from where it was")
            assert tty.look().count(b"ready") == 1
            tty.type(b"\r~.")
            assert await program.wait() == 0
        await typed(daemon, "state", "web", "shutdown", "--deadline", "60", "--wait")
        assert re.search(r"^state +Stopped$", await typed(daemon, "get", "web"), re.MULTILINE)
        assert "Stopped" in await typed(daemon, "logs", "web")
        await typed(daemon, "state", "web", "run", "-w")
        await typed(daemon, "rm", "-f", "web")
        assert await typed(daemon, "ls", "-q") == ""


async def test_curl(tmp_path: Path) -> None:
    """The same by HTTP."""
    tiny.write(tmp_path)
    async with server(tmp_path, *ARGUMENTS) as daemon:
        toml = (tmp_path / "vm.toml").read_text().replace('kernel = "', f'kernel = "{tmp_path}/')
        await curl(daemon, "/instances/web", "-X", "PUT", "-H", "Content-Type: application/toml", "--data-binary", toml)
        put = ("-X", "PUT", "-H", "Content-Type: application/json", "-d")
        await curl(daemon, "/instances/web/state", *put, '"Run"')
        await daemon.until("web", "Running")
        data: list[int] = []
        async with asyncio.timeout(TIMEOUT):
            while not bytes(data).startswith(b"ready"):
                data = json.loads(await curl(daemon, "/instances/web/serial/history?from_start=0"))["data"]
        await curl(daemon, "/instances/web/shutdown", *put, '{"deadline_seconds": 60}')
        await daemon.until("web", "Stopped")
        await curl(daemon, "/instances/web", "-X", "DELETE")


async def test_the_readme_s_example_of_the_client(tmp_path: Path) -> None:
    """As it stands there, but for the socket."""
    readme = (TREE / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import asyncio\n.*?)```", readme, re.DOTALL)
    code = code.replace("unix:/run/propolis/propolis.sock", f"unix:{tmp_path}/api")
    tiny.write(tmp_path)
    async with server(tmp_path, *ARGUMENTS):
        process = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TREE)!r})\n{code}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert (process.returncode, process.stderr) == (0, "")
        assert process.stdout.startswith("b'ready")
