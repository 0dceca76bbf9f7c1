"""A small host of its own: systemd as process 1 of a PID namespace, on a copy of this system that is gone afterwards.

Nothing of it reaches this system: the root is an overlay over memory; /proc/sys and /sys are read-only; of /dev it has
a handful of nodes; its control groups are below one of a test's. It needs root and a machine that grants namespaces.
"""

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import cgroup2
from tests.source.tree import TREE

SYSTEMD = "/lib/systemd/systemd"

# $1: an empty folder. $2: a folder shared with the test. The others: what is bound at its own place.
_BOOT = r"""
set -e
top=$1 shared=$2; shift 2
mount -t tmpfs none "$top"
mkdir "$top/upper" "$top/work" "$top/root"
mount -t overlay none -o lowerdir=/,upperdir="$top/upper",workdir="$top/work" "$top/root"
cd "$top/root"
for path in "$shared" "$@"; do mkdir -p ".$path"; mount --bind "$path" ".$path"; done
mount -t proc none proc
mount --bind proc/sys proc/sys; mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro none sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs -o mode=755 none run
mount -t tmpfs -o mode=755 none dev
mkdir dev/net dev/pts dev/shm old
for node in null zero full random urandom tty fuse kvm net/tun userfaultfd loop0; do
  if [ -e "/dev/$node" ]; then : >"dev/$node"; mount --bind "/dev/$node" "dev/$node"; fi
done
mount -t tmpfs -o mode=1777 none dev/shm
rm -rf etc/systemd/system/*.wants usr/lib/systemd/system/*.target.wants usr/lib/systemd/system/propolis-*
: >etc/fstab
pivot_root . old
umount -l /old
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test \
  SYSTEMD --system --unit=test.target --log-target=console --log-level=info --show-status=no </dev/null
"""
_TARGET = """\
[Unit]
Description=What the test waits for
Requires=basic.target
After=basic.target
"""


class Host:
    """A running one."""

    def __init__(self, process_1: int) -> None:
        self._process_1 = str(process_1)

    def call(self, *command: str) -> str:
        """Run a command in it, which succeeds; its output."""
        result = self.attempt(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def attempt(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        enter = ["nsenter", "--all", "--root", "--wd", "--target", self._process_1]
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=False, timeout=60)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.call("systemctl", "show", "--value", "--property", name, unit)


@contextlib.contextmanager
def running(shared: Path, *files: tuple[str, str]) -> Iterator[Host]:
    """A host with these files, path and text, in addition; skips where this machine does not let a test have one."""
    for tool in (SYSTEMD, "unshare", "nsenter", "setpriv"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is missing (apt install systemd util-linux)")
    if os.geteuid():
        pytest.skip("only root can start a systemd of its own")
    root = cgroup2.of_the_host()
    if root is None:
        pytest.skip("no cgroup2 file system is mounted that can be written to")
    places = {str(TREE), sys.prefix, sys.base_prefix}
    bound = sorted(place for place in places if os.stat(place).st_dev != os.stat("/usr").st_dev)
    script = _BOOT.replace("SYSTEMD", SYSTEMD)
    for path, text in (("/etc/systemd/system/test.target", _TARGET), *files):
        name = f"file-{path.replace('/', '-')}"
        (shared / name).write_text(text)
        (shared / name).chmod(0o755 if text.startswith("#!") else 0o644)
        script = script.replace(
            "pivot_root .", f'mkdir -p ".{os.path.dirname(path)}"; cp "$shared/{name}" ".{path}"\npivot_root .', 1
        )
    with cgroup2.group(root) as group, tempfile.TemporaryDirectory() as top, open(shared / "log", "w+") as log:
        flags = [
            "--mount",
            "--pid",
            "--fork",
            "--uts",
            "--ipc",
            "--net",
            "--cgroup",
            "--kill-child",
            "--propagation=private",
        ]
        join = f'echo $$ >"{group}/cgroup.procs" && exec setpriv --pdeathsig KILL unshare "$@"'
        command = ["sh", "-c", join, "sh", *flags, "sh", "-c", script, "sh", top, str(shared), *bound]
        with subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL) as outside:
            try:
                yield _booted(outside, shared / "log", 90)
            finally:
                outside.kill()  # the kernel then kills its child, process 1, and with that one all others


def _booted(outside: subprocess.Popen[bytes], log: Path, patience: float) -> Host:
    """Waits for process 1 to have reached its target."""
    deadline = time.monotonic() + patience
    ended = os.pidfd_open(outside.pid)
    try:
        while time.monotonic() < deadline:
            children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
            if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
                host = Host(int(children[0]))
                if host.attempt("systemctl", "is-active", "test.target").returncode == 0:
                    return host
            if select.select([ended], [], [], 0.05)[0]:
                pytest.skip(f"this machine lets no systemd of its own start: {log.read_text().strip()[-300:]}")
    finally:
        os.close(ended)
    raise TimeoutError(f"systemd has not reached its target: {log.read_text()[-3000:]}")
