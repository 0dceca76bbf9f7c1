"""Processes that are not children of this one: told from later ones of their number, and awaited."""

from __future__ import annotations

import asyncio

import msgspec


class Process(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A process; the start time tells it from a later one with its number."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this number now."""
        started = start_time(pid)
        return None if started is None else cls(pid=pid, start_time=started)

    def is_there(self) -> bool:
        """Whether it has not been buried: it may have ended and not been waited for."""
        return start_time(self.pid) == self.start_time


def start_time(pid: int) -> int | None:
    """When a process started, in the kernel's ticks since its boot; proc(5), field 22 of stat."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def parent(pid: int) -> int | None:
    """The process that this one is a child of; proc(5), field 4 of stat."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def _stat(pid: int) -> list[bytes] | None:
    """The fields of stat, from the third one on."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
    return line[line.rindex(b")") + 2 :].split()


def boot_id() -> str:
    """What the kernel calls this boot of the host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


async def has_ended(process: int, patience: float | None = None) -> bool:
    """Wait for the process of a pidfd; False when `patience` is over."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(process, lambda: None if ended.done() else ended.set_result(None))
    try:
        async with asyncio.timeout(patience):
            await ended
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(process)
    return True
