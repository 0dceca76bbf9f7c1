"""Where the daemon listens: IP addresses, unix sockets and what systemd hands over; TLS, and limits on connections."""

from __future__ import annotations

import asyncio
import errno
import grp
import logging
import os
import socket
import ssl
from typing import TYPE_CHECKING, cast

import aiohttp
import aiohttp.http_exceptions
from aiohttp import web

from propolis.config import Address, Limits, Settings, TcpAddress, Tls, UnixAddress
from propolis.errors import BackendError, BusyError, ConfigError
from propolis.unix_name import UnixName

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

SOCKET_MODE = 0o660
_BACKLOG = 256
_FIRST_PASSED = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)
_MAX_PASSED = 64
_HANDSHAKE_SECONDS = 15.0
# What a client has had begun is done before that. What still goes on then are watchers, which come back to the next
# server, and a question or two. It is waited for twice.
_LAST_SECONDS = 0.5
_TURNS = 5
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 88\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\n"
    b'{"request_id":"","error_code":"busy","message":"too many connections; try again later"}\n'
)


def check_exposure(address: TcpAddress, settings: Settings) -> None:
    """Raises ConfigError where other machines could use the API without showing who they are."""
    if address.is_loopback or settings.insecure:
        return
    is_authenticated = bool(settings.tokens) or (settings.tls is not None and settings.tls.client_ca is not None)
    missing = [*([] if settings.tls else ["[tls]"]), *([] if is_authenticated else ["[tokens]"])]
    if missing:
        raise ConfigError(
            f"listen at {address}: other machines reach it, so the configuration needs {' and '.join(missing)}"
            " (or --insecure, and then whoever reaches it owns the VMs)"
        )


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Raises ConfigError naming the file that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    what = f"certificate {tls.certificate!r} with key {tls.key!r}"
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password)
        if tls.client_ca is not None:
            what = f"client_ca {tls.client_ca!r}"
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigError(f"use {what}: {reason}") from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted: expected one without a passphrase")


def passed_sockets(environ: Mapping[str, str]) -> list[socket.socket]:
    """The listening sockets that a service manager hands over, by the protocol of sd_listen_fds(3)."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdigit()) or not 0 < int(count) <= _MAX_PASSED:
        raise ConfigError(f"LISTEN_FDS is {count[:20]!r}: expected a number from 1 to {_MAX_PASSED}")
    sockets: list[socket.socket] = []
    try:
        for fd in range(_FIRST_PASSED, _FIRST_PASSED + int(count)):
            try:
                passed = socket.socket(fileno=fd)
            except OSError as error:
                raise ConfigError(f"descriptor {fd} of LISTEN_FDS: {error.strerror}") from error
            sockets.append(passed)
            passed.set_inheritable(False)
            passed.setblocking(False)
            is_listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if not is_listening or passed.type != socket.SOCK_STREAM:
                raise ConfigError(f"descriptor {fd} of LISTEN_FDS: expected a listening stream socket")
            address_of(passed)
    except BaseException:
        for passed in sockets:
            passed.close()
        raise
    return sockets


def address_of(listener: socket.socket) -> Address:
    """Where a socket listens."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return UnixAddress(name if isinstance(name, str) else "@" + bytes(name).decode(errors="replace").lstrip("\0"))
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        return TcpAddress(name[0], name[1])
    raise ConfigError(f"listen on a socket of family {listener.family!r}: expected IP or unix")


