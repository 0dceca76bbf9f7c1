"""The units, as a real systemd runs them: what a restart, a crash and a shutdown do to VMs, and what is denied."""

import os
import sys
from pathlib import Path

import pytest

from propolis.install_service import Manager, files
from tests.services import host
from tests.source.tree import TREE

pytestmark = [pytest.mark.program, pytest.mark.slow, pytest.mark.timeout(300)]

SERVER = "/usr/local/bin/propolis-server"
REPORTS = "/propolis-reports"
VMS = "/sys/fs/cgroup/machine.slice/propolis-vms.service"
ASK = """
import socket
client = socket.socket(socket.AF_UNIX)
client.connect("/run/propolis/propolis.sock")
print(client.recv(99).decode())
"""


def test_vms_outlive_the_daemon_and_go_off_before_the_host(tmp_path: Path) -> None:
    """The whole life of the installed service, on one host."""
    wrapper = f'#!/bin/sh\ncd {TREE} && exec {sys.executable} -m tests.services.server_stand_in "$@"\n'
    installed = [(file.path, file.text) for file in files(Manager.SYSTEMD, "/usr/local", SERVER)]
    reports = tmp_path / "reports"
    reports.mkdir()
    with host.running(tmp_path, (SERVER, wrapper), *installed) as machine:
        machine.call("ln", "-s", str(reports), REPORTS)
        machine.call("systemctl", "start", "systemd-journald.service")
        machine.call("systemd-sysusers")
        machine.call("systemd-tmpfiles", "--create", "/usr/local/lib/tmpfiles.d/propolis.conf")
        machine.call("systemctl", "enable", "--now", *_units())
        assert {machine.show(unit, "ActiveState") for unit in _units()} == {"active"}

        # The daemon's directories and its socket are for whom they should be.
        assert machine.call("stat", "-c", "%a %U %G", "/run/propolis/propolis.sock") == "660 root propolis"
        assert machine.call("stat", "-c", "%a", "/run/propolis", "/var/lib/propolis").split() == ["755", "700"]

        # The VM has a group of its own. Both are denied what is not on the list.
        assert machine.call("ls", VMS).split().count("vm-web") == 1
        vm = machine.call("cat", f"{VMS}/vm-web/cgroup.procs")
        assert vm.isdigit()
        denied = ["/sys/fs/cgroup/elsewhere: Read-only file system", "/etc/elsewhere: Read-only file system"]
        if os.path.exists("/dev/fuse"):
            denied.insert(0, "/dev/fuse: Operation not permitted")
        assert (reports / "daemon").read_text().splitlines() == denied
        assert (reports / "vm").read_text().splitlines() == denied

        def vm_lives() -> bool:
            return machine.call("cat", f"{VMS}/vm-web/cgroup.procs") == vm

        # Whatever happens to the daemon does not happen to the VM, and a client waits.
        first = machine.call(sys.executable, "-c", ASK)
        assert first == machine.show("propolis-server", "MainPID")
        machine.call("systemctl", "restart", "propolis-server")
        second = machine.call(sys.executable, "-c", ASK)
        assert second != first
        assert vm_lives()
        machine.call("systemctl", "reload", "propolis-server")
        assert (reports / "reloaded").exists()
        machine.call("kill", "-KILL", second)
        assert machine.call(sys.executable, "-c", ASK) != second
        assert machine.show("propolis-server", "NRestarts") == "1"
        assert vm_lives()
        machine.call("systemctl", "daemon-reload")
        machine.call("systemctl", "daemon-reexec")
        machine.call("systemctl", "restart", "propolis-server")
        assert vm_lives()

        # Nor does what happens to the process that keeps the group.
        holder = machine.show("propolis-vms", "MainPID")
        assert int(holder) > 1
        machine.call("kill", "-KILL", holder)
        machine.call("systemctl", "restart", "propolis-server")
        assert vm_lives()
        assert machine.show("propolis-vms", "ActiveState") == "active"

        # Stopped, the daemon leaves the VM on; the VMs' unit stops the daemon and then powers them off.
        machine.call("systemctl", "stop", "propolis-server.socket", "propolis-server.service")
        assert vm_lives()
        machine.call("systemctl", "start", "propolis-server.socket", "propolis-server.service")
        assert vm_lives()
        machine.call("systemctl", "stop", "propolis-vms")
        assert machine.show("propolis-server", "ActiveState") == "inactive"
        assert machine.show("propolis-vms", "Result") == "success"
        assert machine.attempt("ls", VMS).returncode != 0
        machine.call("journalctl", "--sync")
        log = machine.call("journalctl", "--unit", "propolis-vms", "--output", "cat")
        assert "web: powered off within 90 s" in log


def _units() -> list[str]:
    return ["propolis-vms.service", "propolis-server.socket", "propolis-server.service"]
