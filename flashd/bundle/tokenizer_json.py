"""What a tokenizer.json may ask for, checked before the tokenizers library makes anything of it.

The library keeps a promise to nobody: a few Replace steps that double a text make a gigabyte of one letter, and the
number of a token is room for as many. What a text grows to is multiplied here, and numbers are compared with counts.
"""

from __future__ import annotations

from typing import Any

import msgspec

from flashd.errors import NOT_JSON, DataError

LONGEST = 64 << 20
"""Bytes. A vocabulary of 262,000 tokens takes 33 MB."""

MOST_GROWTH = 64
"""How many times as long a text may become. The models that are known make it three times as long."""


class _Added(msgspec.Struct):
    id: int


class _Steps(msgspec.Struct):
    """What changes a text before it is cut."""

    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None


class _Numbers(msgspec.Struct):
    """The model's own tokens have numbers, or places in a list."""

    model: dict[str, Any]
    added_tokens: list[_Added] = []


def check_growth(data: bytes) -> None:
    """Raises DataError for a tokenizer that makes texts much longer, or is far too long itself."""
    if len(data) > LONGEST:
        raise DataError(f"a tokenizer of {len(data)} bytes; {LONGEST} at the most")
    steps = _decoded(data, _Steps)
    try:
        growth = _growth(steps.normalizer) * _growth(steps.pre_tokenizer)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"a tokenizer whose steps make no sense ({error})") from error
    if growth > MOST_GROWTH:
        raise DataError(f"a tokenizer that makes a text {growth} times as long; {MOST_GROWTH} times at the most")


def check_numbers(data: bytes, rows: int) -> None:
    """Raises DataError if a token has a number that so many rows and tokens give no reason for."""
    found = _decoded(data, _Numbers)
    vocab = found.model.get("vocab")
    numbers = [*vocab.values()] if isinstance(vocab, dict) else []
    numbers += [added.id for added in found.added_tokens]
    if not all(isinstance(number, int) for number in numbers):
        raise DataError("a tokenizer whose tokens have no numbers")
    most = rows + len(numbers)
    if odd := [number for number in numbers if not 0 <= number < most]:
        raise DataError(f"a token has the number {odd[0]}, with {len(numbers)} tokens and a model of {rows}")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with none that the tokenizer adds. Raises DataError if it fails."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except BaseException as error:
        # the library's own panic is not an Exception: a regular expression that never ends brings it about
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"the tokenizer fails on a text ({what[:200]}); pack the model again") from error
        raise


def _growth(step: Any) -> int:
    """How many times as long a step, or all within it, may make a text of one character."""
    if step is None:
        return 1
    growth = 1
    for inner in [*step.get("normalizers", []), *step.get("pretokenizers", [])]:
        growth *= _growth(inner)
        if growth > MOST_GROWTH:  # a long list of steps is not worth a number of a thousand digits
            return growth
    match step.get("type"):
        case "Replace":
            return growth * _replaced(step["pattern"], len(step["content"]))
        case "Prepend":
            return growth * (1 + len(step["prepend"]))
        case "ByteLevel":
            return growth * 2
    return growth


def _replaced(pattern: dict[str, str], content: int) -> int:
    """A regular expression may match nothing, before each character and at the end."""
    literal = pattern.get("String")
    return max(1, -(-content // len(literal))) if literal else 2 + 2 * content


def _decoded(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except NOT_JSON as error:
        raise DataError(f"a tokenizer that is not JSON of the known kind ({error})") from error
