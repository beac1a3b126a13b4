"""A GGUF file's vocabulary -> a `tokenizers` JSON and the texts of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from flashd.bundle.token_bytes import TokenBytes
from flashd.errors import DataError
from flashd.pack.gguf import GgufModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of tokenizer.ggml.token_type."""

END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<|end_of_text|>", "</s>")

# Split patterns as the models' own tokenizers publish them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "qwen2": lambda: _split(QWEN2),
    "llama-bpe": lambda: _split(LLAMA3),
}

NORMALISED = {"qwen2": normalizers.NFC()}


@dataclass(frozen=True)
class Vocabulary:
    """What a bundle keeps of a tokenizer."""

    tokenizer_json: bytes
    token_bytes: TokenBytes
    eos: list[int]
    bos: int | None
    add_bos: bool
    chat_template: str | None


def read_vocabulary(source: GgufModel) -> Vocabulary:
    """The vocabulary of a model file. Raises DataError where its tokenizer is of an unknown kind or incomplete."""
    texts = _texts(source, "tokenizer.ggml.tokens")
    types = source.metadata("tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    if not isinstance(types, list) or len(types) != len(texts):
        raise DataError(f"{source.path}: {len(texts)} tokens but not as many token types")
    kind = source.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(source, texts)
        spell = _byte_level_bytes()
    elif kind == "llama":
        tokenizer = _sentence_piece(source, texts, types)
        spell = _sentence_piece_bytes
    else:
        raise DataError(f"{source.path}: a tokenizer of kind {kind!r} is not supported; known are gpt2, llama")
    special = [i for i, t in enumerate(types) if t in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(texts[i], special=True, normalized=False) for i in special if types[i] == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(texts[i], special=False, normalized=False) for i in special if types[i] == USER_DEFINED]
    )
    spelled = [
        b"" if t in (CONTROL, UNUSED) else text.encode() if t == USER_DEFINED else spell(text, t)
        for text, t in zip(texts, types, strict=True)
    ]
    bos = source.metadata("tokenizer.ggml.bos_token_id")
    template = source.metadata("tokenizer.chat_template")
    return Vocabulary(
        tokenizer_json=tokenizer.to_str().encode(),
        token_bytes=TokenBytes.of(spelled),
        eos=_end_tokens(source, texts, types),
        bos=bos if isinstance(bos, int) else None,
        add_bos=_adds_bos(source, kind),
        chat_template=template if isinstance(template, str) else None,
    )


def _texts(source: GgufModel, key: str) -> list[str]:
    value = source.metadata(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataError(f"{source.path}: {key!r} is missing or no list of texts")
    return value


def _byte_level(source: GgufModel, texts: list[str]) -> Tokenizer:
    pre_value = source.metadata("tokenizer.ggml.pre")
    pre = pre_value if isinstance(pre_value, str) else "default"
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise DataError(f"{source.path}: pre-tokenizer {pre!r} is not supported; known are {known}")
    merges: list[Any] = [tuple(m.split(" ", 1)) for m in _texts(source, "tokenizer.ggml.merges")]
    vocab = {t: i for i, t in enumerate(texts)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:
        raise DataError(f"{source.path}: the tokenizer's merges do not fit its tokens ({error})") from error
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre in NORMALISED:
        tokenizer.normalizer = NORMALISED[pre]
    return tokenizer


def _sentence_piece(source: GgufModel, texts: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE: pairs merge in the order of their product's score."""
    scores = source.metadata("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise DataError(f"{source.path}: {len(texts)} tokens but not as many scores")
    index = {t: i for i, t in enumerate(texts)}
    ranked: list[tuple[float, str, str]] = []
    for text, score, kind in zip(texts, scores, types, strict=True):
        if kind == NORMAL and len(text) > 1:
            ranked += [
                (-score, text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in index and text[i:] in index
            ]
    ranked.sort(key=lambda r: r[0])
    unknown = next((t for t, kind in zip(texts, types, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=index,
            merges=[(a, b) for _, a, b in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = source.metadata("tokenizer.ggml.add_space_prefix") is not False
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    return tokenizer


def _byte_level_bytes() -> Callable[[str, int], bytes]:
    """GPT-2's printable stand-ins for bytes, undone."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}

    def spell(text: str, _: int) -> bytes:
        if all(c in table for c in text):
            return bytes(table[c] for c in text)
        return text.encode()

    return spell


def _sentence_piece_bytes(text: str, kind: int) -> bytes:
    if kind == BYTE:
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


def _adds_bos(source: GgufModel, kind: str) -> bool:
    """What the file says; where it says nothing, what its kind of tokenizer does."""
    stated = source.metadata("tokenizer.ggml.add_bos_token")
    if stated is None:
        return kind == "llama" or source.metadata("tokenizer.ggml.pre") == "llama-bpe"
    return stated is True


def _end_tokens(source: GgufModel, texts: list[str], types: list[int]) -> list[int]:
    """Every token that ends an answer: the file's own and the well-known ones that are control tokens here."""
    ends = {source.metadata(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")}
    ends |= {i for i, t in enumerate(texts) if t in END_TEXTS and types[i] == CONTROL}
    return sorted(i for i in ends if isinstance(i, int) and 0 <= i < len(texts))
