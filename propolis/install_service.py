"""Puts the service files in place: `propolis-server install-service`.

systemd's units, sysusers.d and tmpfiles.d entries, or the SMF manifest and its method, with the path of this
installation in them. What this program wrote carries a mark with a digest, so that it never overwrites what somebody
else wrote, or changed, without being told to.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import os
import re
import secrets
import shlex
import stat
import subprocess
import sys
import sysconfig
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import msgspec

from propolis.errors import BackendError, BusyError, ConfigError, PropolisError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

PREFIX = "/usr/local"
CONFIG = "/etc/propolis/config.toml"
UNITS = ("propolis-vms.service", "propolis-server.socket", "propolis-server.service")
FMRI = "svc:/system/illumos/propolis-server"

_MARK = "Written by propolis-server install-service, which keeps a file that was edited. sha256="
_MARKED = re.compile(rf"^.*{re.escape(_MARK)}([0-9a-f]{{64}}).*\n", re.MULTILINE)

EPILOG = """\
Run as root. A second run brings the files up to date. Settings of your own belong into drop-ins (systemctl edit), SMF
properties and /etc/propolis/config.toml, which is written only where there is none.
"""


class Manager(enum.Enum):
    """What runs services here."""

    SYSTEMD = "systemd"
    SMF = "smf"


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file to put in place; `path` is below the root."""

    path: str
    text: str
    mode: int = 0o644
    is_configuration: bool = False
    """The administrator's once it is there: neither marked nor written again."""


class Kind(enum.Enum):
    """What stands in a file's place."""

    ABSENT = enum.auto()
    OURS = enum.auto()
    EDITED = enum.auto()
    FOREIGN = enum.auto()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `propolis-server install-service`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--root", default="/", metavar="DIR", help="install into the system below DIR, such as an image"
    )
    parser.add_argument("--prefix", default=PREFIX, metavar="DIR", help=f"where the files belong (default: {PREFIX})")
    parser.add_argument(
        "--server",
        metavar="PATH",
        help="the propolis-server that the service runs (default: the one of this installation)",
    )
    parser.add_argument(
        "--manager", choices=[manager.value for manager in Manager], help="for another system than this one"
    )
    parser.add_argument("--enable", action="store_true", help="have it started at boot, and now")
    parser.add_argument("--force", action="store_true", help="overwrite files that others wrote or edited")
    parser.add_argument("--remove", action="store_true", help="remove what this command wrote")


def run(arguments: argparse.Namespace) -> int:
    """Does what the command line says: exit status 0, or 1 with the reason on standard error."""
    try:
        root = os.path.abspath(arguments.root)
        manager = Manager(arguments.manager) if arguments.manager else _manager()
        if arguments.remove:
            for line in remove(root, files(manager, arguments.prefix, "/"), force=arguments.force):
                _say(line)
            return 0
        server = arguments.server or find_server()
        for line in warnings(root, server, arguments.prefix):
            sys.stderr.write(f"propolis-server: warning: {line}\n")
        wanted = files(manager, arguments.prefix, server)
        for line in install(root, wanted, force=arguments.force):
            _say(line)
        if arguments.enable:
            enable(manager, root, wanted)
        else:
            where = "next" if root == "/" else "next, in that system"
            _say(f"{where}: {' && '.join(map(shlex.join, _commands(manager, wanted)))}")
    except PropolisError as error:
        sys.stderr.write(f"propolis-server: {error}\n")
        return 1
    return 0


# -- what to install ---------------------------------------------------------------------------------------------------


