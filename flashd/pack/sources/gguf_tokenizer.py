"""A GGUF file's vocabulary -> a `tokenizers` JSON and the texts of its tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from flashd.bundle.token_bytes import TokenBytes, frames_thoughts
from flashd.errors import DataError, UsageError
from flashd.pack.open_model import OpenModel
from flashd.pack.vocabulary import (
    END_TEXTS,
    Vocabulary,
    byte_level_bytes,
    byte_token,
    channels_of,
    ends_of,
    sentence_piece_bytes,
)

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of tokenizer.ggml.token_type."""

# Split patterns as the models' own tokenizers publish them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# cased letters; DeepSeek lists those of Unicode 11, without the mathematical ones
DEEPSEEK = (
    r"[\r\n]", r"\s?[[\p{Lu}\p{Ll}\p{Lt}]&&[^\x{1d400}-\x{1d7ff}]]+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+", r"\s+$",
    r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+", r"\p{N}+",
)  # fmt: skip
TEKKEN = GPT4O.replace(SHORT, "").replace(r"\p{N}{1,3}", r"\p{N}")

SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "qwen2": (QWEN2,),
    "qwen35": (QWEN35,),
    "llama-bpe": (LLAMA3,),
    "gpt-4o": (GPT4O,),
    "tekken": (TEKKEN,),
    "deepseek-llm": DEEPSEEK,
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),  # llama.cpp's
}
"""Patterns that cut a text into words, each within what those before it left."""

SAME_SPLITS = {
    "phi-2": "gpt-2", "mpt": "gpt-2", "olmo": "gpt-2", "starcoder": "smollm", "refact": "smollm",
    "command-r": "smollm", "stablelm2": "qwen2", "deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe",
    "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "smaug-bpe": "llama-bpe", "dbrx": "llama-bpe",
    "lfm2": "llama-bpe", "falcon-h1": "llama-bpe", "pixtral": "llama-bpe", "glm4": "llama-bpe",
    "chatglm-bpe": "llama-bpe",
}  # fmt: skip
"""Other values of tokenizer.ggml.pre, and those whose splits are theirs."""

KNOWN = sorted({*SPLITS, *SAME_SPLITS})

WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "lfm2", "falcon-h1", "pixtral")
"""Those in which a word that is a token is not put together from its parts, and in which `bos` begins every text."""

COMPOSED = ("qwen2", "qwen35", "stablelm2", "deepseek-r1-qwen")
"""Those that compose letters and accents first, as NFC does."""


def read_vocabulary(source: OpenModel, size: int, pre: str | None) -> Vocabulary:
    """The vocabulary of a GGUF file whose model has `size` rows of embeddings.

    `pre`: the pre-tokenizer, whatever the file says. Raises UsageError if flashd does not know it, DataError if the
    file's tokenizer is of an unknown kind or incomplete.
    """
    texts = _texts(source, "tokenizer.ggml.tokens")
    types = source.metadata("tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    if not isinstance(types, list) or len(types) != len(texts):
        raise DataError(f"{source.path}: {len(texts)} tokens but not as many token types")
    if len(texts) > size:
        raise DataError(f"{source.path}: {len(texts)} tokens but only {size} rows of embeddings")
    kind = source.text("tokenizer.ggml.model")
    if pre is not None and kind != "gpt2":
        raise UsageError(f"--pre {pre}: only tokenizers of kind gpt2 have a pre-tokenizer, and this one is {kind!r}")
    if kind == "gpt2":
        pre = pre or _pre_tokenizer(source)
        tokenizer, spell = _byte_level(source, texts, pre), byte_level_bytes
    elif kind == "llama":
        tokenizer, spell = _sentence_piece(source, texts, types), sentence_piece_bytes
    elif kind == "gemma4":
        tokenizer, spell = _merged(source, texts, types), sentence_piece_bytes
    else:
        known = "gpt2, llama, gemma4"
        raise DataError(f"{source.path}: a tokenizer of kind {kind!r} is not supported; known are {known}")
    _add_tokens(tokenizer, texts, types)
    bos, channels = source.metadata("tokenizer.ggml.bos_token_id"), channels_of(tokenizer)
    template = source.metadata("tokenizer.chat_template")
    if template is None and (named := sorted(k for k in source.keys if k.startswith("tokenizer.chat_template."))):
        log.warning("%s: it has no default chat template, and of %s none is taken", source.path, ", ".join(named))
    return Vocabulary(
        tokenizer_json=tokenizer.to_str().encode(),
        # rows that only fill the table are no text
        token_bytes=TokenBytes.of(
            [_spelled(spell, *token) for token in zip(texts, types, strict=True)] + [b""] * (size - len(texts))
        ),
        eos=ends_of(_end_tokens(source, texts, types), tokenizer, channels),
        bos=bos if isinstance(bos, int) else None,
        add_bos=_adds_bos(source, kind),
        chat_template=template if isinstance(template, str) else None,
        channels=channels,
    )


def _add_tokens(tokenizer: Tokenizer, texts: list[str], types: list[int]) -> None:
    """Makes tokens of what is never cut: control tokens, and words that the model's makers chose."""
    for special, kinds in ((True, (CONTROL, UNKNOWN)), (False, (USER_DEFINED,))):
        tokens = [text for text, kind in zip(texts, types, strict=True) if kind in kinds and text]
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in tokens])


