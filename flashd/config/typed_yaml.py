"""A YAML file -> a msgspec struct. An error names the line, the key and what is allowed, in the file's own words.

A text that has to match a pattern says in its Meta's description what that allows. A value that people write in
several ways names in its Meta's `extra` what reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import msgspec
from msgspec import inspect

from flashd.config import plain_yaml
from flashd.config.fields import READ
from flashd.config.plain_yaml import Document

T = TypeVar("T")
Steps = Sequence[str | int]
"""The keys and list places that lead to a value."""

KINDS = {
    "array": "a list: lines that begin with -", "object": "keys with their values", "int": "a whole number",
    "float": "a number", "str": "a text: put it in quotes", "bool": "true or false",
}  # fmt: skip
"""What msgspec calls them, and what they are in the file."""

LIMITS = {">=": "of at least", "<=": "of at most", ">": "above", "<": "below"}

UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
MISSING = re.compile(r"Object missing required field `(.+)`")
VALUE = re.compile(r"Invalid (?:enum )?value '?(.*?)'?$", re.DOTALL)
MISTAKEN = re.compile(r"Expected `(\w+)[^`]*`, got `(\w+)`$")
RANGE = re.compile(r"Expected `(int|float)` (<=|>=|<|>) (\S+)$")
SHORT = re.compile(r"Expected `array` of length >= (\d+)$")
"""How msgspec says what is wrong."""


class Wrong(Exception):
    """A file that is not what it should be; the text goes on from its name: ", line 3: serial 'usb', baud: ..."."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(f": {what}" if line is None else f", line {line}: {what}")


def read(path: Path, most: int) -> str:
    """The text of a file of at most `most` bytes: what YAML makes of one takes a hundred times as much RAM.

    Raises OSError, Wrong.
    """
    with path.open("rb") as file:
        return text_of(file.read(most + 1), most)


