"""Reading the tables of a TOML file: values by kind, and everything wrong reported at once, each with its place.

The code that reads a table is its grammar: a key that is asked for is a known one, any other is reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import tomli

from propolis.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
D = TypeVar("D")
Path = tuple[str | int, ...]

MAX_FILE_BYTES = 1 << 20
NOT_HERE = "is known, but not available in this version"
_SHOWN = 40  # characters of a wrong value or key that a message repeats
_INTEGERS = range(-(1 << 63), 1 << 63)  # what TOML asks of a parser; ours reads larger ones too


def read_text(shown: str) -> str:
    """The text of the configuration file called `shown`."""
    try:
        with open(shown, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"open configuration {shown!r}: {reason}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{shown}: expected a configuration of at most {MAX_FILE_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError(f"{shown}:{line}:{column}: expected UTF-8 text, found a byte that is none") from error


def parse_text(text: str, shown: str) -> dict[str, object]:
    """The document that `text` is."""
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{shown}:{error.lineno}:{error.colno}: not TOML: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
        raise ConfigError(f"{shown}: {error}") from error


class Problem(NamedTuple):
    path: Path
    message: str
    is_key: bool  # the key itself is at fault, not its value


class Log:
    """Problems by the path they are at: the first one at a place stands, what follows from it is left out."""

    def __init__(self) -> None:
        self._problems: dict[Path, Problem] = {}

    def __len__(self) -> int:
        return len(self._problems)

    def add(self, path: Path, message: str, *, is_key: bool = False) -> None:
        self._problems.setdefault(path, Problem(path, message, is_key))

    def error(self, source: str, shown: str) -> ConfigError:
        """One line for each problem, in the order of the file whose text is `source`."""
        from propolis.toml_places import Places  # only a file with problems pays for a second look

        places = Places(source)
        found = [
            (places.key(problem.path) if problem.is_key else places.value(problem.path), problem.message)
            for problem in self._problems.values()
        ]
        found.sort(key=lambda entry: entry[0])
        return ConfigError("\n".join(f"{shown}:{at.line}:{at.column}: {message}" for at, message in found))


class UnexpectedError(ValueError):
    """A value is not what was expected; the message says what was."""


class Table:
    """One table being read: keys are taken from it by name and kind, and those never asked for are unknown."""

    def __init__(self, log: Log, path: Path, values: dict[str, object]) -> None:
        self._log = log
        self._path = path
        self._values = values
        self._known: list[str] = []
        self._absent: set[str] = set()

    @property
    def names(self) -> list[str]:
        return list(self._values)

    @property
    def known(self) -> list[str]:
        """The keys that were asked for so far."""
        return self._known

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def wrong(self, key: str, message: str, *, is_key: bool = False) -> None:
        self._log.add((*self._path, key), message, is_key=is_key)

    def take(self, key: str, kind: Callable[[object], T], default: D) -> T | D:
        """The value of `key`, or `default` where there is none or a wrong one, which is reported."""
        self._known.append(key)
        if key not in self._values:
            return default
        try:
            return kind(self._values[key])
        except UnexpectedError as wrong:
            self.wrong(key, f"{key if self._path else _title((key,))}: {wrong}")
            return default

    def require(self, key: str, kind: Callable[[object], T], stand_in: D, what: str) -> T | D:
        """The same of a key that must be there, `what` says what is expected."""
        if key not in self._values:
            self.wrong(key, f"{_title(self._path)} has no {key!r}: expected {what}", is_key=True)
        return self.take(key, kind, stand_in)

    def unavailable(self, *keys: str) -> None:
        """These belong to the grammar, but not to what this version does."""
        self._absent.update(keys)
        for key in keys:
            if key in self._values:
                self.wrong(key, f"{key!r} {NOT_HERE}", is_key=True)

    def table(self, key: str) -> Table:
        """The table called `key`, an empty one where there is none."""
        values = self.take(key, table, None)
        # Of what is no table, that alone is reported: what it lacks then goes to a log that nobody reads.
        log = Log() if values is None and key in self._values else self._log
        return Table(log, (*self._path, key), values or {})

    def finish(self, elsewhere: Callable[[str], str | None] = lambda key: None) -> None:
        """Report the keys that nobody asked for; `elsewhere` may know where one of them belongs."""
        for key in self._values:
            if key not in self._known and key not in self._absent:
                hint = elsewhere(key) or advice(key, self._known)
                self.wrong(key, f"unknown key {show(key)} in {_title(self._path)}: {hint}", is_key=True)


def text(value: object) -> str:
    if not isinstance(value, str):
        raise UnexpectedError(f"expected a string, not {show(value)}")
    return value


def whole(value: object) -> int:
    # To Python a boolean is a number; to TOML it is not.
    if not isinstance(value, int) or isinstance(value, bool) or value not in _INTEGERS:
        raise UnexpectedError(f"expected a whole number, not {show(value)}")
    return value


def flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise UnexpectedError(f"expected true or false, not {show(value)}")
    return value


def table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise UnexpectedError(f"expected a table, not {show(value)}")
    return value


def show(value: object) -> str:
    """A value as a message repeats it: on one line, and not too long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, str):
        # ascii() rather than repr(): what a message repeats must not reorder or hide the rest of its line.
        return ascii(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!a}..."
    if isinstance(value, int) and value not in _INTEGERS:
        return "one so large"
    return str(value)


def advice(wrong: str, expected: list[str], known: list[str] | None = None) -> str:
    """What to write in place of `wrong`: the name that it nearly is, or else all that would do."""
    import difflib  # only ever needed for a mistake

    if near := difflib.get_close_matches(wrong[:_SHOWN].lower(), known or expected, n=1):
        return f"did you mean {near[0]!r}?"
    return f"expected {'one of ' if len(expected) > 1 else ''}{', '.join(map(repr, expected))}"


def _title(path: Path) -> str:
    return f"[{'.'.join(map(_part, path))}]" if path else "the file"


def _part(part: str | int) -> str:
    name = str(part)
    is_bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum() and len(name) <= _SHOWN
    return name if is_bare else show(name)
