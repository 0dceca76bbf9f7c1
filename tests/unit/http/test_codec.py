"""Bodies and queries: what is wrong is named by its JSON pointer, keys of maps included, and nothing else happens."""

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from propolis.errors import FieldError, PropolisError
from propolis.http import codec


class Leaf(msgspec.Struct, forbid_unknown_fields=True):
    size: int


class Red(msgspec.Struct, tag_field="type", tag="red", forbid_unknown_fields=True):
    leaf: Leaf


class Blue(msgspec.Struct, tag_field="type", tag="blue", forbid_unknown_fields=True):
    leaf: Leaf


class Tree(msgspec.Struct, forbid_unknown_fields=True):
    things: dict[str, Red | Blue]
    leaves: list[Leaf] = []
    deep: dict[str, dict[str, Leaf]] = {}


RED = {"type": "red", "leaf": {"size": 1}}


def refused(body: bytes) -> FieldError:
    with pytest.raises(FieldError) as caught:
        codec.decode_bytes(body, Tree)
    return caught.value


def status(body: bytes) -> int:
    try:
        codec.decode_bytes(body, Tree)
    except PropolisError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("body", "pointer", "message"),
    [
        ({}, "/things", "missing required field `things`"),
        ({"things": 5}, "/things", "Expected `object`, got `int`"),
        ({"things": {}, "more": 1}, "/more", "unknown field `more`"),
        ({"things": {"a": RED, "b": 5}}, "/things/b", "Expected `object`"),
        ({"things": {"a": RED, "b": {"type": "red"}}}, "/things/b/leaf", "missing required field"),
        ({"things": {"a": {"type": "green"}}}, "/things/a/type", "Invalid value 'green'"),
        ({"things": {"a": {"leaf": {"size": 1}}}}, "/things/a/type", "missing required field"),
        ({"things": {"a/b~c": {"type": "red", "leaf": {"size": "x"}}}}, "/things/a~1b~0c/leaf/size", "Expected `int`"),
        ({"things": {"": {"type": "red", "leaf": {"size": 1.5}}}}, "/things//leaf/size", "Expected `int`"),
        ({"things": {"a": {**RED, "x": 1}}}, "/things/a/x", "unknown field"),
        ({"things": {}, "leaves": [{"size": 1}, {"size": None}]}, "/leaves/1/size", "got `null`"),
        ({"things": {}, "deep": {"a": {}, "b": {"c": {"size": 1}, "d": {}}}}, "/deep/b/d/size", "missing"),
        ([], "", "Expected `object`, got `array`"),
        ({"things": {}, "leaves": [{"size": 1, "x` - at `$.y": 2}]}, "/leaves/0/x` - at `$.y", "unknown field"),
    ],
)
def test_the_pointer_of_what_is_wrong(body: object, pointer: str, message: str) -> None:
    error = refused(json.dumps(body).encode())
    assert error.pointer == pointer
    assert message in str(error)
    assert error.status == 400


def test_the_first_of_several_is_named() -> None:
    things = {f"k{number}": dict(RED) for number in range(100)}
    things["k40"]["leaf"] = {"size": "a"}
    things["k70"]["leaf"] = {"size": "b"}
    assert refused(json.dumps({"things": things, "leaves": 5}).encode()).pointer == "/things/k40/leaf/size"


def test_the_key_is_found_quickly_among_many() -> None:
    things: dict[str, Any] = {f"k{number}": RED for number in range(30_000)}
    things["bad"] = {}
    body = json.dumps({"things": things}).encode()
    started = time.monotonic()
    assert refused(body).pointer == "/things/bad/type"
    assert time.monotonic() - started < 5  # and not with the square of their number


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"{",
        b"nul",
        b'{"things": {}} {}',
        b'{"things": NaN}',
        b'{"things": {"\\ud800": {}}}',
        b"[" * 100_000,
        b'{"things": ' * 20_000,
        b'\xef\xbb\xbf{"things": {}}',
        '{"things": {}}'.encode("utf-16"),
    ],
    ids=range(11),
)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(PropolisError) as caught:
        codec.decode_bytes(body, Tree)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b'{"things": {}, "things": {}}', b'{"things": {"a": %s, "a": %s}}'])
def test_a_key_given_twice_is_refused(body: bytes) -> None:
    """Of two values one would be dropped, and not every reader drops the same."""
    red = json.dumps(RED).encode()
    with pytest.raises(FieldError, match="is given twice in one object"):
        codec.decode_bytes(body.replace(b"%s", red), Tree)


def test_a_message_does_not_repeat_all_that_was_sent() -> None:
    error = refused(json.dumps({"things": {}, "x" * 500_000: 1}).encode())
    assert len(str(error)) < 510_000  # the pointer names it
    assert len(error.problems[0][1]) <= codec.MAX_ECHO + 1


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["things", "leaves", "deep", "type", "leaf", "size", "red"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JSON_VALUES)
def test_any_json_is_decoded_or_refused(value: object) -> None:
    assert status(json.dumps(value).encode()) in (200, 400)


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    assert status(body) in (200, 400)


@given(st.text(max_size=8), st.text(max_size=8))
def test_any_key_is_named(good: str, bad: str) -> None:
    """Whatever characters the keys are of."""
    if good == bad:
        return
    error = refused(msgspec.json.encode({"things": {good: RED, bad: {"type": "red", "leaf": {"size": "no"}}}}))
    assert error.pointer == codec.pointer(("things", bad, "leaf", "size"))