def files(manager: Manager, prefix: str, server: str) -> list[File]:
    """The files of a service manager, with what depends on this installation filled in."""
    for what, path in (("prefix", prefix), ("server", server)):
        if not os.path.isabs(path) or not path.isprintable() or "$" in path:
            raise ConfigError(f"{what} {path!r}: expected an absolute path without '$' or unprintable characters")
    prefix = os.path.normpath(prefix)
    configuration = File(path=CONFIG, text=_template("config.toml"), is_configuration=True)
    if manager is Manager.SYSTEMD:
        units = f"{prefix}/lib/systemd/system"
        return [
            *(File(path=f"{units}/{name}", text=_fill(name, _for_systemd, server=server)) for name in UNITS),
            File(path=f"{prefix}/lib/sysusers.d/propolis.conf", text=_fill("propolis.sysusers.conf", str)),
            File(path=f"{prefix}/lib/tmpfiles.d/propolis.conf", text=_fill("propolis.tmpfiles.conf", str)),
            configuration,
        ]
    method = f"{prefix}/lib/svc/method/propolis-server"
    return [
        File(path=method, text=_fill("svc-propolis-server", shlex.quote, server=server), mode=0o755),
        File(
            path="/lib/svc/manifest/site/propolis-server.xml",
            text=_fill("propolis-server.xml", _for_manifest, method=method),
        ),
        configuration,
    ]


def _template(name: str) -> str:
    return (resources.files("propolis") / "services" / name).read_text(encoding="utf-8")


def _fill(name: str, quote: Callable[[str], str], **values: str) -> str:
    text = _template(name)
    for key, value in {"config": CONFIG, **values}.items():
        text = text.replace(f"@{key}@", quote(value))
    # The mark follows a line that must come first, with the comment signs of the file's kind.
    first, _, rest = text.partition("\n")
    before, opening, closing = ("", "# ", "")
    if first.startswith(("#!", "<?xml")):
        before, text = f"{first}\n", rest
    if first.startswith("<?xml"):
        opening, closing = "<!-- ", " -->"
    return f"{before}{opening}{_MARK}{_digest(before + text)}{closing}\n{text}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _for_systemd(path: str) -> str:
    """As a word of ExecStart=; systemd.service(5), "Command lines", and systemd.syntax(7)."""
    path = path.replace("%", "%%")
    if re.fullmatch(r"[\w%+,./:@-]+", path):
        return path
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _for_manifest(path: str) -> str:
    """As a word of a method's command, in an attribute."""
    return escape(shlex.quote(path).replace("%", "%%"), {'"': "&quot;"})


