"""A run directory: what a worker leaves in it is there for others, whatever that is and however it ended."""

import json
import os
import random
import signal
import socket
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Self

import pytest

from propolis.errors import BackendError, BusyError
from propolis.lifecycle import State
from propolis.processes import Process
from propolis.run_directory import LOG_KEPT_BYTES, ExitRecord, RunDirectory
from propolis.state_file import FILE_BYTES, StateRecord

ME = os.getpid()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(str(tmp_path / "run")) as directory:
        yield directory


def file(directory: RunDirectory, name: str) -> Path:
    return Path(directory.path, name)


# -- the directory -----------------------------------------------------------------------------------------------------


def test_it_is_its_users_alone(directory: RunDirectory) -> None:
    assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700
    for entry in os.scandir(directory.path):
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def test_its_files_have_their_room_on_the_disk(directory: RunDirectory) -> None:
    """A store into a mapped file where there is none would kill the worker."""
    for name in ("state", "console", "log"):
        status = file(directory, name).stat()
        assert status.st_blocks * 512 >= status.st_size > 0


def test_nothing_is_there_at_first(directory: RunDirectory) -> None:
    assert directory.state() is None
    assert directory.exit_record() is None
    assert directory.processes() is None
    assert directory.lock_holder() is None
    assert directory.last_log_lines() == []
    with directory.history() as history:
        assert history.read(from_start=0) == (b"", 0)


def test_made_again_it_keeps_what_is_there(directory: RunDirectory) -> None:
    with closing(directory.map_state()) as state, closing(directory.map_history()) as history:
        state.write(7, State.RUNNING)
        history.append(b"hello")
    with RunDirectory.create(directory.path) as again, again.history() as kept:
        assert kept.read(from_start=0) == (b"hello", 5)
        record = again.state()
        assert record is not None
        assert record.generation == 7


def test_files_of_another_version_are_made_anew(directory: RunDirectory) -> None:
    file(directory, "console").write_bytes(b"of another version")
    with RunDirectory.create(directory.path) as again, closing(again.map_history()) as history:
        assert history.total_bytes == 0


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_open_to_others_is_refused(directory: RunDirectory, mode: int) -> None:
    os.chmod(directory.path, mode)
    with pytest.raises(BackendError, match="this user's alone"):
        RunDirectory.open(directory.path)


def test_what_is_no_directory_is_refused(directory: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory.path)
    (tmp_path / "file").write_text("")
    for name in ("link", "file", "missing", "missing/below"):
        with pytest.raises(BackendError, match="open run directory"):
            RunDirectory.open(str(tmp_path / name))
    for name in ("link", "file", "missing/below"):
        with pytest.raises(BackendError, match="run directory"):
            RunDirectory.create(str(tmp_path / name))