class _NotOfClients(logging.Filter):
    """What a client got wrong is no error of ours, and what it sent, a token perhaps, is not for the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, aiohttp.http_exceptions.HttpProcessingError | web.RequestPayloadError):
            log.debug("malformed request", extra={"problem": type(error).__name__})
            return False
        return True


_server_log = logging.getLogger("propolis.http.server")
_server_log.addFilter(_NotOfClients())


def make_runner(app: web.Application, limits: Limits) -> web.AppRunner:
    """What serves the application, with limits on what a client sends and on how long it says nothing."""
    return web.AppRunner(
        app,
        access_log=None,
        logger=_server_log,
        handler_cancellation=True,
        keepalive_timeout=float(limits.idle_seconds),  # bounds a request's head as well
        max_line_size=limits.header_bytes,
        max_field_size=limits.header_bytes,
        shutdown_timeout=_LAST_SECONDS,
    )


class Door:
    """The open listeners of one application. Context manager."""

    def __init__(self, runner: web.AppRunner, settings: Settings) -> None:
        """`runner` is set up."""
        self._runner = runner
        self._settings = settings
        self._names: list[UnixName] = []
        self._listeners: list[socket.socket] = []
        self._addresses: list[Address] = []
        self._servers: list[asyncio.Server] = []
        self._refused = 0

    @property
    def addresses(self) -> list[Address]:
        """Where it listens."""
        return list(self._addresses)

    @property
    def connections(self) -> int:
        """How many there are now."""
        server = self._runner.server
        return 0 if server is None else len(server.connections)

    @property
    def refused_connections(self) -> int:
        """How many were one too many."""
        return self._refused

    async def open(self, addresses: tuple[Address, ...], passed: list[socket.socket]) -> None:
        """Listen at all of these. Raises BusyError where somebody else does, BackendError, ConfigError."""
        self._listeners += passed
        try:
            self._addresses += map(address_of, passed)
            for address in (*self._addresses, *addresses):
                if isinstance(address, TcpAddress):
                    check_exposure(address, self._settings)
            for address in addresses:
                if isinstance(address, TcpAddress):
                    opened = await _listen(address)
                    self._listeners += opened
                    self._addresses += map(address_of, opened)
                else:
                    name = UnixName(address.path, "API socket")
                    group = _group(self._settings.socket_group)
                    self._listeners.append(await name.take(SOCKET_MODE, group=group, backlog=_BACKLOG))
                    self._names.append(name)
                    self._addresses.append(UnixAddress(name.path))
            await self._serve()
        except BaseException:
            await self.close()
            raise

    async def reload(self, settings: Settings) -> None:
        """Serve with these settings from now on, at the same addresses; raises ConfigError and changes nothing."""
        for address in self.addresses:
            if isinstance(address, TcpAddress):
                check_exposure(address, settings)
        if settings.tls is not None:
            tls_context(settings.tls)
        self._settings = settings
        old = self._servers
        self._servers = []
        # The new servers accept from the same queues, so no connection is lost between the two.
        await self._serve()
        for server in old:
            server.close()

    async def close(self) -> None:
        """Listen no more; what is connected stays. Twice is fine."""
        for server in self._servers:
            server.close()
        self._servers = []
        for _ in range(_TURNS):  # what was just accepted reaches the runner, which then knows to close it
            await asyncio.sleep(0)
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        self._addresses = []
        for name in self._names:
            await name.release()
        self._names = []

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        tls = tls_context(self._settings.tls) if self._settings.tls is not None else None
        for listener in self._listeners:
            own = listener.dup()  # a server closes its socket
            try:
                if listener.family == socket.AF_UNIX:
                    server = await loop.create_unix_server(self._connection, sock=own)
                elif tls is not None:
                    server = await loop.create_server(
                        self._connection, sock=own, ssl=tls, ssl_handshake_timeout=_HANDSHAKE_SECONDS
                    )
                else:
                    server = await loop.create_server(self._connection, sock=own)
            except BaseException:
                own.close()
                raise
            self._servers.append(server)

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None
        if len(server.connections) >= self._settings.limits.connections:
            self._refused += 1
            return _Refusal()
        return server()


class _Refusal(asyncio.Protocol):
    """One connection too many: told so, and closed without a look at what it sends."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writer = cast("asyncio.WriteTransport", transport)  # which uvloop's is not a subclass of
        writer.write(_FULL)
        writer.close()


async def _listen(address: TcpAddress) -> list[socket.socket]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise BackendError(f"listen at {address}: {error.strerror}") from error
    listeners: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, name in found:
        try:
            listener = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        except OSError as error:  # this host has no IPv6, say
            problem = error
            continue
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(name)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                for other in listeners:
                    other.close()
                raise BusyError(f"listen at {address}: another program does") from error
            problem = error
        else:
            listeners.append(listener)
            if address.port == 0:
                break  # a second one would get another port
    if not listeners:
        assert problem is not None
        raise BackendError(f"listen at {address}: {problem.strerror}") from problem
    return listeners


def _group(name: str | None) -> int:
    if name is None:
        return -1
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"socket_group: there is no group {name!r}") from None
