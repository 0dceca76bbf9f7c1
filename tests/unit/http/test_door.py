"""The door, with real clients: who gets in, over what, and what a client may have at most."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
from aiohttp import web

from propolis.config import Settings, TcpAddress, Tls, Tokens, UnixAddress, parse_address
from propolis.errors import BusyError, ConfigError, PropolisError
from propolis.http.access import ACCESS, Guard, TokenSet
from propolis.http.door import Door, check_exposure, make_runner, passed_sockets, tls_context
from tests.source.tree import TREE

TIMEOUT = 20
FULL, READER = "full-" + "x" * 32, "reader-" + "y" * 32


@web.middleware
async def tell(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except PropolisError as error:
        return web.json_response({"message": str(error)}, status=error.status)


async def whoami(request: web.Request) -> web.StreamResponse:
    if request.headers.get("Upgrade") == "websocket":
        return await echo(request)
    return web.Response(text=request[ACCESS].value + (await request.text()))


async def echo(request: web.Request) -> web.StreamResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        await websocket.send_str(message.data)
    return websocket


class Site(NamedTuple):
    door: Door
    guard: Guard
    runner: web.AppRunner

    def url(self, index: int = 0, scheme: str = "http") -> str:
        address = self.door.addresses[index]
        assert isinstance(address, TcpAddress)
        return f"{scheme}://{address}"


Open = Callable[..., Awaitable[Site]]


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Open, aiohttp.ClientSession]]:
    """Sites, and a client that is gone before them."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(settings: Settings, passed: list[socket.socket] | None = None) -> Site:
            app = web.Application(middlewares=[tell])
            guard = Guard(settings, TokenSet.load(settings.tokens))
            guard.install(app)
            app.router.add_route("*", "/{tail:.*}", whoami)
            runner = make_runner(app, settings.limits)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            door = Door(runner, settings)
            await door.open(settings.listen, passed or [])
            stack.push_async_callback(door.close)
            return Site(door, guard, runner)

        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(TIMEOUT)) as session:
            yield start, session


def settings(*listen: str, **more: Any) -> Settings:
    addresses = tuple(map(parse_address, listen))
    return Settings(state_directory="/nowhere", run_directory="/nowhere", listen=addresses, **more)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    (tmp_path / "full").write_text(f"# operators\n\n{FULL}\n  another-{FULL}  \n")
    (tmp_path / "readers").write_text(READER)
    for name in ("full", "readers"):
        (tmp_path / name).chmod(0o600)
    return Tokens(full=(str(tmp_path / "full"),), read_only=(str(tmp_path / "readers"),))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, and a second one."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("a", "b"):
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=propolis"
        names = [
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            f"{folder}/{name}.key",
            "-out",
            f"{folder}/{name}.pem",
        ]
        subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return folder


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "headers", "status", "words"),
    [
        ("GET", bearer(FULL), 200, "full"),
        ("PUT", bearer(FULL), 200, "full"),
        ("PUT", bearer(f"another-{FULL}"), 200, "full"),
        ("PUT", {"Authorization": f"bearer   {FULL}"}, 200, "full"),
        ("GET", bearer(READER), 200, "read-only"),
        ("PUT", bearer(READER), 403, "needs a token with full access"),
        ("DELETE", bearer(READER), 403, "needs a token with full access"),
        ("GET", {}, 401, "needs a token"),
        ("GET", bearer(FULL[:-1]), 401, "not known here"),
        ("GET", bearer(FULL + "x"), 401, "not known here"),
        ("GET", bearer("# operators"), 401, "not known here"),
        ("GET", {"Authorization": f"Basic {FULL}"}, 401, "needs a token"),
        ("GET", {"Authorization": FULL}, 401, "needs a token"),
        ("GET", {"Authorization": "Bearer "}, 401, "needs a token"),
        ("GET", bearer("ü" * 40), 401, "not known here"),
    ],
)
async def test_tokens(tokens: Tokens, method: str, headers: dict[str, str], status: int, words: str) -> None:
    async with serving() as (open_site, http):
        site = await open_site(settings("127.0.0.1:0", tokens=tokens))
        async with http.request(method, site.url() + "/instances", headers=headers) as response:
            assert response.status == status
            assert words in await response.text()
            assert response.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)


async def test_two_tokens_are_none(tokens: Tokens) -> None:
    async with serving() as (open_site, http):
        site = await open_site(settings("127.0.0.1:0", tokens=tokens))
        headers = [("Authorization", f"Bearer {READER}"), ("Authorization", f"Bearer {FULL}")]
        async with http.put(site.url(), headers=headers) as response:
            assert response.status == 401


