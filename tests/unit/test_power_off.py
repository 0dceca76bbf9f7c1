"""All VMs go off when the host does: by the power button, by force, and without a daemon."""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis import power_off
from propolis.run_directory import RunDirectory

pytestmark = pytest.mark.program


@contextlib.contextmanager
def vms(folder: Path, **manners: str) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes that keep run directories, by name."""
    (folder / "vms").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        started = {}
        for name, manner in manners.items():
            command = [sys.executable, "-m", "tests.services.vm_stand_in", str(folder / "vms" / name), manner]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            started[name] = process
        for name, process in started.items():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", name
        yield started


async def test_power_buttons_first_then_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each VM ends, in the gentlest way that works on it, and is told of."""
    monkeypatch.setattr(power_off, "_ANSWER", 2.0)
    monkeypatch.setattr(power_off, "_GRACE", 1.0)
    said: list[str] = []
    with vms(tmp_path, obeys="obeys", refuses="refuses", hangs="hangs") as running:
        RunDirectory.create(str(tmp_path / "vms/off")).close()
        assert await power_off.power_off(str(tmp_path), 0.5, said.append) == []
        assert {name: process.wait(10) for name, process in running.items()} == {"obeys": 0, "refuses": 0, "hangs": -9}
    assert "obeys: powered off within 0.5 s" in said
    assert [line.partition(" after")[0] for line in said if line.startswith("refuses")] == [
        "refuses: no power button: 409 Conflict",
        "refuses: terminate",
        "refuses: stopped",
    ]
    assert [line.partition(" after")[0] for line in said if line.startswith("hangs")] == [
        "hangs: terminate",
        "hangs: kill",
        "hangs: its keeper was killed",
    ]
    assert not [line for line in said if line.startswith("off")]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the daemon's configuration, which says where VMs are."""
    configuration = tmp_path / "config.toml"
    configuration.write_text('[server]\nrun_directory = "run"\n')
    parser = argparse.ArgumentParser()
    power_off.add_arguments(parser)
    assert power_off.run(parser.parse_args([str(configuration)])) == 0
    with vms(tmp_path / "run", web="obeys") as running:
        assert power_off.run(parser.parse_args([str(configuration), "--deadline", "7"])) == 0
        assert running["web"].wait(10) == 0
    assert capsys.readouterr().out == "web: powered off within 7 s\n"
    (tmp_path / "run/vms/broken").mkdir(mode=0o777)
    (tmp_path / "run/vms/broken").chmod(0o777)
    assert power_off.run(parser.parse_args([str(configuration)])) == 1
    assert "expected a directory that is this user's alone" in capsys.readouterr().out
    configuration.write_text("[nothing]\n")
    assert power_off.run(parser.parse_args([str(configuration)])) == 1
    assert "nothing" in capsys.readouterr().err
