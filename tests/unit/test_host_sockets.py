"""Sockets of the host for a worker's devices: who opens them, and what becomes of their names."""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis import jail
from propolis.errors import BackendError, BusyError, PropolisError
from propolis.host_sockets import AskingConnector, ConnectorServer, DirectConnector, HostListener
from propolis.keeper_process import MAX_CONNECTORS, Ends
from propolis.keeper_protocol import RemoteKeeper
from propolis.run_directory import RunDirectory
from propolis.small_devices import VirtioSocket
from propolis.spec import PciPath
from tests.unit.keepers import ended, kept, serving, spec

USER = 65534 if os.getuid() == 0 else None


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(str(tmp_path / "run")) as directory:
        yield directory


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    return listener


def test_a_name_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = HostListener(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with pytest.raises(BusyError, match="another program listens there"):
        HostListener(str(path))
    listener.close()
    listener.close()
    assert not path.exists()


def test_what_a_dead_program_left_is_replaced(tmp_path: Path) -> None:
    listening(tmp_path / "s").close()
    HostListener(str(tmp_path / "s")).close()


@pytest.mark.parametrize("kind", ["file", "link", "folder", "none"])
def test_names_that_cannot_be_had(tmp_path: Path, kind: str) -> None:
    """A link is not followed: what it leads to stays as it is."""
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        path.mkdir()
    else:
        path = tmp_path / "nowhere/s"
    with pytest.raises(PropolisError, match=str(path)):
        HostListener(str(path))
    assert sorted(tmp_path.iterdir()) == ([path] if kind != "none" else [])


def test_a_name_that_is_another_s_now_stays(tmp_path: Path) -> None:
    listener = HostListener(str(tmp_path / "s"))
    os.rename(tmp_path / "s", tmp_path / "t")
    with listening(tmp_path / "s"):
        listener.close()
        assert (tmp_path / "s").exists()


async def test_a_keeper_that_connects(tmp_path: Path) -> None:
    """Answers come in the order of the questions, and None is one; a path may be longer than a socket's name may be."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    here = os.getcwd()
    os.chdir(folder)
    try:
        there = listening(Path("s_52"))
    finally:
        os.chdir(here)
    server = ConnectorServer(str(folder / "s"))
    connector = AskingConnector(socket.socket(fileno=server.other.detach()))
    loop = asyncio.get_running_loop()
    connector.start(loop)
    loop.add_reader(server.fileno(), server.serve)
    answers: asyncio.Queue[tuple[int, socket.socket | None]] = asyncio.Queue()
    for port in (51, 52, 53):
        connector.connect(port, lambda found, port=port: answers.put_nowait((port, found)))  # type: ignore[misc]
    found = dict([await asyncio.wait_for(answers.get(), 10) for _ in range(3)])
    assert [port for port, peer in found.items() if peer is not None] == [52]
    assert found[52] is not None
    found[52].close()
    loop.remove_reader(server.fileno())
    server.close()
    connector.connect(1, lambda found: answers.put_nowait((1, found)))
    assert await asyncio.wait_for(answers.get(), 10) == (1, None)
    connector.close()
    connector.close()
    there.close()


def test_a_worker_that_asks_and_does_not_listen(tmp_path: Path) -> None:
    """The keeper does not wait for it: it has nothing more to do with it."""
    server = ConnectorServer(str(tmp_path / "s"))
    server.other.setblocking(False)
    for _ in range(100_000):
        with contextlib.suppress(BlockingIOError):
            server.other.send(bytes(4))
        if not server.serve():
            break
    else:
        pytest.fail("the keeper answered all of it")
    server.close()


@pytest.mark.parametrize("question", [b"", b"123", b"12345678"])
def test_what_is_no_question(tmp_path: Path, question: bytes) -> None:
    server = ConnectorServer(str(tmp_path / "s"))
    server.other.send(question)
    assert server.serve() is (len(question) > 4)  # of which the first four bytes count
    server.close()


async def test_a_jailed_worker(directory: RunDirectory, tmp_path: Path) -> None:
    """It listens, is called and calls, by what its keeper opens for it; what its spec does not name it does not get."""
    path = str(tmp_path / "v.sock")
    vm = spec(
        tmp_path, devices=(VirtioSocket(name="v", pci_path=PciPath(0, 6, 0), guest_cid=3, path=path),), backends={}
    )

    async def live(keeper: RemoteKeeper) -> list[str]:
        said = []
        for other in (f"{path}_52", "/run/docker.sock", "", "v.sock"):
            for opening in (keeper.open_listener, keeper.open_connector):
                try:
                    opening(other)
                except BackendError as error:
                    said.append(str(error).rpartition(": ")[2])
        loop = asyncio.get_running_loop()
        listener, connector = keeper.open_listener(path), keeper.open_connector(path)
        connector.start(loop)
        answer: asyncio.Future[socket.socket | None] = loop.create_future()
        connector.connect(52, answer.set_result)
        peer = await answer
        assert peer is not None
        peer.setblocking(False)
        await loop.sock_sendall(peer, b"called")
        listener.socket.setblocking(False)
        client, _ = await loop.sock_accept(listener.socket)
        said.append((await loop.sock_recv(client, 10)).decode())
        try:
            for _ in range(MAX_CONNECTORS):
                keeper.open_connector(path)
        except BackendError as error:
            said.append(str(error).rpartition(": ")[2])
        return said

    def work(keeper: RemoteKeeper, _ends: Ends) -> None:
        jail.enter(jail.JailSettings(uid=USER), keep=[0, 1, 2, keeper.fileno()])
        os.write(2, "\n".join(asyncio.run(live(keeper))).encode())
        os._exit(0)

    with listening(tmp_path / "v.sock_52") as program, kept(directory, vm, serving(work)) as one:
        running = one.introduced()
        one.ready()
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            peer, _ = await loop.sock_accept(program)
            peer.setblocking(False)
            assert await loop.sock_recv(peer, 10) == b"called"
        peer.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
            client.send(b"hello")
            record = await ended(running)
    refused = ["the VM's spec does not name it"] * 8
    assert record.stderr.split("\n") == [*refused, "hello", "the VM has enough of them"]
    assert not os.access(path, os.F_OK)


def test_a_connector_without_a_keeper(tmp_path: Path) -> None:
    found: list[socket.socket | None] = []
    with listening(tmp_path / "s_1"):
        for port in (1, 2):
            DirectConnector(str(tmp_path / "s")).connect(port, found.append)
    assert found[1] is None
    assert found[0] is not None
    found[0].close()
