"""VMs started by a zygote, as real processes on the replay back end: nobody's death but their own is theirs."""

import asyncio
import os
import pickle
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from propolis.errors import BusyError, ImageError, PropolisError
from propolis.http import v5
from propolis.jail import JailSettings
from propolis.keeper_protocol import StartOptions
from propolis.lifecycle import State
from propolis.run_directory import RunDirectory
from propolis.running_vm import RunningVm, find_running
from propolis.zygote import Zygote
from tests.unit.keepers import TIMEOUT, ended, is_gone, spec, until

TREE = Path(__file__).resolve().parents[2]
NO_JAIL = msgspec.Raw(b'{"mode":"off"}')
REPLAY = StartOptions(hypervisor="replay", jail=NO_JAIL)
PROPERTIES = v5.InstanceProperties(
    id=uuid.UUID(int=1),
    name="kept",
    description="",
    metadata=v5.InstanceMetadata(
        silo_id=uuid.UUID(int=2),
        project_id=uuid.UUID(int=3),
        sled_id=uuid.UUID(int=4),
        sled_serial="",
        sled_revision=0,
        sled_model="",
    ),
)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(str(tmp_path / "run")) as directory:
        yield directory


@asynccontextmanager
async def running(
    zygote: Zygote, directory: RunDirectory, folder: Path, *, jail: msgspec.Raw = NO_JAIL
) -> AsyncIterator[RunningVm]:
    """A VM that is made and not started; gone afterwards, however."""
    options = StartOptions(hypervisor="replay", jail=jail)
    vm = await zygote.start_vm(directory, spec(folder), PROPERTIES, options)
    try:
        yield vm
    finally:
        vm.kill_all()
        await ended(vm)
        vm.close()


@asynccontextmanager
async def client(directory: RunDirectory) -> AsyncIterator[aiohttp.ClientSession]:
    """Of the worker's socket."""
    connector = aiohttp.UnixConnector(directory.socket_path)
    async with aiohttp.ClientSession("http://vm", connector=connector) as session:
        yield session


async def run(directory: RunDirectory) -> None:
    """Has a guest run."""
    async with client(directory) as session, session.put("/instance/state", json="Run") as reply:
        assert reply.status == 204
    await state(directory, State.RUNNING)


async def state(directory: RunDirectory, wanted: State) -> None:
    """Waits for a state to be noted."""

    def is_reached() -> bool:
        record = directory.state()
        return record is not None and record.state is wanted

    until(f"state {wanted.value}", is_reached)


def found(directory: RunDirectory) -> RunningVm:
    vm = find_running(directory)
    assert vm is not None
    return vm


IS_ROOT = os.geteuid() == 0
JAIL = msgspec.Raw(msgspec.json.encode(JailSettings(uid=61_235 if IS_ROOT else None)))  # a user that nobody is


# -- a life ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jail", [JAIL, NO_JAIL], ids=["jailed", "free"])
async def test_a_life(directory: RunDirectory, tmp_path: Path, jail: msgspec.Raw) -> None:
    """Made, run, stopped by the API: what it was is told by its directory."""
    async with await Zygote.spawn() as zygote, running(zygote, directory, tmp_path, jail=jail) as vm:
        await state(directory, State.CREATING)
        async with client(directory) as session, session.get("/instance") as reply:
            assert (await reply.json())["instance"]["state"] == "Creating"
        await run(directory)
        async with client(directory) as session, session.put("/instance/state", json="Stop") as reply:
            assert reply.status == 204
        record = await ended(vm)
        assert (record.status, record.reason) == (0, "the worker ended")
    await state(directory, State.STOPPED)
    assert any("state Stopped" in line for line in directory.last_log_lines())
    assert find_running(directory) is None
    assert sorted(os.listdir(directory.path)) == ["console", "exit", "lock", "log", "processes", "state"]


