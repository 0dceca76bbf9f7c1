"""Python programs whose names do not end in .py are checked like the rest."""

import subprocess

import tomli

from tests.source.tree import TREE


def test_ruff_knows_every_script() -> None:
    """It finds .py files alone by itself."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=TREE, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    scripts = set()
    for name in listed:
        if not name.endswith(".py") and (TREE / name).is_file():
            first = (TREE / name).read_bytes()[:100].partition(b"\n")[0]
            if first.startswith(b"#!") and b"python" in first:
                scripts.add(name)
    settings = tomli.loads((TREE / "pyproject.toml").read_text())["tool"]["ruff"]
    assert scripts == set(settings["extend-include"])
