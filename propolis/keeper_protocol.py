"""What a worker and its keeper say to each other, on a pair of sockets that keep messages apart.

A request is answered by an error or by descriptors. The keeper treats what comes from its worker as what a guest says.
"""

from __future__ import annotations

import array
import os
import socket
from io import FileIO
from typing import Final

import msgspec

from propolis import errors
from propolis.errors import BackendError, PropolisError
from propolis.host_sockets import AskingConnector
from propolis.network_spec import MAX_NIC_QUEUES
from propolis.spec import Network, Spec  # noqa: TC001 -- msgspec reads it

MAX_MESSAGE = 64 << 10
ANSWER_TIMEOUT: Final = 60.0  # seconds that a file may take to open
MAX_TEXT = 4000

KINDS: dict[str, type[PropolisError]] = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PropolisError)
}


class OpenHypervisor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Asks for /dev/kvm."""


class OpenImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Asks for a kernel or initrd."""

    path: str
    what: str


class OpenDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Asks for a disk."""

    path: str
    read_only: bool


class OpenNvram(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Asks for the file of the firmware's variables."""


class OpenListener(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Asks for a socket that listens."""

    path: str


class OpenConnector(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Asks for a channel on which to ask for connections to the sockets beside one that listens."""

    path: str


class OpenNetwork(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Asks for the host's side of the card that has this backend."""

    backend: str


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The VM is made and its socket is served. Not answered."""


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The VM cannot be made. Not answered."""

    code: str
    message: str


Opening = OpenHypervisor | OpenImage | OpenDisk | OpenNvram | OpenListener | OpenConnector
Message = Opening | OpenNetwork | Ready | Failed


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With a descriptor, or several of a network, where there is no error."""

    code: str | None = None
    message: str = ""

    @classmethod
    def refusal(cls, error: PropolisError) -> Answer:
        return cls(error.code, str(error)[:MAX_TEXT])

    def raise_error(self) -> None:
        """Raises the error that the other side met, as one of its class."""
        if self.code is not None:
            raise KINDS.get(self.code, BackendError)(self.message)


class StartOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a worker is to run, besides what its VM is."""

    log_level: str = "info"
    log_format: str = "text"  # or "json"
    hypervisor: str = "kvm"
    jail: msgspec.Raw = msgspec.Raw(b"{}")  # JailSettings of propolis.jail; by itself a full one
    cgroup: str | None = None  # the directory of the control group that keeper and worker join
    names: str | None = None  # the folder in which the keeper holds the VM's name: propolis.names


class Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM to run: from the daemon for its keeper and worker."""

    directory: str  # the run directory's path, for messages: its descriptor comes along
    spec: Spec
    properties: msgspec.Raw  # of propolis.http.v5, or null
    options: StartOptions


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """From the keeper for the daemon, with the pidfds of both: they run, and whether the VM can is told next."""

    keeper: int
    worker: int


def receive(channel: socket.socket, max_fds: int) -> tuple[bytes, list[int]]:
    """A message and the descriptors that came with it, which no program that is executed gets. Raises OSError."""
    fds = array.array("i")
    room = socket.CMSG_LEN(max_fds * fds.itemsize)
    data, ancillary, _, _ = channel.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


class PassedListener:
    """A listening socket of the keeper's."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)

    def close(self) -> None:
        """Twice is fine."""
        self.socket.close()


class RemoteKeeper:
    """The keeper as its worker has it; the same as `LocalKeeper`.

    Calls block: the VM is not there yet, or one of its networks is not, and the keeper is quick at that.
    """

    def __init__(self, channel: socket.socket) -> None:
        """Owns the socket."""
        self._channel = channel
        channel.settimeout(ANSWER_TIMEOUT)

    def close(self) -> None:
        """Twice is fine."""
        self._channel.close()

    def fileno(self) -> int:
        """Readable, between calls, only once the keeper has ended."""
        return self._channel.fileno()

    def open_hypervisor(self) -> int:
        """A descriptor of the hypervisor, which the caller closes. Raises HypervisorError."""
        return self._open(OpenHypervisor(), "the hypervisor")

    def open_image(self, path: str, what: str) -> FileIO:
        """A kernel or initrd, open for reading. Raises ImageError."""
        fd = self._open(OpenImage(path, what), f"{what} '{path}'")
        return FileIO(path, opener=lambda _path, _flags: fd)  # by this it knows its name

    def open_disk(self, path: str, *, read_only: bool) -> int:
        """A locked descriptor, which the caller closes. Raises BusyError, ImageError or BackendError."""
        return self._open(OpenDisk(path, read_only), f"disk '{path}'")

    def open_nvram(self, path: str, template: str | None) -> int:
        """A locked descriptor, which the caller closes. Raises BusyError, ImageError or BackendError."""
        return self._open(OpenNvram(), f"nvram '{path}'")

    def open_listener(self, path: str) -> PassedListener:
        """A socket that listens, whose name goes with the keeper. Raises BusyError or BackendError."""
        return PassedListener(self._open(OpenListener(path), f"socket '{path}'"))

    def open_connector(self, path: str) -> AskingConnector:
        """Who has the keeper connect to the sockets at `path`, "_" and a number. Raises BackendError."""
        return AskingConnector(socket.socket(fileno=self._open(OpenConnector(path), f"sockets beside '{path}'")))

    def open_network(self, name: str, network: Network, queues: int) -> list[int]:
        """Descriptors, which the caller closes. Raises BackendError."""
        return self._open_all(OpenNetwork(name), f"network {name!r}", MAX_NIC_QUEUES)

    def report_ready(self) -> None:
        """The VM is made and its socket is served."""
        self._send(Ready())

    def report_failure(self, error: PropolisError) -> None:
        """The VM cannot be made."""
        self._send(Failed(error.code, str(error)[:MAX_TEXT]))

    def _send(self, message: Message) -> None:
        try:
            self._channel.send(msgspec.json.encode(message))
        except OSError as error:
            raise BackendError(f"talk to the keeper: {error.strerror or error}") from error

    def _open(self, message: Message, what: str) -> int:
        return self._open_all(message, what, 1)[0]

    def _open_all(self, message: Message, what: str, most: int) -> list[int]:
        self._send(message)
        try:
            data, fds = receive(self._channel, most)
        except TimeoutError as error:
            raise BackendError(f"open {what}: no answer within {ANSWER_TIMEOUT:g} s") from error
        except OSError as error:
            raise BackendError(f"open {what}: {error.strerror or error}") from error
        if not data:
            raise BackendError(f"open {what}: the keeper has ended")
        try:
            msgspec.json.decode(data, type=Answer).raise_error()
            if not fds:
                raise BackendError(f"open {what}: the keeper's answer has no descriptor")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds
