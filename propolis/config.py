"""The daemon's settings: a TOML file, or defaults that work without one.

Beside the daemon's own tables the file may hold what every VM gets: a kernel, and devices as in a standalone file.
"""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import msgspec

from propolis import spec as model
from propolis.errors import ConfigError
from propolis.names import default_folder
from propolis.toml_boot import take_boot
from propolis.toml_devices import DeviceTables, place_in_file, report
from propolis.toml_table import (
    NOT_HERE,
    Log,
    Path,
    Table,
    UnexpectedError,
    flag,
    parse_text,
    read_text,
    show,
    text,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
JailMode = Literal["on", "log", "off"]

T = TypeVar("T", bound=str)

DEFAULT_PORT = 12400
LOG_LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warning", "error")
LOG_FORMATS: tuple[LogFormat, ...] = ("text", "json")
JAIL_MODES: tuple[JailMode, ...] = ("on", "log", "off")
_SOCKET_NAME = "propolis.sock"


class UnixAddress(NamedTuple):
    """A socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(NamedTuple):
    """An IP address, or "localhost", and a port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files; with `client_ca`, clients need a certificate that one of its authorities signed."""

    certificate: str
    key: str
    client_ca: str | None = None


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Files of bearer tokens, one a line."""

    full: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.full or self.read_only)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may have at most."""

    body_bytes: int = 1 << 20
    header_bytes: int = 16384
    connections: int = 512
    idle_seconds: int = 75
    vms: int = 1000


class Jail(msgspec.Struct, frozen=True, kw_only=True):
    """How VMs are confined: propolis.jail. Where root runs the daemon each is a user of its own, from `first_uid`."""

    mode: JailMode = "on"
    first_uid: int = 0x7000_0000  # from here on nobody else has users, as systemd's list of them says
    core_bytes: int = 0


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What is added to each new VM; `boot` only to one that says nothing of it."""

    boot: model.Boot | None = None
    devices: tuple[model.Device, ...] = ()
    backends: dict[str, model.Backend] = {}

    def added_to(self, requested: model.Spec) -> model.Spec:
        """The VM as asked for, with the devices that every VM gets. Raises ConfigError where they clash."""
        if not self.devices and not self.backends:
            return requested
        if twice := sorted(self.backends.keys() & requested.backends.keys()):
            raise ConfigError(f"backend {twice[0]!r} is one that this server's configuration gives to every VM")
        return msgspec.structs.replace(
            requested,
            devices=(*requested.devices, *self.devices),
            backends={**requested.backends, **self.backends},
        )


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that the daemon is told; paths are absolute."""

    state_directory: str
    run_directory: str
    listen: tuple[Address, ...]
    socket_group: str | None = None  # who may use unix sockets, beside this user
    insecure: bool = False
    allowed_directories: tuple[str, ...] | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    tls: Tls | None = None
    tokens: Tokens = Tokens()
    limits: Limits = Limits()
    jail: Jail = Jail()
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    defaults: Defaults = Defaults()


def parse_address(word: str) -> Address:
    """Read "unix:PATH" or "IP:PORT"; ConfigError says what was expected."""
    wanted = f"expected IP:PORT, such as 127.0.0.1:{DEFAULT_PORT} or [::1]:{DEFAULT_PORT}, or unix:PATH"
    if word.startswith("unix:"):
        path = word.removeprefix("unix:")
        if not path or "\0" in path:
            raise ConfigError(f"{show(word)} is no address: {wanted}")
        return UnixAddress(os.path.abspath(path))
    host, colon, port = word.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{show(word)} is no address: {wanted}")
    if not colon or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise ConfigError(f"{show(word)} is no address: {wanted}")
    if host != "localhost":
        try:
            host = str(ipaddress.ip_address(host))
        except ValueError as error:
            raise ConfigError(f"{show(word)} is no address: {wanted}") from error
    return TcpAddress(host, int(port))


def default_state_directory() -> str:
    """Where this user's definitions are kept."""
    if os.geteuid() == 0:
        return "/var/lib/propolis"
    home = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(home, "propolis")


def default_settings() -> Settings:
    """The settings where there is no file."""
    return parse("", "the defaults", "/")


def load(path: str | os.PathLike[str]) -> Settings:
    """Read the file at `path`; a ConfigError has one line for each thing wrong with it."""
    shown = os.fspath(path)
    return parse(read_text(shown), shown, os.path.dirname(os.path.abspath(shown)))


def parse(source: str, shown: str, folder: str) -> Settings:
    """Read the text of a file; messages call it `shown`, relative paths in it begin at `folder`."""
    log = Log()
    settings = _Reader(log, folder).document(Table(log, (), parse_text(source, shown)))
    if log:
        raise log.error(source, shown)
    return settings


