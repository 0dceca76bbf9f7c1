"""The keeper as a process: the parent of one worker, outside the worker's jail.

It opens for the worker what the VM's spec names and nothing else, waits for the worker's end and writes it down. It
does little, so that it needs little memory of its own: it was forked, and shares what it does not write to.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import msgspec

from propolis.errors import BackendError, BusyError, ImageError, PropolisError
from propolis.host_sockets import ConnectorServer
from propolis.keeper import LocalKeeper
from propolis.keeper_protocol import (
    KINDS,
    MAX_MESSAGE,
    MAX_TEXT,
    Answer,
    Failed,
    Message,
    OpenConnector,
    OpenDisk,
    OpenHypervisor,
    OpenImage,
    Opening,
    OpenListener,
    OpenNetwork,
    OpenNvram,
    Ready,
    Start,
    Started,
    receive,
)
from propolis.names import NameLock
from propolis.processes import Process
from propolis.run_directory import MAX_WORDS, ExitRecord, RunDirectory
from propolis.spec import FirmwareBoot, Network, Spec, VirtioNic, boot_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis.host_sockets import HostListener

MAX_CONNECTORS = 16  # of one VM
MAX_START = 16 << 20
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_MESSAGES = 1000  # more than a pair of sockets keeps
_LAST_READS = 4  # a pipe holds what one read takes; others may have the worker's end of it
_BURIAL = 5.0  # seconds that the kernel may take to bury an earlier worker
_PR_SET_PDEATHSIG = 1
_MESSAGES = msgspec.json.Decoder(Message)  # made here, what it knows of the types is there in every child
_STARTS = msgspec.json.Decoder(Start)
_ENCODER = msgspec.json.Encoder()
_libc = ctypes.CDLL(None, use_errno=True)


class Ends(NamedTuple):
    """What a worker is given; all of it is the worker's then."""

    start: Start
    directory: RunDirectory
    keeper: socket.socket
    listener: socket.socket


class Work(NamedTuple):
    """What workers do: `prepare` before there is a VM for them, then `main`, which returns the exit status."""

    main: Callable[[Ends], int]
    prepare: Callable[[], object] = tuple


def die_with_parent(parent: int) -> None:
    """See that this process is killed once its parent is. Of no effect after a change of user: to be called again then.

    Raises BackendError where `parent` has ended already.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise BackendError(f"follow the keeper into its end: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise BackendError("the keeper has ended")


def run(assignment: socket.socket, work: Work) -> NoReturn:
    """The life of a keeper, in a process that was forked for it.

    It has its worker made, and then waits for its assignment: a message with three descriptors, which are those of a
    run directory, of a file with what to start, and of a socket on which the daemon hears how that begins.
    """
    status = 1
    daemon = None
    try:
        gc.disable()  # a collection would write to every object, and make the pages of all of them this process's own
        _leave_the_daemon()
        worker = _Worker.fork(work, assignment)
        fds = _wait(assignment, worker)
        if fds:
            directory, request, reply = fds
            daemon = socket.socket(fileno=reply)
            start = read_start(request)
            with RunDirectory.from_fd(start.directory, directory) as run_directory:
                _keep(start, run_directory, request, daemon, worker)
        status = 0
    except PropolisError as error:
        _tell(daemon, Answer.refusal(error))
    except BaseException as error:  # noqa: BLE001 -- nothing is above this; it is told and the process ends
        _tell(daemon, Answer("internal", f"the keeper failed: {error!r}"[:MAX_TEXT]))
    finally:
        os._exit(status)  # and the worker, if there is one, goes along


def _wait(assignment: socket.socket, worker: _Worker) -> list[int]:
    """The descriptors of the assignment; none where there will be no assignment."""
    poll = select.poll()
    poll.register(assignment, select.POLLIN)
    poll.register(worker.process, select.POLLIN)
    ready = [fd for fd, _ in poll.poll()]
    if assignment.fileno() not in ready:
        return []  # its worker is dead: another keeper has to be found
    data, fds = receive(assignment, 3)
    assignment.close()
    return fds if data and len(fds) == 3 else []


def _keep(start: Start, directory: RunDirectory, request: int, daemon: socket.socket, worker: _Worker) -> None:
    """Keeps one VM to its end. Raises PropolisError where it does not begin."""
    set_title(f"keep {start.spec.name}")
    if start.options.cgroup is not None:
        for pid in (os.getpid(), worker.pid):
            _join(start.options.cgroup, pid)
    directory.take_lock()
    _wait_for_earlier_worker(directory)
    with contextlib.ExitStack() as stack:
        if start.options.names is not None:
            stack.enter_context(NameLock.acquire_free(start.spec.name, program="daemon", folder=start.options.names))
        directory.clear_run()
        Keeper(start, directory, daemon, worker).run(request)


def read_start(request: int) -> Start:
    """What to start, in a file that others have as well. Raises BackendError."""
    try:
        return _STARTS.decode(os.pread(request, MAX_START, 0))
    except (OSError, ValueError) as error:
        raise BackendError(f"start a VM: {error}") from error


def _leave_the_daemon() -> None:
    """No terminal, folder, output or signal handler of the daemon's."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    set_title("keeper")
    if _oom_score() < 0:  # this host's administrator has the daemon spared, and it is we who tell how a VM was not
        _set_oom_score(-1000)


