"""The console of `propolis-standalone`: the socket ./ttya and its clients, and a terminal with --console."""

import asyncio
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from tests.machine import kernels, tiny
from tests.machine.guest import Guest

pytestmark = [pytest.mark.kvm, pytest.mark.program]

SOON = 20


async def until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    """What a client is sent up to `end`."""
    async with asyncio.timeout(SOON):
        return await reader.readuntil(end)


async def leave(writer: asyncio.StreamWriter) -> None:
    """Close a client."""
    writer.close()
    await writer.wait_closed()


async def ready(vm: Guest) -> None:
    """The guest has greeted."""
    await vm.expect("ready", SOON, "the kernel's greeting")


# -- ./ttya ------------------------------------------------------------------------------------------------------------


async def test_a_late_client_gets_the_history_first(tmp_path: Path) -> None:
    """All of it, then what follows."""
    async with tiny.guest(tmp_path) as vm:
        await ready(vm)
        await vm.send("one")
        await vm.expect("one", SOON, "the echo")
        reader, writer = await vm.connect()
        assert await until(reader, b"one") == b"ready\r\none"
        await vm.send("two")
        assert await until(reader, b"two") == b"two"
        await leave(writer)


async def test_several_clients(tmp_path: Path) -> None:
    """Each sees everything, and what each types reaches the guest; one that leaves is not missed."""
    async with tiny.guest(tmp_path) as vm:
        await ready(vm)
        clients = [await vm.connect() for _ in range(5)]
        for number, (_, writer) in enumerate(clients):
            writer.write(f"<{number}>".encode())
            await vm.expect(f"<{number}>", SOON, "the echo of what another client typed")
        for reader, _ in clients:
            assert await until(reader, b"<4>") == b"ready\r\n<0><1><2><3><4>"
        await leave(clients[0][1])
        await vm.send("still")
        assert await until(clients[1][0], b"still") == b"still"
        for _, writer in clients[1:]:
            await leave(writer)


async def test_long_input_arrives_whole(tmp_path: Path) -> None:
    """More than the guest's FIFO and the sockets hold is delivered as the guest takes it."""
    typed = "".join(f"{number:05d}." for number in range(1000))
    async with tiny.guest(tmp_path) as vm:
        await ready(vm)
        reader, writer = await vm.connect()
        await until(reader, b"ready\r\n")
        writer.write(typed.encode())
        assert await until(reader, b"00999.") == typed.encode()
        await leave(writer)


async def test_a_client_that_does_not_read_blocks_nobody(tmp_path: Path, rounds: int) -> None:
    """The guest prints more than the sockets hold and powers off, and another client sees the end of it.

    Each character is an exit to the program: a MiB takes at least 10 s on a nested KVM.
    """
    size = rounds * (160 << 10)
    pieces = size // kernels.BURST
    flood = kernels.repeat(pieces, kernels.say("." * (kernels.BURST - 2) + "\r\n"))
    image = kernels.kernel(
        kernels.say("ready\r\n")
        + kernels.forever(kernels.on_input(flood + kernels.say("the end\r\n") + kernels.power_off()))
    )
    async with tiny.guest(tmp_path, image) as vm:
        await ready(vm)
        with socket.socket(socket.AF_UNIX) as slow:
            slow.connect(os.fspath(tmp_path / "ttya"))
            reader, writer = await vm.connect()
            await vm.send("x")
            async with asyncio.timeout(20 * rounds):
                seen = await reader.read(-1)
            await leave(writer)
            assert await vm.exit_status() == 0
            assert seen.endswith(b".\r\nthe end\r\n")
    if b"no longer kept" not in seen:  # for a client that keeps up
        assert len(seen) == len("ready\r\nthe end\r\n") + size


