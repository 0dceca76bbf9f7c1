"""One process for all tests of the command line, which their programs are forked from."""

from pathlib import Path

import pytest

from tests.unit.cli.program import Forge, forge

HERE = Path(__file__).parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts it where it will be needed."""
    if any(HERE in item.path.parents for item in session.items) and not session.config.option.collectonly:
        forge.append(Forge())


def pytest_sessionfinish() -> None:
    """Ends it."""
    while forge:
        forge.pop().close()
