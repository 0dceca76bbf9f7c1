"""A cgroup2 file system that a test can make groups in."""

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def of_the_host() -> str | None:
    """Where the host has one mounted that this user can write to."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if " - cgroup2 " in line and fields[3] == "/":
            with contextlib.suppress(OSError):
                os.rmdir(tempfile.mkdtemp(prefix="propolis-probe-", dir=fields[4]))
                return fields[4]
    return None


@contextlib.contextmanager
def mounted() -> Iterator[str]:
    """The host's, or one that is mounted in a namespace; skips where there can be none."""
    found = of_the_host()
    if found is not None:
        yield found
        return
    unshare = shutil.which("unshare")
    if os.geteuid() or unshare is None:
        pytest.skip("no cgroup2 file system is mounted that this user can write to, and only root can mount one")
    with tempfile.TemporaryDirectory() as point:
        script = 'mount -t cgroup2 none "$0" && echo ready && exec cat'
        command = [unshare, "--mount", "--propagation", "private", "sh", "-c", script, point]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stderr is not None
            try:
                if holder.stdout.readline() != b"ready\n":
                    pytest.skip(f"no cgroup2 file system can be mounted: {holder.stderr.read().decode().strip()}")
                yield f"/proc/{holder.pid}/root{point}"
            finally:
                holder.kill()


@contextlib.contextmanager
def group(root: str) -> Iterator[str]:
    """The path of a new group; at the end, once it has no processes, it is removed with all below it."""
    path = tempfile.mkdtemp(prefix="propolis-test-", dir=root)
    try:
        yield path
    finally:
        _wait_until_empty(path, 20)
        for folder, _, _ in os.walk(path, topdown=False):
            os.rmdir(folder)


def _wait_until_empty(path: str, patience: float) -> None:
    deadline = time.monotonic() + patience
    with open(f"{path}/cgroup.events") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in (events.seek(0), events.read())[1]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"processes remain in {path}")
            poll.poll(left * 1000)
