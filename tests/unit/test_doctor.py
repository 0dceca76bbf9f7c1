"""What is wrong with a host, and how it is mended: of this one, whatever it is, and of made-up ones."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from propolis import config, doctor
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


def test_a_directory_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    settings = config.parse("[server]\nstate_directory = '/usr/x'", "x", "/")
    found = {check.name: check for check in doctor.examine(settings)}
    assert found["state directory"].message == "/usr: no permission to write"
    assert found["kvm"].status == "error"
