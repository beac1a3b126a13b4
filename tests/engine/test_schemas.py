"""Schemas that no answer could follow to an end are refused by name; what only repeats itself is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashd.bundle.reader import Bundle
from flashd.engine.decoding.schemas import Schemas
from flashd.errors import UsageError

pytest.importorskip("llguidance")

ENDLESS: list[dict[str, Any]] = [
    {"$ref": "#"},
    {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    {"type": "object", "properties": {"child": {"$ref": "#"}}, "required": ["child"]},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$defs": {"a/b": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}}}, "$ref": "#/$defs/a~1b"},
    {"type": "object", "properties": {"a": {"items": {"$ref": "#/properties/a"}}}},
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_a_schema_that_refers_to_itself_is_refused(schema: dict[str, Any], tiny_bundle: Path) -> None:
    with Bundle(tiny_bundle) as bundle, pytest.raises(UsageError, match=r"the schema refers to itself \(#"):
        Schemas(bundle).compile(schema)


def test_a_schema_may_use_a_part_twice_and_name_a_key_ref(tiny_bundle: Path) -> None:
    schema = {
        "$defs": {"level": {"type": "integer"}}, "type": "object", "additionalProperties": False,
        "properties": {"one": {"$ref": "#/$defs/level"}, "two": {"$ref": "#/$defs/level"}, "$ref": {"const": "#"}},
    }  # fmt: skip
    with Bundle(tiny_bundle) as bundle:
        Schemas(bundle).compile(schema)


def test_a_schema_that_is_too_deep_is_refused(tiny_bundle: Path) -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"not": schema}
    with Bundle(tiny_bundle) as bundle, pytest.raises(UsageError, match=r"nested too deeply|allowed is"):
        Schemas(bundle).compile(schema)
