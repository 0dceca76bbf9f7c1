"""What is wrong with a host, and how it is mended: of this one, whatever it is, and of made-up ones."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from propolis import config, doctor, landlock
from propolis.doctor import Report
from tests.lab.probe import probe
from tests.source.tree import TREE


def report(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "propolis.doctor", *arguments]
    result = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    return result.returncode, result.stdout


def test_this_host() -> None:
    status, text = report("--json")
    checks = {check.name: check for check in msgspec.json.decode(text, type=Report).checks}
    assert {"kvm", "jail", "io_uring", "tun", "memory", "huge pages", "open files", "state directory"} <= set(checks)
    assert (checks["kvm"].status == "ok") == probe().is_full
    assert status == any(check.status == "error" for check in checks.values())
    assert all(check.remedy for check in checks.values() if check.status == "error")


def test_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "c.toml").write_text("[server]\nstate_directory = 'file/state'\nrun_directory = 'new/run'\n")
    status, text = report(str(tmp_path / "c.toml"))
    assert status == 1
    assert f"ERROR    state directory: {tmp_path}/file: not a directory\n           -> remove it" in text
    assert f"ok       run directory: {tmp_path}/new/run can be made\n" in text


# In a process of its own, for which a filter makes the kernel one without Landlock.
ELSEWHERE = """
import ctypes, errno, sys
import pyseccomp
from propolis import doctor
ctypes.CDLL(None).prctl(38, *map(ctypes.c_ulong, (1, 0, 0, 0)))
program = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
program.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "landlock_create_ruleset")
program.load()
doctor.main()
"""


def test_a_kernel_without_landlock() -> None:
    """What the jail lacks is said, and how to go without."""
    result = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=TREE, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert "ERROR    jail: VMs cannot be confined: Landlock: this kernel has none (CONFIG" in result.stdout
    assert "-> [jail] mode = 'off' goes without\n" in result.stdout


def test_what_this_kernel_s_landlock_does_not_know() -> None:
    """Is told where it is missing, and only there."""
    _, text = report()
    jail = next(line for line in text.splitlines() if "jail:" in line)
    for since, what in ((3, "truncation by path"), (4, "TCP ports"), (6, "signals and abstract sockets")):
        assert (what in jail) == (0 < landlock.abi() < since)


def test_a_directory_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    settings = config.parse("[server]\nstate_directory = '/usr/x'", "x", "/")
    found = {check.name: check for check in doctor.examine(settings)}
    assert found["state directory"].message == "/usr: no permission to write"
    assert found["kvm"].status == "error"
