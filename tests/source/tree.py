"""The project's own files, as the source tests read them."""

import re
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
COMPILED = sorted(path for path in (TREE / "propolis").rglob("_*.pyx"))

_BLOCK = re.compile(r"(?P<quote>\"\"\"|''').*?(?P=quote)", re.DOTALL)


def name_of(path: Path) -> str:
    """The dotted module name of a source file."""
    relative = path.relative_to(TREE).with_suffix("")
    parts = list(relative.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def without_texts(source: str) -> str:
    """The source with triple-quoted texts blanked, line numbers kept."""
    return _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), source)
