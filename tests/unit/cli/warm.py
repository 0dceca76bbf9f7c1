"""A process that has everything imported and forks `propolis-cli` from itself: run as a script with its socket.

A request is JSON with the arguments and the environment, and comes with four descriptors: where to report to, and the
three standard ones. What is forked returns to the end of this file and is the program then, whole and by itself.
"""

import fcntl
import json
import os
import signal
import socket
import sys
import termios
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import cli.completion
import cli.console
import cli.host
import cli.instance
import cli.main
import cli.spec_file
import propolis.names  # noqa: F401


def report(fd: int, *words: object) -> None:
    os.write(fd, (" ".join(map(str, words)) + "\n").encode())


def serve(control: socket.socket) -> dict[str, Any]:
    """Only ever returns in a child that is to be the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not data:
            sys.exit(0)
        if os.fork() == 0:
            control.close()
            return wait_for_program(json.loads(data), fds)
        for fd in fds:
            os.close(fd)


def wait_for_program(request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(fds[0])
        become_program(request, fds[1:])
        return request
    report(fds[0], "pid", pid)
    for fd in fds[1:]:
        os.close(fd)
    _, status = os.waitpid(pid, 0)
    report(fds[0], "status", os.waitstatus_to_exitcode(status))
    os._exit(0)


def become_program(request: dict[str, Any], fds: list[int]) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["at_terminal"]:
        os.setsid()
        fcntl.ioctl(fds[0], termios.TIOCSCTTY, 0)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)


if __name__ == "__main__":
    sys.argv = ["propolis-cli", *serve(socket.socket(fileno=int(sys.argv[1])))["words"]]
    cli.main.main()
