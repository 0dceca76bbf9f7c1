"""The keeper as a process: what it opens and refuses, what it writes down, and who goes with whom."""

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from propolis.errors import BackendError, BusyError, ImageError, PropolisError
from propolis.keeper_process import Ends
from propolis.keeper_protocol import MAX_MESSAGE, Answer, OpenDisk, RemoteKeeper, receive
from propolis.lifecycle import State
from propolis.processes import Process
from propolis.run_directory import RunDirectory
from propolis.running_vm import RunningVm, find_running
from propolis.spec import FirmwareBoot, PciPath, Tap, UserNetwork, VirtioNic
from tests.unit.keepers import ended, idle, is_gone, kept, serving, spec, until


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(str(tmp_path / "run")) as directory:
        yield directory


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


# -- ends --------------------------------------------------------------------------------------------------------------


async def test_a_worker_that_ends_by_itself(directory: RunDirectory, tmp_path: Path) -> None:
    def worker(ends: Ends) -> int:
        RemoteKeeper(ends.keeper).report_ready()
        return 3

    before = time.time()
    with kept(directory, spec(tmp_path), worker) as one:
        vm = one.introduced()
        assert vm.keeper_pid == one.pid
        one.ready()
        record = await ended(vm)
        assert (record.status, record.signal, record.reason) == (3, None, "the worker ended with status 3")
        assert before <= record.time <= time.time()
        assert not record.keeper_died
        one.nothing_more()
    assert not (tmp_path / "run/http").exists()


async def test_a_worker_that_is_killed(directory: RunDirectory, tmp_path: Path) -> None:
    """Its signal is known, and all it had said is there."""

    def work(_keeper: RemoteKeeper, ends: Ends) -> None:
        log, history, state = ends.directory.map_log(), ends.directory.map_history(), ends.directory.map_state()
        log.append(b"one line\n")
        history.append(b"login: ")
        state.write(4, State.RUNNING)
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with kept(directory, spec(tmp_path), serving(work)) as one:
        record = await ended(one.introduced())
    assert (record.status, record.signal) == (None, signal.SIGKILL)
    assert record.reason == "the worker was killed by SIGKILL"
    assert record.stderr == "last words"
    assert directory.exit_record() == record
    state = directory.state()
    assert state is not None
    assert (state.generation, state.state) == (4, State.RUNNING)
    assert directory.last_log_lines() == ["one line"]
    with directory.history() as history:
        assert history.read(from_start=0) == (b"login: ", 7)


async def test_a_bug_in_the_worker(directory: RunDirectory, tmp_path: Path) -> None:
    def worker(ends: Ends) -> int:
        raise RuntimeError("a bug of ours")

    with kept(directory, spec(tmp_path), worker) as one:
        vm = one.introduced()
        with pytest.raises(BackendError, match=r"ended before the VM was made: .*RuntimeError: a bug of ours"):
            one.ready()
        record = await ended(vm)
    assert record.status == 1
    assert record.reason == "the worker ended with status 1: RuntimeError: a bug of ours"
    assert "Traceback" in record.stderr


async def test_a_vm_that_cannot_be_made(directory: RunDirectory, tmp_path: Path) -> None:
    """The daemon hears the same error that the worker met."""

    def worker(ends: Ends) -> int:
        RemoteKeeper(ends.keeper).report_failure(ImageError("read kernel 'x': not a kernel"))
        return 1

    with kept(directory, spec(tmp_path), worker) as one:
        vm = one.introduced()
        with pytest.raises(ImageError, match="not a kernel"):
            one.ready()
        record = await ended(vm)
    assert record.reason == "read kernel 'x': not a kernel"


async def test_a_flood_on_standard_error_is_bounded(directory: RunDirectory, tmp_path: Path) -> None:
    def work(_keeper: RemoteKeeper, _ends: Ends) -> None:
        for _ in range(200):
            os.write(2, b"x" * 65536)
        os.write(2, b"the end")
        os._exit(0)

    with kept(directory, spec(tmp_path), serving(work)) as one:
        record = await ended(one.introduced())
    assert record.stderr.endswith("xxthe end")
    assert len(record.stderr) == 4096