def test_removed_with_all_that_is_in_it(directory: RunDirectory, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("")
    file(directory, "link").symlink_to(elsewhere)
    file(directory, "folder").mkdir()
    file(directory, "folder/link").symlink_to(elsewhere)
    RunDirectory.remove(directory.path)
    assert os.listdir(tmp_path) == ["elsewhere"]
    assert (elsewhere / "precious").exists()
    RunDirectory.remove(directory.path)


def test_a_socket_below_a_long_path(tmp_path: Path) -> None:
    """Longer than the name of a socket may be."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for path in (tmp_path / "short", long / "run"):
        with RunDirectory.create(str(path)) as directory:
            for _ in range(2):  # the second in place of what the first left
                with directory.listen() as listener, socket.socket(socket.AF_UNIX) as client:
                    client.connect(directory.socket_path)
                    listener.accept()[0].close()
            assert stat.S_IMODE((path / "http").stat().st_mode) == 0o600
            directory.remove_socket()
            directory.remove_socket()
            assert not (path / "http").exists()


# -- who keeps it ------------------------------------------------------------------------------------------------------


class Holder:
    """A process that does something with the directory and lives until the end of the `with`."""

    def __init__(self, directory: RunDirectory) -> None:
        self._ready, ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                directory.take_lock()
                os.write(ready, b"y")
                while True:
                    signal.pause()
            finally:
                os._exit(1)
        os.close(ready)

    def __enter__(self) -> Self:
        assert os.read(self._ready, 1) == b"y"
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._ready)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_the_lock_tells_who_keeps_the_vm(directory: RunDirectory) -> None:
    """As long as that process lives, and whatever files say."""
    with Holder(directory) as holder:
        assert directory.lock_holder() == holder.pid
        with pytest.raises(BusyError, match=f"process {holder.pid} keeps its VM"):
            directory.take_lock()
        with pytest.raises(BusyError, match=f"process {holder.pid} keeps its VM"):
            RunDirectory.remove(directory.path)
        assert directory.lock_holder() == holder.pid
    assert directory.lock_holder() is None


def test_processes_are_those_of_this_boot(directory: RunDirectory) -> None:
    me = Process.of(ME)
    assert me is not None
    assert me.is_there()
    directory.write_processes(me, me)
    found = directory.processes()
    assert found is not None
    assert found.keeper == found.worker == me
    path = file(directory, "processes")
    path.write_text(path.read_text().replace(found.boot, "another boot"))
    assert directory.processes() is None
    assert not Process(pid=ME, start_time=me.start_time - 1).is_there()


def test_an_exit_record_goes_with_the_next_run(directory: RunDirectory) -> None:
    record = ExitRecord(reason="killed", time=1e9, signal=9, stderr="last\nwords")
    directory.write_exit(record)
    assert directory.exit_record() == record
    directory.write_exit(ExitRecord(reason="again", time=1e9, status=0))
    again = directory.exit_record()
    assert again is not None
    assert again.reason == "again"
    directory.clear_run()
    directory.clear_run()
    assert directory.exit_record() is None
    assert not [name for name in os.listdir(directory.path) if name.endswith(".new")]


# -- the state ---------------------------------------------------------------------------------------------------------


def test_the_last_state_is_there_for_all(directory: RunDirectory) -> None:
    with closing(directory.map_state()) as writer:
        assert writer.last is None
        for generation in range(10):
            writer.write(generation, State.RUNNING, "why", paused=generation == 9)
            record = directory.state()
            assert record is not None
            assert (record.generation, record.state, record.detail) == (generation, State.RUNNING, "why")
            assert record.paused is (generation == 9)
    with closing(directory.map_state()) as again:
        assert again.last == directory.state()


@pytest.mark.parametrize("detail", ["x" * 10_000, "\0" * 10_000, "🐝" * 10_000, "\ud800" * 10, "a\x1b[31m\nb"])
def test_any_detail_fits(directory: RunDirectory, detail: str) -> None:
    with closing(directory.map_state()) as writer:
        writer.write(1, State.FAILED, detail)
    record = directory.state()
    assert record is not None
    assert record.detail.isprintable()
    assert record.detail[0] == (detail[0] if detail[0].isprintable() else "\ufffd")


def test_a_state_that_is_half_written_is_not_seen(directory: RunDirectory) -> None:
    """Wherever its writer was killed, the one before is."""
    with closing(directory.map_state()) as writer:
        writer.write(1, State.RUNNING, "the first")
        writer.write(2, State.STOPPING, "the second")
        before = file(directory, "state").read_bytes()
        writer.write(3, State.STOPPED, "the third, and the longest of all three")
        after = file(directory, "state").read_bytes()
    seen = []
    for cut in range(4096):
        file(directory, "state").write_bytes(before[:4096] + after[4096 : 4096 + cut] + before[4096 + cut :])
        record = directory.state()
        assert record is not None
        seen.append(record.generation)
    assert seen == sorted(seen)
    assert set(seen) == {2, 3}


def test_states_written_as_fast_as_can_be(directory: RunDirectory) -> None:
    """Readers see whole ones that never go back, and the writer's death leaves one."""
    child = os.fork()
    if child == 0:
        writer = directory.map_state()
        generation = 0
        while True:
            generation += 1
            writer.write(generation, State.RUNNING, f"{generation} " * (generation % 300))
    last = -1
    try:
        for look in range(2000):
            if look == 1900:
                os.kill(child, signal.SIGKILL)
            record = directory.state()
            if record is None:
                assert last < 0
                continue
            assert record.generation >= last
            assert record.detail in f"{record.generation} " * 300
            last = record.generation
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    record = directory.state()
    assert record is not None
    assert record.generation >= last


def slot(sequence: int, payload: bytes) -> bytes:
    """A slot as the writer makes it, around anything."""
    head = zlib.crc32(struct.pack("=QI", sequence, len(payload)))
    return (struct.pack("=QIII", sequence, len(payload), head, zlib.crc32(payload)) + payload).ljust(4096, b"\0")


GOOD = {"generation": 1, "state": "Running", "detail": "", "paused": False, "time": 1e9}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"generation":1e400}',
        json.dumps(GOOD | {"generation": -1}).encode(),
        json.dumps(GOOD | {"generation": 1 << 63}).encode(),
        json.dumps(GOOD | {"state": "Flying"}).encode(),
        json.dumps(GOOD | {"time": -1.0}).encode(),
        json.dumps(GOOD | {"time": 1e300}).encode(),
        json.dumps(GOOD | {"more": 1}).encode(),
    ],
)
def test_a_state_that_makes_no_sense_is_none(directory: RunDirectory, payload: bytes) -> None:
    """And does not keep the next worker from writing its own."""
    for sequence in (1, (1 << 48) - 1, 1 << 48, (1 << 64) - 1):
        file(directory, "state").write_bytes(slot(sequence, payload) * 2)
        assert directory.state() is None
        with closing(directory.map_state()) as writer:
            assert writer.last is None
            writer.write(5, State.RUNNING)
        record = directory.state()
        assert record is not None
        assert record.generation == 5