async def test_a_console_hears_of_the_end(directory: RunDirectory, tmp_path: Path) -> None:
    """As does a poll of the state."""
    async with await Zygote.spawn() as zygote, running(zygote, directory, tmp_path) as vm:
        await run(directory)
        async with client(directory) as session, session.ws_connect("/instance/serial") as console:
            record = directory.state()
            assert record is not None
            poll = asyncio.create_task(_state_at(session, record.generation + 1))
            await asyncio.sleep(0)
            async with client(directory) as other, other.get("/instance") as reply:
                assert reply.status == 200  # so the poll, which came before, is there
            vm.terminate()
            message = await console.receive(TIMEOUT)
            assert (message.type, console.close_code) == (aiohttp.WSMsgType.CLOSE, 1001)
            assert await poll in ("Stopping", "Stopped")
        assert (await ended(vm)).status == 0


async def _state_at(session: aiohttp.ClientSession, generation: int) -> object:
    async with session.get("/instance/state-monitor", json={"gen": generation}) as reply:
        return (await reply.json()).get("state")


async def test_what_was_counted_is_counted_on(directory: RunDirectory, tmp_path: Path) -> None:
    """By the next worker of the VM: generations of states, offsets of the console."""
    async with await Zygote.spawn() as zygote:
        generations = []
        for _ in range(3):
            async with running(zygote, directory, tmp_path) as vm:
                await run(directory)
                record = directory.state()
                assert record is not None
                generations.append(record.generation)
                vm.terminate()
                await ended(vm)
    assert generations == sorted(set(generations))
    last = directory.state()
    assert last is not None
    assert last.generation > generations[-1]


