"""Service files are put in place, with this installation's path in them, and nothing of anybody else's is lost."""

import argparse
import os
import shutil
import stat
import subprocess
import sysconfig
from pathlib import Path

import pytest

from propolis import install_service
from propolis.errors import BackendError, BusyError, ConfigError
from propolis.install_service import CONFIG, Kind, Manager, files, install, kind_of, remove

SERVER = "/opt/propolis/bin/propolis-server"
UNIT = "usr/local/lib/systemd/system/propolis-server.service"

needs_systemctl = pytest.mark.skipif(not shutil.which("systemctl"), reason="systemctl is missing (apt install systemd)")


def run(*arguments: str) -> int:
    """The command."""
    parser = argparse.ArgumentParser()
    install_service.add_arguments(parser)
    return install_service.run(parser.parse_args(arguments))


def tree(root: Path) -> dict[str, bytes]:
    """What is below it."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_each_file_is_written_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where systemd looks for what is neither the distribution's nor the administrator's."""
    assert run("--root", str(tmp_path), "--manager", "systemd", "--server", SERVER) == 0
    expected = [
        "usr/local/lib/systemd/system/propolis-vms.service",
        "usr/local/lib/systemd/system/propolis-server.socket",
        UNIT,
        "usr/local/lib/sysusers.d/propolis.conf",
        "usr/local/lib/tmpfiles.d/propolis.conf",
        "etc/propolis/config.toml",
    ]
    assert sorted(tree(tmp_path)) == sorted(expected)
    output = capsys.readouterr()
    assert output.out.splitlines()[:-1] == [f"wrote {tmp_path}/{name}" for name in expected]
    assert output.out.splitlines()[-1].endswith(
        "systemctl enable --now propolis-vms.service propolis-server.socket propolis-server.service"
    )
    assert "does not exist" in output.err
    text = (tmp_path / UNIT).read_text()
    assert f"\nExecStart={SERVER} run {CONFIG}\n" in text
    assert not [data for data in tree(tmp_path).values() if b"@server@" in data or b"@config@" in data]
    assert stat.S_IMODE((tmp_path / UNIT).stat().st_mode) == 0o644


def test_a_second_run_changes_nothing_and_an_update_does(tmp_path: Path) -> None:
    """What this command wrote, it writes again where it differs."""
    wanted = files(Manager.SYSTEMD, "/usr/local", SERVER)
    list(install(str(tmp_path), wanted))
    before = tree(tmp_path)
    (tmp_path / CONFIG[1:]).write_text("[log]\n")
    lines = list(install(str(tmp_path), wanted))
    assert [line.partition(" /")[0] for line in lines] == ["up to date"] * 5 + ["kept"]
    lines = list(install(str(tmp_path), files(Manager.SYSTEMD, "/usr/local", "/elsewhere/propolis-server")))
    assert [line.split()[0] for line in lines] == ["wrote", "up", "wrote", "up", "up", "kept"]
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert b"ExecStart=/elsewhere/propolis-server run" in after[UNIT]
    assert after[CONFIG[1:]] == b"[log]\n"


@pytest.mark.parametrize("what", ["foreign", "edited", "link", "folder"])
def test_what_others_wrote_is_kept(tmp_path: Path, what: str) -> None:
    """The whole installation is refused, before anything is written; --force does it, but for a folder."""
    wanted = files(Manager.SYSTEMD, "/usr/local", SERVER)
    path = tmp_path / UNIT
    path.parent.mkdir(parents=True)
    match what:
        case "foreign":
            path.write_text("[Service]\n")
        case "edited":
            list(install(str(tmp_path), wanted))
            path.write_text(path.read_text().replace("WatchdogSec=30", "WatchdogSec=99"))
        case "link":
            path.symlink_to("/dev/null")
        case "folder":
            path.mkdir()
    assert kind_of(str(path)) is (Kind.EDITED if what == "edited" else Kind.FOREIGN)
    before = tree(tmp_path)
    with pytest.raises(BusyError, match=r"without --force: .*propolis-server\.service \((edited|not written by)"):
        list(install(str(tmp_path), wanted))
    assert tree(tmp_path) == before
    if what == "folder":
        with pytest.raises(BackendError, match="Is a directory"):
            list(install(str(tmp_path), wanted, force=True))
    else:
        list(install(str(tmp_path), wanted, force=True))
        assert kind_of(str(path)) is Kind.OURS
        assert not path.is_symlink()
    assert not [name for name in tree(tmp_path) if Path(name).name.startswith(".")]


def test_removal_takes_what_was_written_and_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration is the administrator's."""
    wanted = files(Manager.SYSTEMD, "/usr/local", SERVER)
    list(install(str(tmp_path), wanted))
    with (tmp_path / UNIT).open("a") as unit:
        unit.write("# mine\n")
    assert len([line for line in remove(str(tmp_path), wanted) if line.startswith("removed ")]) == 4
    assert sorted(tree(tmp_path)) == sorted([UNIT, CONFIG[1:]])
    assert run("--root", str(tmp_path), "--manager", "systemd", "--remove", "--force") == 0
    assert list(tree(tmp_path)) == [CONFIG[1:]]
    assert f"removed {tmp_path}/{UNIT}\n" in capsys.readouterr().out


