"""Opens the bundle's onnxruntime graphs and gives each the shape of a function on arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from flashd.bundle.layout import Model
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import BLOCK, Floats, PlainGroups, PlainRows, QuantGroups, QuantRows
from flashd.engine.kv import KvCache
from flashd.errors import DataError

BROKEN: tuple[type[Exception], ...] = (
    UnicodeDecodeError, RuntimeError,
    *(e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)),
)  # fmt: skip
"""What onnxruntime raises; its errors have no base of their own, and may quote what is no text."""

TEMPORARY_BYTES = 3 << 20
"""Rows are widened to float32 a part at a time; a part this large stays in a processor's cache."""


@cache
def use_threads(threads: int) -> None:
    """One pool of `threads` for all graphs of this process: a session each of its own would oversubscribe."""
    ort.set_global_thread_pool_sizes(threads, 1)
    ort.set_default_logger_severity(3)
    _keep_freed_pages()


def _keep_freed_pages() -> None:
    """Lets glibc reuse the widened rows' memory between runs rather than return it to the kernel each time.

    Without this every run pays a page fault for each 4 KiB of its temporaries.
    """
    try:
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 64 << 20)
    except (OSError, AttributeError):
        return  # another C library: slower, not wrong


def open_session(graph: bytes, initialisers: dict[str, npt.NDArray[Any]] | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    # An arena keeps the largest of everything it ever held; the budget is kept by plain allocations.
    options.enable_cpu_mem_arena = False
    if initialisers:
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for v in initialisers.values()]
        options.add_external_initializers(list(initialisers), values)
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except BROKEN as error:
        raise DataError(
            f"a graph of the bundle cannot be loaded ({str(error).splitlines()[0]}); pack it again"
        ) from error


