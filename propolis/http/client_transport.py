"""Asking a server: where it is, the connections to it, and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import os
import ssl
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from propolis import __version__
from propolis.errors import ConfigError
from propolis.http.client_replies import UnreachableError, UntrustedError, refuse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping

TIMEOUT = 60.0  # seconds for an answer, where waiting is not what was asked for
CONNECT_TIMEOUT = 10.0
SILENCE = 60.0  # seconds without a sign of life after which a stream is taken for lost
OFFSET_HEADER = "propolis-console-offset"
_MAX_SOCKET_PATH = 107  # sockaddr_un; uvloop cuts a longer one off and connects to whatever that is
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Address(NamedTuple):
    """A server: the base of its URLs, and the socket that they are asked for at where that is a unix one."""

    base: str
    socket: str | None
    host: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read "unix:PATH", "http://HOST:PORT" or "https://HOST:PORT"; ConfigError says what was expected."""
        if url.startswith("unix:"):
            path = url.removeprefix("unix:").removeprefix("//")
            if path and "\0" not in path:
                path = os.path.abspath(path)
                if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
                    raise ConfigError(f"unix:{path}: a socket's path has at most {_MAX_SOCKET_PATH} bytes")
                return cls("http://localhost", path, "")
        else:
            with contextlib.suppress(ValueError):
                parts = urlsplit(url)
                is_complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
                if is_complete and not (parts.query or parts.fragment or parts.username or parts.password):
                    return cls(url.rstrip("/"), None, parts.hostname or "")
        raise ConfigError(f"{url!r} is no server: expected unix:PATH, http://HOST:PORT or https://HOST:PORT")

    @property
    def is_readable_on_the_way(self) -> bool:
        """Whether others may read what is sent."""
        return self.socket is None and self.base.startswith("http:") and self.host not in _LOOPBACK

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket is not None else self.base


class _Handshake:
    """How the opening of a websocket was answered, of which aiohttp does not tell all."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.offset: int | None = None


_handshake: ContextVar[_Handshake | None] = ContextVar("_handshake", default=None)


async def _note_handshake(session: aiohttp.ClientSession, context: object, end: aiohttp.TraceRequestEndParams) -> None:
    note = _handshake.get()
    if note is None:
        return
    note.status = end.response.status
    offset = end.response.headers.get(OFFSET_HEADER, "")
    if offset.isascii() and offset.isdigit() and len(offset) < 20:
        note.offset = int(offset)
    if note.status != 101:
        note.body = await end.response.read()


class Transport:
    """The connections to one server."""

    def __init__(self, address: Address, token: str | None, ca_file: str | None) -> None:
        self._address = address
        self._token = token
        self._ca_file = ca_file
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections; twice is fine."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout: float | None = TIMEOUT,
    ) -> tuple[int, bytes]:
        """The status and body of a reply; what is no success is raised."""
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT)
        headers = {} if body is None else {"Content-Type": "application/json"}
        with self._explained(f"{method} {path}"):
            async with self._connected().request(
                method,
                self._address.base + path,
                params=params,
                data=body,
                headers=headers,
                timeout=limits,
                allow_redirects=False,
            ) as response:
                content = await response.read()
        if not 200 <= response.status < 300:
            refuse(response.status, content)
        return response.status, content

    async def stream(self, path: str, headers: Mapping[str, str]) -> AsyncGenerator[bytes]:
        """The lines of a reply without end, the first of them empty: that one says that the server has begun."""
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE)
        with self._explained(f"GET {path}"):
            async with self._connected().get(
                self._address.base + path, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                if response.status != 200:
                    refuse(response.status, await response.read())
                yield b"\n"
                while line := await response.content.readline():
                    yield line

    async def websocket(
        self, path: str, params: Mapping[str, str], what: str = "open the console"
    ) -> tuple[aiohttp.ClientWebSocketResponse, int | None]:
        """A websocket, and the offset that its output begins at where the server says so."""
        note = _Handshake()
        token = _handshake.set(note)
        try:
            with self._explained(what):
                websocket = await self._connected().ws_connect(
                    self._address.base + path,
                    params=params,
                    # A local socket tells by itself when its other end is gone.
                    heartbeat=None if self._address.socket is not None else SILENCE / 2,
                    timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
                )
        except aiohttp.WSServerHandshakeError as error:
            if note.status == 101:
                raise UnreachableError(f"{what}: {self._address}: {error.message}") from error
            refuse(note.status, note.body)
        finally:
            _handshake.reset(token)
        return websocket, note.offset

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self._address.socket is not None:
                connector = aiohttp.UnixConnector(self._address.socket)
            elif self._address.base.startswith("https:"):
                connector = aiohttp.TCPConnector(ssl=self._tls())
            else:
                connector = aiohttp.TCPConnector()
            headers = {"User-Agent": f"propolis/{__version__}"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            traces = aiohttp.TraceConfig()
            traces.on_request_end.append(_note_handshake)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers, trace_configs=[traces])
        return self._session

    def _tls(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._ca_file)
        except OSError as error:  # what is no certificate as well
            raise ConfigError(f"read certificates {self._ca_file!r}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """What goes wrong on the way becomes an UnreachableError."""
        try:
            yield
        except aiohttp.WSServerHandshakeError:
            raise
        except aiohttp.ClientConnectorCertificateError as error:
            problem = error.certificate_error
            reason = getattr(problem, "verify_message", None) or problem
            raise UntrustedError(f"connect to {self._address}: its certificate is not trusted: {reason}") from error
        except aiohttp.ClientConnectorError as error:
            reason = error.os_error.strerror or error.os_error
            raise UnreachableError(f"connect to {self._address}: {reason}") from error
        except TimeoutError as error:
            raise UnreachableError(f"{what}: {self._address} does not answer") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{what}: {self._address}: {str(error) or type(error).__name__}") from error
