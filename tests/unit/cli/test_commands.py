"""The commands against the application of one VM: what they print, where, and their exit status."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from propolis import __version__
from propolis.console.history import ConsoleHistory
from propolis.http.app import make_app, serve
from propolis.lifecycle import State
from propolis.spec import CloudInit
from tests.unit.cli.program import TREE, Program, at_terminal, cli
from tests.unit.console.terminals import Pty, until
from tests.unit.http.serving import UUID, Served, build, empty, kernel, one_vm, serving, wire_spec

pytestmark = pytest.mark.program


@pytest.fixture
def tty() -> Iterator[Pty]:
    tty = Pty()
    yield tty
    tty.close()


async def ok(served: Served, *words: str, **more: Any) -> str:
    """The standard output of a command that succeeds."""
    result = await cli(*words, server=served.path, **more)
    assert result.status == 0, result
    return result.out


async def fails(served: Served, status: int, text: str, *words: str, **more: Any) -> None:
    """A command that fails says why on standard error, and nothing on standard output."""
    result = await cli(*words, server=served.path, **more)
    assert (result.status, result.out) == (status, ""), result
    assert text in result.err


# -- without a server --------------------------------------------------------------------------------------------------


async def test_help_and_version() -> None:
    assert await cli("--version") == (0, f"propolis-cli {__version__}\n", "")
    for words in (("--help",), ("-h",), ("new", "--help"), ("serial", "-h")):
        result = await cli(*words)
        assert result.status == 0
        assert result.out.startswith("Usage: propolis-cli ")
        assert max(map(len, result.out.splitlines())) <= 120
    assert "124 time ran out" in " ".join((await cli("--help")).out.split())


def test_the_program_itself(tmp_path: Path) -> None:
    """As it is started by a user, with what that loads."""
    command = [sys.executable, "-c", "from cli.main import main; main()"]
    for words, status in ((["--version"], 0), (["--url", f"unix:{tmp_path}/none", "ls"], 3)):
        assert subprocess.run([*command, *words], cwd=TREE, capture_output=True).returncode == status


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['propolis-cli', '--help']\n"
        "import cli.main\n"
        "try: cli.main.main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('aiohttp', 'asyncio', 'msgspec', 'rich', 'propolis.spec') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=TREE, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), ""),
        (("start", "web"), "No such command"),
        (("state", "web", "fly"), "'fly'"),
        (("state", "web", "run", "--deadline", "1"), "--deadline goes with shutdown"),
        (("-p", "0", "ls"), "'-p'"),
        (("wait", "web", "happy"), "'happy'"),
        (("set", "web"), "nothing to change"),
        (("new", "web", "-s", "x.json", "-c", "1"), "-m, --hyperv and --cloud-init do not go with it"),
        (("new", "web", "-s", "x.json", "--hyperv"), "--hyperv and --cloud-init do not go with it"),
        (("new", "web", "--cpuid-profile", "x"), "--cpuid-profile goes with -t"),
        (("new", "web", "--meta-data", "x"), "--meta-data and --network-config go with --cloud-init"),
        (("--url", "gopher://x", "ls"), "'gopher://x' is no server"),
        (("--token-file", "/none", "ls"), "read token file '/none': No such file"),
        (("--token-file", "/dev/null", "ls"), "expected a token on its first line"),
        (("serial", "web", "-e", "^1"), "there is no such control key"),
        (("get", "../web"), "cannot name a VM"),
    ],
)
async def test_wrong_usage(words: tuple[str, ...], text: str) -> None:
    result = await cli(*words, environment={"PROPOLIS_URL": "unix:/none/x.sock"})
    assert result.status == 2, result
    assert text in result.err
    assert result.out == "" or not words


async def test_no_server(tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/none"
    expected = f"propolis-cli: connect to {where}: No such file or directory"
    assert await cli("--url", where, "ls") == (3, "", f"{expected}\n")
    assert await cli("ls", environment={"PROPOLIS_URL": where}) == (3, "", f"{expected}\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        result = await cli("-s", "localhost", "-p", str(port), "ls", environment={"PROPOLIS_URL": where})
    assert result.status == 3
    assert f"connect to http://localhost:{port}: " in result.err


# -- a VM's life -------------------------------------------------------------------------------------------------------


async def test_the_seed_s_three_commands(tmp_path: Path) -> None:
    """With a host and a port; the console is tested elsewhere."""
    async with empty(tmp_path) as served:
        listener = socket.create_server(("127.0.0.1", 0))
        runner = await serve(make_app(served.run(build(tmp_path))), listener)
        try:
            server = ("-s", "127.0.0.1", "-p", str(listener.getsockname()[1]))
            assert await cli(*server, "state", "web", "run", "--wait") == (0, "", "")
            await served.reaches(State.RUNNING)
            assert await cli(*server, "state", "web", "stop", "-w") == (0, "", "")
        finally:
            await runner.cleanup()


async def test_a_vm_from_a_toml_file(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "vm.toml").write_text(f"""
        [main]
        name = "other"
        cpus = 2
        memory = 32
        kernel = "{kernel(tmp_path)}"
        cmdline = "console=ttyS0"
        [block_dev.root]
        type = "file"
        path = "disk.raw"
        readonly = true
        [dev.disk0]
        driver = "pci-virtio-block"
        block_dev = "root"
        pci-path = "0.4.0"
    """)
    async with empty(tmp_path) as served:
        result = await cli("new", "web", "-t", str(tmp_path / "vm.toml"), "-m", "16", "-u", UUID, server=served.path)
        assert result == (0, "", f"[VM 'web' created: {UUID}]\n")
        assert (served.vm.spec.name, served.vm.spec.cpus, served.vm.spec.memory_mib) == ("web", 2, 16)
        table = await ok(served, "get", "web")
        assert [line.split(maxsplit=1) for line in table.splitlines()] == [
            ["name", "web"],
            ["uuid", UUID],
            ["state", "Creating"],
            ["cpus", "2"],
            ["memory", "16 MiB"],
            ["kernel", kernel(tmp_path)],
            ["cmdline", "console=ttyS0"],
            ["disk0", f"0.4.0  {tmp_path}/disk.raw  read-only"],
        ]
        shown = msgspec.json.decode(await ok(served, "get", "web", "--json"))
        assert shown["instance"]["properties"]["id"] == UUID
        assert shown["spec"]["value"]["board"]["cpus"] == 2
        await fails(served, 1, "there is a VM already", "new", "web", "-t", str(tmp_path / "vm.toml"))


async def test_a_vm_with_a_cpuid_of_its_own(tmp_path: Path) -> None:
    """The one that the option names, from a file of devices alone; there is nobody to boot it here."""
    (tmp_path / "vm.toml").write_text("[cpuid.old]\nvendor = 'amd'\n0 = [1, 2, 3, 4]\n")
    where = {"PROPOLIS_URL": f"unix:{tmp_path}/none"}
    words = ("new", "web", "-t", f"{tmp_path}/vm.toml", "--cpuid-profile")
    assert (await cli(*words, "new", environment=where)).err.endswith("there is no [cpuid.new]: expected 'old'\n")
    result = await cli(*words, "old", environment=where)
    assert f"{tmp_path}/vm.toml:2:10: vendor: leaf 0x0 is not amd's" in result.err


async def test_a_vm_with_a_hyper_v(tmp_path: Path) -> None:
    """Which the replayed host cannot be."""
    (tmp_path / "vm.toml").write_text(f"[main]\nname = 'x'\ncpus = 1\nmemory = 16\nkernel = '{kernel(tmp_path)}'\n")
    async with empty(tmp_path) as served:
        words = ("new", "web", "-t", f"{tmp_path}/vm.toml", "--hyperv")
        await fails(served, 1, "this host's KVM cannot be a Hyper-V to its guests", *words)


async def test_a_vm_with_a_volume_for_cloud_init(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text(f"[main]\nname = 'x'\ncpus = 1\nmemory = 16\nkernel = '{kernel(tmp_path)}'\n")
    for name, text in (("user", "#cloud-config\n"), ("meta", "instance-id: i"), ("network", "version: 2")):
        (tmp_path / name).write_text(text)
    words = ("new", "web", "-t", f"{tmp_path}/vm.toml", "--cloud-init")
    async with empty(tmp_path) as served:
        await fails(served, 2, "--cloud-init: open '/none': No such file or directory", *words, "/none")
        more = ("--meta-data", f"{tmp_path}/meta", "--network-config", f"{tmp_path}/network")
        await ok(served, *words, f"{tmp_path}/user", *more)
        volume = CloudInit(user_data="#cloud-config\n", meta_data="instance-id: i", network_config="version: 2")
        assert served.vm.spec.backends == {"cloud-init-backend": volume}
        assert (await ok(served, "get", "web")).splitlines()[-1].split() == [
            *("cloud-init", "0.24.0", "for", "cloud-init", "read-only")
        ]


async def test_no_room_for_the_volume_for_cloud_init(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text("""
        [block_dev.a]
        type = "file"
        path = "a"
        [dev.a]
        driver = "pci-virtio-block"
        block_dev = "a"
        pci-path = "0.24.0"
    """)
    words = ("new", "web", "-t", f"{tmp_path}/vm.toml", "--cloud-init", "/dev/null")
    result = await cli(*words, environment={"PROPOLIS_URL": f"unix:{tmp_path}/none"})
    assert result == (2, "", "propolis-cli: --cloud-init: PCI path 0.24.0 is already taken by device 'a'\n")


async def test_a_vm_from_json(tmp_path: Path) -> None:
    spec = wire_spec(tmp_path)
    whole = {"properties": {}, "init": {"method": "Spec", "value": {"spec": spec}}}
    for number, document in enumerate((spec, whole)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "spec.json").write_bytes(msgspec.json.encode(document))
        async with empty(folder) as served:
            words = ("new", "web", "-s", str(folder / "spec.json"), "-q", "-u", UUID, "--description", "a test")
            assert await cli(*words, server=served.path) == (0, f"{UUID}\n", "")
            assert served.vm.properties.description == "a test"


async def test_a_vm_that_needs_the_server_s_configuration(tmp_path: Path) -> None:
    """A server without one says so."""
    async with empty(tmp_path) as served:
        await fails(served, 1, "expected what the VM boots, as this server has no default", "new", "web", "-m", "16")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[main]\nname = 1\n", "vm.toml:2:8: name: expected a string, not 1"),
        ("[dev.x]\ndriver = 'pci-nvme'\n", "vm.toml:2:10: driver 'pci-nvme' is known, but not available"),
        (
            "[dev.x]\ndriver = 'pci-virtio-block'\nblock_dev = 'no'\npci-path = '0.1.0'",
            "vm.toml:4:12: pci-path: PCI path 0.1.0 belongs to the ISA bridge of the board",
        ),
        ("[main]\nboot_order = ['x']\n", "vm.toml:2:15: boot_order: there is no device 'x'"),
        ("= 1", "vm.toml:1:1: not TOML"),
    ],
)
async def test_a_wrong_file(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "vm.toml").write_text(text)
    result = await cli(
        "new", "web", "-t", str(tmp_path / "vm.toml"), environment={"PROPOLIS_URL": f"unix:{tmp_path}/none"}
    )
    assert result.status == 2
    assert f"propolis-cli: {tmp_path}/{error}" in result.err


async def test_wrong_numbers_are_the_options_not_the_file_s(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text("[block_dev]\n")
    for words in (("-c", "0"), ("-c", "99", "-t", str(tmp_path / "vm.toml"))):
        result = await cli("new", "web", *words, environment={"PROPOLIS_URL": f"unix:{tmp_path}/none"})
        assert result == (2, "", f"propolis-cli: --cpus: expected 1 to 64 CPUs, not {words[1]}\n")


async def test_states(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await fails(served, 1, "cannot reboot: the VM has not been started", "state", "web", "reboot")
        await ok(served, "state", "web", "run", "--wait")
        await ok(served, "state", "web", "pause", "--wait")
        assert "Paused" in await ok(served, "get", "web")
        await ok(served, "state", "web", "resume", "-w")
        await ok(served, "state", "web", "reboot", "-w")
        await ok(served, "state", "web", "reset", "-w")
        await ok(served, "inject-nmi", "web")
        assert "NAME  STATE" in await ok(served, "ls")
        assert await ok(served, "ls", "-q") == "web\n"
        assert msgspec.json.decode(await ok(served, "ls", "--json"))[0]["name"] == "web"
        assert msgspec.json.decode(await ok(served, "--json", "ls"))[0]["name"] == "web"
        await ok(served, "state", "web", "shutdown", "--deadline", "0", "--wait")
        assert "Stopped" in await ok(served, "get", "web")


async def test_no_such_vm(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        for words in (("get", "db"), ("state", "db", "stop"), ("serial", "db"), ("rm", "db", "db2")):
            await fails(served, 4, "db", *words)


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_waiting(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await fails(
            served, 124, "propolis-cli: web is not running after 0.2 s\n", "wait", "web", "running", "--timeout", "0.2"
        )
        waiting = asyncio.create_task(cli("wait", "web", "RUNNING", "--timeout", "20", server=served.path))
        await served.running()
        assert await waiting == (0, "", "")
        waiting = asyncio.create_task(cli("wait", "web", "paused", server=served.path))
        await served.put("/instance/stop")
        result = await waiting
        assert (result.status, result.err) == (1, "propolis-cli: web is stopped: stopped\n")
        assert await cli("wait", "web", "stopped", server=served.path) == (0, "", "")


async def test_an_interrupt(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, Program("monitor", "web", server=served.path) as program:
        assert program.out is not None
        assert await program.out.readline() == b"    0  Creating\n"
        program.send_signal(signal.SIGINT)
        assert await program.wait() == 130


async def test_somebody_at_a_terminal_is_told_what_takes_long(tmp_path: Path, tty: Pty) -> None:
    async with one_vm(tmp_path) as served, at_terminal(tty, "wait", "web", "running", server=served.path) as process:
        await until(lambda: b"waiting until web is running (1 s)" in tty.look(), "the word after a second")
        await served.running()
        assert await process.wait() == 0
        assert tty.look().endswith(b"\r\x1b[K")


async def test_colours(tmp_path: Path, tty: Pty) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        async with at_terminal(tty, "ls", server=served.path) as process:
            assert await process.wait() == 0
        assert b"\x1b[32mRunning\x1b[0m" in tty.look()
        tty.seen.clear()
        async with at_terminal(tty, "ls", server=served.path, environment={"NO_COLOR": "1"}) as process:
            assert await process.wait() == 0
        assert b"Running" in tty.look()
        assert b"\x1b" not in tty.seen


async def test_what_came_from_elsewhere_does_not_reach_the_terminal(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        (tmp_path / "spec.json").write_bytes(msgspec.json.encode(wire_spec(tmp_path)))
        await ok(served, "new", "web", "-s", str(tmp_path / "spec.json"), "--description", "\x1b]0;owned\x07\nstate ok")
        assert r"\x1b]0;owned\x07\nstate ok" in await ok(served, "get", "web")


# -- watching ----------------------------------------------------------------------------------------------------------


async def test_monitor(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        watching = asyncio.create_task(cli("monitor", "web", server=served.path))
        watching_json = asyncio.create_task(cli("monitor", "web", "--json", server=served.path))
        await served.running()
        await served.put("/instance/stop")
        result = await watching
        assert result.status == 0
        assert result.out.splitlines()[-1].split() == [str(served.vm.lifecycle.record.generation), "Stopped", "stopped"]
        lines = [msgspec.json.decode(line) for line in (await watching_json).out.splitlines()]
        assert lines[-1]["state"] == "Stopped"


async def test_events(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        async with Program("events", "web", "--after", "0", "--json", server=served.path) as program:
            assert program.out is not None
            first = msgspec.json.decode(await program.out.readline())
            assert (first["kind"], first["name"]) == ("state", "web")
            await served.ask("POST", "/instance/nmi")
            while b'"nmi"' not in await program.out.readline():
                pass


async def test_logs(tmp_path: Path) -> None:
    log = ConsoleHistory()
    log.append(b"one\ntwo\x1b[31m\nthree\n")
    async with serving(tmp_path, build(tmp_path), log=log) as served:
        assert await ok(served, "logs", "web") == "one\ntwo\\x1b[31m\nthree\n"
        assert await ok(served, "logs", "web", "-n", "1") == "three\n"
        assert await ok(served, "logs", "web", "-n", "0") == ""
        async with Program("logs", "web", "-f", "-n", "1", server=served.path) as program:
            assert program.out is not None
            assert await program.out.readline() == b"three\n"
            log.append(b"four\n")
            assert await program.out.readline() == b"four\n"


async def test_nobody_reads_any_more(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, Program("monitor", "web", server=served.path) as program:
        assert program.out is not None
        await program.out.readline()
        program.close_output()
        await served.running()
        assert await program.wait() == 1


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_a_shell_s_script(shell: str) -> None:
    result = await cli("completion", shell)
    assert result.status == 0
    assert f"_PROPOLIS_CLI_COMPLETE=complete_{shell}" in result.out


async def test_names_are_completed(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        for word, found in (("w", "web"), ("x", "")):
            words = f"propolis-cli --url unix:{served.path} state {word}"
            more = {"_PROPOLIS_CLI_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
            result = await cli(environment=more)
            assert result.out.strip() == found
    result = await cli(environment=more)  # no server, no names
    assert result.out.strip() == ""
