"""Runs sample text through a model while it is packed, layer by layer, to learn which neurons matter.

What comes of it decides only which groups are pinned first, and so how often a draft that has only those is
right. Answers do not depend on it.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from flashd.bundle.layout import Model
from flashd.bundle.rows import BLOCK, Floats
from flashd.pack.families import Family
from flashd.pack.source import Source

TOKENS = 384
"""Sample tokens. Twice as many move a group's rank by little and cost twice the time."""

ROWS_AT_ONCE = 2048


def sample_tokens(tokenizer_json: bytes) -> npt.NDArray[np.int64]:
    """The first tokens of the sample text that ships with flashd."""
    text = files("flashd.pack").joinpath("sample.txt").read_text("utf-8")
    ids = Tokenizer.from_buffer(tokenizer_json).encode(text, add_special_tokens=False).ids
    return np.array(ids[:TOKENS], np.int64)


class Calibration:
    """The sample's hidden states [T, H], one layer further with each call of `layer`."""

    def __init__(self, source: Source, family: Family, model: Model, tokens: npt.NDArray[np.int64]) -> None:
        self._source, self._family, self._model = source, family, model
        self._x: Floats = source.tensor("token_embd.weight").rows(tokens)

    def layer(self, i: int) -> npt.NDArray[np.int64]:
        """Takes the sample through layer i; returns the numbers [groups] of its groups, the hottest first."""
        at = f"blk.{i}."
        self._x = self._x + self._attention(i, self._normed(f"{at}attn_norm.weight"))
        h = self._normed(f"{at}ffn_norm.weight")
        gate, up = (self._product(h, f"{at}ffn_{part}.weight") for part in ("gate", "up"))
        with np.errstate(over="ignore"):
            a = gate / (1 + np.exp(-gate)) * up  # [T, F]
        down = self._source.tensor(f"{at}ffn_down.weight").rows()  # [H, F]
        self._x = self._x + a @ down.T
        return self._hottest_first(a, down)

    def _hottest_first(self, a: Floats, down: Floats) -> npt.NDArray[np.int64]:
        """Groups by the mean size of their neurons' shares in the output, |activation| x |down column|."""
        size = np.abs(a).mean(0) * np.linalg.norm(down, axis=0)  # [F]
        size = np.pad(size, (0, self._model.neurons - len(size)))
        return np.argsort(-size.reshape(-1, BLOCK).sum(1), kind="stable")

    def _normed(self, weight: str) -> Floats:
        scale = np.sqrt(np.mean(np.square(self._x), axis=1, keepdims=True) + self._model.norm_epsilon)
        return np.asarray(self._x / scale * self._source.tensor(weight).rows(), np.float32)

    def _product(self, x: Floats, name: str) -> Floats:
        """x [T, K] times a matrix of the file [n, K], some rows at a time."""
        tensor = self._source.tensor(name)
        n = tensor.shape[0]
        return np.concatenate(
            [x @ tensor.rows(slice(at, min(at + ROWS_AT_ONCE, n))).T for at in range(0, n, ROWS_AT_ONCE)], axis=1
        )

    def _attention(self, i: int, x: Floats) -> Floats:
        m = self._model
        q, k, v = (self._heads(i, part, x) for part in "qkv")  # [heads, T, D]
        q, k = self._rotated(q), self._rotated(k)
        later = np.triu(np.full((len(x), len(x)), -np.inf, np.float32), 1)
        out = np.empty((len(x), m.heads, m.head_dim), np.float32)
        for head in range(m.heads):
            shared = head * m.kv_heads // m.heads
            scores = q[head] @ k[shared].T / np.float32(np.sqrt(m.head_dim)) + later  # [T, T]
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, head] = weights / weights.sum(1, keepdims=True) @ v[shared]
        return self._product(out.reshape(len(x), -1), f"blk.{i}.attn_output.weight")

    def _heads(self, i: int, part: str, x: Floats) -> Floats:
        y = self._product(x, f"blk.{i}.attn_{part}.weight")
        if self._family.qkv_bias:
            y += self._source.tensor(f"blk.{i}.attn_{part}.bias").rows()
        return y.reshape(len(x), -1, self._model.head_dim).transpose(1, 0, 2)

    def _rotated(self, x: Floats) -> Floats:
        """Rotary embedding of [heads, T, D] in the file's own pairing."""
        half = self._model.head_dim // 2
        angle = np.arange(x.shape[1])[:, None] * self._model.rope_base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        first, second = (
            (slice(0, None, 2), slice(1, None, 2)) if self._family.permuted else (slice(half), slice(half, None))
        )
        out = np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out