async def test_no_client_at_all(tmp_path: Path) -> None:
    """The guest does not wait for one: it prints more than the port holds."""
    image = kernels.kernel(kernels.repeat(192, kernels.say("x" * kernels.BURST)) + kernels.power_off())
    tiny.write(tmp_path, image)
    ended = await asyncio.to_thread(tiny.run, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")


async def test_the_socket_of_another_vm_is_refused(tmp_path: Path) -> None:
    """That VM goes on, and keeps its socket."""
    async with tiny.guest(tmp_path) as vm:
        await ready(vm)
        tiny.write(tmp_path, name=f"{tiny.NAME}-2", file="second.toml")
        ended = await asyncio.to_thread(tiny.run, tmp_path, "second.toml")
        assert ended.returncode == 1
        assert ended.stderr == (
            f"propolis-standalone: open console socket '{tmp_path}/ttya': another program listens there\n"
        )
        reader, writer = await vm.connect()
        await until(reader, b"ready\r\n")
        await leave(writer)


async def test_the_socket_of_a_killed_vm_is_replaced(tmp_path: Path) -> None:
    """So is its name, and the lock on its disk."""
    more = tiny.disk("disk.raw")
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    async with tiny.guest(tmp_path, more=more) as vm:
        await ready(vm)
        assert vm.process is not None
        vm.process.kill()
        assert await vm.exit_status() == -signal.SIGKILL
    assert (tmp_path / "ttya").is_socket()
    async with tiny.guest(tmp_path, more=more) as vm:
        await ready(vm)
        await vm.send("P")
        assert await vm.exit_status() == 0
    assert not (tmp_path / "ttya").exists()


def test_a_file_in_the_sockets_place_is_kept(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    (tmp_path / "ttya").write_text("mine")
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch(
        r"propolis-standalone: open console socket .*: there is something that is not a socket\n", ended.stderr
    )
    assert (tmp_path / "ttya").read_text() == "mine"


async def test_what_was_typed_before_a_reset_is_forgotten(tmp_path: Path) -> None:
    """It was meant for the system that is gone."""
    async with tiny.guest(tmp_path) as vm:
        await ready(vm)
        await vm.send("R" + "P" * 1000)
        await ready(vm)
        await vm.send("alive")
        await vm.expect("alive", SOON, "the echo")


# -- a terminal --------------------------------------------------------------------------------------------------------


def test_a_terminal_until_power_off(tmp_path: Path) -> None:
    """Keys and output pass, Ctrl-C too; there is no socket; the terminal is as it was afterwards."""
    tiny.write(tmp_path)
    with tiny.AtTerminal(tmp_path, "--console") as terminal:
        terminal.expect(rf"\[console of VM '{tiny.NAME}'; Ctrl-\] or ~\. leaves\]\r\n")
        terminal.expect("ready\r\n")
        assert terminal.is_raw
        assert not (tmp_path / "ttya").exists()
        terminal.type("hello\x03\x04")
        terminal.expect("hello\x03\x04")
        terminal.type("P")
        assert terminal.exit_status() == 0
        assert terminal.restored()


def test_a_terminal_that_is_not_attached(tmp_path: Path) -> None:
    """Is told where the console is, and what Ctrl-C did."""
    tiny.write(tmp_path, tiny.DEAF)
    with tiny.AtTerminal(tmp_path) as terminal:
        terminal.expect(rf"^\[VM '{tiny.NAME}': its console is \./ttya, Ctrl-C presses its power button\]\r\n")
        terminal.type("\x03")
        terminal.expect(r"\[pressed the power button; once more ends the VM\]\r\n")
        terminal.type("\x03")
        assert terminal.exit_status() == 128 + signal.SIGINT


async def test_leaving_the_terminal(tmp_path: Path) -> None:
    """The VM runs on with its console at ./ttya, and the terminal's Ctrl-C is a signal again."""
    tiny.write(tmp_path)
    with tiny.AtTerminal(tmp_path, "--console") as terminal:
        terminal.expect("ready\r\n")
        terminal.type("hello\x1d")
        terminal.expect(r"\[left the console\]\r\n")
        terminal.expect(r"\[the VM runs on: its console is \./ttya, Ctrl-C presses its power button\]\r\n")
        assert terminal.restored()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "ttya")
        assert await until(reader, b"hello") == b"ready\r\nhello"
        terminal.type("\x03")
        await until(reader, b"button\r\n")
        await leave(writer)
        assert terminal.exit_status() == 0
    assert not (tmp_path / "ttya").exists()


def test_leaving_by_another_key(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    with tiny.AtTerminal(tmp_path, "--console", "--escape", "^A") as terminal:
        terminal.expect(r"; Ctrl-A or ~\. leaves\]")
        terminal.expect("ready\r\n")
        terminal.type("\x1d.")
        terminal.expect("\x1d\\.")
        terminal.type("\x01")
        terminal.expect("left the console")


async def test_leaving_where_the_socket_is_taken(tmp_path: Path) -> None:
    """Does not end the VM; it says that there is no console."""
    async with tiny.guest(tmp_path, name=f"{tiny.NAME}-2") as other:
        await ready(other)
        tiny.write(tmp_path)
        with tiny.AtTerminal(tmp_path, "--console") as terminal:
            terminal.expect("ready\r\n")
            terminal.type("\x1d")
            terminal.expect(r"\[the VM runs on without a console: .*another program listens there; Ctrl-C ")
            terminal.type("\x03")
            assert terminal.exit_status() == 0


def test_an_escape_key_that_does_not_exist(tmp_path: Path) -> None:
    """Is refused before anything is begun."""
    tiny.write(tmp_path)
    ended = tiny.run(tmp_path, "--console", "--escape", "F12", "vm.toml")
    assert ended.returncode == 2
    assert ended.stderr == "escape key 'F12': expected '^]', 'ctrl-]', one character, or 'none'\n"


def test_a_failure_restores_the_terminal(tmp_path: Path) -> None:
    """And is told below the console, from the left edge."""
    tiny.write(tmp_path)
    with tiny.AtTerminal(tmp_path, "--console") as terminal:
        terminal.expect("ready\r\n")
        terminal.type("F")
        assert terminal.exit_status() == 1
        assert terminal.restored()
        assert re.search(r"\[left the console\]\r\npropolis-standalone: vCPU 0: [^\n]*\r\n$", terminal.transcript)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_vm_at_a_terminal(tmp_path: Path, number: signal.Signals) -> None:
    tiny.write(tmp_path, tiny.DEAF)
    with tiny.AtTerminal(tmp_path, "--console") as terminal:
        terminal.expect("ready\r\n")
        terminal.process.send_signal(number)
        terminal.expect("not now")
        assert terminal.is_raw
        terminal.process.send_signal(number)
        assert terminal.exit_status() == 128 + number
        assert terminal.restored()


def test_sigkill_restores_the_terminal(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    with tiny.AtTerminal(tmp_path, "--console") as terminal:
        terminal.expect("ready\r\n")
        assert terminal.is_raw
        terminal.process.kill()
        assert terminal.exit_status() == -signal.SIGKILL
        assert terminal.restored()


def test_a_terminal_that_hangs_up(tmp_path: Path) -> None:
    """SIGHUP presses the power button; the exit status is the guest's."""
    tiny.write(tmp_path)
    with tiny.AtTerminal(tmp_path, "--console") as terminal:
        terminal.expect("ready\r\n")
        terminal.hang_up()
        assert terminal.exit_status() == 0


def test_log_lines_at_a_raw_terminal(tmp_path: Path) -> None:
    """Begin at the left edge."""
    tiny.write(tmp_path)
    with tiny.AtTerminal(tmp_path, "--log-level", "info", "--console") as terminal:
        terminal.expect("ready\r\n")
        terminal.type("R")
        terminal.expect(r"INFO state Rebooting: guest\r\n\d")
        terminal.expect("ready\r\n")
        terminal.type("P")
        assert terminal.exit_status() == 0
    assert not re.search(r"[^\r]\n", terminal.transcript)


def test_piped_input(tmp_path: Path) -> None:
    """The escape key means nothing there, the end of the input neither; standard output is the console alone."""
    tiny.write(tmp_path)
    ended = tiny.run(tmp_path, "--console", "vm.toml", typed=b"hello\x1d\nP")
    assert ended.returncode == 0
    assert ended.stdout == "ready\r\nhello\x1d\n"
    assert ended.stderr == f"[console of VM '{tiny.NAME}']\n"


def test_input_that_ends(tmp_path: Path) -> None:
    """The guest runs on: this one prints something when it has seen the last of it."""
    image = kernels.kernel(kernels.forever(kernels.on_input(kernels.say("later\r\n") + kernels.power_off())))
    tiny.write(tmp_path, image)
    ended = tiny.run(tmp_path, "--console", "vm.toml", typed=b"x")
    assert (ended.returncode, ended.stdout) == (0, "later\r\n")


async def test_output_that_nobody_reads_any_more(tmp_path: Path) -> None:
    """The console moves to ./ttya."""
    tiny.write(tmp_path)
    out, end = os.pipe()
    vm = Guest([*tiny.PROGRAM, "--console", "vm.toml"], tmp_path)
    process = await asyncio.create_subprocess_exec(
        *vm.argv, cwd=tmp_path, stdin=asyncio.subprocess.PIPE, stdout=end, stderr=asyncio.subprocess.PIPE
    )
    os.close(end)
    assert process.stdin is not None
    assert process.stderr is not None
    with os.fdopen(out, "rb") as screen:
        assert await asyncio.to_thread(screen.readline) == b"ready\r\n"
    process.stdin.write(b"hello")
    await until(process.stderr, b"[the VM runs on: its console is ./ttya, Ctrl-C presses its power button]\n")
    reader, writer = await vm.connect()
    assert (await until(reader, b"hello")).startswith(b"ready\r\n")
    writer.write(b"P")
    assert await process.wait() == 0
    await leave(writer)
    await process.communicate()