def _join(cgroup: str, pid: int) -> None:
    try:
        with open(os.path.join(cgroup, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write(str(pid))
    except OSError as error:
        raise BackendError(f"join control group {cgroup!r}: {error.strerror}") from error


def set_title(name: str) -> None:
    """What ps and top call this process."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name[:15])


def _oom_score() -> int:
    """How much this process is wanted when the host has no memory: proc(5), oom_score_adj."""
    with open("/proc/self/oom_score_adj", encoding="ascii") as file:
        return int(file.read())


def _set_oom_score(score: int) -> None:
    """To make it less needs a privilege, without which it stays as it is."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(score))


def _wait_for_earlier_worker(directory: RunDirectory) -> None:
    """Where its keeper was killed it is being killed too, and may still have its disks locked."""
    earlier = directory.processes()
    if earlier is None:
        return
    try:
        process = os.pidfd_open(earlier.worker.pid)
    except OSError:
        return
    try:
        if not earlier.worker.is_there():
            return
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(_BURIAL * 1000):
            raise BusyError(f"an earlier worker of this VM does not end: process {earlier.worker.pid}")
    finally:
        os.close(process)


def _tell(daemon: socket.socket | None, message: msgspec.Struct, fds: tuple[int, ...] = ()) -> bool:
    """False where the other side does not listen any more."""
    if daemon is None:
        return False
    try:
        socket.send_fds(daemon, [_ENCODER.encode(message)], fds)
    except OSError:
        return False
    return True


class Opener:
    """Opens what a worker asks for, if its VM's spec names it."""

    def __init__(self, spec: Spec) -> None:
        self._local = LocalKeeper()
        self._images = set(boot_files(spec.boot))
        self._firmware = spec.boot if isinstance(spec.boot, FirmwareBoot) else None
        self._disks = {file.path for file in spec.files()}
        self._writable = {file.path for file in spec.files() if not file.readonly}
        self._cards = {device.backend: device for device in spec.devices if isinstance(device, VirtioNic)}
        self._networks = {name: found for name, found in spec.backends.items() if isinstance(found, Network)}
        self._sockets = spec.sockets()
        self._listeners: list[HostListener] = []
        self.connectors: list[ConnectorServer] = []

    def close(self) -> None:
        """Takes the names of sockets away."""
        for listener in self._listeners:
            listener.close()
        for connector in self.connectors:
            connector.close()

    def open(self, message: Opening | OpenNetwork) -> list[int]:
        """Descriptors. Raises PropolisError."""
        if isinstance(message, OpenNetwork):
            name = message.backend
            if name not in self._networks or name not in self._cards:
                raise BackendError(f"open network {name!r}: the VM's spec does not name it")
            return self._local.open_network(name, self._networks[name], self._cards[name].queues)
        return [self._open(message)]

    def _open(self, message: Opening) -> int:
        match message:
            case OpenHypervisor():
                return self._local.open_hypervisor()
            case OpenImage(path, what):
                if path not in self._images:
                    raise ImageError(f"open {what} {path!r}: the VM's spec does not name it")
                with self._local.open_image(path, what) as file:
                    return os.dup(file.fileno())
            case OpenDisk(path, read_only):
                if path not in (self._disks if read_only else self._writable):
                    raise ImageError(f"open disk {path!r}: the VM's spec does not name it so")
                return self._local.open_disk(path, read_only=read_only)
            case OpenNvram():
                if self._firmware is None or self._firmware.nvram is None:
                    raise ImageError("open nvram: the VM's spec has none")
                return self._local.open_nvram(self._firmware.nvram, self._firmware.nvram_template)
            case OpenListener(path):
                self._listeners.append(listener := self._local.open_listener(self._named(path)))
                return os.dup(listener.socket.fileno())
            case OpenConnector(path):
                if len(self.connectors) >= MAX_CONNECTORS:
                    raise BackendError(f"open connector {path!r}: the VM has enough of them")
                self.connectors.append(server := ConnectorServer(self._named(path)))
                return server.other.detach()

    def _named(self, path: str) -> str:
        if path not in self._sockets:
            raise BackendError(f"open socket {path!r}: the VM's spec does not name it")
        return path


class _Worker(NamedTuple):
    """A worker as its keeper has it."""

    pid: int
    process: int  # a pidfd
    channel: socket.socket
    words: int  # what it writes to its standard error

    @classmethod
    def fork(cls, work: Work, assignment: socket.socket) -> _Worker:
        """The worker waits for its VM."""
        channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words, stderr = os.pipe2(os.O_CLOEXEC)
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            assignment.close()
            channel.close()
            os.close(words)
            _be_worker(work, other, stderr, me)
        other.close()
        os.close(stderr)
        os.set_blocking(words, False)
        return cls(pid, os.pidfd_open(pid), channel, words)


class Keeper:
    """One run of one worker."""

    def __init__(self, start: Start, directory: RunDirectory, daemon: socket.socket, worker: _Worker) -> None:
        self._directory = directory
        self._daemon: socket.socket | None = daemon
        self._opener = Opener(start.spec)
        self._worker = worker
        self._failure: str | None = None  # why the worker could not make the VM
        self._words = bytearray()  # the end of what the worker wrote to its standard error

    def run(self, request: int) -> None:
        """Gives the worker what it needs, serves it, and writes its end down. Raises PropolisError."""
        worker = self._worker
        for number in ENDING_SIGNALS:
            signal.signal(number, self._pass_on)
        try:
            with self._directory.listen() as listener:
                fds = [self._directory.fileno(), request, listener.fileno()]
                with contextlib.suppress(OSError):  # it is dead, which is found out below
                    socket.send_fds(worker.channel, [b"start"], fds)
            os.close(request)
            self._introduce()  # meanwhile the worker makes the VM, and asks for what it needs
            self._serve(worker.channel, worker.words)
        except BaseException:
            os.kill(worker.pid, signal.SIGKILL)  # not waited for yet: the number is still the worker's
            raise
        finally:
            end = os.waitid(os.P_PID, worker.pid, os.WEXITED)
            assert end is not None
            record = self._record(end, worker.words)
            self._opener.close()
            self._directory.remove_socket()
            self._directory.write_exit(record)
        self._announce(Answer("backend", f"the worker ended before the VM was made: {record.reason}"))

    def _pass_on(self, number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._worker.process, signal.SIGTERM)

    def _introduce(self) -> None:
        keeper, worker = os.getpid(), self._worker.pid
        mine, its = Process.of(keeper), Process.of(worker)
        assert mine is not None
        assert its is not None  # at least its remains, for which nobody but this process waits
        self._directory.write_processes(mine, its)
        assert self._daemon is not None
        me = os.pidfd_open(keeper)
        try:
            if not _tell(self._daemon, Started(keeper=keeper, worker=worker), (me, self._worker.process)):
                raise BackendError("the daemon does not want this VM any more")
        finally:
            os.close(me)

    def _serve(self, channel: socket.socket, words: int) -> None:
        """Answers the worker until it ends."""
        poll = select.poll()
        for fd in (channel.fileno(), words, self._worker.process):
            poll.register(fd, select.POLLIN)
        known = 0
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._worker.process in ready:
                self._hear_out(channel)
                return
            if words in ready and not self._hear(words):
                poll.unregister(words)
            if channel.fileno() in ready and not self._answer(channel):
                poll.unregister(channel.fileno())
            for connector in self._opener.connectors[known:]:
                poll.register(connector, select.POLLIN)
            known = len(self._opener.connectors)
            for connector in self._opener.connectors:
                if connector.fileno() in ready and not connector.serve():
                    poll.unregister(connector)

    def _hear_out(self, channel: socket.socket) -> None:
        """What the worker said just before it ended."""
        for _ in range(_LAST_MESSAGES):
            if not select.select([channel], [], [], 0)[0] or not self._answer(channel):
                break

    def _hear(self, words: int) -> bool:
        """Keeps the end of what the worker writes to its standard error; False where nothing more will come."""
        try:
            data = os.read(words, 65536)
        except BlockingIOError:
            return True
        self._words += data
        del self._words[:-MAX_WORDS]
        return bool(data)

    def _answer(self, channel: socket.socket) -> bool:
        """Answers one message; False where the worker has closed its end."""
        try:
            data = channel.recv(MAX_MESSAGE)  # descriptors that come along are dropped by the kernel
            if not data:
                return False
            message = _MESSAGES.decode(data)
        except (ValueError, RecursionError) as error:
            return _tell(channel, Answer("internal", f"not a message for a keeper: {error}"))
        except OSError:
            return False
        match message:
            case Ready():
                self._announce(Answer())
                return True
            case Failed(code, text):
                self._failure = text
                self._announce(Answer(code if code in KINDS else "internal", text[:MAX_TEXT]))
                return True
        fds: list[int] = []
        try:
            try:
                fds = self._opener.open(message)
                answer = Answer()
            except PropolisError as error:
                answer = Answer.refusal(error)
            except (OSError, ValueError) as error:
                answer = Answer("backend", f"open what the worker asks for: {error}"[:MAX_TEXT])
            return _tell(channel, answer, tuple(fds))
        finally:
            for fd in fds:
                os.close(fd)

    def _announce(self, answer: Answer) -> None:
        """Tells the daemon, once, whether the VM was made; nobody else needs it after that."""
        if self._daemon is not None:
            _tell(self._daemon, answer)
            self._daemon.close()
            self._daemon = None

    def _record(self, end: os.waitid_result, words: int) -> ExitRecord:
        for _ in range(_LAST_READS):
            if not select.select([words], [], [], 0)[0] or not self._hear(words):
                break
        text = self._words.decode(errors="replace")
        if end.si_code == os.CLD_EXITED:
            reason = self._failure or ("the worker ended" if end.si_status == 0 else _last_line(text, end.si_status))
            return ExitRecord(reason=reason[:MAX_TEXT], time=time.time(), status=end.si_status, stderr=text)
        try:
            name = signal.Signals(end.si_status).name
        except ValueError:
            name = f"signal {end.si_status}"
        why = ", its jail: the kernel's log names the system call" if end.si_status == signal.SIGSYS else ""
        return ExitRecord(
            reason=f"the worker was killed by {name}{why}", time=time.time(), signal=end.si_status, stderr=text
        )


def _last_line(text: str, status: int) -> str:
    lines = text.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"the worker ended with status {status}" + (f": {last}" if last else "")


def _be_worker(work: Work, channel: socket.socket, stderr: int, keeper: int) -> NoReturn:
    """In the worker's process."""
    status = 1
    try:
        os.dup2(stderr, 2)
        os.close(stderr)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        gc.enable()
        set_title("worker")
        if _oom_score() < 0:
            _set_oom_score(0)
        die_with_parent(keeper)
        work.prepare()
        data, fds = receive(channel, 3)
        if data:
            directory, request, listener = fds
            start = read_start(request)
            os.close(request)
            set_title(start.spec.name)
            run_directory = RunDirectory.from_fd(start.directory, directory)
            status = work.main(Ends(start, run_directory, channel, socket.socket(fileno=listener)))
    except BaseException:  # noqa: BLE001 -- nothing is above this; its last words are in the exit record
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)