class Linear:
    """y = x W^T on rows in place."""

    def __init__(self, graph: bytes, rounded: bool = False) -> None:
        """`rounded`: round x as the constant head does, so that both give the same logits."""
        self._session = open_session(graph)
        self._rounded = rounded

    def __call__(self, x: Floats, rows: QuantRows | PlainRows) -> Floats:
        """x [T, K] float32, n rows of K -> [T, n] float32, widening a part of the rows at a time."""
        part = max(1, TEMPORARY_BYTES // (4 * x.shape[1]))
        feed = {"x": x}
        if isinstance(rows, QuantRows):
            feed = {"x": round_blocks(x) if self._rounded else x, "sums": block_sums(x)}
        out = np.empty((len(x), len(rows)), np.float32)
        for start in range(0, len(rows), part):
            out[:, start : start + part] = self._part(feed, rows[start : start + part])
        return out

    def _part(self, feed: dict[str, Floats], rows: Any) -> Floats:
        if isinstance(rows, PlainRows):
            (y,) = self._session.run(None, {**feed, "w": rows.w})
        else:
            (y,) = self._session.run(
                None,
                {
                    **feed, "q": rows.q, "scale": rows.scale, "centre": rows.centre, "step": rows.step,
                    "index": _index(len(rows)),
                },
            )  # fmt: skip
        return np.asarray(y, np.float32)


class Ffn:
    """The share of some groups of bundles in a gated FFN's output."""

    def __init__(self, graph: bytes) -> None:
        self._session = open_session(graph)

    def __call__(self, x: Floats, groups: QuantGroups | PlainGroups) -> Floats:
        """x [T, H] float32, n groups in place -> [T, H] float32."""
        hidden = x.shape[1]
        # gate and up of 32 neurons, widened
        part = max(1, TEMPORARY_BYTES // (4 * hidden * 2 * BLOCK))
        feed = {"x": x} if isinstance(groups, PlainGroups) else {"x": x, "sums": block_sums(x)}
        out = np.zeros((len(x), hidden), np.float32)
        for start in range(0, len(groups), part):
            out += self._part(feed, groups[start : start + part], hidden)
        return out

    def _part(self, feed: dict[str, Floats], g: Any, hidden: int) -> Floats:
        n = len(g)
        if isinstance(g, PlainGroups):
            (y,) = self._session.run(None, {**feed, "w": g.w.reshape(-1, hidden), "down": g.down.reshape(-1, hidden)})
        else:
            rows, neurons, blocks = n * BLOCK * g.q.shape[2], n * BLOCK, hidden // BLOCK
            (y,) = self._session.run(
                None,
                {
                    **feed,
                    "q": g.q.reshape(rows, -1), "scale": g.scale.reshape(rows, -1),
                    "centre": g.centre.reshape(rows, -1), "step": g.step.reshape(rows, 2),
                    "index": _index(rows),
                    "down": g.down.reshape(neurons, -1), "ones": _ones(neurons, blocks),
                    "down_index": _index(neurons),
                    "down_scale": g.down_scale.reshape(n, blocks, BLOCK),
                    "down_centre": g.down_centre.reshape(n, blocks, BLOCK),
                    "down_step": g.down_step,
                },
            )  # fmt: skip
        return np.asarray(y, np.float32)


@cache
def _index(n: int) -> npt.NDArray[np.int64]:
    return np.arange(n)


@cache
def _ones(neurons: int, blocks: int) -> Floats:
    return np.ones((neurons, blocks), np.float32)


def block_sums(x: Floats) -> Floats:
    """The sum [T, K / 32] of each block of x [T, K]."""
    return np.asarray(x.reshape(len(x), -1, BLOCK).sum(2), np.float32)


def round_blocks(x: Floats) -> Floats:
    """x [T, K] rounded to 8 bits a block of 32, as MatMulNBits rounds its input at accuracy level 4."""
    blocks = x.reshape(len(x), -1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(2, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return np.asarray((np.rint(blocks / scale) * scale).reshape(x.shape), np.float32)


def rotary_tables(model: Model, positions: int) -> tuple[Floats, Floats]:
    """cos and sin [positions, head_dim / 2] of rotary embedding (arXiv 2104.09864), halves rotated."""
    half = model.head_dim // 2
    frequency = model.rope_base ** (-np.arange(half) / half)
    angle = np.arange(positions)[:, None] * frequency[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


NEVER = np.float32(-1e30)
"""Added to a score, what takes a key out of attention."""


@dataclass(frozen=True)
class Places:
    """Where the T tokens of a pass stand, and which of them each may look at."""

    past: int
    positions: npt.NDArray[np.int64]  # [1, T]
    bias: Floats  # [1, 1, T, past + T], added to attention's scores

    @classmethod
    def in_line(cls, past: int, tokens: int) -> Places:
        """One token behind the other."""
        return cls(past, np.arange(past, past + tokens)[None], np.zeros((1, 1, tokens, past + tokens), np.float32))

    @classmethod
    def in_tree(cls, past: int, parents: Sequence[int]) -> Places:
        """Each token behind its parent, which came before it; the first has none. It looks at its ancestors alone.

        Section 3 of SpecInfer (arXiv 2305.09781) calls this tree attention.
        """
        sees = np.eye(len(parents), dtype=bool)
        for node, parent in enumerate(parents[1:], 1):
            sees[node] |= sees[parent]
        places = cls.in_line(past, len(parents))
        places.bias[0, 0, :, past:] = np.where(sees, np.float32(0), NEVER)
        return cls(past, past + sees.sum(1)[None] - 1, places.bias)


class Attention:
    """Grouped-query attention with rotary embedding over a layer's KV cache."""

    def __init__(self, bundle: Bundle, cache: KvCache) -> None:
        model = bundle.header.model
        self._session = open_session(bundle.read("graph.attention"))
        self._cache = cache
        self._cos, self._sin = rotary_tables(model, cache.context)

    def __call__(self, layer: int, qkv: Floats, places: Places) -> Floats:
        """qkv [T, q + k + v widths] of T new tokens -> [T, query width]; their keys and values are kept."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("qkv", qkv[None])
        bind_positions(binding, places.past, len(qkv), self._cos, self._sin)
        binding.bind_cpu_input("positions", places.positions)
        binding.bind_cpu_input("bias", places.bias)
        for part, value in zip(("key", "value"), self._cache.layer(layer), strict=True):
            binding.bind_ortvalue_input(f"past_{part}", value)
            binding.bind_ortvalue_output(f"present_{part}", value)
        binding.bind_output("y", "cpu")
        self._session.run_with_iobinding(binding)
        (y,) = [v.numpy() for v in binding.get_outputs() if len(v.shape()) == 3]
        return np.asarray(y[0], np.float32)


def bind_positions(binding: Any, past: int, new: int, cos: Floats, sin: Floats) -> None:
    """Tells GroupQueryAttention where `new` tokens stand behind `past` ones."""
    binding.bind_cpu_input("last", np.array([past + new - 1], np.int32))
    binding.bind_cpu_input("total", np.array(past + new, np.int32))
    binding.bind_cpu_input("cos", cos)
    binding.bind_cpu_input("sin", sin)
