"""What a user installs: the source archive, the wheel made from it, and their commands in a clean environment."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.source.tree import COMPILED, TREE

pytestmark = [pytest.mark.slow, pytest.mark.shared, pytest.mark.timeout(900)]


SERVICE_FILES = {str(path.relative_to(TREE)) for path in (TREE / "propolis/services").iterdir()}


def _call(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PROPOLIS"))}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this tree, and the wheel that pip makes of it as `pip install .` does, with build isolation."""
    folder = tmp_path_factory.mktemp("dist")
    # From a copy without build products. (The wheel needs one compilation of everything: half a minute.)
    tree = folder / "tree"
    listed = _call("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=TREE).splitlines()
    for name in listed:
        if (TREE / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((TREE / name).read_bytes())
    _call(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    _call("tar", "-xzf", sdist, cwd=folder)
    (unpacked,) = folder.glob("propolis-*/")
    _call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, unpacked, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_sdist_holds_the_sources(archives: tuple[Path, Path]) -> None:
    """Everything a build needs, nothing that a build makes."""
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(TREE)) for path in COMPILED}
    for path in COMPILED:
        for suffix in (".pxd", ".pyi"):
            if path.with_suffix(suffix).exists():
                sources.add(str(path.with_suffix(suffix).relative_to(TREE)))
    sources |= {str(path.relative_to(TREE)) for path in (TREE / "propolis").rglob("*.h")}
    sources |= SERVICE_FILES
    assert sources <= names
    assert not [name for name in names if name.endswith((".so", ".html", ".pyc")) or name.startswith("build/")]
    assert not {name.removesuffix(".c") for name in names if name.endswith(".c")} & {
        name.removesuffix(".pyx") for name in sources
    }


def test_the_wheel_holds_what_runs(archives: tuple[Path, Path]) -> None:
    """Modules, stubs and the marker for type checkers; no source of compiled modules."""
    with zipfile.ZipFile(archives[1]) as archive:
        names = set(archive.namelist())
    assert not [name for name in names if name.endswith((".c", ".pyx", ".pxd", ".h"))]
    assert {"propolis/py.typed", "propolis_cli/py.typed", "propolis_cli/main.py"} <= names
    assert names >= SERVICE_FILES
    for path in COMPILED:
        if path.stem != "_bhyve":
            stem = str(path.relative_to(TREE).with_suffix(""))
            assert [name for name in names if name.startswith(f"{stem}.") and name.endswith(".so")], stem
            assert f"{stem}.pyi" in names
    assert not [name for name in names if name.startswith(("tests", "cli/", "scripts", "docs"))]


def test_the_wheel_works_in_a_clean_environment(archives: tuple[Path, Path], tmp_path: Path) -> None:
    """pip installs it with its dependencies; the modules load and the commands answer."""
    venv.create(tmp_path / "venv", with_pip=True)
    tools = tmp_path / "venv/bin"
    _call(tools / "python", "-m", "pip", "install", "-q", archives[1], cwd=tmp_path)
    version = _call(tools / "python", "-c", "import propolis; print(propolis.__version__)", cwd=tmp_path).strip()
    for path in COMPILED:
        if path.stem != "_bhyve":
            name = str(path.relative_to(TREE).with_suffix("")).replace("/", ".")
            _call(tools / "python", "-c", f"import {name}", cwd=tmp_path)
    for command in ("propolis-standalone", "propolis-server", "propolis-cli"):
        assert version in _call(tools / command, "--version", cwd=tmp_path)
    _call(tools / "propolis-server", "install-service", "--root", tmp_path / "image", cwd=tmp_path)
    unit = tmp_path / "image/usr/local/lib/systemd/system/propolis-server.service"
    assert f"\nExecStart={tools}/propolis-server run " in unit.read_text()