def find_server() -> str:
    """The command of this installation, virtual environment or not. Raises ConfigError where there is none."""
    schemes = [sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user")]
    found = [os.path.join(sysconfig.get_path("scripts", scheme), "propolis-server") for scheme in schemes]
    if os.path.basename(sys.argv[0]) == "propolis-server":
        found.insert(0, os.path.abspath(sys.argv[0]))  # not resolved: a link may be what a package manager keeps right
    for path in found:
        if os.access(path, os.X_OK):
            return path
    raise ConfigError(f"no propolis-server in {found[-2]}: install the package (pip install .), or give --server PATH")


def _manager() -> Manager:
    return Manager.SMF if sys.platform.startswith("sunos") else Manager.SYSTEMD


def warnings(root: str, server: str, prefix: str) -> Iterator[str]:
    """What is odd, but may be meant."""
    here = _below(root, server)
    if not os.path.exists(here):
        yield f"{here} does not exist: the service starts once it does"
    elif root == "/":
        places = {path for word in (server, sys.prefix) for path in (word, *map(str, Path(word).parents))}
        for path in sorted(places):
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if status.st_uid or (status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX):
                    yield f"others than root can write to {path}: the service, which is root, runs what they put there"
    for name in UNITS:
        path = _below(root, f"/etc/systemd/system/{name}")
        if os.path.lexists(path) and os.path.normpath(prefix) != "/etc":
            yield f"{path} takes precedence over the file that is installed"


# -- putting it in place -----------------------------------------------------------------------------------------------


def install(root: str, wanted: list[File], *, force: bool = False) -> Iterator[str]:
    """Writes the files, each at once or not at all, and says each. BusyError, before anything, where one is foreign."""
    _folders_stay_below(root, wanted)
    kinds = {file.path: kind_of(_below(root, file.path)) for file in wanted}
    refused = [
        f"{_below(root, file.path)} ({'edited' if kinds[file.path] is Kind.EDITED else 'not written by this command'})"
        for file in wanted
        if kinds[file.path] in (Kind.EDITED, Kind.FOREIGN) and not file.is_configuration
    ]
    if refused and not force:
        raise BusyError(f"not overwritten without --force: {', '.join(refused)}")
    for file in wanted:
        path = _below(root, file.path)
        if file.is_configuration and kinds[file.path] is not Kind.ABSENT:
            yield f"kept {path}"
        elif kinds[file.path] is Kind.OURS and Path(path).read_text(encoding="utf-8") == file.text:
            yield f"up to date {path}"
        else:
            _write(path, file)
            yield f"wrote {path}"


def remove(root: str, wanted: list[File], *, force: bool = False) -> Iterator[str]:
    """Removes what `install` wrote and nobody changed, and says each file."""
    _folders_stay_below(root, wanted)
    for file in wanted:
        path = _below(root, file.path)
        kind = kind_of(path)
        if kind is Kind.OURS or (kind is Kind.EDITED and force):
            try:
                os.unlink(path)
            except OSError as error:
                raise BackendError(f"remove {path}: {error.strerror}") from error
            yield f"removed {path}"
        elif kind is not Kind.ABSENT:
            yield f"kept {path}"


def kind_of(path: str) -> Kind:
    """What stands there. A link is foreign, whatever it leads to."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return Kind.ABSENT
    except OSError:
        return Kind.FOREIGN
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return Kind.FOREIGN
    with open(fd, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 20)
    mark = _MARKED.search(text)
    if mark is None:
        return Kind.FOREIGN
    return Kind.OURS if _digest(text[: mark.start()] + text[mark.end() :]) == mark[1] else Kind.EDITED


def _below(root: str, path: str) -> str:
    return os.path.normpath(f"{root}/{path}")


def _folders_stay_below(root: str, wanted: list[File]) -> None:
    """In an image, a folder may be a link that leads, from here, out of it."""
    real = os.path.realpath(root)
    for file in wanted:
        folder = os.path.dirname(_below(root, file.path))
        if os.path.commonpath((real, os.path.realpath(folder))) != real:
            raise ConfigError(f"{folder} is, by a link, outside of {root}")


def _write(path: str, file: File) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(8)}")
    try:
        os.makedirs(folder, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as opened:
                opened.write(file.text)
                opened.flush()
                os.fchmod(fd, file.mode)
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise BackendError(f"write {path}: {error.strerror}") from error


# -- telling the service manager ---------------------------------------------------------------------------------------


def enable(manager: Manager, root: str, wanted: list[File]) -> None:
    """Has the services started at every boot, and, in the system that runs, now. Raises BackendError."""
    is_here = root == "/" and (manager is Manager.SMF or os.path.isdir("/run/systemd/system"))
    if is_here:
        for command in _commands(manager, wanted):
            _call(command)
        _say("enabled, and running; after an update: restart it, VMs run on")
    elif manager is Manager.SYSTEMD:
        _call(["systemctl", "--no-reload", f"--root={root}", "enable", *UNITS])
        _say("enabled: it starts with that system")
    else:
        raise ConfigError("--enable with --root: an SMF service is enabled by a profile, or once the system runs")


def _commands(manager: Manager, wanted: list[File]) -> list[list[str]]:
    if manager is Manager.SMF:
        manifest = next(file.path for file in wanted if file.path.endswith(".xml"))
        return [["svccfg", "import", manifest], ["svcadm", "enable", FMRI]]
    sysusers, tmpfiles = (
        next(file.path for file in wanted if f"/{folder}/" in file.path) for folder in ("sysusers.d", "tmpfiles.d")
    )
    return [
        ["systemd-sysusers", sysusers],
        ["systemd-tmpfiles", "--create", tmpfiles],
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", "--now", *UNITS],
    ]


def _call(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise BackendError(f"{command[0]} is not there: is this a system with the service manager?") from error
    except subprocess.CalledProcessError as error:
        raise BackendError(f"{shlex.join(command)}: exit status {error.returncode}") from error


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
