"""Every write to guest memory from compiled devices and backends ends in mark_dirty: the kernel sees none of them.

A store whose target is not the address of a field (`&...`), a copy into a buffer of a chain, and a read from a file are
taken for such writes.
"""

import re
from pathlib import Path

import pytest

from tests.source.tree import COMPILED, TREE, without_texts

WRITE = re.compile(r"\bst(?:8|16|32|64)_(?:rlx|rel)\((?!&)|\bmemcpy\([^,]*iov_base|\bp?readv2?\(")
FUNCTION = re.compile(r"^\s*(?:cdef|cpdef|def)\b[^=]*?(\w+)\(")

# function -> why it is right without.
ALLOWED = {
    "transfer": "the pages of a read are marked when it completes, by whoever submitted it: BlkQueue._complete",
    "_perform_now": "as for transfer",
    "receive": "a link does not know whose pages its vectors are: NetPair._deliver marks them",
}

MODULES = [path for path in COMPILED if {"devices", "backends"} & set(path.relative_to(TREE).parts)]


def sites(source: Path) -> list[tuple[str, int, bool]]:
    """(function, line, marked) of each write."""
    lines = without_texts(source.read_text()).splitlines()
    starts = [i for i, line in enumerate(lines) if FUNCTION.match(line) and not line.lstrip().startswith("cdef class")]
    found = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        match = FUNCTION.match(lines[start])
        assert match is not None
        found += [
            (match[1], i + 1, any("mark_dirty(" in line for line in lines[i + 1 : end]))
            for i in range(start, end)
            if WRITE.search(lines[i])
        ]
    return found


@pytest.mark.parametrize("source", MODULES, ids=lambda path: path.stem)
def test_writes_are_marked(source: Path) -> None:
    """Somewhere below the write, in the same function."""
    bad = [(name, line) for name, line, marked in sites(source) if not marked and name not in ALLOWED]
    assert not bad, f"{source.relative_to(TREE)}: writes to guest memory without mark_dirty: {bad}"


def test_the_known_sites_are_found() -> None:
    """What the search is for."""
    found = {name for source in MODULES for name, _, _ in sites(source)}
    assert {"scatter", "put", "publish", "suppress", "listen", "_answer", "transfer"} <= found
    assert set(ALLOWED) <= found
