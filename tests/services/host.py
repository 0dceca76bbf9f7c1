"""A host with systemd as process 1, for a test to install into, and to restart.

In the lab it is the lab's machine. Elsewhere it is a small one of its own, in a PID namespace, on a copy of this system
that is gone afterwards. Nothing of it reaches this system: the root is an overlay over memory; /proc/sys and /sys are
read-only; of /dev it has a handful of nodes; its control groups are below one of a test's. It needs root and a machine
that grants namespaces.
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

from tests.machine.guest import SLOWER
from tests.services import cgroup2
from tests.source.tree import TREE

SYSTEMD = "/lib/systemd/systemd"
BOOT_ID = "/proc/sys/kernel/random/boot_id"

# $1: an empty folder. $2: a folder shared with the test. The others: what is bound at its own place. A start of the
# host is a process 1 in new namespaces; one that ended by reboot(2), which is SIGHUP for it, is followed by the next.
_MACHINE = r"""
top=$1
mount -t tmpfs none "$top" || exit
mkdir "$top/upper" "$top/work" "$top/root"
while setpriv --pdeathsig KILL unshare --mount --pid --fork --uts --ipc --net --cgroup --kill-child sh -c 'BOOT' sh "$@"
  [ $? = 129 ]; do :; done
"""
_BOOT = r"""
set -e
top=$1 shared=$2; shift 2
mount -t overlay none -o lowerdir=/,upperdir="$top/upper",workdir="$top/work" "$top/root"
cd "$top/root"
for path in "$shared" "$@"; do mkdir -p ".$path"; mount --bind "$path" ".$path"; done
mount -t proc none proc
mount --bind proc/sys proc/sys; mount -o remount,ro,bind proc/sys
cat /proc/sys/kernel/random/uuid >"$top/boot_id"; mount --bind "$top/boot_id" proc/sys/kernel/random/boot_id
mount -t sysfs -o ro none sys
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs -o mode=755 none run
mount -t tmpfs -o mode=755 none dev
mkdir dev/net dev/pts dev/shm old
for node in null zero full random urandom tty fuse kvm net/tun userfaultfd loop0; do
  if [ -e "/dev/$node" ]; then : >"dev/$node"; mount --bind "/dev/$node" "dev/$node"; fi
done
mount -t tmpfs -o mode=1777 none dev/shm
if ! [ -e "$top/has_booted" ]; then
  rm -rf etc/systemd/system/*.wants usr/lib/systemd/system/*.target.wants usr/lib/systemd/system/propolis-*
  wanted=etc/systemd/system/sysinit.target.wants
  mkdir -p $wanted var/log/journal
  for unit in systemd-journald systemd-journal-flush; do ln -s "/lib/systemd/system/$unit.service" $wanted; done
  : >etc/fstab
  : >"$top/has_booted"
fi
pivot_root . old
umount -l /old
rmdir /old
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test \
  SYSTEMD --system --unit=multi-user.target --log-target=console --log-level=info --show-status=no </dev/null
""".replace("SYSTEMD", SYSTEMD)


class Host:
    """A running one. Commands are entered by a prefix to them; its files are below `root`."""

    def __init__(self, root: str = "", enter: tuple[str, ...] = ()) -> None:
        self.root = root
        self._enter = enter

    def call(self, *command: str) -> str:
        """Run a command in it, which succeeds; its output."""
        result = self.attempt(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def attempt(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it."""
        return subprocess.run(
            [*self._enter, *command], capture_output=True, text=True, check=False, timeout=60 * SLOWER
        )

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.call("systemctl", "show", "--value", "--property", name, unit)

    def write(self, path: str, text: str) -> None:
        """A file in it, with the folders above."""
        found = Path(f"{self.root}{path}")
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_text(text)

    def reboot(self, *units: str) -> None:
        """Stops the units as a shutdown does, and starts what is enabled anew in a system that knows nothing of before.

        The lab's machine, which would forget its files as well, only has its units stopped and started: what a boot
        takes from them, /run/propolis and the boot's number, is taken from them in between.
        """
        self.call("systemctl", "stop", *units)
        self.call("rm", "-r", "/run/propolis")
        Path("/run/boot_id").write_text(Path("/proc/sys/kernel/random/uuid").read_text())
        self.call("mount", "--bind", "/run/boot_id", BOOT_ID)
        self.call("systemd-tmpfiles", "--create", "--boot")
        self.call("systemctl", "start", *filter(self._is_enabled, units))

    def _is_enabled(self, unit: str) -> bool:
        return self.attempt("systemctl", "is-enabled", unit).returncode == 0


class SmallHost(Host):
    """One of the test's own: a child of `outside`, the process that starts it again and again."""

    def __init__(self, outside: "subprocess.Popen[bytes]", log: Path) -> None:
        self._outside = outside
        self._log = log
        self._process_1 = 0
        self._boot()

    def reboot(self, *units: str) -> None:
        """By its own systemd, from shutdown to what is enabled; /run is new, and so is the boot's number."""
        self.attempt("systemctl", "reboot")
        self._boot()

    def _boot(self) -> None:
        """Waits for a new process 1 to have reached its target."""
        deadline = time.monotonic() + 90
        ended = os.pidfd_open(self._outside.pid)
        try:
            while time.monotonic() < deadline:
                if (found := self._find_process_1()) not in (0, self._process_1):
                    enter = ("nsenter", "--all", "--root", "--wd", "--target", str(found))
                    super().__init__(f"/proc/{found}/root", enter)
                    if self.attempt("systemctl", "is-active", "multi-user.target").returncode == 0:
                        self._process_1 = found
                        return
                if select.select([ended], [], [], 0.05)[0]:
                    last_words = self._log.read_text().strip()[-300:]
                    assert self._process_1 == 0, f"it did not start again: {last_words}"
                    pytest.skip(f"this machine lets no systemd of its own start: {last_words}")
        finally:
            os.close(ended)
        raise TimeoutError(f"systemd has not reached its target: {self._log.read_text()[-3000:]}")

    def _find_process_1(self) -> int:
        """The child of the child of the loop that starts it, if it is systemd yet; else 0."""
        pid = self._outside.pid
        with contextlib.suppress(OSError, IndexError):
            for _ in range(2):
                pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
            if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                return pid
        return 0


@contextlib.contextmanager
def running(shared: Path) -> Iterator[Host]:
    """A host that sees this tree and the folder `shared`; skips where this machine does not let a test have one."""
    if os.environ.get("KVM_LAB") == "1" and Path("/proc/1/comm").read_text() == "systemd\n":
        yield Host()
        return
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
    with cgroup2.group(root) as group, tempfile.TemporaryDirectory() as top, open(shared / "log", "w+") as log:
        join = f'echo $$ >"{group}/cgroup.procs" && exec setpriv --pdeathsig KILL "$@"'
        machine = ["unshare", "--mount", "--propagation=private", "sh", "-c", _MACHINE.replace("BOOT", _BOOT)]
        command = ["sh", "-c", join, "sh", *machine, "sh", top, str(shared), *bound]
        with subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL) as outside:
            try:
                yield SmallHost(outside, shared / "log")
            finally:
                outside.kill()  # the kernel then kills unshare, its child, process 1 with it, and all others