def test_a_number_at_its_end_does_not_stop_the_writer(directory: RunDirectory) -> None:
    payload = json.dumps(GOOD).encode()
    file(directory, "state").write_bytes(slot(1 << 48, payload) * 2)
    assert directory.state() == StateRecord(generation=1, state=State.RUNNING, time=1e9)
    with closing(directory.map_state()) as writer:
        writer.write(5, State.PAUSED)
    record = directory.state()
    assert record is not None
    assert record.generation == 5


# -- hostile content ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_any_bytes_in_any_file(directory: RunDirectory, seed: int) -> None:
    """Whoever reads gets nothing, or something that fits; nothing raises what is not an error of ours."""
    rng = random.Random(seed)
    for _ in range(30):
        for name in ("state", "log", "exit", "processes", "lock"):
            size = rng.choice([0, 1, 100, FILE_BYTES, 100_000])
            content = rng.choice([rng.randbytes(size), b"{" * size, b'{"reason":"' + b"a" * size, b'"' * size])
            file(directory, name).write_bytes(content)
        assert directory.state() is None
        assert directory.exit_record() is None
        assert directory.processes() is None
        assert directory.lock_holder() is None
        assert directory.last_log_lines() == []


USES: dict[str, list[Callable[[RunDirectory], object]]] = {
    "state": [RunDirectory.state, RunDirectory.map_state],
    "console": [RunDirectory.history, RunDirectory.map_history],
    "log": [RunDirectory.log, RunDirectory.map_log, RunDirectory.last_log_lines],
    "exit": [RunDirectory.exit_record],
    "processes": [RunDirectory.processes],
    "lock": [RunDirectory.lock_holder, RunDirectory.take_lock],
}


@pytest.mark.parametrize("name", USES)
def test_what_is_no_file_of_ours_is_not_opened(directory: RunDirectory, tmp_path: Path, name: str) -> None:
    """A link would have us read, or write, what is not this VM's; a pipe would have us wait."""
    secret = tmp_path / "secret"
    secret.write_text("not this VM's")

    def link() -> None:
        file(directory, name).symlink_to(secret)

    def hard_link() -> None:
        os.link(secret, file(directory, name))

    def pipe() -> None:
        os.mkfifo(file(directory, name))

    def folder() -> None:
        file(directory, name).mkdir()

    def device() -> None:
        os.mknod(file(directory, name), stat.S_IFCHR | 0o600, os.makedev(1, 5))

    for make in (link, hard_link, pipe, folder, *([device] if os.geteuid() == 0 else [])):
        file(directory, name).unlink(missing_ok=True)
        make()
        for use in USES[name]:
            with pytest.raises(BackendError, match=name):
                use(directory)
        if make is folder:
            file(directory, name).rmdir()
    assert secret.read_text() == "not this VM's"


def test_words_of_a_record_do_nothing_to_a_terminal(directory: RunDirectory) -> None:
    record = {"reason": "a\x1b[2Jb\r\nc", "time": 1e9, "stderr": "one\x07\ntwo\x1b]0;x"}
    file(directory, "exit").write_text(json.dumps(record))
    found = directory.exit_record()
    assert found is not None
    assert found.reason == "a\ufffd[2Jb\ufffd\ufffdc"
    assert found.stderr == "one\ufffd\ntwo\ufffd]0;x"


def test_the_last_lines_of_the_log(directory: RunDirectory) -> None:
    with closing(directory.map_log()) as log:
        log.append("first\nsecond \u2713\n".encode())
        assert directory.last_log_lines() == ["first", "second \u2713"]
        log.append(b"\x1b[31mred\xff\n")
        assert directory.last_log_lines(2) == ["second \u2713", "\ufffd[31mred\ufffd"]
        for number in range(30_000):
            log.append(b"line %d\n" % number)
        assert directory.last_log_lines(3) == ["line 29997", "line 29998", "line 29999"]
        log.append(b"x" * LOG_KEPT_BYTES)
        assert all(len(line) <= 1000 for line in directory.last_log_lines(1000))
