"""Control groups, in the kernel's own hierarchy where this machine lets a test make one."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis import cgroup
from propolis.errors import BackendError, BusyError
from tests.services import cgroup2

MIB = 1 << 20


class Place:
    """A group in a hierarchy, and what /proc would say to a process in it."""

    def __init__(self, root: str, path: str, proc: Path) -> None:
        self.path = path
        self.name = path.removeprefix(root)
        self.proc = str(proc)
        (proc / "mountinfo").write_text(
            f"1 0 0:1 / / rw - tmpfs none rw\n2 1 0:2 / {root} rw,nosuid - cgroup2 none rw\n"
        )
        (proc / "cgroup").write_text(f"1:name=systemd:/elsewhere\n0::{self.name}\n")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A new, empty group."""
    with cgroup2.mounted() as root, cgroup2.group(root) as path:
        yield Place(root, path, tmp_path)


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits until it is killed."""
    with subprocess.Popen(command or ["cat"], stdin=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


def subtree_of(place: Place) -> cgroup.Subtree:
    """The delegated group, which there is."""
    found = cgroup.find(place.name, proc=place.proc)
    assert found is not None
    return found


def test_a_vm_has_a_group_of_its_own(place: Place) -> None:
    """It is made, holds what is moved there, is refused a second time, killed, and removed once it is empty."""
    subtree = subtree_of(place)
    assert subtree.path == place.path
    group = subtree.make("a", cgroup.Limits())
    assert not group.has_processes()
    with process() as running:
        group.add(running.pid)
        assert group.processes() == [running.pid]
        assert group.has_processes()
        assert f"0::{place.name}/vm-a\n" in Path(f"/proc/{running.pid}/cgroup").read_text()
        assert not group.remove()
        with pytest.raises(BusyError, match=f"'a' still has processes: {running.pid}"):
            subtree.make("a", cgroup.Limits())
        found = subtree.open("a")
        assert found is not None
        found.kill()
        assert running.wait(10) == -signal.SIGKILL
    assert not group.has_processes()
    assert group.remove()
    assert group.remove()
    assert group.processes() == []
    assert group.oom_kills() == 0
    assert subtree.open("a") is None


def test_what_vms_left_is_swept(place: Place) -> None:
    """An empty group is removed, one in use stays, and a new VM takes an empty one over."""
    subtree = subtree_of(place)
    used = subtree.make("used", cgroup.Limits())
    subtree.make("empty", cgroup.Limits())
    with process() as running:
        used.add(running.pid)
        subtree.make("empty", cgroup.Limits())
        assert [group.name for group in subtree.groups()] == ["empty", "used"]
        subtree.sweep()
        assert [group.name for group in subtree.groups()] == ["used"]


def test_processes_in_the_delegated_group_move_to_a_leaf(place: Place) -> None:
    """The kernel gives no controllers to the children of a group that has processes itself."""
    with process() as running:
        Path(place.path, "cgroup.procs").write_text(str(running.pid))
        subtree_of(place)
        assert f"0::{place.name}/rest\n" in Path(f"/proc/{running.pid}/cgroup").read_text()
        subtree_of(place)
        assert Path(place.path, "rest/cgroup.procs").read_text() == f"{running.pid}\n"


def test_the_own_group_is_taken_where_it_is_delegated(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name it is this process's group, and only with the service manager's word for it."""
    monkeypatch.delenv(cgroup.VARIABLE, raising=False)
    if os.geteuid() == 0:
        assert cgroup.find(proc=place.proc) is None
    os.setxattr(place.path, "user.delegate", b"1")
    found = cgroup.find(proc=place.proc)
    assert found is not None
    assert found.path == place.path


