"""What a tokenizer.json may ask for, checked before the tokenizers library makes anything of it.

The library keeps a promise to nobody: a few Replace steps that double a text make a gigabyte of one letter, and the
number of a token is room for as many. What a text grows to is multiplied here, and numbers are compared with counts.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import msgspec

from flashd.errors import NOT_JSON, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 64 << 20
"""Bytes. A vocabulary of 262,000 tokens takes 33 MB."""

MOST_GROWTH = 64
"""How many times as many bytes a text may become. Known models make them 12 times as many at the most."""

CUTS = (
    "BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts",
    "Whitespace", "WhitespaceSplit",
)  # fmt: skip
"""Steps that only cut a text."""

GROWTH = {
    "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 12, "ByteLevel": 2, "Metaspace": 6,
    **dict.fromkeys(("Sequence", "Strip", "StripAccents", "Nmt", *CUTS), 1),
}  # fmt: skip
"""How many times as many bytes of UTF-8 a step may make of a text, by its type.

Of Unicode's forms as unicode.org/faq/normalization.html says. A small letter takes at most half as much again as the
capital. BERT's step sets spaces around a character, takes it apart and makes it small. A metaspace has three bytes
and may be set before one.
"""


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


def read(data: bytes) -> tuple[Tokenizer, int]:
    """The library's tokenizer, and how many times as many bytes it may make of a text.

    Raises DataError for a tokenizer that makes too many, is far too long itself, or is none.
    """
    growth = checked_growth(data)
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(data), growth
    except BaseException as error:
        raise _failed("a tokenizer that is none", error) from error


def checked_growth(data: bytes) -> int:
    """How many times as many bytes a tokenizer may make of a text. Raises DataError if it is too much."""
    if len(data) > LONGEST:
        raise DataError(f"a tokenizer of {len(data)} bytes; {LONGEST} at the most")
    steps = _decoded(data, _Steps)
    try:
        growth = _growth(steps.normalizer) * _growth(steps.pre_tokenizer)
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        raise DataError(f"a tokenizer whose steps make no sense ({error})") from error
    if growth > MOST_GROWTH:
        raise DataError(f"a tokenizer that makes a text {growth} times as long; {MOST_GROWTH} times at the most")
    return growth


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
        raise _failed("the tokenizer fails on a text", error, "; pack the model again") from error


def _failed(what: str, error: BaseException, do: str = "") -> BaseException:
    """A DataError for the library's own errors. Its panic is not an Exception: a regular expression can cause one."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        return DataError(f"{what} ({said[:200]}){do}")
    return error


def _growth(step: Any) -> int:
    """How many times as long a step, or all within it, may make a text of one character."""
    if step is None:
        return 1
    growth = 1
    for inner in [*step.get("normalizers", []), *step.get("pretokenizers", [])]:
        growth *= _growth(inner)
        if growth > MOST_GROWTH:  # a long list of steps is not worth a number of a thousand digits
            return growth
    match kind := step.get("type"):
        case "Replace":
            return growth * _replaced(step["pattern"], len(step["content"].encode()))
        case "Prepend":
            return growth * (1 + len(step["prepend"].encode()))
        case "Precompiled":
            return growth * _longest_of(base64.b64decode(step["precompiled_charsmap"] or ""))
    if kind not in GROWTH:
        raise ValueError(f"{kind!r} is not a step that is known")
    return growth * GROWTH[kind]


def _replaced(pattern: dict[str, str], content: int) -> int:
    """A regular expression may match nothing, before each character and at the end."""
    literal = pattern.get("String")
    return max(1, -(-content // len(literal.encode()))) if literal else 2 + 2 * content


def _longest_of(charsmap: bytes) -> int:
    """Bytes of the longest text in a map of SentencePiece's: the size of an index, the index, texts that end in 0."""
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max(1, *map(len, texts.split(b"\0")))


def _decoded(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except NOT_JSON as error:
        raise DataError(f"a tokenizer that is not JSON of the known kind ({error})") from error
