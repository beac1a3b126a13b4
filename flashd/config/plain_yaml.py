"""YAML that anybody may have written -> plain values, each with its line.

What YAML can do and a configuration has no use for is refused: aliases, which make a short file a large tree; tags,
which have the library construct what the text is not; a key given twice; characters that no text has. A number is
what people take for one: 017 is not 15, and 17:30 is not 1050; both are texts here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from flashd.config import yaml_mistakes

MOST_NODES = 10_000
"""Keys, values, lists and mappings of a text: the library takes a second for as many on a small board."""


class YamlError(Exception):
    """A text that is not YAML, or more than plain values; `line` counts from 1."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(" ".join(text.split()))
        self.line = line


class Document(NamedTuple):
    """A text's value, None where it has none, and the tree that it was made of."""

    value: Any
    tree: yaml.Node | None

    def line(self, path: Sequence[str | int]) -> int:
        """The line of what `path` leads to, or of the last step of it that is there."""
        node = self.tree
        line = node.start_mark.line if node is not None else 0
        for step in path:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == step), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
                line = node.start_mark.line
        return int(line) + 1


def parse(text: str) -> Document:
    """Raises YamlError."""
    loader = None
    try:
        loader = _Loader(text)
        tree = loader.get_single_node()
        return Document(None if tree is None else loader.construct_document(tree), tree)
    except yaml.YAMLError as error:
        line, what = yaml_mistakes.explained(text, error)
        raise YamlError(line, what) from error
    except RecursionError as error:
        raise YamlError(1, "lists and mappings are too deep in one another") from error
    except (ValueError, OverflowError) as error:
        line = loader.get_mark().line + 1 if loader else 1
        raise YamlError(line, "an escape that is no character") from error


NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)\Z"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
"""PyYAML's, without octal numbers and those of base 60."""


class _Loader(yaml.SafeLoader):
    """Raises yaml.MarkedYAMLError if it refuses something."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the base class has it without ClassVar
        first: [(tag, NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise _refused(event, f"more than {MOST_NODES} keys and values")
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, "aliases are not allowed")
        if event.tag is not None:
            raise _refused(event, "tags are not allowed")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
            raise _refused(node, "a character that no text has")
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a day that is not in the calendar, a number of thousands of digits
            raise _refused(node, str(error)) from error


def _check_keys(mapping: yaml.MappingNode) -> None:
    known: set[str] = set()
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused(key, "a key is a word; put a text that begins with a brace in quotes")
        if key.value in known:
            raise _refused(key, f"{key.value} is given twice")
        known.add(key.value)


def _refused(at: Any, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=at.start_mark)