def text_of(data: bytes, most: int) -> str:
    """The text of a file's bytes, as `read` gives it. Raises Wrong."""
    if len(data) > most:
        raise Wrong(f"more than {most} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Wrong(f"not UTF-8 (byte {error.start})") from error


def parse(text: str, kind: type[T]) -> tuple[T, Document]:
    """The struct that a text says, and where in it what is. Raises Wrong."""
    try:
        document = plain_yaml.parse(text)
    except plain_yaml.YamlError as error:
        raise Wrong(str(error), error.line) from error
    value = {} if document.value is None else document.value
    try:
        return msgspec.convert(_as_meant(_whole(cast(Any, kind)), value, ()), kind), document
    except _NotMeant as error:
        raise Wrong(_before(error.path, value) + str(error), document.line(error.path)) from error
    except msgspec.ValidationError as error:
        what, path = _taken_apart(str(error))
        unknown = UNKNOWN.match(what)
        line = document.line([*path, unknown.group(1)] if unknown else path)
        raise Wrong(_before(path, value) + _explained(what, *_place(kind, path, value)), line) from error


def place_words(path: Steps, root: Any) -> str:
    """A path into `root` in words: "trigger 'ask', pin", "outputs[0] (led), pin", "answer.top_p"."""
    words, between = "", ""
    for step in path:
        root = _inside(root, step)
        if isinstance(step, int):
            words, between = _entry_words(words, step, root), ", "
        else:
            words, between = f"{words}{between}{step}", "."
    return words


def _entry_words(what: str, number: int, entry: Any) -> str:
    """An entry of a list, by its name if it has one."""
    name, kind = _inside(entry, "name"), _inside(entry, "kind")
    if isinstance(name, str) and what.isidentifier():
        return f"{what.removesuffix('s')} {name[:40]!r}"
    return f"{what}[{number}]" + (f" ({kind})" if isinstance(kind, str) and kind.isidentifier() else "")


def _inside(value: Any, step: str | int) -> Any:
    """What a step leads to in the file's tree or in what was made of it. None if nothing is there."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        return config.tag if step == config.tag_field else getattr(value, str(step), None)
    try:
        return value[step]
    except (TypeError, KeyError, IndexError):
        return None


def _before(path: Steps, root: Any) -> str:
    words = place_words(path, root)
    return f"{words}: " if words else ""


class _NotMeant(Exception):
    """A value that its reader does not understand."""

    def __init__(self, path: Steps, text: str) -> None:
        super().__init__(text)
        self.path = path


def _as_meant(place: _Place, value: Any, path: tuple[str | int, ...]) -> Any:
    """The value with what people write in several ways as it is meant. Raises _NotMeant."""
    if place.read is not None and value is not None:
        try:
            return place.read(value)
        except ValueError as error:
            raise _NotMeant(path, str(error)) from error
    if isinstance(value, dict) and place.types:
        return {
            k: _as_meant(place.within(k, value), v, (*path, k)) if isinstance(k, str) else v for k, v in value.items()
        }
    if isinstance(value, list) and place.types:
        return [_as_meant(place.within(i, value), v, (*path, i)) for i, v in enumerate(value)]
    return value


def _taken_apart(text: str) -> tuple[str, list[str | int]]:
    """msgspec's 'what - at `$.a[0].b`' -> (what, ['a', 0, 'b'])."""
    what, _, where = text.partition(" - at `$")
    steps: list[str | int] = []
    for word, number in re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", where):
        steps.append(int(number) if number else word)
    return what, steps


class _Place(NamedTuple):
    """What may be at a place of the file."""

    types: list[inspect.Type]  # any of these
    words: str  # for what a pattern of it allows; empty if there is none
    read: Callable[[Any], Any] | None = None  # what people write -> what is meant

    @classmethod
    def of(cls, kind: inspect.Type) -> _Place:
        if isinstance(kind, inspect.Metadata):
            words = (kind.extra_json_schema or {}).get("description", "")
            return cls(cls.of(kind.type).types, words, (kind.extra or {}).get(READ))
        places = [cls.of(k) for k in kind.types] if isinstance(kind, inspect.UnionType) else [cls([kind], "")]
        return cls(
            [t for place in places for t in place.types],
            "".join(place.words for place in places),
            next((place.read for place in places if place.read), None),
        )

    def struct(self, value: Any) -> inspect.StructType | None:
        """The one that describes `value`, of several the one that it says it is."""
        structs = [t for t in self.types if isinstance(t, inspect.StructType)]
        said = [s for s in structs if s.tag_field and isinstance(value, dict) and value.get(s.tag_field) == s.tag]
        return next(iter(said or structs), None)

    def within(self, step: str | int, value: Any) -> _Place:
        """The place that `step` leads to, where `value` is here."""
        tags = [t.tag for t in self.types if isinstance(t, inspect.StructType) and t.tag_field == step]
        if tags:
            return _Place([inspect.LiteralType(tuple(tags))], "")
        lists = [t.item_type for t in self.types if isinstance(t, inspect.ListType)]
        struct = self.struct(value)
        fields = [f.type for f in struct.fields if f.encode_name == step] if struct else []
        return _Place.of(inspect.UnionType(tuple(lists if isinstance(step, int) else fields)))


@cache
def _whole(kind: Any) -> _Place:
    """What a whole file may be."""
    return _Place.of(inspect.type_info(kind))


def _place(kind: Any, path: Steps, value: Any) -> tuple[_Place, Any]:
    """What may be where `path` leads, and what is."""
    place = _whole(kind)
    for step in path:
        place, value = place.within(step, value), value[step]
    return place, value


def _explained(what: str, place: _Place, value: Any) -> str:
    """What msgspec says of the value at a place, in the file's own words, with what is allowed."""
    if unknown := UNKNOWN.match(what):
        struct = place.struct(value)
        keys = [struct.tag_field or "", *(f.encode_name for f in struct.fields)] if struct else []
        return _not_known(unknown.group(1), filter(None, keys))
    if missing := MISSING.match(what):
        return f"{missing.group(1)!r} is missing"
    if invalid := VALUE.match(what):
        literals = (t.values for t in place.types if isinstance(t, inspect.LiteralType))
        return _not_known(invalid.group(1), (str(v) for values in literals for v in values))
    if what.startswith("Expected `str` matching regex"):
        return f"expected {place.words}"
    if isinstance(value, str) and re.fullmatch(r"0[0-9]+", value) and what == "Expected `int`, got `str`":
        return f"expected a whole number with no 0 before it: {int(value)}"
    if limit := RANGE.match(what):
        return f"expected {KINDS[limit[1]]} {LIMITS[limit[2]]} {float(limit[3]):g}"
    if short := SHORT.match(what):
        return f"expected a list with {short[1]} or more entries"
    if what == "Expected `str`, got `bool`":
        return "expected a text; quote it: YAML takes yes, no, on and off for true and false"
    if mistaken := MISTAKEN.match(what):
        wanted = place.words or KINDS.get(mistaken.group(1), mistaken.group(1))
        return f"expected {wanted}" + ("; or leave the key out" if mistaken.group(2) == "null" else "")
    return what[:1].lower() + what[1:]


def _not_known(what: str, allowed: Iterable[str]) -> str:
    return f"{what!r} is not known; allowed are {', '.join(allowed)}"
