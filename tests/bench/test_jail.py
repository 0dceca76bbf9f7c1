"""What the jail costs: a call behind its filters, and entering it."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from propolis import jail, syscall_filter
from tests.bench.report import show

pytestmark = pytest.mark.bench

USER = 61_235
ENTRIES = 21


def test_a_call_behind_filters(tmp_path: Path) -> None:
    """KVM_RUN on no descriptor: the call itself, and then what each filter adds."""
    source = Path(__file__).with_name("filtered_call.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", tmp_path / "call", source], check=True)
    for kind in ("worker", "vcpu"):
        # With the action of the log mode: at its end the program does what no vCPU thread does.
        (tmp_path / kind).write_bytes(syscall_filter.compiled(kind, syscall_filter.LOG))

    def measure(*kinds: str) -> float:
        command = [tmp_path / "call", *(tmp_path / kind for kind in kinds)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    for name, kinds in {
        "no filter": (),
        "the worker's filter": ("worker",),
        "a vCPU thread's filters": ("worker", "vcpu"),
    }.items():
        show(f"a call, {name}", [measure(*kinds) for _ in range(3)], "ns")


def test_entering() -> None:
    """In a fork of a process that has prepared for it, as a worker is."""
    uid = USER if os.geteuid() == 0 else None
    jail.prepare()

    def enter() -> float:
        receiving, sending = os.pipe()
        pid = os.fork()
        if pid == 0:
            start = time.perf_counter()
            jail.enter(jail.JailSettings(uid=uid), keep=[sending])
            os.write(sending, str(time.perf_counter() - start).encode())
            os._exit(0)
        os.close(sending)
        with os.fdopen(receiving) as pipe:
            taken = float(pipe.read())
        os.waitpid(pid, 0)
        return taken

    times = [enter() for _ in range(ENTRIES)]
    show("entering the jail", [taken * 1e3 for taken in times], "ms")