# -- together ----------------------------------------------------------------------------------------------------------


async def test_the_worker_goes_with_its_keeper(directory: RunDirectory, tmp_path: Path) -> None:
    with kept(directory, spec(tmp_path), idle) as one:
        vm = one.introduced()
        one.ready()
        assert vm.worker_pid is not None
        os.kill(one.pid, signal.SIGKILL)
        record = await ended(vm)
        assert record.keeper_died
        assert record.reason == "its keeper was killed"
        assert is_gone(vm.worker_pid)
        assert directory.exit_record() is None
        assert directory.lock_holder() is None


async def test_a_worker_that_does_not_want_to_go_with_its_keeper(directory: RunDirectory, tmp_path: Path) -> None:
    def work(_keeper: RemoteKeeper, _ends: Ends) -> None:
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        (tmp_path / "alone").touch()
        while True:
            signal.pause()

    with kept(directory, spec(tmp_path), serving(work)) as one:
        vm = one.introduced()
        one.ready()
        assert vm.worker_pid is not None
        until("the worker is on its own", (tmp_path / "alone").exists)
        os.kill(one.pid, signal.SIGKILL)
        await ended(vm)
        assert is_gone(vm.worker_pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_to_the_keeper_asks_the_worker(
    directory: RunDirectory, tmp_path: Path, number: signal.Signals
) -> None:
    """Again and again, if need be; a hang-up is nothing to either."""

    def work(_keeper: RemoteKeeper, _ends: Ends) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        for name in ("none yet", "one"):
            (tmp_path / name).touch()
            signal.sigwait([signal.SIGTERM])
        os._exit(42)

    with kept(directory, spec(tmp_path), serving(work)) as one:
        vm = one.introduced()
        one.ready()
        assert vm.worker_pid is not None
        for name in ("none yet", "one"):
            until(f"signals taken: {name}", (tmp_path / name).exists)
            os.kill(one.pid, signal.SIGHUP)
            os.kill(vm.worker_pid, signal.SIGHUP)
            os.kill(one.pid, number)
        record = await ended(vm)
    assert record.status == 42


async def test_they_share_nothing_with_who_started_them(directory: RunDirectory, tmp_path: Path) -> None:
    """No terminal, output, folder or descriptor."""
    with kept(directory, spec(tmp_path), idle) as one:
        vm = one.introduced()
        one.ready()
        one.nothing_more()
        for pid in (vm.keeper_pid, vm.worker_pid):
            assert pid is not None
            assert os.getsid(pid) == vm.keeper_pid
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(2)] == ["/dev/null"] * 2
            assert title(pid) == ("keep kept\n" if pid == vm.keeper_pid else "kept\n")
        assert os.readlink(f"/proc/{vm.keeper_pid}/fd/2") == "/dev/null"
        assert os.readlink(f"/proc/{vm.worker_pid}/fd/2").startswith("pipe:")


async def test_a_daemon_that_went_away_meanwhile(directory: RunDirectory, tmp_path: Path) -> None:
    """Before it knows of them it does not want them; after that the VM lives on."""
    with kept(directory, spec(tmp_path), idle, is_heard=False) as one:
        until("the keeper has ended", lambda: is_gone(one.pid))
    assert directory.lock_holder() is None
    with kept(directory, spec(tmp_path), idle) as one:
        vm = one.introduced()
        one._channel.close()
        with find(directory) as found:
            assert (found.keeper_pid, found.worker_pid) == (one.pid, vm.worker_pid)
            found.terminate()
            record = await ended(found)
        assert record.signal == signal.SIGTERM


def find(directory: RunDirectory) -> RunningVm:
    found = find_running(directory)
    assert found is not None
    return found


# -- found again -------------------------------------------------------------------------------------------------------


async def test_found_again(directory: RunDirectory, tmp_path: Path) -> None:
    assert find_running(directory) is None
    with kept(directory, spec(tmp_path), idle) as one:
        vm = one.introduced()
        one.ready()
        with RunDirectory.open(directory.path) as again, find(again) as found:
            assert (found.keeper_pid, found.worker_pid) == (vm.keeper_pid, vm.worker_pid)
            found.kill()
            record = await ended(found)
            assert record.signal == signal.SIGKILL
    assert find_running(directory) is None


