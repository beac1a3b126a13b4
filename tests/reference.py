"""A plain float32 forward pass over a GGUF file's dequantised weights: what the engine is measured against.

Written for reading, not for speed, and sharing no code with the engine: no blocks, no pages, no graphs.
Rotary pairs are taken as the file has them (llama: neighbours, qwen2: halves), so that the packer's
reordering is checked too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass
class Reference:
    """Logits of a llama or qwen2 GGUF file. Keeps keys and values of the tokens it has seen."""

    path: Path
    keys: dict[int, Floats] = field(default_factory=dict)
    values: dict[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reader = gguf.GGUFReader(self.path)
        self.w = {
            t.name: np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float32).reshape(tuple(t.shape)[::-1])
            for t in reader.tensors
        }
        self.family: str = reader.fields["general.architecture"].contents()

        def value(key: str) -> Any:
            return reader.fields[f"{self.family}.{key}"].contents()

        self.layers = int(value("block_count"))
        self.heads = int(value("attention.head_count"))
        self.kv_heads = int(value("attention.head_count_kv"))
        self.epsilon = float(value("attention.layer_norm_rms_epsilon"))
        self.base = float(value("rope.freq_base"))
        self.head_dim = self.w["blk.0.attn_q.weight"].shape[0] // self.heads

    def forget(self) -> None:
        self.keys.clear()
        self.values.clear()

    def logits(self, tokens: list[int]) -> Floats:
        """Logits [T, V] of `tokens` behind those seen before."""
        past = self.keys[0].shape[0] if self.keys else 0
        x = self.w["token_embd.weight"][tokens]  # [T, H]
        for i in range(self.layers):
            x = x + self._attention(i, self._norm(x, f"blk.{i}.attn_norm.weight"), past)
            h = self._norm(x, f"blk.{i}.ffn_norm.weight")
            gate, up = (h @ self.w[f"blk.{i}.ffn_{part}.weight"].T for part in ("gate", "up"))  # [T, F]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"blk.{i}.ffn_down.weight"].T
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        return np.asarray(self._norm(x, "output_norm.weight") @ head.T, np.float32)

    def _norm(self, x: Floats, weight: str) -> Floats:
        scale = np.sqrt(np.mean(x * x, axis=1, keepdims=True) + self.epsilon)
        return np.asarray(x / scale * self.w[weight], np.float32)

    def _attention(self, i: int, x: Floats, past: int) -> Floats:
        q, k, v = (self._project(i, part, x) for part in "qkv")  # [T, heads, D]
        q, k = self._rotate(q, past), self._rotate(k, past)
        if i in self.keys:
            k, v = np.concatenate([self.keys[i], k]), np.concatenate([self.values[i], v])
        self.keys[i], self.values[i] = k, v
        shared = self.heads // self.kv_heads
        k, v = k.repeat(shared, axis=1), v.repeat(shared, axis=1)  # [S, heads, D]
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(self.head_dim)
        seen = np.arange(len(k))[None, :] <= past + np.arange(len(q))[:, None]
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        out = np.einsum("hts,shd->thd", weights, v).reshape(len(q), -1)
        return np.asarray(out @ self.w[f"blk.{i}.attn_output.weight"].T, np.float32)

    def _project(self, i: int, part: str, x: Floats) -> Floats:
        y = x @ self.w[f"blk.{i}.attn_{part}.weight"].T
        bias = self.w.get(f"blk.{i}.attn_{part}.bias")
        return np.asarray(y if bias is None else y + bias, np.float32).reshape(len(x), -1, self.head_dim)

    def _rotate(self, x: Floats, past: int) -> Floats:
        half = self.head_dim // 2
        angle = (past + np.arange(len(x)))[:, None] * self.base ** (-np.arange(half) / half)[None, :]
        cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
        pairs = (slice(0, None, 2), slice(1, None, 2)) if self.family == "llama" else (slice(half), slice(half, None))
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        out = np.empty_like(x)
        out[..., pairs[0]], out[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
        return out


def kl(reference: Floats, logits: Floats) -> float:
    """Mean over rows of KL(reference || logits), in nats."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (reference, logits))
    np.subtract(p, q, out=q)
    np.exp(p, out=p)
    return float(np.einsum("tv,tv->t", p, q).mean())


def relative(a: Floats, b: Floats) -> float:
    """How far two sets of logits are apart, in parts of the first."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def _log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of `x`, in its place: a text's logits of a whole vocabulary are large."""
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x