def _spelled(spell: Callable[[str], bytes], text: str, kind: int) -> bytes:
    """What a token adds to a text."""
    if kind in (CONTROL, UNKNOWN, UNUSED):
        return text.encode() if frames_thoughts(text) else b""
    if kind == USER_DEFINED:
        return text.encode()
    return byte_token(text) if kind == BYTE else spell(text)


def _texts(source: OpenModel, key: str) -> list[str]:
    value = source.metadata(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataError(f"{source.path}: {key!r} is missing or no list of texts")
    return value


def check_pre(pre: str) -> None:
    """Raises UsageError for a pre-tokenizer that flashd does not know."""
    if pre not in KNOWN:
        raise UsageError(f"--pre {pre}: not known; known are {', '.join(KNOWN)}")


def _pre_tokenizer(source: OpenModel) -> str:
    """The name of the file's own. Raises DataError if flashd does not know it."""
    stated = source.metadata("tokenizer.ggml.pre")
    if stated is None:
        log.warning(
            "%s: the file does not say how its tokenizer splits words (tokenizer.ggml.pre); the default is taken, as"
            " llama.cpp does, and answers may be worse. --pre NAME says it; known are %s",
            source.path, ", ".join(KNOWN),
        )  # fmt: skip
        return "default"
    if stated not in KNOWN:
        raise DataError(
            f"{source.path}: pre-tokenizer {stated!r} is not supported; --pre NAME takes another one, if you know"
            f" that it splits words alike; known are {', '.join(KNOWN)}"
        )
    return str(stated)


def _byte_level(source: OpenModel, texts: list[str], pre: str) -> Tokenizer:
    splits = SPLITS[SAME_SPLITS.get(pre, pre)]
    merges: list[Any] = [tuple(m.split(" ", 1)) for m in _texts(source, "tokenizer.ggml.merges")]
    vocab = {t: i for i, t in enumerate(texts)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    except Exception as error:
        raise DataError(f"{source.path}: the tokenizer's merges do not fit its tokens ({error})") from error
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(source: OpenModel, texts: list[str], types: list[int]) -> Tokenizer:
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


def _merged(source: OpenModel, texts: list[str], types: list[int]) -> Tokenizer:
    """Gemma 4's: spelled as SentencePiece does, with merges of its own. Runs of new lines are words of their own, see
    LLAMA_VOCAB_PRE_TYPE_GEMMA4 in llama.cpp's src/llama-vocab.cpp."""
    merges: list[Any] = [tuple(m.split(" ", 1)) for m in _texts(source, "tokenizer.ggml.merges")]
    unknown = next((t for t, kind in zip(texts, types, strict=True) if kind == UNKNOWN), None)
    vocab = {t: i for i, t in enumerate(texts)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    except Exception as error:
        raise DataError(f"{source.path}: the tokenizer's merges do not fit its tokens ({error})") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), behavior="isolated")
    return tokenizer


def _adds_bos(source: OpenModel, kind: str) -> bool:
    """What the file says; where it says nothing, what its kind of tokenizer does."""
    stated = source.metadata("tokenizer.ggml.add_bos_token")
    if stated is None:
        return kind in ("llama", "gemma4") or source.metadata("tokenizer.ggml.pre") in WHOLE_WORDS
    return stated is True


def _end_tokens(source: OpenModel, texts: list[str], types: list[int]) -> list[int]:
    """Every token that ends an answer: the file's own, and the well-known ones that are control tokens here."""
    ends = [source.metadata(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    ends += [i for i, t in enumerate(texts) if t in END_TEXTS and types[i] == CONTROL]
    return list(dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < len(texts)))
