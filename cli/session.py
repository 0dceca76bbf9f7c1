"""One run of a command: finds the server, runs the coroutine, and makes an exit status of what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from propolis.errors import ConfigError, NotFoundError, PropolisError
from propolis.http.client import Client
from propolis.http.client_replies import ReplyError, UnreachableError, UntrustedError

from .output import Output, fail

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Work = Callable[[Client, Output], Awaitable[int | None]]

OK, FAILURE, USAGE, UNREACHABLE, NO_SUCH_VM, TIMEOUT, INTERRUPTED = 0, 1, 2, 3, 4, 124, 130
PORT = 12400
SYSTEM_SOCKET = "/run/propolis/propolis.sock"
_MAX_TOKEN = 4096


class Options(NamedTuple):
    """What the user said about the server before the command's name, and about the output."""

    server: str | None = None
    port: int | None = None
    url: str | None = None
    token_file: str | None = None
    ca_file: str | None = None
    insecure: bool = False
    is_json: bool = False
    is_quiet: bool = False

    @property
    def is_explicit(self) -> bool:
        """Whether a server was named at all."""
        return any(value is not None for value in (self.server, self.port, self.url))


def find_server(options: Options) -> str:
    """The URL of the server that is meant: what was named, else the socket of a daemon of this user, or of root's."""
    if options.server is not None or options.port is not None:
        host = options.server or "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{options.port or PORT}"
    if options.url is not None:
        return options.url
    from propolis.names import default_folder

    own = os.path.join(default_folder(), "propolis.sock")
    return f"unix:{next((path for path in (own, SYSTEM_SOCKET) if os.path.exists(path)), own)}"


def read_token(path: str) -> str:
    """The first line of a file of tokens."""
    try:
        with open(path, encoding="ascii") as file:
            token = file.readline(_MAX_TOKEN + 1).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise ConfigError(f"read token file {path!r}: {reason}") from error
    if not token or len(token) > _MAX_TOKEN or not token.isprintable():
        raise ConfigError(f"read token file {path!r}: expected a token on its first line")
    return token


def open_client(options: Options) -> Client:
    """A client of the server that is meant."""
    token = read_token(options.token_file) if options.token_file is not None else None
    return Client(find_server(options), token, ca_file=options.ca_file, insecure=options.insecure)


def perform(options: Options, work: Work) -> int:
    """Run a command; returns the exit status."""

    async def run() -> int | None:
        async with open_client(options) as client:
            return await work(client, Output(is_json=options.is_json, is_quiet=options.is_quiet))

    try:
        return asyncio.run(run()) or OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return FAILURE
    except PropolisError as error:
        fail(_explained(error, options))
        return status_of(error)


def status_of(error: PropolisError) -> int:
    """The exit status that says what kind of failure this was."""
    if isinstance(error, UnreachableError):
        return UNREACHABLE
    if isinstance(error, ReplyError):
        return NO_SUCH_VM if isinstance(error, NotFoundError) else FAILURE
    return USAGE if isinstance(error, ConfigError) else FAILURE


def _explained(error: PropolisError, options: Options) -> str:
    text = str(error)
    if isinstance(error, ReplyError):
        if error.pointer and error.pointer not in text:
            text = f"{error.pointer}: {text}"
    elif isinstance(error, UntrustedError):
        if options.ca_file is None:
            text += "; --ca-file names the certificates to check it with"
    elif isinstance(error, UnreachableError) and not options.is_explicit:
        text += "; is propolis-server running? (-s HOST, --url or PROPOLIS_URL name another)"
    return text