def test_the_environment_names_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the unit of the daemon does."""
    monkeypatch.setenv(cgroup.VARIABLE, place.name)
    found = cgroup.find(proc=place.proc)
    assert found is not None
    assert found.path == place.path


def test_limits_are_set(place: Place) -> None:
    """Each in the kernel's files; what exceeds its memory is killed, and counted."""
    subtree = subtree_of(place)
    missing = {"cpu", "memory", "pids"} - subtree.controllers
    if missing:
        pytest.skip(f"groups here have no controller for {', '.join(sorted(missing))}")
    group = subtree.make("a", cgroup.Limits(memory_bytes=64 * MIB, processes=99, cpu_weight=300))
    expected = {"memory.max": str(64 * MIB), "memory.oom.group": "1", "pids.max": "99", "cpu.weight": "300"}
    assert {name: Path(group.path, name).read_text().strip() for name in expected} == expected
    eater = "import sys; sys.stdin.readline(); x = b'x' * (256 << 20); sys.stdin.readline()"
    with process(sys.executable, "-c", eater) as running:
        group.add(running.pid)
        assert running.stdin is not None
        running.stdin.write(b"\n")
        running.stdin.flush()
        assert running.wait(30) == -signal.SIGKILL
    assert group.oom_kills() == 1


def test_a_process_that_is_gone_cannot_be_moved(place: Place) -> None:
    """The error says what was tried."""
    group = subtree_of(place).make("a", cgroup.Limits())
    with process() as running:
        pass
    with pytest.raises(BackendError, match=rf"VM 'a': write {running.pid} to cgroup\.procs: No such process"):
        group.add(running.pid)


def test_only_names_of_vms_are_names_of_groups(place: Place) -> None:
    """Nothing is made or removed elsewhere."""
    subtree = subtree_of(place)
    for name in ("../a", "a/b", "", ".."):
        with pytest.raises(BackendError, match="no name"):
            subtree.make(name, cgroup.Limits())


# -- without one -------------------------------------------------------------------------------------------------------


def _proc(folder: Path, mount: str, group: str) -> str:
    (folder / "mountinfo").write_text(mount)
    (folder / "cgroup").write_text(group)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "group", "wanted", "expected"),
    [
        ("cgroup", "1:memory:/a\n", None, "no cgroup2 file system is mounted"),
        ("cgroup2", "1:memory:/a\n", None, "this process is in no control group"),
        ("cgroup2", "0::/a\n", None, "/a is not delegated"),
        ("cgroup2", "0::/a\n", "/b", "there is no control group /b"),
    ],
)
def test_without_a_delegated_group_there_is_a_line_in_the_log(
    kind: str, group: str, wanted: str | None, expected: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And None, with which VMs run all the same."""
    monkeypatch.delenv(cgroup.VARIABLE, raising=False)
    caplog.set_level("INFO")
    proc = _proc(tmp_path, f"2 1 0:2 / {tmp_path}/none rw - {kind} none rw\n", group)
    assert cgroup.find(wanted, proc=proc) is None
    assert expected in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING" if wanted else "INFO"}


def test_this_process_asks_without_error() -> None:
    """Whatever this machine has; a bind mount of a part of the hierarchy is not the hierarchy."""
    assert cgroup.find("/propolis-of-nobody") is None


def test_the_limit_of_memory() -> None:
    """It is above the guest's RAM by what page tables, programs and disks in memory need."""
    assert cgroup.memory_limit(1024 * MIB) == (1024 + 16 + 128) * MIB
    assert cgroup.memory_limit(64 * MIB, files_in_memory=MIB) == (64 + 1 + 128 + 1) * MIB


def test_files_in_memory(tmp_path: Path) -> None:
    """Those on a tmpfs, by the device they are on; what is missing or no file counts nothing."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    device = disk.stat().st_dev
    for kind, expected in (("tmpfs", 4096), ("ext4", 0)):
        line = f"9 1 {os.major(device)}:{os.minor(device)} / /a\\040b rw shared:1 master:2 - {kind} none rw\n"
        (tmp_path / "mountinfo").write_text(line)
        paths = [str(disk), str(tmp_path), str(tmp_path / "missing")]
        assert cgroup.bytes_in_memory(paths, mountinfo=str(tmp_path / "mountinfo")) == expected
