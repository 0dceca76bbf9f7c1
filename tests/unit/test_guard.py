"""What the tests start goes with them."""

import os
import select
import signal
import subprocess
import sys

import pytest

from tests.source.tree import TREE

PROGRAM = """
import os, subprocess
from tests import guard
guard.begin()
child = subprocess.Popen(["setsid", "sh", "-c", "echo $$; exec sleep 1000"], stdout=subprocess.PIPE)
print(child.stdout.readline().decode(), end="", flush=True)
input()
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, None], ids=["killed", "over"])
def test_a_process_of_its_own_session_ends_with_the_tests(ending: signal.Signals | None) -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, cwd=TREE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdin is not None
        assert tests.stdout is not None
        other = os.pidfd_open(int(tests.stdout.readline()))
        try:
            assert not select.select([other], [], [], 0)[0]
            if ending is None:
                tests.stdin.write("\n")
                tests.stdin.flush()
            else:
                tests.send_signal(ending)
            assert select.select([other], [], [], 20)[0]
        finally:
            os.close(other)
