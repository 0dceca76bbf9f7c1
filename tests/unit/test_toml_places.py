"""Keys and values are found where they are written, whatever TOML surrounds them."""

import random

import pytest
import tomli

from propolis.toml_places import Path, Place, Places

TRICKY = r'''# [not.a.table] key = 1
top = 1 # a = [
"quoted key" = "a = 1 # no comment"
'lit\key' = 'C:\'
"esc\"aped\u0041\x42" = 1
""	=	"empty"
site."google.com".'x y' = true
  indented   =   2
text = """
[fake]
fake = 1
"quoted" ""still in \""" and \\"""
after = 1
lit = """""" # empty
lit2 = QQQ
[fake2] \QQQ
two_quotes = """x"""""
after2 = 1979-05-27 07:32:00
after3 = 07:32:00
array = [ 1, "]", [2, '#'], # ] comment
  { x = 1, "y z" = [ { d = "}" } ] }, ]
inline = { a.b = 1, c = """
]}""", "q=r" = -inf }
[ table . "dot.ted" ]
key = 1
[table]
key = 2
[[list]]
key = 3
[list.sub]
key = 4
[[list.sub.inner]]
key = 5
[[list.sub.inner]]
key = 6
[[ list ]] # second
key = 7
[list.sub]
key = 8
[a.b.c]
[last]
"é" = "ü"
x.y = 0xff
'''.replace("QQQ", "'''")

EXPECTED: list[tuple[Path, Place, Place | None]] = [
    (("top",), Place(2, 1), Place(2, 7)),
    (("quoted key",), Place(3, 1), Place(3, 16)),
    (("lit\\key",), Place(4, 1), Place(4, 13)),
    (('esc"apedAB',), Place(5, 1), Place(5, 25)),
    (("",), Place(6, 1), Place(6, 6)),
    (("site", "google.com"), Place(7, 6), None),
    (("site", "google.com", "x y"), Place(7, 19), Place(7, 27)),
    (("indented",), Place(8, 3), Place(8, 18)),
    (("after",), Place(13, 1), Place(13, 9)),
    (("lit",), Place(14, 1), Place(14, 7)),
    (("lit2",), Place(15, 1), Place(15, 8)),
    (("two_quotes",), Place(17, 1), Place(17, 14)),
    (("after2",), Place(18, 1), Place(18, 10)),
    (("after3",), Place(19, 1), Place(19, 10)),
    (("array",), Place(20, 1), Place(20, 9)),
    (("array", 2, 1), Place(20, 23), Place(20, 23)),
    (("array", 3), Place(21, 3), Place(21, 3)),
    (("array", 3, "y z"), Place(21, 12), Place(21, 20)),
    (("array", 3, "y z", 0, "d"), Place(21, 24), Place(21, 28)),
    (("inline", "a", "b"), Place(22, 14), Place(22, 18)),
    (("inline", "c"), Place(22, 21), Place(22, 25)),
    (("inline", "q=r"), Place(23, 8), Place(23, 16)),
    (("table",), Place(26, 1), None),
    (("table", "dot.ted"), Place(24, 1), None),
    (("table", "dot.ted", "key"), Place(25, 1), Place(25, 7)),
    (("table", "key"), Place(27, 1), Place(27, 7)),
    (("list",), Place(28, 1), None),
    (("list", 0, "key"), Place(29, 1), Place(29, 7)),
    (("list", 0, "sub", "key"), Place(31, 1), Place(31, 7)),
    (("list", 0, "sub", "inner", 0, "key"), Place(33, 1), Place(33, 7)),
    (("list", 0, "sub", "inner", 1, "key"), Place(35, 1), Place(35, 7)),
    (("list", 1), Place(36, 1), None),
    (("list", 1, "key"), Place(37, 1), Place(37, 7)),
    (("list", 1, "sub", "key"), Place(39, 1), Place(39, 7)),
    (("a", "b"), Place(40, 1), None),
    (("last", "é"), Place(42, 1), Place(42, 7)),
    (("last", "x", "y"), Place(43, 3), Place(43, 7)),
]


def paths(value: object, path: Path = ()) -> list[Path]:
    children: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    found = [path] if path else []
    for part, child in children:
        found += paths(child, (*path, part))
    return found


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_key_is_found(newline: str) -> None:
    text = TRICKY.replace("\n", newline)
    places = Places(text)
    for path, key, value in EXPECTED:
        assert places.key(path) == key, path
        assert places.value(path) == (value or key), path


def test_the_scanner_finds_the_keys_that_the_parser_reads() -> None:
    places = Places(TRICKY)
    lines = TRICKY.split("\n")
    for path in paths(tomli.loads(TRICKY)):
        assert path in places._keys, path
        place = places.value(path)
        assert lines[place.line - 1][place.column - 1].strip(), path


def test_what_is_not_there_is_at_its_closest_table() -> None:
    places = Places("a = 1\n\n[main]\nx = 1\n")
    assert places.key(("main", "missing")) == Place(3, 1)
    assert places.value(("main", "missing", "more")) == Place(3, 1)
    assert places.key(("missing",)) == Place(1, 1)
    assert Places("").key(("main",)) == Place(1, 1)


def test_depth_and_length_are_bounded() -> None:
    deep = "a = " + "[" * 399 + "'[', \"]\" # ]\n" + "]" * 399 + "\nb = 1\n"
    deep += "c = " + "{x = [" * 150 + "]}" * 150 + "\n" + ".".join(["k"] * 900) + " = 1\nd = 2\n"
    tomli.loads(deep)
    places = Places(deep)
    assert places.key(("b",)) == Place(3, 1)
    assert places.key(("d",)) == Place(6, 1)


def random_text(rng: random.Random) -> tuple[str, dict[Path, int]]:
    """A document of random keys and values, and the line of each."""
    keys = ["a", "b-c", '"d e"', "'f.g'", '"h\\"i"', '"#"', '"="', "'['"]
    values = [
        "1",
        "1.5",
        '"x"',
        "'y'",
        '"""p\nq = 1\n"""',
        "'''\n[r]\n'''",
        "[1,\n 2]",
        "{s = 1}",
        "true",
        '"\\\\"',
        "[]",
    ]
    text, line = "", 1
    where: dict[Path, int] = {}
    for table in range(rng.randrange(1, 6)):
        text += f"[t{table}]\n"
        line += 1
        for key in rng.sample(keys, rng.randrange(len(keys))):
            pad = rng.choice(["", " ", "\t", "# [note\n", "\n"])
            value = rng.choice(values)
            line += pad.count("\n")
            name = next(iter(tomli.loads(f"{key} = 1")))
            where[(f"t{table}", name)] = line
            text += f"{pad}{key}{rng.choice(['', ' '])}={rng.choice(['', ' '])}{value}{rng.choice(['', ' # ]'])}\n"
            line += value.count("\n") + 1
    return text, where


@pytest.mark.parametrize("seed", range(100))
def test_random_documents(seed: int) -> None:
    text, where = random_text(random.Random(seed))
    document = tomli.loads(text)
    places = Places(text)
    assert where.keys() == {(table, key) for table, keys in document.items() for key in keys}
    for path, line in where.items():
        assert places.key(path).line == line, (seed, path)
