"""Answers that follow a JSON schema or call tools: at each token, only tokens that can lead to a valid answer are
allowed.

The llguidance library does the grammar work. With a vocabulary of 49,000 tokens it takes 50 MiB. So `Schemas` is made
before the plan, which then counts that memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np

from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.bundle.tokenizer_json import check_numbers
from flashd.engine.decoding.tools.calls import Tool
from flashd.errors import DataError, FlashdError, InputMissing, UsageError
from flashd.system.freed_memory import give_back_freed_memory

MAX_SCHEMA = 16 << 10
"""The most characters of a schema, as JSON; of the schemas of all tools together."""

OF_ANSWER, OF_SCHEMA = 1 << 20, 200
"""Bytes that the grammar of an answer takes at the most, in any case and for each byte of its schema; measured."""

HELD_BY_ANSWERS = 8 << 20
"""Bytes of the grammars of those answers that grow together."""

HELD, HELD_PER_TOKEN = (4 << 20) + HELD_BY_ANSWERS + OF_ANSWER + OF_SCHEMA * MAX_SCHEMA, 1130
"""Bytes that the library takes: in any case, with a schema that is being checked, and for each token of the
vocabulary. Of what it takes for tokens it holds a fifth less once it is made.
"""

STEP_FUEL, MOST_STATES = 20_000, 1000
"""What following a schema may take. Without these limits the pattern .*a.{30} took 20 MiB, and 1 s for a token."""


def held_by_schemas(bundle: Bundle) -> int:
    """Bytes that Schemas takes for a bundle."""
    return HELD + HELD_PER_TOKEN * bundle.header.model.vocabulary


def held_by_answer(*schemas: dict[str, Any]) -> int:
    """Bytes that the grammar of an answer takes at the most, which may follow one of some schemas."""
    return OF_ANSWER + OF_SCHEMA * sum(len(json.dumps(schema)) for schema in schemas)


class Schemas:
    """Compiles schemas for one bundle.

    Raises InputMissing if llguidance is not installed, DataError if the model has no token that ends an answer.
    """

    def __init__(self, bundle: Bundle) -> None:
        header = bundle.header
        if not header.text.eos:
            raise DataError(
                f"{bundle.path}: the model has no token that ends an answer, so it cannot follow a schema"
            )
        try:
            import llguidance
        except ImportError as error:
            raise InputMissing("a json_schema needs the schema extra: pip install 'flashd[schema]'") from error
        self._library = llguidance
        self._vocabulary = header.model.vocabulary
        data = bundle.read("tokenizer")
        try:
            check_numbers(data, self._vocabulary)
            text, eos = data.decode(), header.text.eos[0]
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=self._vocabulary, eos_token=eos)
        except (ValueError, DataError) as error:
            raise DataError(f"{bundle.path}: its tokenizer follows no schema ({error}); pack it again") from error
        self._limits = llguidance.LLParserLimits(
            step_lexer_fuel=STEP_FUEL, max_lexer_states=MOST_STATES, verbose_errors=False,
        )  # fmt: skip
        give_back_freed_memory()

    def compile(self, schema: dict[str, Any]) -> JsonAnswer:
        """The constraint of one answer. Raises UsageError if the schema is too large or cannot be followed."""
        text = _checked(schema)
        if len(text) > MAX_SCHEMA:
            raise UsageError(f"a schema of {len(text)} bytes; allowed are {MAX_SCHEMA}")
        # no free whitespace: a model with nothing to say would fill the answer with it
        options: Any = {"whitespace_flexible": False}
        return self._answer("the schema", self._library.LLMatcher.grammar_from_json_schema, text, options)

    def compile_calls(self, tools: Sequence[Tool], grammar: str) -> JsonAnswer:
        """The constraint of one answer that may call some tools. Raises UsageError as `compile` does.

        `grammar`: as `grammar_of` makes it.
        """
        size = 0
        for tool in tools:
            try:
                size += len(_checked(tool.schema))
            except UsageError as error:
                raise UsageError(f"the parameters of {tool.name}: {error}") from error
        if size > MAX_SCHEMA:
            raise UsageError(f"parameters of {size} bytes; allowed are {MAX_SCHEMA} for all tools together")
        try:
            return self._answer("the parameters", self._library.LLMatcher.grammar_from_lark, grammar)
        except UsageError:
            for tool in tools:  # which of them it is
                self._answer(f"the parameters of {tool.name}", self._library.LLMatcher.grammar_from_json_schema,
                             json.dumps(tool.schema))  # fmt: skip
            raise

    def _answer(self, what: str, make: Callable[..., str], source: str, *options: Any) -> JsonAnswer:
        """The constraint that `make` makes of a source. Raises UsageError if that cannot be followed."""
        try:
            grammar = make(source, *options)
        except ValueError as error:
            raise UsageError(f"{what} cannot be followed: {str(error).splitlines()[0]}") from error
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UsageError(f"{what} cannot be followed: {matcher.get_error().splitlines()[0]}")
        return JsonAnswer(matcher, self._vocabulary)


def _checked(schema: dict[str, Any]) -> str:
    """The schema as JSON. Raises UsageError if it has no end."""
    try:
        _refuse_endless(schema)
        return json.dumps(schema)
    except RecursionError as error:
        raise UsageError("the schema is nested too deeply") from error


VALUES = ("const", "enum", "default", "examples")
"""Keys of a schema that hold no schemas."""


def _refuse_endless(schema: dict[str, Any]) -> None:
    """Raises UsageError if a part of the schema refers to what it is a part of: an answer to it may have no end."""
    seen: set[int] = set()
    open_nodes: set[int] = set()

    def visit(node: Any) -> None:
        if not isinstance(node, dict | list) or id(node) in seen:
            return
        open_nodes.add(id(node))
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key == "$ref" and isinstance(value, str):
                target = _referred(schema, value)
                if id(target) in open_nodes:
                    raise UsageError(
                        f"the schema refers to itself ({value}); write out as many levels as the answer may have"
                    )
                visit(target)
            elif key not in VALUES:
                visit(value)
        open_nodes.remove(id(node))
        seen.add(id(node))

    visit(schema)


def _referred(schema: dict[str, Any], reference: str) -> Any:
    """What "#/$defs/name" leads to; None if that is not in the schema, which the library then says."""
    node: Any = schema
    if reference in ("#", "#/"):
        return node
    for step in reference.removeprefix("#/").split("/"):
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and name.isdecimal() and int(name[:9]) < len(node):
            node = node[int(name[:9])]
        else:
            node = node.get(name) if isinstance(node, dict) else None
    return node


class JsonAnswer:
    """The Constraint of one answer that follows a schema."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)

    def mask(self, logits: Floats) -> Floats:
        """Logits [V] with minus infinity for the tokens that may not come next.

        If the schema takes too much to follow, only the token that ends the answer may come.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
        return np.where(allowed, logits, np.float32(-np.inf))

    def advance(self, token: int) -> None:
        """Is told that `token` was drawn. Raises FlashdError if the grammar does not allow it."""
        if not self._matcher.consume_token(token):
            raise FlashdError(f"the schema's grammar refused token {token}: {self._matcher.get_error()}")
