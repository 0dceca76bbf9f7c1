"""Definitions survive whatever happens to the daemon, and a broken one takes no other with it."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from propolis.errors import BackendError, BusyError
from propolis.spec import DirectBoot, FileBlock, PciPath, Spec, VirtioBlock
from propolis.store import Definition, Store
from tests.source.tree import TREE


def make(name: str = "vm", cpus: int = 1, number: int = 1) -> Definition:
    spec = Spec(
        name=name,
        cpus=cpus,
        memory_mib=32,
        boot=DirectBoot(kernel="/kernel", cmdline="console=ttyS0"),
        devices=(VirtioBlock(name="d", backend="b", pci_path=PciPath(0, 4, 0)),),
        backends={"b": FileBlock(path="/disk")},
    )
    return Definition(
        uuid=f"00000000-0000-4000-8000-{number:012x}",
        created=1.5,
        index=number,
        spec=spec,
        requested=spec,
        properties=msgspec.Raw(b'{"name":"vm"}'),
        restart="always",
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "state")) as store:
        yield store


def reopen(store: Store) -> dict[str, Definition]:
    store.close()
    with Store.open(store.path) as again:
        found = again.load()
        store.unreadable = again.unreadable
    return found


def file(store: Store, name: str = "vm.json") -> Path:
    return Path(store.path, "vms", name)


def test_what_was_saved_is_there_later(store: Store) -> None:
    store.save(make("a"))
    store.save(make("b", number=2))
    store.save(make("a", cpus=4))
    found = reopen(store)
    assert list(found) == ["a", "b"]
    assert found["a"].spec == make("a", cpus=4).spec
    assert (found["b"].restart, found["b"].created) == ("always", 1.5)
    assert msgspec.json.decode(found["b"].properties) == {"name": "vm"}


def test_what_was_removed_is_gone(store: Store) -> None:
    store.save(make())
    store.remove("vm")
    store.remove("vm")
    assert reopen(store) == {}


def test_only_this_user_reads_it(store: Store) -> None:
    store.save(make())
    assert file(store).stat().st_mode & 0o777 == 0o600
    assert file(store).parent.stat().st_mode & 0o777 == 0o700


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: data.replace(b"console", b"cons\xff\xfee"),
    "nested": lambda data: b"[" * 100_000,
    "a later format": lambda data: data.replace(b'"format": 1', b'"format": 2'),
    "an unknown field": lambda data: data.replace(b'"format": 1', b'"format": 1, "x": 2'),
    "an invalid spec": lambda data: data.replace(b'"cpus": 1', b'"cpus": 0'),
    "another name": lambda data: data.replace(b'"name": "bad"', b'"name": "other"'),
    "a uuid twice": lambda data: data.replace(b"000000000002", b"000000000001"),
    "an index twice": lambda data: data.replace(b'"index": 2', b'"index": 1'),
    "too large": lambda data: data + b" " * (8 << 20),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_set_aside_and_the_others_are_read(store: Store, kind: str) -> None:
    store.save(make("a"))
    store.save(make("bad", number=2))
    store.save(make("c", number=3))
    broken = BROKEN[kind](file(store, "bad.json").read_bytes())
    file(store, "bad.json").write_bytes(broken)
    assert list(reopen(store)) == ["a", "c"]
    (unreadable,) = store.unreadable
    assert Path(unreadable.path).read_bytes() == broken
    assert unreadable.path.endswith("/vms/bad.json.unreadable")
    assert "\n" not in unreadable.reason
    assert list(reopen(store)) == ["a", "c"]
    assert store.unreadable[0].reason == "set aside earlier"


def test_nothing_that_was_set_aside_is_overwritten(store: Store) -> None:
    for content in ("1", "2", "3"):
        file(store, "vm.json").write_text(content)
        reopen(store)
    kept = sorted(file(store).parent.iterdir())
    assert [path.read_text() for path in kept] == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
def test_what_is_no_file_is_set_aside(store: Store, tmp_path: Path, kind: str) -> None:
    store.save(make("a"))
    file(store, "a.json").rename(tmp_path / "real")
    if kind == "symlink":
        file(store, "a.json").symlink_to(tmp_path / "real")
    elif kind == "fifo":
        os.mkfifo(file(store, "a.json"))
    else:
        file(store, "a.json").mkdir()
    assert reopen(store) == {}
    assert len(store.unreadable) == 1


def test_a_name_for_half_written_files_is_not_followed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    file(store, "vm.json.new").symlink_to(tmp_path / "victim")
    store.save(make())
    assert (tmp_path / "victim").read_text() == "precious"
    assert list(reopen(store)) == ["vm"]


def test_a_write_that_fails_leaves_what_was_there(store: Store) -> None:
    store.save(make())
    file(store, "vm.json.new").mkdir()  # in the way of the next one
    with pytest.raises(BackendError, match="write the definition of VM 'vm'"):
        store.save(make(cpus=2))
    file(store, "vm.json.new").rmdir()
    assert reopen(store)["vm"].spec.cpus == 1


WRITER = """
import sys, msgspec
from propolis.store import Store
with Store.open(sys.argv[1]) as store:
    definition = store.load()["vm"]
    print("ready", flush=True)
    for cpus in range(1, 10**9):
        spec = msgspec.structs.replace(definition.spec, cpus=cpus % 64 + 1, name="vm")
        store.save(msgspec.structs.replace(definition, spec=spec))
"""


def test_a_writer_that_is_killed_loses_nothing(store: Store, rounds: int) -> None:
    store.save(make())
    store.close()
    for _ in range(5 * rounds):
        process = subprocess.Popen([sys.executable, "-c", WRITER, store.path], stdout=subprocess.PIPE, cwd=TREE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        before = file(store).stat().st_ino
        deadline = time.monotonic() + 20
        while file(store).stat().st_ino == before and time.monotonic() < deadline:
            pass  # at least one write, and then at whatever point of another it is
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        with Store.open(store.path) as again:
            found = again.load()
            assert again.unreadable == []
        assert found["vm"].requested == make().spec
        assert [path.name for path in file(store).parent.iterdir()] == ["vm.json"]


HOLDER = """
import sys
from propolis.store import Store
with Store.open(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_daemon_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TREE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    with pytest.raises(BusyError, match=f"'{tmp_path}' is in use by propolis-server, process {process.pid}"):
        Store.open(str(tmp_path))
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    Store.open(str(tmp_path)).close()  # the lock went with the process


def test_a_lock_without_a_record_is_still_one(store: Store) -> None:
    Path(store.path, "lock").write_bytes(b"")
    with pytest.raises(BusyError, match="in use by another propolis-server"):
        Store.open(store.path)


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vms").mkdir(0o777)
    (tmp_path / "vms").chmod(0o777)
    with pytest.raises(BackendError, match="expected one that only this user can write to"):
        Store.open(str(tmp_path))


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="Not a directory"):
        Store.open(str(tmp_path / "file" / "state"))


def test_a_full_disk_leaves_what_was_there(store: Store) -> None:
    store.save(make())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as near to a full disk as a process can make it
    try:
        with pytest.raises(BackendError, match="write the definition of VM 'vm': File too large"):
            store.save(make(cpus=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in file(store).parent.iterdir()] == ["vm.json"]
    assert reopen(store)["vm"].spec.cpus == 1
