"""Schemas that no answer could follow to an end are refused by name; what only repeats itself is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashd.bundle.reader import Bundle
from flashd.engine.decoding.schemas import OF_ANSWER, Schemas, held_by_answer
from flashd.engine.decoding.tools.calls import Calling, Tool
from flashd.engine.engine import Prompts
from flashd.errors import UsageError
from flashd.system.memory import MIB, resident_now

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


@pytest.mark.parametrize("pattern", [".*a.{30}", "(a|b)*a(a|b){18}"])
def test_a_schema_that_takes_too_much_to_follow_ends_its_answer(pattern: str, packed: dict[str, Path]) -> None:
    """Its states grow with each character, and each takes memory. Others' answers in the same pass go on."""
    with Bundle(packed["int4"]) as bundle:
        size, ends = bundle.header.model.vocabulary, bundle.header.text.eos
        answer = Schemas(bundle).compile({"type": "string", "pattern": pattern})
        before = resident_now()
        random = np.random.default_rng(0)
        said: list[int] = []
        while len(said) < 200 and not set(ends) & set(said):
            allowed = np.flatnonzero(np.isfinite(answer.mask(np.zeros(size, np.float32))))
            said.append(int(random.choice(allowed)))
            answer.advance(said[-1])
        assert resident_now() - before < OF_ANSWER + 4 * MIB


@pytest.mark.parametrize("count", [1, 200])
def test_a_grammar_takes_no_more_than_is_planned(count: int, tiny_bundle: Path) -> None:
    numbers = {f"a{i}": {"type": "number", "minimum": i / 7, "maximum": i * 1.37 + 100_000} for i in range(count)}
    schema = {"type": "object", "properties": numbers}
    with Bundle(tiny_bundle) as bundle:
        schemas = Schemas(bundle)
        kept = [schemas.compile(schema)]
        before = resident_now()
        kept += [schemas.compile(schema) for _ in range(4)]
        assert resident_now() - before < 4 * held_by_answer(schema)
        tools = tuple(Tool(name=f"f{i}", parameters=schema) for i in range(64 if count == 1 else 1))
        grammar = Prompts(bundle).speaking(Calling(tools=tools)).grammar
        before = resident_now()
        kept += [schemas.compile_calls(tools, grammar) for _ in range(4)]
        assert resident_now() - before < 4 * held_by_answer(*(tool.schema for tool in tools))
