"""The lab itself: statuses, the shared folder, the time limit, and the probe's answer inside it."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.lab.probe import Verdict, probe

LAB = Path(__file__).with_name("kvm-lab")

in_lab = os.environ.get("KVM_LAB") == "1"


def lab(*words: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the lab script."""
    return subprocess.run(
        [LAB, *words], env=os.environ | settings, capture_output=True, text=True, check=False, timeout=110
    )


def test_the_probe_has_an_answer_for_a_missing_device() -> None:
    """No device, no KVM: and it says how that can be."""
    verdict = probe("/nonexistent/kvm")
    assert verdict.word == "absent"
    assert str(verdict).startswith("absent: /nonexistent/kvm: No such file or directory")


def test_the_probe_is_quick_and_leaves_nothing() -> None:
    """It runs before every test session."""
    started = time.monotonic()
    assert isinstance(probe(), Verdict)
    assert time.monotonic() - started < (20 if in_lab else 2)


def test_unknown_options_are_refused() -> None:
    """With the status for the lab's own failures."""
    result = lab("--nonsense")
    assert (result.returncode, result.stderr) == (125, "kvm-lab: unknown option --nonsense (see --help)\n")


def test_a_command_is_needed() -> None:
    """And asked for in one line."""
    result = lab()
    assert (result.returncode, result.stderr) == (125, "kvm-lab: no command (see --help)\n")


@pytest.mark.slow
@pytest.mark.skipif(in_lab, reason="a lab in the lab would take minutes")
def test_a_command_runs_with_a_full_kvm(tmp_path: Path) -> None:
    """Its status and output come back, what it writes to the shared folder stays, and its KVM runs everything."""
    script = 'python3 tests/lab/probe.py; echo "$KVM_LAB $PWD" >"$LAB_OUT/file"; exit 7'
    result = lab("--out", tmp_path / "out", "--", "bash", "-c", script)
    assert result.returncode == 7, result.stderr
    assert result.stdout == "full\n"
    assert (tmp_path / "out/file").read_text() == f"1 {Path.cwd()}\n"


@pytest.mark.slow
@pytest.mark.skipif(in_lab, reason="a lab in the lab would take minutes")
def test_the_time_limit_ends_it() -> None:
    """With one line that says so."""
    result = lab("sleep", "1000", LAB_TIMEOUT="2")
    assert result.returncode == 125
    assert "no end within 2 s (LAB_TIMEOUT)" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(in_lab, reason="a lab in the lab would take minutes")
def test_a_crash_of_its_kernel_is_the_labs_failure() -> None:
    """At once and with the kernel's last words, so that whoever started it can tell it from a failed test."""
    result = lab("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000", LAB_TIMEOUT="120")
    assert result.returncode == 125
    assert "sysrq triggered crash" in result.stderr
