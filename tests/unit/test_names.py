"""Names are held by real processes, ended through their pidfd, and given up however a process goes."""

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from propolis import names, processes
from propolis.errors import BackendError, BusyError, ConfigError
from propolis.names import Holder, NameLock, clear_stale

TIMEOUT = 20

# Holds the name given as the second argument in the folder given as the first, and says so; the third says how it
# takes SIGTERM: by default, by counting, or not at all.
HOLDER = """
import asyncio, os, signal, sys
from propolis.names import NameLock

async def main():
    folder, name, program, manner = sys.argv[1:]
    loop, terms = asyncio.get_running_loop(), []
    def term():
        terms.append(1)
        print("term", flush=True)
        if manner == "second" and len(terms) == 2:
            os._exit(7)
    if manner != "plain":
        loop.add_signal_handler(signal.SIGTERM, term)
    lock = await NameLock.acquire(name, program=program, folder=folder, socket="/run/x.sock")
    if manner == "fork" and os.fork() == 0:
        os.close(1)
        signal.pause()
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    started: list[asyncio.subprocess.Process] = []

    async def start(
        name: str = "vm", program: str = "standalone", manner: str = "plain", is_awaited: bool = True
    ) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLDER, tmp_path, name, program, manner, stdout=asyncio.subprocess.PIPE
        )
        started.append(process)
        if is_awaited:
            await says(process, b"held\n")
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        assert process.stdout is not None
        await process.stdout.read()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # or its end is left to the garbage collector


async def says(process: asyncio.subprocess.Process, line: bytes) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT):
        assert await process.stdout.readline() == line


async def ends(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(TIMEOUT):
        return await process.wait()


@contextlib.contextmanager
def held_by_hand(path: Path, record: bytes) -> Iterator[None]:
    """A lock that is held, but not by whom its record says."""
    with path.open("wb") as file:
        file.write(record)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def take(folder: Path, name: str = "vm", **arguments: float) -> NameLock:
    async with asyncio.timeout(TIMEOUT):
        return await NameLock.acquire(name, folder=str(folder), **arguments)  # type: ignore[arg-type]


async def test_a_free_name(tmp_path: Path) -> None:
    with await take(tmp_path) as lock:
        assert os.listdir(tmp_path) == ["vm.lock"]
        assert os.stat(tmp_path / "vm.lock").st_mode & 0o777 == 0o600
        with await take(tmp_path, "other"):
            pass
    lock.release()
    assert os.listdir(tmp_path) == []


async def test_the_record_says_who_holds_it(tmp_path: Path, start: Start) -> None:
    process = await start()
    file = os.open(tmp_path / "vm.lock", os.O_RDWR)
    holder = names._read(file)
    os.close(file)
    start_time = processes.start_time(process.pid)
    assert start_time is not None
    assert holder == Holder(pid=process.pid, start_time=start_time, program="standalone", socket="/run/x.sock")


async def test_a_standalone_vm_is_ended(tmp_path: Path, start: Start) -> None:
    process = await start()
    with await take(tmp_path):
        assert await ends(process) == -signal.SIGTERM


async def test_one_that_wants_to_be_told_twice(tmp_path: Path, start: Start) -> None:
    process = await start(manner="second")
    with await take(tmp_path, grace=0.2):
        assert await ends(process) == 7


async def test_one_that_does_not_listen_is_killed(tmp_path: Path, start: Start) -> None:
    process = await start(manner="never")
    with await take(tmp_path, grace=0.1):
        assert await ends(process) == -signal.SIGKILL
    await says(process, b"term\n")


async def test_what_the_daemon_runs_is_left_alone(tmp_path: Path, start: Start) -> None:
    process = await start(program="daemon")
    with pytest.raises(BusyError, match=f"VM 'vm' belongs to the daemon's keeper, process {process.pid}"):
        await take(tmp_path)
    assert process.returncode is None


@pytest.mark.parametrize("program", ["standalone", "run-one"])
async def test_the_daemon_ends_nobody(tmp_path: Path, start: Start, program: str) -> None:
    process = await start(program=program)
    with pytest.raises(BusyError, match=f"VM 'vm' belongs to .*{program}.*, process {process.pid}"):
        NameLock.acquire_free("vm", program="daemon", folder=str(tmp_path))
    clear_stale("vm", str(tmp_path))
    assert process.returncode is None
    assert os.listdir(tmp_path) == ["vm.lock"]
    process.kill()
    await ends(process)
    with NameLock.acquire_free("vm", program="daemon", folder=str(tmp_path)), pytest.raises(BusyError):
        NameLock.acquire_free("vm", program="daemon", folder=str(tmp_path))
    assert os.listdir(tmp_path) == []


async def test_what_a_killed_process_left_can_be_cleared(tmp_path: Path, start: Start) -> None:
    process = await start(program="daemon")
    process.kill()
    await ends(process)
    clear_stale("vm", str(tmp_path))
    assert os.listdir(tmp_path) == []
    clear_stale("vm", str(tmp_path / "gone" / "too"))


async def test_the_same_name_twice_in_one_process(tmp_path: Path) -> None:
    with await take(tmp_path), pytest.raises(BusyError, match="already run by this process"):
        await take(tmp_path)


async def test_a_killed_process_leaves_nothing_in_the_way(tmp_path: Path, start: Start) -> None:
    process = await start(program="daemon")
    process.kill()
    await ends(process)
    assert os.listdir(tmp_path) == ["vm.lock"]
    (await take(tmp_path)).release()


async def test_a_holder_that_goes_by_itself_while_we_wait(tmp_path: Path, start: Start) -> None:
    process = await start(manner="never")
    taking = asyncio.create_task(take(tmp_path, grace=TIMEOUT * 2))
    await says(process, b"term\n")
    process.kill()
    (await taking).release()


async def test_waiting_can_be_given_up(tmp_path: Path, start: Start) -> None:
    process = await start(manner="never")
    taking = asyncio.create_task(take(tmp_path, grace=TIMEOUT * 2))
    await says(process, b"term\n")
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert process.returncode is None


async def test_of_many_at_once_the_last_stays(tmp_path: Path, start: Start) -> None:
    processes = [await start(is_awaited=False) for _ in range(4)]
    waits = [asyncio.create_task(process.wait()) for process in processes]
    async with asyncio.timeout(TIMEOUT):
        while sum(wait.done() for wait in waits) < len(waits) - 1:
            await asyncio.wait([wait for wait in waits if not wait.done()], return_when=asyncio.FIRST_COMPLETED)
    (last,) = [process for process, wait in zip(processes, waits, strict=True) if not wait.done()]
    await says(last, b"held\n")
    last.kill()
    assert sorted(await asyncio.gather(*waits)) == [-15, -15, -15, -9]


@pytest.mark.parametrize("record", [b"", b"{}", b"\0" * 1024, b'{"pid":1,"start_time":1,"program":"standalone"}'])
async def test_a_lock_without_a_holder_that_can_be_ended(
    tmp_path: Path, record: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_LAST_WAIT", 0.05)
    with held_by_hand(tmp_path / "vm.lock", record), pytest.raises(BusyError, match="cannot be found"):
        await take(tmp_path)


async def test_a_process_that_has_the_number_of_the_holder_by_now_is_not_ended(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    innocent = await start("innocent")
    start_time = processes.start_time(innocent.pid)
    assert start_time is not None
    monkeypatch.setattr(names, "_LAST_WAIT", 0.05)
    record = b'{"pid":%d,"start_time":%d,"program":"standalone"}' % (innocent.pid, start_time - 1)
    with held_by_hand(tmp_path / "vm.lock", record), pytest.raises(BusyError, match="cannot be found"):
        await take(tmp_path)
    assert innocent.returncode is None


async def test_a_stale_record_of_a_live_process_ends_nobody(tmp_path: Path, start: Start) -> None:
    """The lock counts, not the record: nobody holds it here."""
    innocent = await start("innocent")
    (tmp_path / "vm.lock").write_bytes((tmp_path / "innocent.lock").read_bytes())
    (await take(tmp_path)).release()
    assert innocent.returncode is None


async def test_a_child_that_shares_the_lock_is_not_taken_for_the_holder(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_LAST_WAIT", 0.05)
    process = await start(manner="fork")
    (child,) = children(process.pid)
    process.kill()
    await ends(process)
    try:
        with pytest.raises(BusyError, match=f"cannot be found; its lock names a standalone VM, process {process.pid}"):
            await take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "-x", "a/b", "x" * 65])
async def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a VM"):
        await take(tmp_path, name)
    assert os.listdir(tmp_path) == []


async def test_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir(mode=0o700)
    (tmp_path / "precious").write_text("x" * 2000)
    (folder / "vm.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(BackendError):
        await take(folder)
    assert (tmp_path / "precious").read_text() == "x" * 2000
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(BackendError):
        await take(tmp_path / "link", "other")


async def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vm.lock")
    with pytest.raises(BackendError, match="no regular file"):
        await take(tmp_path)


async def test_folders_that_others_can_write_to_or_own(tmp_path: Path) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(BackendError, match="only this user can write"):
        await take(folder)
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
        with pytest.raises(BackendError, match="only this user can write"):
            await take(folder)
    with pytest.raises(BackendError, match="No such file"):
        await take(tmp_path / "a" / "b")


async def test_the_folder_is_made(tmp_path: Path) -> None:
    """As the daemon makes it, whose folder it is as well: whoever may use its socket finds that there."""
    with await take(tmp_path / "names"):
        assert os.stat(tmp_path / "names").st_mode & 0o777 == 0o755


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    assert names.default_folder() == f"{tmp_path}/propolis"
    for elsewhere in ("", "relative", "/does/not/exist"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", elsewhere)
        assert names.default_folder() == "/tmp/propolis-7"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert names.default_folder() in ("/run/propolis", "/tmp/propolis-0")
