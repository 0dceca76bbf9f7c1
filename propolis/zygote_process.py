"""The process that is forked for each VM: one thread, everything imported, nothing of any VM in it.

    python -m propolis.zygote_process CONTROL

CONTROL is the descriptor on which the daemon asks. A request is three descriptors: a run directory, what to start, and
who wants to hear of it. It is not looked into here: it is passed on to a keeper. One with its worker is there before it
is needed, since most of the time that a start would take is that of making the pages of two new processes.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys

import msgspec

from propolis import keeper_process, worker
from propolis.errors import BackendError
from propolis.keeper_process import Work
from propolis.keeper_protocol import Answer, receive

QUIET = 0.2  # seconds without a request, before a keeper is made for the next one: a start under way is not held up

_WORK = Work(worker.main, worker.prepare)


def main() -> int:
    """Serves the daemon until it ends."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    keeper_process.set_title("zygote")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's to wait for: the kernel buries them
    worker.preload()
    gc.collect()
    gc.freeze()  # a collection in a child would write to every object, and thereby copy it
    control.send(b"ready")
    spare: socket.socket | None = None
    while True:
        if spare is None and not select.select([control], [], [], QUIET)[0]:
            spare = _try_to_fork(control)
        data, fds = receive(control, 3)
        if not data:
            return 0
        if len(fds) == 3:
            _assign(control, spare, fds)
            spare = None
        for fd in fds:
            os.close(fd)


def _assign(control: socket.socket, spare: socket.socket | None, fds: list[int]) -> None:
    """Has a keeper do it; tells the asker where there is none."""
    try:
        if spare is None or not _hand_over(spare, fds):
            _hand_over(_fork(control, *fds), fds)
    except OSError as error:
        with socket.socket(fileno=os.dup(fds[2])) as daemon:
            refusal = BackendError(f"fork a keeper: {error.strerror}")
            daemon.send(msgspec.json.encode(Answer.refusal(refusal)))


def _hand_over(keeper: socket.socket, fds: list[int]) -> bool:
    """False where it is dead."""
    with keeper:
        try:
            socket.send_fds(keeper, [b"start"], fds)
        except OSError:
            return False
    return True


def _try_to_fork(control: socket.socket) -> socket.socket | None:
    try:
        return _fork(control)
    except OSError:  # whoever needs one will be told
        return None


def _fork(control: socket.socket, *others: int) -> socket.socket:
    """A keeper that waits for what it is to keep, and has none of these descriptors. Raises OSError."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        try:
            pid = os.fork()
        except OSError:
            mine.close()
            raise
        if pid == 0:
            control.close()
            mine.close()
            for fd in others:
                os.close(fd)
            keeper_process.run(its, _WORK)
    return mine


if __name__ == "__main__":
    sys.exit(main())