async def test_health_needs_no_token(tokens: Tokens) -> None:
    async with serving() as (open_site, http):
        site = await open_site(settings("127.0.0.1:0", tokens=tokens))
        async with http.get(site.url() + "/healthz") as response:
            assert response.status == 200


async def test_a_unix_socket_needs_no_token(tokens: Tokens, tmp_path: Path) -> None:
    async with serving() as (open_site, _):
        await open_site(settings(f"unix:{tmp_path}/api", tokens=tokens))
        http = aiohttp.ClientSession(connector=aiohttp.UnixConnector(f"{tmp_path}/api"))
        async with http, http.put("http://anything.example/") as response:
            assert (response.status, await response.text()) == (200, "full")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ("", 0o600, "expected a token on each line"),
        ("# only this", 0o600, "expected a token on each line"),
        ("short", 0o600, "16 to 512 ASCII characters"),
        ("two words and more of them", 0o600, "16 to 512 ASCII characters"),
        ("ü" * 20, 0o600, "16 to 512 ASCII characters"),
        (FULL, 0o644, "chmod 0600"),
        (FULL, 0o620, "chmod 0600"),
    ],
)
def test_files_of_tokens_that_are_refused(tmp_path: Path, content: str, mode: int, words: str) -> None:
    (tmp_path / "t").write_text(content)
    (tmp_path / "t").chmod(mode)
    with pytest.raises(ConfigError, match=words) as caught:
        TokenSet.load(Tokens(full=(str(tmp_path / "t"),)))
    assert not content or content.startswith("#") or content not in str(caught.value)


def test_a_file_of_tokens_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none': No such file"):
        TokenSet.load(Tokens(read_only=(f"{tmp_path}/none",)))
    with pytest.raises(ConfigError, match="expected a regular file"):
        TokenSet.load(Tokens(read_only=(str(tmp_path),)))


# -- browsers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "origin", "status"),
    [
        ("POST", "https://evil.example", 403),
        ("POST", "null", 403),
        ("POST", "http://127.0.0.1:1", 403),
        ("POST", "http://", 403),
        ("POST", "SELF", 200),
        ("POST", "https://console.example", 200),
        ("GET", "https://evil.example", 200),  # its answer is not shown to the page
    ],
)
async def test_pages_of_others_change_nothing(method: str, origin: str, status: int) -> None:
    async with serving() as (open_site, http):
        site = await open_site(settings("127.0.0.1:0", allowed_origins=("https://console.example",)))
        headers = {"Origin": site.url() if origin == "SELF" else origin}
        async with http.request(method, site.url(), headers=headers) as response:
            assert response.status == status