async def test_no_file_makes_another_process_a_worker(directory: RunDirectory, tmp_path: Path) -> None:
    """A note of who the worker is is believed only of a child of the keeper that is as old as noted."""
    with kept(directory, spec(tmp_path), idle) as one:
        vm = one.introduced()
        one.ready()
        assert vm.worker_pid is not None
        keeper, worker = Process.of(one.pid), Process.of(vm.worker_pid)
        me = Process.of(os.getpid())
        assert keeper is not None
        assert worker is not None
        assert me is not None
        older = Process(pid=worker.pid, start_time=worker.start_time - 1)
        for other in (me, older, Process(pid=1 << 30, start_time=1)):
            directory.write_processes(keeper, other)
            with find(directory) as found:
                assert (found.keeper_pid, found.worker_pid) == (one.pid, None)
        directory.write_processes(me, me)
        with find(directory) as found:
            assert (found.keeper_pid, found.worker_pid) == (one.pid, None)
            found.kill()  # the keeper, as nothing else is known of it
            await ended(found)
        until("the worker went with it", lambda: is_gone(worker.pid))


async def test_one_keeper_for_each_directory(directory: RunDirectory, tmp_path: Path) -> None:
    with kept(directory, spec(tmp_path), idle) as one:
        vm = one.introduced()
        with kept(directory, spec(tmp_path), idle) as other:
            with pytest.raises(BusyError, match=f"process {one.pid} keeps its VM"):
                other.introduced()
            other.nothing_more()
        one.ready()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(directory.socket_path)
        vm.kill()
        await ended(vm)
    with kept(directory, spec(tmp_path), idle) as again:
        again.introduced()
        again.ready()
        assert directory.exit_record() is None


async def test_a_worker_that_is_still_dying_is_waited_for(directory: RunDirectory, tmp_path: Path) -> None:
    """Its keeper was killed: the next one finds its disks free."""
    with ExitStack() as stack:
        one = stack.enter_context(kept(directory, spec(tmp_path), idle))
        vm = one.introduced()
        one.ready()
        assert vm.worker_pid is not None
        innocent = stack.enter_context(kept(RunDirectory.create(str(tmp_path / "other")), spec(tmp_path), idle))
        lingering = innocent.introduced()
        assert lingering.worker_pid is not None
        stack.callback(innocent.directory.close)
        keeper, process = Process.of(one.pid), Process.of(lingering.worker_pid)
        assert keeper is not None
        assert process is not None
        vm.kill_all()
        await ended(vm)
        directory.write_processes(keeper, process)  # as if this one were the worker that does not end yet
        again = stack.enter_context(kept(directory, spec(tmp_path), idle))
        until("the keeper waits", lambda: directory.lock_holder() == again.pid)
        assert not is_gone(again.pid)
        lingering.kill()
        again.introduced()
        again.ready()


# -- opening -----------------------------------------------------------------------------------------------------------


def attempt(action: Callable[[], object]) -> str:
    try:
        action()
    except PropolisError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


