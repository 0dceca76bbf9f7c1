"""The host's side of network cards, as the keeper makes it: taps of the kernel, and passt, which needs no privilege.

passt is another process, which ends with the socket that it serves; what it printed is told where it does not begin.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import socket
import struct

from propolis.errors import BackendError
from propolis.spec import Network, Tap, UserNetwork

# linux/if_tun.h, linux/if.h, linux/sockios.h
_TUNSETIFF = 0x400454CA
_TUNSETVNETHDRSZ = 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100
_IFF_UP = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCBRADDIF = 0x89A2
_HEADER_BYTES = 12  # struct virtio_net_hdr_v1

_PASST = "passt"
_BEGIN_SECONDS = 10.0
_WORDS = 1000


def open_network(network: Network, queues: int) -> list[int]:
    """Descriptors for a card of that many pairs of queues, which the caller closes. Raises BackendError."""
    if isinstance(network, Tap):
        return open_tap(network, queues)
    return [start_passt(network)]


# -- taps --------------------------------------------------------------------------------------------------------------


def open_tap(tap: Tap, queues: int) -> list[int]:
    """One descriptor for each queue of a tap that there is already, or that ends with them.

    Raises BackendError, which says what a user without privileges can do.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    try:
        name = (tap.interface or "").encode()
        for _ in range(queues):
            fds.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            name = fcntl.ioctl(fds[-1], _TUNSETIFF, struct.pack("16sH22x", name, flags))[:16].rstrip(b"\0")
            fcntl.ioctl(fds[-1], _TUNSETVNETHDRSZ, struct.pack("i", _HEADER_BYTES))
        _switch_on(name, tap.bridge)
    except OSError as error:
        for fd in fds:
            os.close(fd)
        what = f"open tap {tap.interface!r}" if tap.interface else "make a tap"
        raise BackendError(f"{what}: {_why(error)}") from error
    return fds


def _why(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"{error.strerror}: be root, or have it made: ip tuntap add mode tap user NAME"
    return error.strerror or str(error)


def _switch_on(name: bytes, bridge: str | None) -> None:
    """Up, and on its bridge; where we may not, it is as whoever made it left it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        if bridge is not None:
            index = socket.if_nametoindex(name.decode())
            try:
                fcntl.ioctl(control, _SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
            except OSError as error:
                if not os.path.exists(f"/sys/class/net/{bridge}/brif/{name.decode()}"):
                    raise OSError(error.errno, f"put it on bridge {bridge!r}: {error.strerror}") from error
        (flags,) = struct.unpack_from("16xH", fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16s24x", name)))
        if not flags & _IFF_UP:
            with contextlib.suppress(PermissionError):
                fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name, flags | _IFF_UP))


# -- passt -------------------------------------------------------------------------------------------------------------


def passt_options(network: UserNetwork) -> list[str]:
    """How passt(1) is told what a user asked for."""
    options = []
    for entry in network.forward:
        protocol, _, ports = entry.rpartition(" ")
        options += ["-u" if protocol == "udp" else "-t", ports]
    if not network.host:
        options.append("--no-map-gw")
    return options


def start_passt(network: UserNetwork) -> int:
    """A stream socket to a new passt, which the caller closes. Raises BackendError with what passt said."""
    program = shutil.which(_PASST)
    if program is None:
        raise BackendError("network of type 'user': passt is not installed: apt-get install passt")
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    started, mark = os.pipe2(os.O_CLOEXEC)
    words = os.memfd_create("passt")
    try:
        os.fchmod(mark, 0o666)  # which passt opens once more, by then as another user
        for fd in (its.fileno(), mark):
            os.set_inheritable(fd, True)
        arguments = [
            _PASST, "--foreground", "--quiet", "--stderr", *passt_options(network),
            "--pid", f"/dev/fd/{mark}", "--fd", str(its.fileno()),
        ]  # fmt: skip
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            redirect = [(os.POSIX_SPAWN_DUP2, from_fd, to) for from_fd, to in ((null, 0), (null, 1), (words, 2))]
            pid = os.posix_spawn(program, arguments, {}, file_actions=redirect)
        finally:
            os.close(null)
        its.close()
        os.close(mark)
        mark = -1
        _await_start(pid, started, words)
        return ours.detach()
    except OSError as error:
        raise BackendError(f"start passt: {error.strerror or error}") from error
    finally:
        ours.close()
        its.close()
        for fd in (started, mark, words):
            if fd >= 0:
                os.close(fd)


_running: set[int] = set()  # passts of this process, until they are waited for


def _await_start(pid: int, started: int, words: int) -> None:
    """Until it wrote its number, which it does when it has its ports."""
    reap()
    _running.add(pid)
    poll = select.poll()
    poll.register(started, select.POLLIN)
    if poll.poll(_BEGIN_SECONDS * 1000) and os.read(started, 16):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    _running.discard(pid)
    said = os.pread(words, 1 << 16, 0).decode(errors="replace").splitlines()
    reason = next((line for line in reversed(said) if line and "syslog" not in line), "it ended without a word")
    raise BackendError(f"start passt: {reason[:_WORDS]}")


def reap() -> None:
    """Waits for the passts that have ended, and for no other."""
    for pid in tuple(_running):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _running.discard(pid)
