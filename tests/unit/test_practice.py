"""A worker's practice, in a process of its own: it does what it is for, and leaves nothing."""

import subprocess
import sys

from tests.source.tree import TREE

PROGRAM = """\
import gc, logging, os
from propolis import practice
from propolis.http.app import make_app
from propolis.lifecycle import Lifecycle

seen = []
publish = Lifecycle._publish
async def noting(self, state, detail=""):
    await publish(self, state, detail)
    seen.append(state.value)
Lifecycle._publish = noting

def practise():
    practice.practise(make_app(None))
    gc.collect()
    return sorted(os.listdir("/proc/self/fd")), os.listdir("/proc/self/task"), logging.getLogger().handlers

first = practise()
assert seen == ["Starting", "Running", "Paused", "Stopping", "Stopped"], seen
assert practise() == first, first
assert len(first[1]) == 1 and not first[2], first
assert os.fork() or os._exit(practise()[0] != first[0])  # as a worker does, in a fork of the zygote
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


def test_it_runs_a_vm_and_leaves_nothing() -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM]
    result = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