async def test_it_opens_what_the_spec_names(directory: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("another VM's")
    (tmp_path / "link").symlink_to(tmp_path / "kernel")

    def work(keeper: RemoteKeeper, ends: Ends) -> None:
        folder = str(tmp_path)
        with keeper.open_image(f"{folder}/kernel", "kernel") as image:
            lines = [f"{image.name} {image.read(4)!r} {image.mode}"]
        disk = keeper.open_disk(f"{folder}/disk", read_only=False)
        os.pwrite(disk, b"written", 0)
        cd = keeper.open_disk(f"{folder}/cd", read_only=True)
        lines.append(attempt(lambda: keeper.open_disk(f"{folder}/disk", read_only=False)))
        for fd in (disk, cd):
            lines.append(str(os.get_inheritable(fd)))
            os.close(fd)
        images = ("secret", "link", "disk/../secret", "", "../../../etc/passwd", "kernel\0", "disk")
        lines += [attempt(lambda: keeper.open_image(f"{folder}/{path}", "kernel")) for path in images]
        disks = ("secret", "kernel", "cd")
        lines += [attempt(lambda: keeper.open_disk(f"{folder}/{path}", read_only=False)) for path in disks]
        os.unlink(f"{folder}/kernel")
        lines.append(attempt(lambda: keeper.open_image(f"{folder}/kernel", "kernel")))
        os.write(2, "\n".join(line.replace(folder, "") for line in lines).encode())
        os._exit(0)

    with kept(directory, spec(tmp_path), serving(work)) as one:
        vm = one.introduced()
        one.ready()
        record = await ended(vm)
    lines = record.stderr.split("\n")
    assert lines[0] == "/kernel b'\\x7fELF' rb"
    assert lines[1].startswith("BusyError: disk '/disk' for writing: in use by ")
    assert lines[2:4] == ["False", "False"]
    assert all(line.endswith("the VM's spec does not name it") for line in lines[4:11]), lines
    assert all(line.endswith("the VM's spec does not name it so") for line in lines[11:14]), lines
    assert lines[14] == "ImageError: open kernel '/kernel': No such file or directory"
    assert (tmp_path / "disk").read_bytes().startswith(b"written")


async def test_it_makes_the_file_of_the_firmware_s_variables(directory: RunDirectory, tmp_path: Path) -> None:
    """Where the spec says, whatever the worker calls it; the template is not the worker's to read."""
    for name in ("rom", "template"):
        (tmp_path / name).write_bytes(name.encode())
    rom, nvram, template = (str(tmp_path / name) for name in ("rom", "nvram", "template"))
    vm_spec = spec(tmp_path, boot=FirmwareBoot(bootrom=rom, nvram=nvram, nvram_template=template))

    def work(keeper: RemoteKeeper, _ends: Ends) -> None:
        fd = keeper.open_nvram("/etc/passwd", None)
        os.pwrite(fd, b"T", 0)
        lines = [attempt(lambda: keeper.open_image(path, "bootrom").close()) for path in (rom, nvram, template)]
        os.write(2, "\n".join(line.rpartition(": ")[2] for line in lines).encode())
        os._exit(0)

    with kept(directory, vm_spec, serving(work)) as one:
        record = await ended(one.introduced())
    assert (tmp_path / "nvram").read_bytes() == b"Template"
    assert record.stderr.splitlines() == ["done", *["the VM's spec does not name it"] * 2]


async def test_there_is_no_file_of_variables_without_firmware(directory: RunDirectory, tmp_path: Path) -> None:
    def work(keeper: RemoteKeeper, _ends: Ends) -> None:
        os.write(2, attempt(lambda: keeper.open_nvram("nvram", None)).encode())
        os._exit(0)

    with kept(directory, spec(tmp_path), serving(work)) as one:
        record = await ended(one.introduced())
    assert record.stderr == "ImageError: open nvram: the VM's spec has none"


async def test_it_gives_the_networks_that_the_spec_has(directory: RunDirectory, tmp_path: Path) -> None:
    """Once more where one has ended; the worker neither names a program nor an interface."""
    card = VirtioNic(name="n", backend="net", pci_path=PciPath(0, 6, 0))
    lan = VirtioNic(name="m", backend="lan", pci_path=PciPath(0, 7, 0))
    plain = spec(tmp_path)
    vm_spec = msgspec.structs.replace(
        plain,
        devices=(*plain.devices, card, lan),
        backends={**plain.backends, "net": UserNetwork(), "lan": Tap(bridge="nosuchbridge")},
    )

    def work(keeper: RemoteKeeper, _ends: Ends) -> None:
        lines = []
        for _ in range(2):
            [fd] = keeper.open_network("net", Tap(interface="eth0"), 1)
            with socket.socket(fileno=fd) as end:
                lines.append(f"{end.type == socket.SOCK_STREAM}")
        others = ("lan", "disk", "none")
        lines += [attempt(lambda: keeper.open_network(name, UserNetwork(), 1)) for name in others]
        os.write(2, "\n".join(lines).encode())
        os._exit(0)

    with kept(directory, vm_spec, serving(work)) as one:
        record = await ended(one.introduced())
    lines = record.stderr.splitlines()
    assert lines[:2] == ["True", "True"]
    assert lines[2].startswith("BackendError: make a tap: ")
    assert lines[3:] == [
        f"BackendError: open network {name!r}: the VM's spec does not name it" for name in ("disk", "none")
    ]


@pytest.mark.parametrize("read_only", [True, False])
async def test_errors_keep_their_class(directory: RunDirectory, tmp_path: Path, read_only: bool) -> None:
    vm_spec = spec(tmp_path)
    (tmp_path / "disk").unlink()

    def work(keeper: RemoteKeeper, _ends: Ends) -> None:
        os.write(2, attempt(lambda: keeper.open_disk(f"{tmp_path}/disk", read_only=read_only)).encode())
        os._exit(0)

    with kept(directory, vm_spec, serving(work)) as one:
        record = await ended(one.introduced())
    assert record.stderr == f"ImageError: open disk '{tmp_path}/disk': No such file or directory"


async def test_a_hostile_worker(directory: RunDirectory, tmp_path: Path) -> None:
    """Whatever it says, its keeper serves on and gathers nothing."""
    disk = msgspec.json.encode(OpenDisk(f"{tmp_path}/cd", read_only=True))

    def work(keeper: RemoteKeeper, ends: Ends) -> None:
        channel = ends.keeper
        null = os.open(os.devnull, os.O_RDONLY)
        for data in (b"x", b"{}", b"\xff" * MAX_MESSAGE, b"[" * 60000, b'{"type":"OpenKernel"}', b"x" * 150_000, disk):
            socket.send_fds(channel, [data], [null] * 5)
            answer, fds = receive(channel, 1)
            assert (msgspec.json.decode(answer, type=Answer).code is None) == (data == disk) == bool(fds)
            for fd in fds:
                os.close(fd)
        for message in (b'{"type":"Failed","code":"no such","message":"x"}', b'{"type":"Ready"}') * 100:
            channel.send(message)
        for _ in range(1000):
            os.close(keeper.open_disk(f"{tmp_path}/cd", read_only=True))
        (tmp_path / "done").touch()

    with kept(directory, spec(tmp_path), serving(work)) as one:
        vm = one.introduced()
        one.ready()
        one.nothing_more()
        until("the worker has said it all", (tmp_path / "done").exists)
        assert len(os.listdir(f"/proc/{one.pid}/fd")) < 50
        vm.kill()
        assert (await ended(vm)).signal == signal.SIGKILL


async def test_a_worker_that_asks_and_does_not_listen(directory: RunDirectory, tmp_path: Path) -> None:
    """It holds up nobody but itself."""
    message = msgspec.json.encode(OpenDisk("/" + "x" * 3000, read_only=True))

    def work(_keeper: RemoteKeeper, ends: Ends) -> None:
        ends.keeper.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                ends.keeper.send(message)
        (tmp_path / "stuck").touch()
        ends.keeper.settimeout(None)
        while True:
            ends.keeper.send(message)

    with kept(directory, spec(tmp_path), serving(work)) as one:
        vm = one.introduced()
        one.ready()
        until("the keeper does not take any more", (tmp_path / "stuck").exists)
        vm.terminate()
        assert (await ended(vm)).signal == signal.SIGTERM


# -- wear --------------------------------------------------------------------------------------------------------------


async def test_rounds_leave_nothing(directory: RunDirectory, tmp_path: Path, rounds: int) -> None:
    before = sorted(os.listdir(directory.path))
    pids = []
    for number in range(10 * rounds):
        with kept(directory, spec(tmp_path), idle) as one:
            vm = one.introduced()
            one.ready()
            pids += [vm.keeper_pid, vm.worker_pid]
            (vm.kill, vm.terminate, vm.kill_all)[number % 3]()
            await ended(vm)
    assert all(pid is not None and is_gone(pid) for pid in pids)
    left = set(os.listdir(directory.path)) - set(before)
    assert left <= {"exit", "processes", "http"}
