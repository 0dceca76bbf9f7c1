"""The API's document is the one in docs/, and covers Propolis API 5.0.0."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from propolis.config import default_settings
from propolis.http import openapi
from propolis.http.access import Guard, TokenSet
from propolis.http.feed import Feed
from propolis.http.forward import Workers
from propolis.http.prometheus import Metrics
from propolis.http.router import Router
from propolis.instance import Instance
from propolis.store import Store
from propolis.supervisor import Supervisor
from propolis.zygote import Zygote
from tests.source.tree import TREE

THEIRS = json.loads((TREE / "tests/source/propolis_api_5_0_0.json").read_text())
OURS = json.loads(openapi.text())
SCHEMAS = OURS["components"]["schemas"]
REFERENCE = "#/components/schemas/"

# Where a union of 5.0.0 has a name, ours is an anyOf of structs; these are answered by nobody, and told by two fields.
UNTAGGED = {"VolumeInfo"}

Schema = dict[str, Any]


def resolved(schema: Schema) -> Schema:
    """What a reference refers to."""
    while "$ref" in schema:
        schema = SCHEMAS[schema["$ref"].removeprefix(REFERENCE)]
    return schema


def without_null(schema: Schema) -> Schema:
    """5.0.0 calls a field nullable, ours is a union with null."""
    choices = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    return choices[0] if len(choices) == 1 else schema


def fits(schema: Schema, kind: str) -> bool:
    """Whether a type of ours is the one that 5.0.0 has there, of which the data has a word."""
    schema = without_null(schema)
    if kind.startswith("["):
        return bool(schema["type"] == "array") and fits(schema["items"], kind[1:-1])
    if kind.startswith("{"):
        return bool(schema["type"] == "object") and fits(schema["additionalProperties"], kind[1:-1])
    if kind in ("string", "integer", "boolean", "null"):
        return bool(resolved(schema).get("type") == kind)
    if kind == "object":
        return bool(resolved(schema)["type"] == "object")
    if kind == "SpecKey":
        return schema == {"type": "string"}
    return schema == {"$ref": REFERENCE + kind} or schema == SCHEMAS[kind]


def variants(schema: Schema, tag: str) -> dict[str, Schema]:
    """The structs of a union by the value of their tag."""
    structs = [resolved(choice) for choice in schema.get("anyOf", [schema])]
    return {struct["properties"][tag]["enum"][0]: struct for struct in structs}


def test_the_document_in_docs_is_this_one() -> None:
    """make it with: propolis-server open-api > docs/openapi.json"""
    shown = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[1:] = ['open-api']; from propolis.daemon import main; main()"],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (TREE / "docs/openapi.json").read_text() == shown.stdout


def test_there_are_thirteen_operations() -> None:
    assert len(THEIRS["operations"]) == 13


@pytest.mark.parametrize("theirs", THEIRS["operations"], ids=lambda operation: operation["id"])
def test_each_operation_is_covered(theirs: Schema) -> None:
    """Same name, parameters, body and answer; and below /instances/{name} as well."""
    prefixes = ["/instance"] if theirs["id"] == "instance_ensure" else ["/instance", "/instances/{name}"]
    for prefix in prefixes:
        ours = OURS["paths"][theirs["path"].replace("/instance", prefix, 1)][theirs["method"]]
        assert ours["operationId"].removeprefix("named_") == theirs["id"]
        queries = {part["name"] for part in ours.get("parameters", []) if part["in"] == "query"}
        assert queries >= set(theirs["query"])
        places = re.findall(r"{(\w+)}", theirs["path"])
        assert {part["name"] for part in ours.get("parameters", []) if part["in"] == "path"} >= set(places)
        body = ours.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
        assert (body is None) == (theirs["body"] is None)
        assert body is None or fits(body, theirs["body"])
        if prefix != "/instance" and theirs["id"] == "instance_get":  # which tells more
            wanted = SCHEMAS["InstanceGetResponse"]["properties"]["instance"]
            assert SCHEMAS["InstanceReply"]["properties"]["instance"] == wanted
            continue
        reply = ours["responses"][str(theirs["status"])].get("content", {}).get("application/json", {}).get("schema")
        assert (reply is None) == (theirs["reply"] is None)
        assert reply is None or fits(reply, theirs["reply"])


@pytest.mark.parametrize("name", THEIRS["schemas"])
def test_each_schema_is_covered(name: str) -> None:
    """The same fields, needed where they are needed; ours may have more that are not."""
    theirs = THEIRS["schemas"][name]
    ours = SCHEMAS[name]
    if "enum" in theirs:
        assert sorted(ours["enum"]) == theirs["enum"]
    elif "string" in theirs:
        assert ours == {"type": "string"}
    elif name in UNTAGGED:
        assert set(ours["properties"]) == set(theirs["variants"])
    elif "variants" in theirs:
        found = variants(ours, theirs["tag"])
        assert set(found) == set(theirs["variants"])
        for tag, fields in theirs["variants"].items():
            assert set(found[tag]["properties"]) == {theirs["tag"], *fields}
            assert all(fits(found[tag]["properties"][field], kind) for field, kind in fields.items())
            assert set(found[tag]["required"]) == {theirs["tag"], *fields}
    else:
        assert set(ours["required"]) == set(theirs["required"])
        for field, kind in theirs["fields"].items():
            assert fits(ours["properties"][field], kind), field


@pytest.mark.parametrize("operation", openapi.OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_says_what_it_is(operation: openapi.Operation) -> None:
    assert operation.summary
    assert not operation.summary.endswith(".")


def test_the_routes_are_those_of_the_document() -> None:
    """None more, none less."""
    from propolis.http.app import make_app

    served = {
        (route.method.lower(), route.resource.canonical)
        for route in make_app(None).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    pages = {("get", "/openapi.json"), ("get", "/docs")}
    assert served - pages == {(operation.method, operation.path) for operation in openapi.VM_OPERATIONS}


def test_the_daemons_routes_are_those_of_the_document(tmp_path: Path) -> None:
    """None more; what a worker has is reached by one that takes all."""
    with Store.open(str(tmp_path)) as store:
        settings = default_settings()
        supervisor, workers = Supervisor(store, Zygote(), settings, _nobody), Workers()
        app = Router(supervisor, workers).application(Guard(settings, TokenSet({})))
        Feed(supervisor, workers).install(app)
        Metrics(supervisor, workers, lambda: (0, 0)).install(app)
    served = {
        (route.method.lower(), route.resource.canonical.replace("{key}", "{name}"))
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    extra = {("get", "/openapi.json"), ("get", "/docs"), ("*", "/instances/{name}/{rest}")}
    assert extra <= served
    assert served - extra <= {(operation.method, operation.path) for operation in openapi.OPERATIONS}
    assert {(operation.method, operation.path) for operation in openapi.daemon_operations()} <= served


async def _nobody(_: Instance) -> None:
    """Tells no worker anything."""


def test_references_lead_somewhere() -> None:
    names = set(re.findall(REFERENCE + r"(\w+)", openapi.text()))
    assert names <= set(SCHEMAS)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = openapi.page()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=.?(?:https?:)?//", page)
    for target in re.findall(r'href="#(\w+)"', page):
        assert f"id={target}>" in page
    for operation in openapi.OPERATIONS:
        assert f"<code>{operation.path}</code>" in page
