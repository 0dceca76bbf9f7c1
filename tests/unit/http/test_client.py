"""The client against the application of one VM, on the replay hypervisor: requests, refusals, and no server at all."""

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from propolis.errors import ConfigError, StateError
from propolis.http import v5
from propolis.http.client import Client
from propolis.http.client_replies import (
    BadReplyError,
    DeniedError,
    NoVmError,
    RefusedError,
    UnknownVmError,
    UnreachableError,
    VmExistsError,
    VmIsOverError,
)
from propolis.http.client_transport import Address
from propolis.lifecycle import State
from propolis.spec import DirectBoot, FileBlock, PciPath, Spec, VirtioBlock
from tests.unit.http.serving import TIMEOUT, UUID, Served, build, empty, kernel, one_vm, serving, wire_spec


@contextlib.asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[Client]:
    async with asyncio.timeout(TIMEOUT), Client(f"unix:{served.path}") as client:
        yield client


def spec_of(tmp_path: Path, name: str = "web") -> Spec:
    return Spec(name=name, cpus=1, memory_mib=16, boot=DirectBoot(kernel=kernel(tmp_path)))


# -- where a server is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base", "path", "is_readable"),
    [
        ("unix:/run/x.sock", "http://localhost", "/run/x.sock", False),
        ("unix:///run/x.sock", "http://localhost", "/run/x.sock", False),
        ("http://127.0.0.1:12400", "http://127.0.0.1:12400", None, False),
        ("http://[::1]:12400/", "http://[::1]:12400", None, False),
        ("http://localhost:1/below", "http://localhost:1/below", None, False),
        ("http://vm.example:12400", "http://vm.example:12400", None, True),
        ("https://vm.example", "https://vm.example", None, False),
    ],
)
def test_addresses(url: str, base: str, path: str | None, is_readable: bool) -> None:
    address = Address.parse(url)
    assert (address.base, address.socket, address.is_readable_on_the_way) == (base, path, is_readable)


