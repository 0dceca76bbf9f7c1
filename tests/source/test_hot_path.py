"""No Python in the hot path: two independent proofs for every `noexcept nogil` function of every compiled module.

The translated source: Cython's annotation gives each line a score, 0 where it makes no use of Python. The object file:
the function's section has no relocation to a symbol of Python or of Cython's helpers.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.source.tree import COMPILED, TREE, name_of, without_texts

# Functions that are `noexcept nogil` and still may use Python, each with the reason.
ALLOWED: dict[str, str] = {}

# Comparing a reference with None takes its address and touches nothing.
HARMLESS_SYMBOLS = {"_Py_NoneStruct"}
PYTHON_SYMBOLS = re.compile(r"^_?Py[A-Z_]|^__Pyx|^__pyx_(n|kp|int|float|tuple|codeobj|mstate|ptype|builtin|empty)")

_HEADER = re.compile(
    r"^(?P<indent>[ ]*)(?:cdef|cpdef)\s+(?:inline\s+)?(?P<type>[^=(\n]*?)\b(?P<name>\w+)\s*\((?P<args>[^:]*?)\)\s*"
    r"noexcept\s+nogil\s*:",
    re.MULTILINE | re.DOTALL,
)
_CLASS = re.compile(r"^cdef class (\w+)")


@dataclass(frozen=True)
class Function:
    """A function that has to be free of Python."""

    source: Path
    name: str  # Class.method or function
    first: int  # its lines, counted from 1
    last: int

    def __str__(self) -> str:
        """module:Class.method."""
        return f"{name_of(self.source)}:{self.name}"

    @property
    def c_name(self) -> str:
        """The C function that Cython makes of it."""
        parts = [f"{len(part)}{part}" for part in name_of(self.source).split(".")]
        *outer, own = self.name.split(".")
        return "__pyx_f_" + "_".join(parts) + "_" + "".join(f"{len(name)}{name}_" for name in outer) + own


def functions(source: Path) -> Iterator[Function]:
    """Every `noexcept nogil` function of a module."""
    text = without_texts(source.read_text())
    lines = text.splitlines()
    for match in _HEADER.finditer(text):
        first = text.count("\n", 0, match.start()) + 1
        last = text.count("\n", 0, match.end()) + 1
        indent = len(match["indent"])
        for number in range(last, len(lines)):
            line = lines[number]
            if line.strip() and not line.lstrip().startswith("#"):
                if len(line) - len(line.lstrip()) <= indent and not line.lstrip().startswith(")"):
                    break
                last = number + 1
        name = match["name"]
        if indent:
            owner = next(m[1] for m in (_CLASS.match(lines[n]) for n in range(first - 1, -1, -1)) if m)
            name = f"{owner}.{name}"
        yield Function(source, name, first, last)


HOT = [function for source in COMPILED for function in functions(source)]


def _built(*candidates: Path) -> Path:
    for path in candidates:
        if path.exists():
            return path
    pytest.skip("the release flavour is not built in this tree: make build")


@cache
def scores(source: Path) -> dict[int, int]:
    """Line number -> score, from the annotated translation."""
    relative = source.relative_to(TREE)
    report = _built((TREE / "build/cython-release" / relative).with_suffix(".html"))
    if report.stat().st_mtime < source.stat().st_mtime:
        pytest.fail(f"{relative} is newer than its build: make build")
    found = re.findall(r'class="cython line score-(\d+)"[^>]*>[^<]*<span class="">(\d+)</span>', report.read_text())
    return {int(line): int(score) for score, line in found}


@cache
def references(source: Path) -> dict[str, set[str]]:
    """C function -> symbols that its code refers to, from the object file."""
    relative = source.relative_to(TREE).with_suffix(".o")
    built = _built(*sorted((TREE / "build/release").glob(f"temp.*/build/cython-release/{relative}")))
    listing = subprocess.run(
        ["objdump", "-dr", "--no-show-raw-insn", built], capture_output=True, text=True, check=True
    )
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in listing.stdout.splitlines():
        if start := re.match(r"[0-9a-f]+ <([^>]+)>:", line):
            name = re.sub(r"\.(isra|part|constprop|cold|lto_priv)\b.*", "", start[1])
            current = found.setdefault(name, set())  # outlined parts count with their function
        elif use := re.search(r"R_\w+\s+([\w.]+)", line):
            current.add(re.sub(r"[-+]0x.*", "", use[1]))
    return found


def test_there_are_hot_functions() -> None:
    """The search finds what it is for."""
    if not COMPILED:
        pytest.skip("no compiled modules")
    assert any(str(function) == "propolis._vmm:Vcpu._loop" for function in HOT)


@pytest.mark.parametrize("function", HOT, ids=str)
def test_the_translation_uses_no_python(function: Function) -> None:
    """Every line of it has score 0."""
    if reason := ALLOWED.get(str(function)):
        pytest.skip(reason)
    by_line = scores(function.source)
    lines = [line for line in range(function.first, function.last + 1) if by_line.get(line, 0)]
    assert not lines, f"{function}: {function.source.relative_to(TREE)} lines {lines} use Python"


@pytest.mark.parametrize("function", HOT, ids=str)
def test_the_object_refers_to_no_python(function: Function) -> None:
    """Its code calls and reads nothing of Python's."""
    if reason := ALLOWED.get(str(function)):
        pytest.skip(reason)
    known = references(function.source)
    if function.c_name not in known:
        return  # inlined wherever it is called; the callers are checked
    bad = sorted(s for s in known[function.c_name] if PYTHON_SYMBOLS.match(s) and s not in HARMLESS_SYMBOLS)
    assert not bad, f"{function} refers to {bad}"


def test_the_names_of_c_functions_are_right() -> None:
    """Most functions are found in the object: the rule for their names is the one that Cython uses."""
    if not COMPILED:
        pytest.skip("no compiled modules")
    found = [function for function in HOT if function.c_name in references(function.source)]
    assert len(found) * 2 > len(HOT), sorted(str(f) for f in HOT if f not in found)


def test_allowances_are_needed() -> None:
    """An allowance for a function that is gone goes too."""
    assert set(ALLOWED) <= {str(function) for function in HOT}
