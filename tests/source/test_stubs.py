"""Each compiled module has a stub; what only C code uses has none. (stubtest, in lint, compares stub and module.)"""

from pathlib import Path

import pytest

from tests.source.tree import COMPILED, TREE


@pytest.mark.parametrize("source", COMPILED, ids=lambda path: str(path.relative_to(TREE)))
def test_a_compiled_module_has_a_stub(source: Path) -> None:
    """People and type checkers read the .pyi."""
    assert source.with_suffix(".pyi").exists(), f"{source.relative_to(TREE)} has no .pyi"


def test_no_stub_without_a_module() -> None:
    """A stub that outlived its module would be believed."""
    orphans = [path for path in (TREE / "propolis").rglob("*.pyi") if not path.with_suffix(".pyx").exists()]
    assert orphans == []


def test_generated_c_is_not_kept() -> None:
    """C made by Cython stays below build/."""
    assert [path for path in (TREE / "propolis").rglob("*.c") if path.with_suffix(".pyx").exists()] == []