async def test_a_worker_holds_nothing_of_the_daemons(
    directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor but those it was given, no secret."""
    monkeypatch.setenv("PROPOLIS_SECRET", "of the daemon")
    monkeypatch.setenv("NOTIFY_SOCKET", "@of the daemon")
    with socket.socket(socket.AF_UNIX) as inherited:
        inherited.set_inheritable(True)
        async with await Zygote.spawn() as zygote, running(zygote, directory, tmp_path) as vm:
            for pid in (vm.worker_pid, vm.keeper_pid, zygote.pid):
                names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
                assert f"socket:[{os.fstat(inherited.fileno()).st_ino}]" not in names
                if pid == vm.worker_pid:
                    assert not [name for name in names if name.startswith(directory.path)]
                environment = _environment(pid)
                assert b"PATH=" in environment
                assert b"of the daemon" not in environment


def _environment(pid: int | None) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


# -- what cannot be made -----------------------------------------------------------------------------------------------


async def test_a_vm_that_cannot_be_made(directory: RunDirectory, tmp_path: Path) -> None:
    """The reason is told as it is, also later; nothing is left."""
    vm_spec = spec(tmp_path)
    (tmp_path / "cd").unlink()
    async with await Zygote.spawn() as zygote:
        with pytest.raises(ImageError, match=r"open disk '.*/cd': No such file"):
            await zygote.start_vm(directory, vm_spec, PROPERTIES, REPLAY)
        assert find_running(directory) is None
        record, exit_record = directory.state(), directory.exit_record()
        assert record is not None
        assert exit_record is not None
        assert (record.state, record.detail) == (State.FAILED, exit_record.reason)
        assert "/cd': No such file" in record.detail
        async with running(zygote, directory, tmp_path):  # which has a disk again
            await state(directory, State.CREATING)


async def test_a_directory_has_one_vm(directory: RunDirectory, tmp_path: Path) -> None:
    async with await Zygote.spawn() as zygote, running(zygote, directory, tmp_path) as vm:
        with pytest.raises(BusyError, match=f"process {vm.keeper_pid} keeps its VM"):
            await zygote.start_vm(directory, spec(tmp_path), PROPERTIES, REPLAY)
        await run(directory)


async def test_a_control_group_that_is_none(directory: RunDirectory, tmp_path: Path) -> None:
    options = StartOptions(hypervisor="replay", jail=NO_JAIL, cgroup=str(tmp_path / "none"))
    async with await Zygote.spawn() as zygote:
        with pytest.raises(PropolisError, match="join control group"):
            await zygote.start_vm(directory, spec(tmp_path), PROPERTIES, options)
    assert find_running(directory) is None


# -- deaths ------------------------------------------------------------------------------------------------------------


async def test_a_vm_outlives_the_zygote(directory: RunDirectory, tmp_path: Path) -> None:
    """Which is replaced when the next VM is started."""
    async with await Zygote.spawn() as zygote, running(zygote, directory, tmp_path) as vm:
        await run(directory)
        first = zygote.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until("the zygote has ended", lambda: zygote.pid is None)
        with found(directory) as again:
            assert (again.keeper_pid, again.worker_pid) == (vm.keeper_pid, vm.worker_pid)
        async with client(directory) as session, session.get("/instance") as reply:
            assert (await reply.json())["instance"]["state"] == "Running"
        other = tmp_path / "other"
        other.mkdir()
        with RunDirectory.create(str(other / "run")) as other_directory:
            async with running(zygote, other_directory, other):
                assert zygote.pid not in (None, first)


async def test_a_start_that_a_dying_zygote_took_along(directory: RunDirectory, tmp_path: Path) -> None:
    async with await Zygote.spawn() as zygote:
        pid = zygote.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        starting = asyncio.create_task(zygote.start_vm(directory, spec(tmp_path), PROPERTIES, REPLAY))
        for _ in range(20):
            await asyncio.sleep(0)  # it has asked
        os.kill(pid, signal.SIGKILL)
        with await starting as vm:
            await run(directory)
            vm.kill_all()
            await ended(vm)


async def test_a_start_that_nobody_waits_for_any_more(directory: RunDirectory, tmp_path: Path) -> None:
    async with await Zygote.spawn() as zygote:
        pid = zygote.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        starting = asyncio.create_task(zygote.start_vm(directory, spec(tmp_path), PROPERTIES, REPLAY))
        for _ in range(20):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        os.kill(pid, signal.SIGCONT)
        other = tmp_path / "other"
        other.mkdir()
        with RunDirectory.create(str(other / "run")) as other_directory:
            async with running(zygote, other_directory, other):  # the zygote has come to what was asked before
                until("the unwanted VM is gone", lambda: directory.lock_holder() is None)


DAEMON = """
import asyncio, os, pickle, sys
from propolis.run_directory import RunDirectory
from propolis.zygote import Zygote
from tests.unit.test_zygote import PROPERTIES, REPLAY

async def main():
    zygote = await Zygote.spawn()
    directory = RunDirectory.open(sys.argv[1])
    vm = await zygote.start_vm(directory, pickle.loads(sys.stdin.buffer.read()), PROPERTIES, REPLAY)
    print(zygote.pid, vm.keeper_pid, vm.worker_pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.program
async def test_a_vm_outlives_the_daemon(directory: RunDirectory, tmp_path: Path) -> None:
    """The zygote does not; the next daemon finds the VM by its directory."""
    daemon = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DAEMON,
        directory.path,
        cwd=TREE,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert daemon.stdin is not None
    assert daemon.stdout is not None
    daemon.stdin.write(pickle.dumps(spec(tmp_path)))
    daemon.stdin.close()
    async with asyncio.timeout(60):
        zygote, keeper, worker = map(int, (await daemon.stdout.readline()).split())
    daemon.kill()
    await daemon.wait()  # also of its output, of which the VM has nothing
    assert await daemon.stdout.read() == b""
    until("the zygote has ended", lambda: is_gone(zygote))
    await run(directory)
    with found(directory) as vm:
        assert (vm.keeper_pid, vm.worker_pid) == (keeper, worker)
        vm.terminate()
        assert (await ended(vm)).status == 0
    await state(directory, State.STOPPED)


async def test_a_worker_in_its_jail_goes_with_its_keeper(directory: RunDirectory, tmp_path: Path) -> None:
    """Also as another user than its keeper's."""
    async with await Zygote.spawn() as zygote, running(zygote, directory, tmp_path, jail=JAIL) as vm:
        await run(directory)
        os.kill(vm.keeper_pid, signal.SIGKILL)
        until("the worker has ended", lambda: vm.worker_pid is None or is_gone(vm.worker_pid))
        assert (await ended(vm)).keeper_died
    record = directory.state()
    assert record is not None
    assert record.state is State.RUNNING


# -- many --------------------------------------------------------------------------------------------------------------


async def test_many_at_once(tmp_path: Path) -> None:
    async with await Zygote.spawn() as zygote:
        with ExitStack() as stack:
            folders = [tmp_path / str(number) for number in range(12)]
            for folder in folders:
                folder.mkdir()
            directories = [stack.enter_context(RunDirectory.create(str(folder / "run"))) for folder in folders]
            vms = await asyncio.gather(
                *(
                    zygote.start_vm(directory, spec(folder), PROPERTIES, REPLAY)
                    for directory, folder in zip(directories, folders, strict=True)
                )
            )
            for vm in vms:
                stack.enter_context(vm)
            assert len({vm.worker_pid for vm in vms}) == len(vms)
            for vm in vms:
                vm.terminate()
            for record in await asyncio.gather(*map(ended, vms)):
                assert record.status == 0
            assert all(is_gone(vm.keeper_pid) for vm in vms)


async def test_kills_at_any_moment(directory: RunDirectory, tmp_path: Path, rounds: int) -> None:
    """Of anybody: what is left is a directory in which the next start works."""
    async with await Zygote.spawn() as zygote:
        for number in range(5 * rounds):
            starting = asyncio.create_task(zygote.start_vm(directory, spec(tmp_path), PROPERTIES, REPLAY))
            await asyncio.sleep(0.01 * (number % 5))
            victim = (zygote.pid, directory.lock_holder(), _worker(directory))[number % 3]
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
            try:
                vm = await starting
            except PropolisError:
                pass
            else:
                with vm:
                    vm.kill()
                    await ended(vm)
            until("nobody keeps it", lambda: directory.lock_holder() is None)
        async with running(zygote, directory, tmp_path):
            await run(directory)


def _worker(directory: RunDirectory) -> int | None:
    vm = find_running(directory)
    if vm is None:
        return None
    with vm:
        return vm.worker_pid


async def test_the_zygote_keeps_nothing(directory: RunDirectory, tmp_path: Path) -> None:
    """Of the VMs that it started: no descriptor, no zombie. One keeper waits for the next, and nothing of it stays."""
    async with await Zygote.spawn() as zygote:
        pid = zygote.pid
        assert pid is not None
        until("a keeper waits", lambda: len(children(pid)) == 1)
        before = len(os.listdir(f"/proc/{pid}/fd"))
        for _ in range(3):
            async with running(zygote, directory, tmp_path):
                assert len(os.listdir(f"/proc/{pid}/fd")) <= before
        until("only one keeper is left", lambda: len(children(pid)) == 1)
        (keeper,) = children(pid)
        until("it has a worker", lambda: len(children(keeper)) == 1)
        (worker,) = children(keeper)
    until("both have ended", lambda: is_gone(keeper) and is_gone(worker))


@pytest.mark.parametrize("which", ["keeper", "worker"])
async def test_a_keeper_that_died_while_it_waited(directory: RunDirectory, tmp_path: Path, which: str) -> None:
    """Another takes its place."""
    async with await Zygote.spawn() as zygote:
        pid = zygote.pid
        assert pid is not None
        until("a keeper waits", lambda: len(children(pid)) == 1)
        (keeper,) = children(pid)
        until("it has a worker", lambda: len(children(keeper)) == 1)
        (worker,) = children(keeper)
        os.kill(keeper if which == "keeper" else worker, signal.SIGKILL)
        until("both have ended", lambda: is_gone(keeper) and is_gone(worker))
        async with running(zygote, directory, tmp_path) as vm:
            assert vm.keeper_pid != keeper
            await run(directory)


def children(pid: int) -> list[int]:
    """Those of its only thread."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in text.split()]
