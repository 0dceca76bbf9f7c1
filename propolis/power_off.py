"""Powers off every VM of this host: `propolis-server power-off`, which runs when the host shuts down.

It needs no daemon: it talks to the VMs themselves, which it finds by their run directories. So it also ends those that
a daemon left, and a daemon that is stopped before it does not start again what goes off here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

import aiohttp

from propolis import config
from propolis.errors import BackendError, PropolisError
from propolis.run_directory import RunDirectory
from propolis.running_vm import find_running

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from propolis.run_directory import ExitRecord
    from propolis.running_vm import RunningVm

DEADLINE = 90.0
_ANSWER = 5.0  # seconds that a VM may take to answer, and that it may be late with what it was told to do
_GRACE = 10.0  # seconds between one way of ending it and the next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `propolis-server power-off`."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the daemon's configuration")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEADLINE,
        metavar="SECONDS",
        help="how long guests may take; then they are stopped the hard way (default: %(default)g)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when no VM runs any more; a line on standard output for each that did."""
    try:
        settings = config.load(arguments.config) if arguments.config else config.default_settings()
        left = asyncio.run(power_off(settings.run_directory, max(0.0, arguments.deadline), _say))
    except PropolisError as error:
        sys.stderr.write(f"propolis-server: {error}\n")
        return 1
    return 1 if left else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def power_off(run_directory: str, deadline: float, say: Callable[[str], None]) -> list[str]:
    """Presses all power buttons at once, and ends what is on after the deadline. The names of those that remain."""
    folder = os.path.join(run_directory, "vms")
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BackendError(f"look for VMs in {folder!r}: {error.strerror}") from error
    ended = await asyncio.gather(*(_end(os.path.join(folder, name), name, deadline, say) for name in names))
    return [name for name, has_ended in zip(names, ended, strict=True) if not has_ended]


async def _end(path: str, name: str, deadline: float, say: Callable[[str], None]) -> bool:
    try:
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(RunDirectory.open(path))
            vm = find_running(directory)
            if vm is None:
                return True
            stack.enter_context(vm)
            started = time.monotonic()
            refused = await _press(directory.socket_path, deadline)
            if refused is None:
                record = await _wait(vm, deadline + _ANSWER)
            else:
                say(f"{name}: no power button: {refused}")
                record = None
            for end in (vm.terminate, vm.kill, vm.kill_all):
                if record is None:
                    say(f"{name}: {end.__name__} after {time.monotonic() - started:.0f} s")
                    end()
                    record = await _wait(vm, _GRACE)
            say(f"{name}: {'still runs' if record is None else record.reason}")
            return record is not None
    except PropolisError as error:
        say(f"{name}: {error}")
        return False


async def _press(socket: str, deadline: float) -> str | None:
    """Ask the VM to do it: power button, then a hard stop at the deadline. The reason why it does not."""
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(socket), timeout=aiohttp.ClientTimeout(total=_ANSWER)
            ) as session,
            session.put("http://vm/instance/shutdown", json={"deadline_seconds": deadline}) as reply,
        ):
            return None if reply.ok else f"{reply.status} {reply.reason}"
    except TimeoutError:
        return "it does not answer"
    except (aiohttp.ClientError, OSError) as error:
        return str(error)


async def _wait(vm: RunningVm, patience: float) -> ExitRecord | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience):
            return await vm.wait()
    return None
