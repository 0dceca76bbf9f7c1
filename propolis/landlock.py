"""Landlock with no rule: a thread that opens no path, binds and connects no TCP port, signals nobody outside.

linux/landlock.h; Documentation/userspace-api/landlock.rst. What was opened before stays usable, and so does what is
received as a descriptor: rights belong to the open file.
"""

import ctypes
import errno
import os

from propolis.errors import JailError

# The numbers of its system calls, the same on every architecture.
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
_CREATE_RULESET_VERSION = 1

# Rights to files as they came: the first ABI that knows them, and how many there are then.
_FILE_RIGHTS = ((1, 13), (2, 14), (3, 15), (5, 16), (9, 17))
_TCP_RIGHTS = (4, 2)  # bind, connect
_SCOPES = (6, 2)  # abstract unix sockets, signals

# What no open descriptor is needed for: the first ABI that denies it, and the first Linux with that.
_LATER = ((3, "truncation by path", "6.2"), (4, "TCP ports", "6.7"), (6, "signals and abstract sockets", "6.12"))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


def abi() -> int:
    """Which version of Landlock this kernel has; 0 for none, or one that is not enabled."""
    version: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    return max(0, version)


def why_missing() -> str:
    """What the kernel answers where abi() is 0."""
    _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    if ctypes.get_errno() == errno.EOPNOTSUPP:
        return "it is not enabled when the kernel starts: add landlock to its lsm= option"
    return "this kernel has none (CONFIG_SECURITY_LANDLOCK, Linux 5.13 or later)"


def beyond() -> list[str]:
    """What later kernels' Landlock denies as well and this one's does not, for people."""
    version = abi()
    return [f"{what} (Linux {release})" for since, what, release in _LATER if version < since]


def restrict() -> None:
    """Denies this thread, and all that it starts, everything that this kernel's Landlock can deny.

    Needs no_new_privs. Raises JailError.
    """
    version = abi()
    if version < 1:
        raise JailError(f"no Landlock: {why_missing()}")
    ruleset = _Ruleset(
        files=(1 << max(count for since, count in _FILE_RIGHTS if since <= version)) - 1,
        network=(1 << _TCP_RIGHTS[1]) - 1 if version >= _TCP_RIGHTS[0] else 0,
        scopes=(1 << _SCOPES[1]) - 1 if version >= _SCOPES[0] else 0,
    )
    # An older kernel takes the longer structure where what it does not know is 0.
    fd = _libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.sizeof(ruleset), ctypes.c_uint32(0))
    if fd < 0:
        raise JailError(f"make a Landlock ruleset: {os.strerror(ctypes.get_errno())}")
    try:
        if _libc.syscall(_RESTRICT_SELF, ctypes.c_int(fd), ctypes.c_uint32(0)) < 0:
            raise JailError(f"restrict this process by Landlock: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
