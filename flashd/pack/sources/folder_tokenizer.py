"""A Hugging Face folder's tokenizer.json, and what stands beside it -> a vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from flashd.bundle import tokenizer_json
from flashd.bundle.token_bytes import TokenBytes, frames_thoughts
from flashd.errors import DataError, InputMissing
from flashd.pack.sources.folder_templates import folder_template
from flashd.pack.sources.json_file import Json, read_file, read_object
from flashd.pack.vocabulary import (
    END_TEXTS,
    Vocabulary,
    byte_level_bytes,
    byte_token,
    channels_of,
    ends_of,
    sentence_piece_bytes,
)

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
"""Where the special tokens are named, the first that does so being right."""


def read_tokenizer_json(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a folder whose model has `size` tokens. Raises InputMissing, DataError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputMissing(
            f"{path}: no such file; make it with transformers: AutoTokenizer.from_pretrained(F).save_pretrained(F)"
        )
    try:
        data = read_file(path, tokenizer_json.LONGEST)
        tokenizer_json.check_numbers(data, size)
        tokenizer, stated = tokenizer_json.read(data)[0], json.loads(data)
        spell = _spelling(stated)
    except Exception as error:
        raise DataError(f"{path}: not a tokenizer that is read ({error}); download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    beside = [read_object(folder / name) for name in BESIDE]
    added = {int(t["id"]): (str(t["content"]), t.get("special") is True) for t in stated.get("added_tokens", [])}
    bos = next(_ids(tokenizer, beside, "bos"), None)
    spelled = [b""] * size
    for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
        if i < size:
            spelled[i] = spell(token)
    for i, (token, special) in added.items():
        if i < size:
            spelled[i] = b"" if special and not frames_thoughts(token) else token.encode()
    ends = [*_ids(tokenizer, beside, "eos"), *(i for i, (t, special) in added.items() if special and t in END_TEXTS)]
    channels = channels_of(tokenizer)
    return Vocabulary(
        tokenizer_json=tokenizer.to_str().encode(),
        token_bytes=TokenBytes.of(spelled),
        eos=ends_of((i for i in ends if i < size), tokenizer, channels),
        bos=bos,
        add_bos=_adds_bos(tokenizer, beside[0], bos),
        chat_template=folder_template(folder, beside[0]),
        channels=channels,
    )


def _spelling(stated: Json) -> Callable[[str], bytes]:
    """How the tokens of a tokenizer are turned into bytes, by what it says of its decoder. Raises ValueError."""
    decoder = stated.get("decoder") or {}
    kinds = {decoder.get("type"), *(step["type"] for step in decoder.get("decoders", []))}
    if "ByteLevel" in kinds:
        return byte_level_bytes
    if kinds & {"ByteFallback", "Metaspace"}:
        return lambda text: byte_token(text) if BYTE_TOKEN.fullmatch(text) else sentence_piece_bytes(text)
    raise ValueError(f"its decoder is {decoder.get('type')}; known are ByteLevel, ByteFallback, Metaspace")


def _ids(tokenizer: Tokenizer, beside: list[Json], name: str) -> Iterator[int]:
    """The numbers of a special token, the one that the tokenizer's own files name first."""
    for stated in beside:
        token = stated.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and (number := tokenizer.token_to_id(text)) is not None:
            yield number
        numbers = stated.get(f"{name}_token_id")
        yield from (i for i in (numbers if isinstance(numbers, list) else [numbers]) if isinstance(i, int))


def _adds_bos(tokenizer: Tokenizer, config: Json, bos: int | None) -> bool:
    """What the configuration says; where it says nothing, what the tokenizer itself does."""
    stated = config.get("add_bos_token")
    return stated if isinstance(stated, bool) else bos is not None and tokenizer.encode("a").ids[:1] == [bos]
