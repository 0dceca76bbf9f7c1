"""Who may do what at the door: bearer tokens, and where a browser's request comes from.

A unix socket is guarded by its file's mode. A TCP address needs a token, if the settings have any.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import os
import stat
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web

from propolis.errors import ConfigError, ForbiddenError, UnauthorizedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from propolis.config import Settings, Tokens

MIN_TOKEN = 16  # characters
_MAX_FILE_BYTES = 1 << 16
_MAX_TOKEN = 512
_READS = frozenset(("GET", "HEAD"))
_OPEN_TO_ALL = frozenset(("/healthz", "/readyz"))


class Access(enum.Enum):
    """What a client may do."""

    READ_ONLY = "read-only"
    FULL = "full"


ACCESS: web.RequestKey[Access] = web.RequestKey("access", Access)


class TokenSet:
    """The tokens of the settings' files, as digests."""

    def __init__(self, digests: dict[bytes, Access]) -> None:
        self._digests = digests

    def __len__(self) -> int:
        return len(self._digests)

    @classmethod
    def load(cls, tokens: Tokens) -> TokenSet:
        """Raises ConfigError naming the file that cannot be used."""
        digests: dict[bytes, Access] = {}
        for access, paths in ((Access.READ_ONLY, tokens.read_only), (Access.FULL, tokens.full)):
            for path in paths:
                for token in _read_tokens(path):
                    digests[_digest(token)] = access
        return cls(digests)

    def access(self, token: str) -> Access | None:
        """What this token allows. Takes as long for a wrong one as for a right one, and for each right one."""
        digest = _digest(token)
        found: Access | None = None
        for known, access in self._digests.items():
            if hmac.compare_digest(known, digest):
                found = access
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def _read_tokens(path: str) -> list[str]:
    what = f"token file {path!r}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"open {what}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{what}: expected a regular file")
        if status.st_mode & 0o027:
            raise ConfigError(f"{what}: expected one that others can neither read nor change: chmod 0600")
        with open(fd, encoding="utf-8", closefd=False) as file:
            lines = file.read(_MAX_FILE_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"read {what}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from error
    finally:
        os.close(fd)
    tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not tokens:
        raise ConfigError(f"{what}: expected a token on each line, found none")
    for token in tokens:
        # The token itself is not repeated: messages are logged.
        if not MIN_TOKEN <= len(token) <= _MAX_TOKEN or not token.isascii() or " " in token:
            raise ConfigError(f"{what}: expected tokens of {MIN_TOKEN} to {_MAX_TOKEN} ASCII characters without spaces")
    return tokens


class Guard:
    """The middleware; `settings` and `tokens` are replaced at a reload."""

    def __init__(self, settings: Settings, tokens: TokenSet) -> None:
        self.settings = settings
        self.tokens = tokens

    def install(self, app: web.Application) -> None:
        """Look at every request of this application, after the middlewares it has so far."""
        app.middlewares.append(self._middleware())
        app.on_response_prepare.append(_challenge)

    def _middleware(self) -> Callable[..., Awaitable[web.StreamResponse]]:
        @web.middleware
        async def guard(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            request[ACCESS] = self.admit(request)
            return await handler(request)

        return guard

    def admit(self, request: web.Request) -> Access:
        """Raises UnauthorizedError or ForbiddenError."""
        is_unix = request.transport is not None and isinstance(
            request.transport.get_extra_info("sockname"), str | bytes
        )
        if not is_unix:
            self._check_host(request)
        self._check_origin(request)
        if is_unix or request.path in _OPEN_TO_ALL or not self.settings.tokens:
            return Access.FULL
        access = self._bearer(request)
        if access is Access.READ_ONLY and request.method not in _READS:
            raise ForbiddenError(f"{request.method} needs a token with full access, and this one is read-only")
        return access

    def _bearer(self, request: web.Request) -> Access:
        given = request.headers.getall("Authorization", [])
        if len(given) > 1:
            raise UnauthorizedError("Authorization is given twice")
        scheme, _, token = given[0].partition(" ") if given else ("", "", "")
        if scheme.lower() != "bearer" or not token.strip():
            raise UnauthorizedError("this address needs a token: expected the header Authorization: Bearer TOKEN")
        access = self.tokens.access(token.strip())
        if access is None:
            raise UnauthorizedError("this token is not known here")
        return access

    def _check_host(self, request: web.Request) -> None:
        """Where no token is asked for, a web page must not get in by having its own name resolve to this machine."""
        if self.settings.tokens or self.settings.insecure:
            return
        host = _host_name(request.headers.get("Host", ""))
        if host != "localhost" and not _is_address(host) and host not in self.settings.allowed_hosts:
            raise ForbiddenError(f"this server is not called {host[:100]!r}: see [server] allowed_hosts")

    def _check_origin(self, request: web.Request) -> None:
        """A browser says which page a request comes from, and leaves it to us whether that page may make it."""
        is_upgrade = "upgrade" in request.headers.get("Connection", "").lower()
        origins = request.headers.getall("Origin", [])
        if not origins or (request.method in _READS and not is_upgrade):
            return
        origin = origins[0]
        if len(origins) == 1:
            if origin in self.settings.allowed_origins:
                return
            parts = urlsplit(origin)
            if parts.scheme in ("http", "https") and parts.netloc and parts.netloc == request.headers.get("Host"):
                return
        raise ForbiddenError(f"a page of {origin[:100]!r} may not use this server: see [server] allowed_origins")


def _host_name(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower().rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _challenge(_: web.BaseRequest, response: web.StreamResponse) -> None:
    if response.status == UnauthorizedError.status:
        response.headers.setdefault("WWW-Authenticate", "Bearer")