class _Reader:
    """The grammar, a method for each table."""

    def __init__(self, log: Log, folder: str) -> None:
        self._log = log
        self._folder = folder
        self._device_tables = DeviceTables(folder)

    def document(self, root: Table) -> Settings:
        server = root.table("server")
        state = server.take("state_directory", self._path, None) or default_state_directory()
        run = server.take("run_directory", self._path, None) or default_folder()
        listen = server.take("listen", self._addresses, ())
        group = server.take("socket_group", text, None)
        insecure = server.take("insecure", flag, False)
        directories = server.take("allowed_directories", self._paths, None)
        hosts = server.take("allowed_hosts", _texts, ())
        origins = server.take("allowed_origins", _texts, ())
        server.finish()
        log = root.table("log")
        level: LogLevel = log.take("level", _choice(LOG_LEVELS), "info")
        form: LogFormat = log.take("format", _choice(LOG_FORMATS), "text")
        log.finish()
        tokens = root.table("tokens")
        token_files = Tokens(
            full=tokens.take("full", self._paths, ()),
            read_only=tokens.take("read_only", self._paths, ()),
        )
        tokens.finish()
        settings = Settings(
            state_directory=state,
            run_directory=run,
            listen=listen or (UnixAddress(os.path.join(run, _SOCKET_NAME)),),
            socket_group=group,
            insecure=insecure,
            allowed_directories=directories,
            allowed_hosts=hosts,
            allowed_origins=origins,
            tls=self._tls(root),
            tokens=token_files,
            limits=self._limits(root.table("limits")),
            jail=self._jail(root.table("jail")),
            log_level=level,
            log_format=form,
            defaults=self._defaults(root),
        )
        root.finish(lambda key: "it belongs in [server]" if key in server.known else None)
        return settings

    def _tls(self, root: Table) -> Tls | None:
        if "tls" not in root:
            root.take("tls", flag, None)  # known, though it is not there
            return None
        table = root.table("tls")
        tls = Tls(
            certificate=table.require("certificate", self._path, "?", "the path of a PEM file"),
            key=table.require("key", self._path, "?", "the path of a PEM file"),
            client_ca=table.take("client_ca", self._path, None),
        )
        table.finish()
        return tls

    def _limits(self, table: Table) -> Limits:
        limits = Limits(
            body_bytes=table.take("body_bytes", _between(4096, 1 << 30), Limits().body_bytes),
            header_bytes=table.take("header_bytes", _between(1024, 1 << 20), Limits().header_bytes),
            connections=table.take("connections", _between(1, 1 << 16), Limits().connections),
            idle_seconds=table.take("idle_seconds", _between(1, 86400), Limits().idle_seconds),
            vms=table.take("vms", _between(1, 1 << 16), Limits().vms),
        )
        table.finish()
        return limits

    def _jail(self, table: Table) -> Jail:
        jail = Jail(
            mode=table.take("mode", _choice(JAIL_MODES), Jail().mode),
            first_uid=table.take("first_uid", _between(1, 0x7FFF_0000), Jail().first_uid),
            core_bytes=table.take("core_bytes", _between(0, 1 << 50), Jail().core_bytes),
        )
        table.finish()
        return jail

    def _defaults(self, root: Table) -> Defaults:
        chipset = root.table("chipset")
        if chipset.take("enable-pcie", flag, False):
            chipset.wrong("enable-pcie", f"enable-pcie = true {NOT_HERE}", is_key=True)
        chipset.finish()
        root.unavailable("pci_bridge")
        boot = take_boot(root, self._path)
        devices, backends = self._device_tables.read(root)
        try:
            # Whether they fit together shows on a VM that has nothing else.
            model.Spec(
                name="any",
                cpus=1,
                memory_mib=model.MIN_MEMORY_MIB,
                boot=boot or model.DirectBoot(kernel="any"),
                devices=tuple(devices),
                backends=backends,
            )
        except model.SpecError as error:
            for problem in error.problems:
                report(self._log, problem, _place(problem.where, devices))
        return Defaults(boot=boot, devices=tuple(devices), backends=backends)

    def _path(self, value: object) -> str:
        return os.path.normpath(self._device_tables.path(value))

    def _paths(self, value: object) -> tuple[str, ...]:
        return tuple(self._path(entry) for entry in _texts(value))

    def _addresses(self, value: object) -> tuple[Address, ...]:
        addresses = []
        for word in (value,) if isinstance(value, str) else _texts(value):
            if word.startswith("unix:") and len(word) > 5:
                word = f"unix:{os.path.join(self._folder, word[5:])}"
            try:
                addresses.append(parse_address(word))
            except ConfigError as error:
                raise UnexpectedError(str(error)) from error
        return tuple(addresses)


def _place(where: Path, devices: list[model.Device]) -> tuple[Path, bool]:
    return place_in_file(where, devices) or ((str(where[-1]),), False)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UnexpectedError(f"expected an array of strings, not {show(value)}")
    return tuple(value)


def _choice(words: tuple[T, ...]) -> Callable[[object], T]:
    def read(value: object) -> T:
        word = text(value)
        for known in words:
            if known == word:
                return known
        raise UnexpectedError(f"expected one of {', '.join(words)}, not {show(word)}")

    return read


def _between(least: int, most: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        number = whole(value)
        if not least <= number <= most:
            raise UnexpectedError(f"expected {least} to {most}, not {number}")
        return number

    return read