async def test_pages_of_others_open_no_websocket() -> None:
    async with serving() as (open_site, http):
        site = await open_site(settings("127.0.0.1:0"))
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await http.ws_connect(site.url(), origin="https://evil.example")
        assert caught.value.status == 403
        async with http.ws_connect(site.url(), origin=site.url()) as websocket:
            await websocket.send_str("x")
            assert await websocket.receive_str(timeout=TIMEOUT) == "x"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9", 200),
        ("localhost", 200),
        ("LOCALHOST.:80", 200),
        ("[::1]:80", 200),
        ("vm.example:1", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
async def test_a_name_that_resolves_to_this_machine_is_not_enough(host: str, status: int) -> None:
    async with serving() as (open_site, http):
        site = await open_site(settings("127.0.0.1:0", allowed_hosts=("vm.example",)))
        async with http.get(site.url(), headers={"Host": host}) as response:
            assert response.status == status


# -- addresses ---------------------------------------------------------------------------------------------------------


def test_other_machines_need_tls_and_a_token() -> None:
    everywhere = TcpAddress("0.0.0.0", 1)
    tls = Tls(certificate="a", key="b")
    some = Tokens(full=("x",))
    for refused, words in (
        (settings(), r"\[tls\] and \[tokens\]"),
        (settings(tls=tls), r"needs \[tokens\]"),
        (settings(tokens=some), r"needs \[tls\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_exposure(everywhere, refused)
        check_exposure(TcpAddress("127.0.0.1", 1), refused)
    check_exposure(everywhere, settings(tls=tls, tokens=some))
    check_exposure(everywhere, settings(tls=Tls(certificate="a", key="b", client_ca="c")))
    check_exposure(everywhere, settings(insecure=True))


async def test_a_unix_socket_is_the_groups_and_goes_at_the_end(tmp_path: Path) -> None:
    async with serving() as (open_site, _):
        path = tmp_path / ("long" * 40)
        path.mkdir()
        site = await open_site(settings(f"unix:{path}/api"))
        assert (path / "api").stat().st_mode & 0o777 == 0o660
        await site.door.close()
        assert not (path / "api").exists()


async def test_a_stale_socket_is_taken_over_and_a_live_one_is_not(tmp_path: Path) -> None:
    async with serving() as (open_site, _):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(f"{tmp_path}/api")
        await open_site(settings(f"unix:{tmp_path}/api"))
        with pytest.raises(BusyError, match="another program listens there"):
            await open_site(settings(f"unix:{tmp_path}/api"))


async def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    async with serving() as (open_site, _):
        (tmp_path / "api").write_text("precious")
        with pytest.raises(BusyError, match="not a socket"):
            await open_site(settings(f"unix:{tmp_path}/api"))
        assert (tmp_path / "api").read_text() == "precious"


async def test_an_address_in_use() -> None:
    async with serving() as (open_site, _):
        site = await open_site(settings("127.0.0.1:0"))
        with pytest.raises(BusyError, match="another program does"):
            await open_site(settings(str(site.door.addresses[0])))


async def test_an_unknown_group(tmp_path: Path) -> None:
    async with serving() as (open_site, _):
        with pytest.raises(ConfigError, match="there is no group 'no such group'"):
            await open_site(settings(f"unix:{tmp_path}/api", socket_group="no such group"))


# -- sockets that a service manager hands over -------------------------------------------------------------------------

ACTIVATED = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from propolis.errors import ConfigError
from propolis.http.door import address_of, passed_sockets
try:
    for passed in passed_sockets(os.environ):
        print(address_of(passed), passed.get_inheritable())
except ConfigError as error:
    print(error)
"""


def activated(*passed: socket.socket, count: str | None = None) -> list[str]:
    """What a process says that is started with these as descriptors 3 and up."""

    def arrange() -> None:
        moved = [os.dup(one.fileno()) for one in passed]
        spare = max([*moved, 40]) + 1
        high = [os.dup2(fd, spare + index) for index, fd in enumerate(moved)]
        for index, fd in enumerate(high):
            os.dup2(fd, 3 + index, inheritable=True)

    environ = {**os.environ, "LISTEN_FDS": count if count is not None else str(len(passed))}
    result = subprocess.run(
        [sys.executable, "-c", ACTIVATED],
        cwd=TREE, env=environ, capture_output=True, text=True, check=True, close_fds=False, preexec_fn=arrange,
    )  # fmt: skip
    return result.stdout.splitlines()


def test_passed_sockets(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"{tmp_path}/s")
        unix.listen()
        port = tcp.getsockname()[1]
        assert activated(tcp, unix) == [f"127.0.0.1:{port} False", f"unix:{tmp_path}/s False"]


def test_passed_descriptors_that_will_not_do(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET) as quiet:
        assert activated(quiet) == ["descriptor 3 of LISTEN_FDS: expected a listening stream socket"]
    for count in ("x", "-1", "0", "٣", "1000"):
        assert "expected a number from 1 to 64" in activated(count=count)[0]


def test_what_was_passed_to_another_process_is_not_ours() -> None:
    assert passed_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == []
    assert passed_sockets({}) == []


async def test_a_passed_socket_is_served() -> None:
    async with serving() as (open_site, http):
        passed = socket.create_server(("127.0.0.1", 0))
        passed.setblocking(False)
        site = await open_site(settings(), [passed])
        async with http.get(site.url()) as response:
            assert response.status == 200


async def test_a_passed_socket_is_no_way_around_the_rules() -> None:
    async with serving() as (open_site, _):
        passed = socket.create_server(("0.0.0.0", 0))
        with pytest.raises(ConfigError, match=r"needs \[tls\]"):
            await open_site(settings(), [passed])
        assert passed.fileno() == -1


# -- TLS ---------------------------------------------------------------------------------------------------------------


async def test_tls_and_its_reload(certificates: Path, tmp_path: Path) -> None:
    async with serving() as (open_site, http):
        first = Tls(certificate=f"{certificates}/a.pem", key=f"{certificates}/a.key")
        second = Tls(certificate=f"{certificates}/b.pem", key=f"{certificates}/b.key")
        given = settings("127.0.0.1:0", f"unix:{tmp_path}/api", tls=first)
        site = await open_site(given)
        trust = {name: ssl.create_default_context(cafile=f"{certificates}/{name}.pem") for name in ("a", "b")}

        async def status(name: str) -> int:
            async with aiohttp.ClientSession() as fresh, fresh.get(site.url(0, "https"), ssl=trust[name]) as response:
                return response.status

        assert await status("a") == 200
        held = await http.get(site.url(0, "https"), ssl=trust["a"])
        await held.read()
        with pytest.raises(ConfigError, match="use certificate"):
            await site.door.reload(msgspec.structs.replace(given, tls=Tls(certificate="/none", key="/none")))
        assert await status("a") == 200
        await site.door.reload(msgspec.structs.replace(given, tls=second))
        assert await status("b") == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status("a")
        async with http.get(site.url(0, "https"), ssl=trust["a"]) as response:  # on the connection that it had before
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await http.get(site.url())  # without TLS
        local = aiohttp.ClientSession(connector=aiohttp.UnixConnector(f"{tmp_path}/api"))
        async with local, local.get("http://x/") as response:
            assert response.status == 200


async def test_clients_certificates(certificates: Path) -> None:
    async with serving() as (open_site, _):
        tls = Tls(certificate=f"{certificates}/a.pem", key=f"{certificates}/a.key", client_ca=f"{certificates}/b.pem")
        site = await open_site(settings("127.0.0.1:0", tls=tls))
        stranger = ssl.create_default_context(cafile=f"{certificates}/a.pem")
        friend = ssl.create_default_context(cafile=f"{certificates}/a.pem")
        friend.load_cert_chain(f"{certificates}/b.pem", f"{certificates}/b.key")
        async with aiohttp.ClientSession() as http, http.get(site.url(0, "https"), ssl=friend) as response:
            assert response.status == 200
        async with aiohttp.ClientSession() as http:
            with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
                await http.get(site.url(0, "https"), ssl=stranger)


def test_tls_files_that_cannot_be_used(certificates: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked.key"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", f"{certificates}/a.key", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    pem = f"{certificates}/a.pem"
    for key, words in (
        (f"{certificates}/b.key", "KEY_VALUES_MISMATCH"),
        (str(locked), "expected one without a passphrase"),
        ("/none", "No such file"),
        (pem, "use certificate"),
    ):
        with pytest.raises(ConfigError, match=words):
            tls_context(Tls(certificate=pem, key=key))
    with pytest.raises(ConfigError, match="use client_ca '/none'"):
        tls_context(Tls(certificate=pem, key=f"{certificates}/a.key", client_ca="/none"))


# -- limits ------------------------------------------------------------------------------------------------------------


async def dial(site: Site) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = site.door.addresses[0]
    assert isinstance(address, TcpAddress)
    return await asyncio.open_connection(address.host, address.port)


async def say(site: Site, data: bytes) -> bytes:
    """All that is answered to this, until the connection is closed."""
    reader, writer = await dial(site)
    try:
        writer.write(data)
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(ConnectionError):
                return await reader.read()
        return b""
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_too_many_connections() -> None:
    async with serving() as (open_site, _):
        given = settings("127.0.0.1:0")
        limits = msgspec.structs.replace(given.limits, connections=3)
        site = await open_site(msgspec.structs.replace(given, limits=limits))
        held = []
        for _ in range(3):
            reader, writer = await dial(site)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with asyncio.timeout(TIMEOUT):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            held.append(writer)
        answer = await say(site, b"")
        assert answer.startswith(b"HTTP/1.1 503")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error_code"] == "busy"
        assert site.door.refused_connections == 1
        for writer in held:
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(TIMEOUT):
            while site.door.connections:  # noqa: ASYNC110 -- there is nothing that tells
                await asyncio.sleep(0.01)
            assert (await say(site, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))[9:12] == b"200"


@pytest.mark.parametrize(
    "start",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"],
)
async def test_a_client_that_says_no_more_is_let_go(start: bytes) -> None:
    async with serving() as (open_site, _):
        given = settings("127.0.0.1:0")
        limits = msgspec.structs.replace(given.limits, idle_seconds=1)
        site = await open_site(msgspec.structs.replace(given, limits=limits))
        answer = await say(site, start)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rb\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n",  # TLS where there is none
    ],
    ids=[
        "line",
        "field",
        "fields",
        "both lengths",
        "two lengths",
        "negative",
        "chunked twice",
        "space",
        "CR",
        "version",
        "TLS",
    ],
)
async def test_heads_that_are_refused(head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (open_site, _):
        caplog.set_level("INFO")
        site = await open_site(settings("127.0.0.1:0"))
        answer = await say(site, head)
        assert answer[8:12] == b" 400"
        assert b"Traceback" not in answer
        assert [record for record in caplog.records if record.name != "asyncio"] == []


async def test_requests_in_a_pipeline_are_answered_in_order() -> None:
    async with serving() as (open_site, _):
        site = await open_site(settings("127.0.0.1:0"))
        many = b"".join(
            b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n%s\r\n%05d"
            % (b"Connection: close\r\n" if number == 999 else b"", number)
            for number in range(1000)
        )
        answer = await say(site, many)
        bodies = [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
        assert bodies == [b"full%05d" % number for number in range(1000)]


def test_addresses_as_people_write_them() -> None:
    assert str(UnixAddress("/run/x")) == "unix:/run/x"
