"""The wall clock tells when something was, and times nothing: whoever sets it disturbs no deadline, delay or token."""

import re

from tests.source.tree import TREE

WALL_CLOCK = re.compile(r"\btime\.(time|time_ns|localtime|ctime)\(|\bdatetime\b|\bCLOCK_REALTIME\b|\bgettimeofday\b")
STAMPS = {  # of files, and what they note
    "propolis/event_log.py",  # when an event was
    "propolis/http/feed.py",  # the same, and the first number of events: what a clock set back does is told as a gap
    "propolis/keeper_process.py",  # a worker's end
    "propolis/running_vm.py",  # the same
    "propolis/state_file.py",  # a state
    "propolis/supervisor.py",  # a VM's creation
    "cli/instance.py",  # shows that
    "cli/watch.py",  # shows when an event was
}
OTHERS = {
    "propolis/devices/_timer.pyx",  # the guest's real-time clock has it from there
    "propolis/jail.py",  # reads the time zone
    "propolis/syscall_filter.py",  # names the system calls
}


def test_who_looks_at_the_wall_clock() -> None:
    found = {
        str(path.relative_to(TREE))
        for folder in ("propolis", "cli")
        for path in (TREE / folder).rglob("*.p*")
        if path.suffix in (".py", ".pyx", ".pxd") and WALL_CLOCK.search(path.read_text())
    }
    assert found == STAMPS | OTHERS