def test_an_image_is_not_left_by_a_link(tmp_path: Path) -> None:
    """A folder of the image that is a link to /usr means the image's, and would be this system's."""
    image = tmp_path / "image"
    image.mkdir()
    (tmp_path / "outside").mkdir()
    (image / "usr").symlink_to("../outside")
    with pytest.raises(ConfigError, match="outside of"):
        list(install(str(image), files(Manager.SYSTEMD, "/usr/local", SERVER)))
    assert tree(tmp_path) == {}
    (image / "usr").unlink()
    (image / "real").mkdir()
    (image / "usr").symlink_to("real")
    list(install(str(image), files(Manager.SYSTEMD, "/usr/local", SERVER)))
    assert (image / "real/local/lib/systemd/system/propolis-server.service").is_file()


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/a/bin/propolis-server", "/a/bin/propolis-server"),
        ("/a b/100%/server", '"/a b/100%%/server"'),
        ('/"\\/server', '"/\\"\\\\/server"'),
    ],
)
def test_any_path_is_one_word_for_systemd(tmp_path: Path, path: str, word: str) -> None:
    """systemd.syntax(7)."""
    list(install(str(tmp_path), files(Manager.SYSTEMD, "/usr/local", path)))
    assert f"\nExecStart={word} run {CONFIG}\n" in (tmp_path / UNIT).read_text()


@pytest.mark.parametrize("path", ["bin/propolis-server", "/a\nExecStartPre=/b", "/a$b", ""])
def test_what_is_no_path_is_refused(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that would be read as more than a path."""
    with pytest.raises(ConfigError, match="expected an absolute path"):
        files(Manager.SYSTEMD, "/usr/local", path)
    assert run("--root", str(tmp_path), "--server", SERVER, "--prefix", path) == 1
    assert "prefix" in capsys.readouterr().err
    assert tree(tmp_path) == {}


def test_the_server_is_the_one_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command beside this Python, or the one that was called; by the path that it has, link or not."""
    installed = os.path.join(sysconfig.get_path("scripts"), "propolis-server")
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert install_service.find_server() == installed
    (tmp_path / "propolis-server").symlink_to(installed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["./propolis-server"])
    assert install_service.find_server() == f"{tmp_path}/propolis-server"


def test_a_server_that_others_can_change_is_warned_of(tmp_path: Path) -> None:
    """A service that is root should not be anybody's to write."""
    server = tmp_path / "propolis-server"
    server.touch()
    server.chmod(0o777)
    found = list(install_service.warnings("/", str(server), "/usr/local"))
    assert f"others than root can write to {server}: the service, which is root, runs what they put there" in found
    shadow = tmp_path / "etc/systemd/system/propolis-server.service"
    shadow.parent.mkdir(parents=True)
    shadow.touch()
    found = list(install_service.warnings(str(tmp_path), "/none", "/usr/local"))
    assert found == [
        f"{tmp_path}/none does not exist: the service starts once it does",
        f"{shadow} takes precedence over the file that is installed",
    ]


@needs_systemctl
def test_it_is_enabled_in_an_image(tmp_path: Path) -> None:
    """As systemctl does it, offline."""
    assert run("--root", str(tmp_path), "--manager", "systemd", "--server", SERVER, "--enable") == 0
    system = tmp_path / "etc/systemd/system"
    assert sorted(str(path.relative_to(system)) for path in system.rglob("*.wants/*")) == [
        "multi-user.target.wants/propolis-server.service",
        "multi-user.target.wants/propolis-vms.service",
        "sockets.target.wants/propolis-server.socket",
    ]
    assert os.readlink(system / "sockets.target.wants/propolis-server.socket").endswith(
        "/usr/local/lib/systemd/system/propolis-server.socket"
    )


def test_the_illumos_files(tmp_path: Path) -> None:
    """A manifest where svc.startd imports it at boot, and a method that can be executed."""
    assert run("--root", str(tmp_path), "--manager", "smf", "--server", "/opt/my vms/server", "--prefix", "/opt/p") == 0
    method = tmp_path / "opt/p/lib/svc/method/propolis-server"
    assert sorted(tree(tmp_path)) == [
        CONFIG[1:],
        "lib/svc/manifest/site/propolis-server.xml",
        "opt/p/lib/svc/method/propolis-server",
    ]
    assert stat.S_IMODE(method.stat().st_mode) == 0o755
    assert method.read_text().startswith("#!/bin/sh\n# Written by")
    assert "\nserver='/opt/my vms/server'\n" in method.read_text()
    assert run("--root", str(tmp_path), "--manager", "smf", "--enable") == 1


def test_a_command_that_fails_is_told() -> None:
    """With its exit status, or that it is not there."""
    with pytest.raises(BackendError, match="false now: exit status 1"):
        install_service._call(["false", "now"])
    with pytest.raises(BackendError, match="no-such-command is not there"):
        install_service._call(["no-such-command"])


def test_without_rights_the_reason_is_told(tmp_path: Path) -> None:
    """Here the folder is a file, which stops root as well."""
    (tmp_path / "usr").write_text("")
    with pytest.raises(BackendError, match=r"write .*propolis-vms\.service: Not a directory"):
        list(install(str(tmp_path), files(Manager.SYSTEMD, "/usr/local", SERVER)))


@pytest.mark.skipif(not shutil.which("make"), reason="make is missing")
def test_make_has_it() -> None:
    """`make install-service` runs the command of the tree's environment, with what it is given."""
    tree = Path(__file__).parents[2]
    shown = subprocess.run(
        ["make", "-n", "install-service", "ARGUMENTS=--root /image"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ".venv/bin/propolis-server install-service --root /image" in shown.stdout
