"""Ends what a run of the tests has started as soon as that run is over, also where it was killed.

VMs outlive their daemon and a process need not be its parent's: what belongs to a run is told by its environment.
"""

import contextlib
import os
import select
import signal
import uuid
from pathlib import Path

_VARIABLE = "TESTS_OF_PROPOLIS"
_ROUNDS = 5
_PATIENCE = 5.0  # seconds for one to be gone


def begin() -> None:
    """Everything that this process starts from now on ends with it. To be called before it has threads."""
    os.environ[_VARIABLE] = run = str(uuid.uuid4())
    me = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        try:
            _watch(me, f"{_VARIABLE}={run}".encode())
        finally:
            os._exit(0)
    os.close(me)


def _watch(tests: int, mark: bytes) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):  # who reads what the tests print sees its end
        os.dup2(null, fd)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    select.select([tests], [], [])
    for _ in range(_ROUNDS):  # one that was about to end may have started another
        for pid in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                _end(pid)


def _end(pid: int) -> None:
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [], _PATIENCE)
    finally:
        os.close(process)


def _marked(mark: bytes) -> list[int]:
    """Processes that began with this in their environment, or were forked from one that did, and can be ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # Other users' processes, and those that closed themselves to everybody, go with their parents.
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found