@pytest.mark.parametrize(
    "url",
    [
        *("", "unix:", "unix:a\0b", "vm.example:12400", "ftp://x", "http://", "http://:1", "http://x:0", "http://x:y"),
        *("http://x:99999", "http://x?y", "http://user:secret@x", "http://[::1"),
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="is no server: expected unix:PATH"):
        Address.parse(url)


def test_a_socket_s_path_has_an_end() -> None:
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        Address.parse(f"unix:/{'x' * 107}")
    assert Address.parse(f"unix:/{'x' * 106}").socket == f"/{'x' * 106}"


def test_a_token_is_not_sent_where_others_can_read_it() -> None:
    with pytest.raises(ConfigError, match="a token is only sent by https"):
        Client("http://vm.example:12400", "secret")
    for url, insecure in (("https://vm.example", False), ("http://127.0.0.1:1", False), ("http://vm.example", True)):
        Client(url, "secret", insecure=insecure)


# -- a VM's life -------------------------------------------------------------------------------------------------------


async def test_from_creation_to_the_end(tmp_path: Path) -> None:
    async with empty(tmp_path) as served, client_of(served) as client:
        with pytest.raises(NoVmError, match="it has not been created"):
            await client.get("web")
        assert await client.list() == ()
        assert await client.create("web", spec_of(tmp_path), description="of a test") is True
        there = await client.get("web")
        assert (there.properties.name, there.properties.description) == ("web", "of a test")
        assert there.state is v5.InstanceState.CREATING
        status = (await client.spec("web")).spec
        assert isinstance(status, v5.SpecPresent)
        assert status.value.board.cpus == 1
        (row,) = await client.list()
        assert (row.name, row.uuid, row.cpus, row.memory_mib) == ("web", there.properties.id, 1, 16)
        with pytest.raises(VmExistsError, match="there is a VM already"):
            await client.create("web", spec_of(tmp_path))
        await client.run("web")
        await served.reaches(State.RUNNING)
        await client.pause("web")
        await served.reaches(State.PAUSED)
        await client.resume("web")
        await served.reaches(State.RUNNING)
        await client.reboot("web")
        await client.reset("web")
        await client.inject_nmi("web")
        await client.shutdown("web", deadline=100)
        await client.stop("web")
        with pytest.raises(VmIsOverError):
            await client.state_monitor("web", 1000)


async def test_a_spec_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    spec = msgspec.structs.replace(
        spec_of(tmp_path),
        devices=(VirtioBlock(name="disk0", backend="disk", pci_path=PciPath(0, 4, 0)),),
        backends={"disk": FileBlock(path=str(tmp_path / "disk"), readonly=True)},
    )
    raw = msgspec.Raw(msgspec.json.encode(wire_spec(tmp_path)))
    wire = msgspec.convert(wire_spec(tmp_path), v5.InstanceSpec)
    every: list[Spec | msgspec.Raw | v5.InstanceSpec] = [spec, raw, wire]
    for number, given in enumerate(every):
        folder = tmp_path / str(number)
        folder.mkdir()
        identity = uuid.uuid4()
        async with empty(folder) as served, client_of(served) as client:
            assert await client.create("web", given, identity=identity)
            assert (await client.get()).properties.id == identity
            assert served.vm.spec.name == "web"


async def test_states_are_seen_until_there_are_no_more(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served) as client:
        seen = []
        async with contextlib.aclosing(client.states("web")) as states:
            async for now in states:
                seen.append(now.state.value)
                if now.state is v5.InstanceState.CREATING:
                    await client.run("web")
                elif now.state is v5.InstanceState.RUNNING:
                    await client.stop("web")
        assert seen[0] == "Creating"
        assert seen[-1] == "Stopped"
        assert "Running" in seen


async def test_a_poll_for_a_state_has_no_deadline_but_the_caller_s(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served) as client:
        poll = asyncio.create_task(client.state_monitor("web", 1))
        await client.get("web")
        assert not poll.done()
        await client.run("web")
        assert (await poll).gen >= 1


async def test_a_name_is_checked_by_a_client_of_one_vm(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served) as client:
        for name in ("web", UUID, None):
            assert (await client.get(name)).properties.name == "web"
        with pytest.raises(UnknownVmError, match=r"there is no VM 'db': unix:.*/http runs 'web'"):
            await client.stop("db")
        with pytest.raises(ConfigError, match="cannot name a VM"):
            await client.get("../web")
        await served.reaches(State.CREATING)


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_a_wrong_request_names_the_field(tmp_path: Path) -> None:
    async with empty(tmp_path) as served, client_of(served) as client:
        wrong = wire_spec(tmp_path)
        wrong["board"]["cpus"] = 0
        with pytest.raises(RefusedError, match="expected 1 to 64 CPUs") as refused:
            await client.create("web", msgspec.Raw(msgspec.json.encode(wrong)))
        assert refused.value.pointer == "/init/value/spec/board/cpus"
        assert refused.value.status == 400
        assert refused.value.request_id
        assert isinstance(refused.value, ConfigError)


async def test_what_the_state_does_not_admit(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served) as client:
        with pytest.raises(DeniedError, match="has not been started") as denied:
            await client.reboot("web")
        assert denied.value.status == 403
        assert denied.value.state == "Creating"
        assert isinstance(denied.value, StateError)
        with pytest.raises(DeniedError) as denied:
            await client.pause("web")
        assert denied.value.status == 409


async def test_what_there_is_not(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served) as client:
        with pytest.raises(UnknownVmError, match="keeps no log"):
            await client.log("web")
        with pytest.raises(UnknownVmError, match="COM3"), contextlib.ExitStack():
            async with client.serial("web", com=3):
                pass


# -- no server, or another one -----------------------------------------------------------------------------------------


async def test_no_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        urls = {
            f"unix:{tmp_path}/none": "No such file or directory",
            f"unix:{tmp_path}/dead": "Connection refused",
            f"http://127.0.0.1:{taken.getsockname()[1]}": "Connect",
        }
        for url, reason in urls.items():
            async with Client(url) as client:
                with pytest.raises(UnreachableError, match=f"connect to .*{reason}"):
                    await client.get("web")
                with pytest.raises(UnreachableError, match=f"connect to .*{reason}"):
                    async with client.serial("web"):
                        pass


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"", UnreachableError, "GET /instances/web: unix:.*Server disconnected"),
        (b"SSH-2.0-OpenSSH\r\n", UnreachableError, "GET /instances/web: unix:"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", BadReplyError, "none of this API"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhello", UnreachableError, "GET /instances/web"),
        (b"HTTP/1.1 502 Bad\r\ncontent-length: 9\r\n\r\n<b>no</b>", Exception, "the server answered 502: <b>no</b>$"),
        (b"HTTP/1.1 302 Found\r\nlocation: http://other/\r\ncontent-length: 0\r\n\r\n", Exception, "answered 302"),
    ],
)
async def test_something_else_answers(tmp_path: Path, answer: bytes, error: type[Exception], text: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, tmp_path / "other")
    async with server, asyncio.timeout(TIMEOUT), Client(f"unix:{tmp_path}/other") as client:
        with pytest.raises(error, match=text):
            await client.get("web")


# -- events and the log ------------------------------------------------------------------------------------------------


async def test_events_go_on_where_they_were(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served) as client:
        await served.running()
        async with contextlib.aclosing(client.events("web", after=0)) as events:
            first = await anext(events)
        assert (first.kind, first.name, first.uuid) == ("state", "web", UUID)
        async with contextlib.aclosing(client.events("web", after=first.id)) as events:
            second = await anext(events)
            assert second.id > first.id
            await client.inject_nmi("web")
            kinds = []
            async for event in events:
                kinds.append(event.kind)
                if event.kind == "nmi":
                    await client.stop("web")
        assert "nmi" in kinds
        assert event.state == "Stopped"


async def test_events_that_are_lost_are_told(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served) as client:
        for _ in range(2000):
            served.vm.events.add("x", 0)
        async with contextlib.aclosing(client.events("web", after=1)) as events:
            assert [(await anext(events)).kind for _ in range(3)] == ["gap", "x", "x"]


async def test_the_log_and_what_is_added_to_it(tmp_path: Path) -> None:
    from propolis.console.history import ConsoleHistory

    log = ConsoleHistory()
    log.append("first\nsecönd\n".encode())
    async with serving(tmp_path, build(tmp_path), log=log) as served, client_of(served) as client:
        piece = await client.log("web")
        assert piece.text == "first\nsecönd\n"
        assert (await client.log("web", most_recent=8)).text == "secönd\n"
        async with contextlib.aclosing(client.follow_log("web", from_start=piece.last_byte_offset)) as pieces:
            waiting = asyncio.ensure_future(anext(pieces))
            await client.get("web")
            log.append(b"third\n")
            assert await waiting == "third\n"
