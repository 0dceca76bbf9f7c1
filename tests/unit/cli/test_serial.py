"""`propolis-cli serial` on a real terminal: what is shown and typed, leaving, and a server that goes away."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli.program import Program, at_terminal, cli
from tests.unit.console.terminals import Pty, until
from tests.unit.http.fronts import Front, Relay
from tests.unit.http.serving import Served, one_vm

pytestmark = pytest.mark.program

GREETING = b"[console of VM 'web'; Ctrl-] or ~. leaves]\r\n"


@pytest.fixture
def tty() -> Iterator[Pty]:
    tty = Pty()
    yield tty
    tty.close()


async def typed(served: Served, size: int) -> None:
    """That many bytes wait for the guest, beside those that its port took."""
    await until(lambda: served.vm.hub().waiting_input >= size, "what was typed")


@pytest.mark.parametrize("keys", [b"\x1d", b"~.", b"ls\r~."])
async def test_history_typing_and_leaving(tmp_path: Path, tty: Pty, keys: bytes) -> None:
    async with one_vm(tmp_path) as served, at_terminal(tty, "serial", "web", server=served.path) as process:
        served.vm.hub().feed(b"history\r\n")
        await until(lambda: tty.look().endswith(b"history\r\n"), "the history")
        assert tty.look() == GREETING + b"history\r\n"
        assert tty.is_raw
        tty.type(b"x" * 100 + b"\r")
        await typed(served, 80)
        served.vm.hub().feed(bytes(range(256)))
        await until(lambda: tty.look().endswith(bytes(range(256))), "all bytes as they are")
        tty.type(keys)
        assert await process.wait() == 0
        assert tty.is_restored
        assert tty.look().endswith(b"\r\n[left the console]\r\n")


async def test_another_escape(tmp_path: Path, tty: Pty) -> None:
    async with one_vm(tmp_path) as served, at_terminal(tty, "serial", "-e", "^A", "web", server=served.path) as process:
        await until(lambda: b"Ctrl-A or ~. leaves]" in tty.look(), "the greeting")
        tty.type(b"\x1d\x01")
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("offset", "shown"),
    [([], b"0123456789"), (["-b", "4"], b"456789"), (["--byte-offset=-3"], b"789"), (["-b", "99"], b"")],
)
async def test_where_it_begins(tmp_path: Path, tty: Pty, offset: list[str], shown: bytes) -> None:
    async with one_vm(tmp_path) as served:
        served.vm.hub().feed(b"0123456789")
        async with at_terminal(tty, "serial", *offset, "web", server=served.path):
            await until(lambda: GREETING in tty.look() and served.vm.hub().clients == 1, "the console")
            served.vm.hub().feed(b"!")
            await until(lambda: tty.look().endswith(b"!"), "what follows")
            assert tty.look() == GREETING + shown + b"!"


async def test_the_end_of_the_vm(tmp_path: Path, tty: Pty) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        async with at_terminal(tty, "serial", "web", server=served.path) as process:
            await until(lambda: served.vm.hub().clients == 1, "the console")
            served.vm.hub().feed(b"bye")
            await served.put("/instance/stop")
            assert await process.wait() == 0
            assert b"bye" in tty.look()
            assert tty.is_restored


async def test_a_refusal_leaves_the_terminal_alone(tmp_path: Path, tty: Pty) -> None:
    async with one_vm(tmp_path) as served, at_terminal(tty, "serial", "db", server=served.path) as process:
        assert await process.wait() == 4
        assert tty.is_restored
        assert tty.look().startswith(b"propolis-cli: there is no VM 'db'")


async def test_a_server_that_is_restarted(tmp_path: Path, tty: Pty) -> None:
    async with one_vm(tmp_path) as served, Front(served, tmp_path / "front") as front:
        hub = served.vm.hub()
        async with at_terminal(tty, "serial", "web", server=str(front.path)) as process:
            hub.feed(b"one ")
            await until(lambda: tty.look().endswith(b"one "), "the first output")
            await front.stop()
            await until(lambda: b"; connecting again]\r\n" in tty.look(), "the word about it")
            hub.feed(b"two ")
            assert tty.is_raw
            tty.type(b"x" * 200)
            await front.start()
            await until(lambda: tty.look().endswith(b"[connected again]\r\ntwo "), "what was printed meanwhile")
            await typed(served, 180)
            hub.feed(b"three")
            await until(lambda: tty.look().endswith(b"two three"), "what follows")
            tty.type(b"\x1d")
            assert await process.wait() == 0
            assert tty.is_restored


async def test_every_byte_once_across_killed_connections(tmp_path: Path) -> None:
    """Into a pipe."""
    async with one_vm(tmp_path) as served, Relay(tmp_path / "relay", served.path) as relay:
        hub = served.vm.hub()
        output = "".join(f"{number:06d}\n" for number in range(20_000)).encode()
        await served.running()
        async with Program("serial", "web", server=str(relay.path)) as program:
            assert program.err is not None
            assert await program.err.readline() == b"[console of VM 'web']\n"
            reading = asyncio.create_task(program.ended())
            for at in range(0, len(output), 7000):
                hub.feed(output[at : at + 7000])
                await asyncio.sleep(0)
                if at % 35_000 == 0:
                    seen = relay.connections
                    relay.cut()
                    await until(lambda: relay.connections > seen, "the next connection")
            await served.put("/instance/stop")
            result = await reading
        assert result.status == 0
        assert result.out == output.decode()
        assert "connecting again" in result.err


async def test_leaving_while_the_server_is_away(tmp_path: Path, tty: Pty) -> None:
    async with (
        one_vm(tmp_path) as served,
        Front(served, tmp_path / "front") as front,
        at_terminal(tty, "serial", "web", server=str(front.path)) as process,
    ):
        await until(lambda: served.vm.hub().clients == 1, "the console")
        await front.stop()
        await until(lambda: b"connecting again]" in tty.look(), "the word about it")
        tty.type(b"\r~.")
        assert await process.wait() == 0
        assert tty.is_restored


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT])
async def test_the_terminal_is_restored_whatever_ends_the_program(
    tmp_path: Path, tty: Pty, number: signal.Signals
) -> None:
    async with one_vm(tmp_path) as served, at_terminal(tty, "serial", "web", server=served.path) as process:
        await until(lambda: tty.is_raw and served.vm.hub().clients == 1, "the console")
        process.send_signal(number)
        assert await process.wait() == (130 if number is signal.SIGINT else -number)
        await until(lambda: tty.is_restored, "the terminal as it was")


async def test_a_terminal_that_hangs_up(tmp_path: Path, tty: Pty) -> None:
    async with one_vm(tmp_path) as served, at_terminal(tty, "serial", "web", server=served.path) as process:
        await until(lambda: tty.is_raw and served.vm.hub().clients == 1, "the console")
        tty.hang_up()
        assert await process.wait() in (1, -signal.SIGHUP)
        await until(lambda: served.vm.hub().clients == 0, "the console without it")


async def test_piped(tmp_path: Path) -> None:
    """No key leaves, and the output is the console's alone."""
    async with one_vm(tmp_path) as served:
        await served.running()
        running = asyncio.create_task(cli("serial", "web", server=served.path, typed=b"\x1d~." + b"x" * 97))
        await typed(served, 80)
        served.vm.hub().feed(b"out\x00\r\n")
        await served.put("/instance/stop")
        assert await running == (0, "out\x00\r\n", "[console of VM 'web']\n")
