"""What the units see of a daemon: `python -m tests.services.server_stand_in run CONFIG`.

It reports to the service manager, answers at the socket that it was handed, and keeps one VM, vm_stand_in, in a control
group. Any other command is the real program's. What it finds goes to the folder REPORTS.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from propolis import cgroup, daemon
from propolis.run_directory import RunDirectory
from propolis.running_vm import find_running

REPORTS = Path("/propolis-reports")
VM = "/run/propolis/vms/web"
DEVICES = ("/dev/kvm", "/dev/net/tun", "/dev/null", "/dev/fuse")


def tell(state: str) -> None:
    """sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(os.environ["NOTIFY_SOCKET"])
        sender.send(state.encode())


def refusals() -> list[str]:
    """Devices that there are and that this process may not open, and what else it cannot do."""
    found = []
    for path in filter(os.path.exists, DEVICES):
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    for path in ("/sys/fs/cgroup/elsewhere", "/etc/elsewhere"):
        try:
            os.mkdir(path)
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    return found


def start_vm(subtree: cgroup.Subtree) -> None:
    """As a keeper is: in its group before it is anything else."""
    group = subtree.make("web", cgroup.Limits(processes=99))

    def join() -> None:
        group.add(os.getpid())
        Path("/proc/self/oom_score_adj").write_text("0")
        Path(REPORTS, "vm").write_text("\n".join(refusals()))

    os.makedirs(os.path.dirname(VM), 0o700, exist_ok=True)
    command = [sys.executable, "-m", "tests.services.vm_stand_in", VM, "obeys"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=join, start_new_session=True)  # noqa: PLW1509
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


def see_to_the_vm() -> None:
    """Find it, or start it."""
    Path(REPORTS, "daemon").write_text("\n".join(refusals()))
    subtree = cgroup.find()
    assert subtree is not None
    with contextlib.ExitStack() as stack:
        vm = None
        if os.path.isdir(VM):
            vm = find_running(stack.enter_context(RunDirectory.open(VM)))
        if vm is None:
            start_vm(subtree)
        else:
            vm.close()


async def serve() -> None:
    """Until SIGTERM."""
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end.set)

    def reload() -> None:
        tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        Path(REPORTS, "reloaded").touch()
        tell("READY=1")

    loop.add_signal_handler(signal.SIGHUP, reload)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{os.getpid()}\n".encode())
        writer.close()

    assert os.environ["LISTEN_FDS"] == "1"
    server = await asyncio.start_unix_server(answer, sock=socket.socket(fileno=3))
    tell("READY=1")
    while not end.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(end.wait(), 5)
        tell("WATCHDOG=1")
    server.close()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        see_to_the_vm()
        asyncio.run(serve())
    else:
        sys.exit(daemon.main())
