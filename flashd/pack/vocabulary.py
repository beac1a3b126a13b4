"""What a bundle keeps of a tokenizer, and how tokens are spelled in the vocabularies that are known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer

from flashd.bundle.header import Channels
from flashd.bundle.token_bytes import TokenBytes

END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<|end_of_text|>", "<end_of_turn>", "</s>")
"""Tokens that end an answer wherever they are control tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """What a bundle keeps of a tokenizer."""

    tokenizer_json: bytes
    token_bytes: TokenBytes
    eos: list[int]  # the model's own first
    bos: int | None
    add_bos: bool
    chat_template: str | None
    channels: Channels | None = None


HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
HARMONY_ENDS = ("<|return|>", "<|call|>")
"""OpenAI's control tokens; the first four frame each thing that is said, and only the others end an answer."""


def channels_of(tokenizer: Tokenizer) -> Channels | None:
    """The channels in which a model speaks. None if its tokenizer has no tokens for them."""
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if not {*HARMONY, HARMONY_ENDS[0]} <= added.keys():
        return None
    start, channel, message, end = (added[text] for text in HARMONY)
    role, final = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("assistant", "final"))
    return Channels(
        start=start, channel=channel, message=message, end=end, opens=[start, *role],
        final=[channel, *final, message],
    )  # fmt: skip


def ends_of(stated: Iterable[int], tokenizer: Tokenizer, channels: Channels | None) -> list[int]:
    """The tokens that end an answer, of those that are `stated` or well known; what only ends a thought is none."""
    ends = [i for i in stated if channels is None or i != channels.end]
    if channels:
        ends += [i for text in HARMONY_ENDS if (i := tokenizer.token_to_id(text)) is not None]
    return list(dict.fromkeys(ends))


def byte_level_bytes(text: str) -> bytes:
    """GPT-2's printable stand-ins for bytes, undone."""
    if all(c in _STAND_INS for c in text):
        return bytes(_STAND_INS[c] for c in text)
    return text.encode()


def sentence_piece_bytes(text: str) -> bytes:
    """A piece's text, where spaces are U+2581."""
    return text.replace("▁", " ").encode()


def byte_token(text: str) -> bytes:
    """The byte that a token such as <0x0A> falls back to. Raises ValueError."""
    return bytes([int(text[3:5], 16)])


def _stand_ins() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


_STAND_INS = _stand_ins()
