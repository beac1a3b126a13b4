"""Products with rows in place: calls the bundle's graphs on weights in the format that the card gave them in."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.architecture import Architecture
from flashd.bundle.arrays import (
    ColumnSteps,
    Groups,
    NeuronArrays,
    PairedNeurons,
    PlainGroups,
    PlainNeurons,
    PlainRows,
    QuantGroups,
    QuantNeurons,
    QuantRows,
    Rows,
    TernaryGroups,
    TernaryRows,
)
from flashd.bundle.row_kinds import BLOCK, Floats
from flashd.engine.model.sizes import TEMPORARY_BYTES, TOKENS_AT_ONCE
from flashd.system.freed_memory import use_small_pages
from flashd.system.onnx_session import open_session, start_pool

Vectors = dict[str, Floats]
"""The small vectors of a layer or of the whole model, by the names that Architecture gives them."""


@cache
def use_threads(threads: int) -> None:
    """Makes the process ready to compute with so many threads. The first call decides."""
    start_pool(threads)
    use_small_pages()


class Linear:
    """y = x W^T on rows in place.

    Args:
        graph: graph.linear of the rows' kind.
        rounded: round x to 8 bits a block, as the constant head does, so that both give the same logits.
    """

    def __init__(self, graph: bytes, rounded: bool = False) -> None:
        self._session = open_session(graph)
        self._rounded = rounded

    def __call__(self, x: Floats, rows: Rows) -> Floats:
        """x [T, K] float32, n rows of K weights -> [T, n] float32. It widens a part of the rows at a time."""
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
            (y,) = self._session.run(None, {**feed, "w": rows.w})  # [T, n]
        elif isinstance(rows, TernaryRows):
            n, ones = len(rows), _ones(len(rows), rows.q.shape[1] * 4 // BLOCK)
            (y,) = self._session.run(
                None, {**feed, "q": rows.q, "scale": rows.scale, "ones": ones, "index": _index(n)}
            )
        else:
            (y,) = self._session.run(None, {**feed, **_row_feed(rows, len(rows))})
        return np.asarray(y, np.float32)


class Ffn:
    """The contribution of some groups of neurons to an FFN's output."""

    def __init__(self, graph: bytes, model: Architecture) -> None:
        self._session = open_session(graph)
        self._inputs, self._width = model.inputs, model.share_width

    def __call__(self, x: Floats, groups: Groups) -> Floats:
        """x [T, H] float32, n groups in place -> [T, Architecture.share_width] float32."""
        hidden = x.shape[1]
        # the input rows of 32 neurons, widened
        part = max(1, TEMPORARY_BYTES // (4 * hidden * self._inputs * BLOCK))
        out = np.zeros((len(x), self._width), np.float32)
        for at in range(0, len(x), TOKENS_AT_ONCE):
            some, y = x[at : at + TOKENS_AT_ONCE], out[at : at + TOKENS_AT_ONCE]
            plain = isinstance(groups, PlainGroups | TernaryGroups)
            feed = {"x": some} if plain else {"x": some, "sums": block_sums(some)}
            for start in range(0, len(groups), part):
                y += self._part(feed, groups[start : start + part], hidden)
        return out

    def _part(self, feed: dict[str, Floats], g: Any, hidden: int) -> Floats:
        n = len(g)
        if g.bias.size:
            feed = {**feed, "bias": g.bias.reshape(-1)}
        if isinstance(g, PlainGroups):
            (y,) = self._session.run(None, {**feed, "w": g.w.reshape(-1, hidden), "down": g.down.reshape(-1, hidden)})
        elif isinstance(g, TernaryGroups):
            rows, neurons, blocks = n * BLOCK * g.q.shape[2], n * BLOCK, hidden // BLOCK
            (y,) = self._session.run(
                None,
                {
                    **feed,
                    "q": g.q.reshape(rows, -1), "scale": g.scale.reshape(rows, 1),
                    "ones": _ones(rows, blocks), "index": _index(rows),
                    "down": g.down.reshape(neurons, -1), "down_scale": g.down_scale.reshape(neurons, 1),
                    "down_ones": _ones(neurons, blocks), "down_index": _index(neurons),
                },
            )  # fmt: skip
        else:
            rows, neurons, blocks = n * BLOCK * g.q.shape[2], n * BLOCK, hidden // BLOCK
            (y,) = self._session.run(
                None,
                {
                    **feed, **_row_feed(g, rows),
                    "down": g.down.reshape(neurons, -1), "ones": _ones(neurons, blocks),
                    "down_index": _index(neurons),
                    "down_scale": g.down_scale.reshape(n, blocks, BLOCK),
                    "down_centre": g.down_centre.reshape(n, blocks, BLOCK),
                    "down_step": g.down_step,
                },
            )  # fmt: skip
        return np.asarray(y, np.float32)


class Neurons:
    """The contribution of some neurons to an FFN's output. Each neuron has a weight in each token, mostly 0.

    Args:
        graph: graph.ffn of a bundle that selects neurons.
        inputs: how many rows a neuron has, not counting its column of down_proj.
    """

    def __init__(self, graph: bytes, inputs: int) -> None:
        self._session = open_session(graph)
        self._rows = inputs + 1

    def __call__(
        self, x: Floats, neurons: NeuronArrays, counts: npt.NDArray[Any], steps: ColumnSteps | None = None
    ) -> Floats:
        """x [T, H] float32, n neurons, `counts` [T, n] -> [T, H] float32.

        Args:
            counts: the weight of each neuron in each token.
            steps: the steps of the columns, if the neurons are PairedNeurons.
        """
        part = max(1, TEMPORARY_BYTES // (4 * x.shape[1] * self._rows))
        out = np.zeros(x.shape, np.float32)
        for start in range(0, len(neurons), part):
            some = slice(start, start + part)
            out += self._part(x, neurons[some], counts[:, some], steps[some] if steps else None)
        return out

    def _part(self, x: Floats, n: Any, counts: npt.NDArray[Any], steps: Any) -> Floats:
        rows = len(n) * self._rows
        feed: dict[str, Any] = {"x": x, "chosen": counts.astype(np.float32)}
        if isinstance(n, PairedNeurons):
            (y,) = self._session.run(None, feed | _pair_feed(x, n, steps))
            return np.asarray(y, np.float32)
        if n.bias.size:
            feed["bias"] = n.bias.reshape(-1)
        if isinstance(n, PlainNeurons):
            feed["w"] = n.w.reshape(rows, -1)
        else:
            feed |= _row_feed(n, rows)
        (y,) = self._session.run(None, feed)
        return np.asarray(y, np.float32)


def _pair_feed(x: Floats, n: PairedNeurons, steps: ColumnSteps) -> dict[str, npt.NDArray[Any]]:
    """The inputs of the graph of PairedNeurons, by name. x: [T, H]."""
    blocks = x.shape[1] // BLOCK
    return {
        "sums": block_sums(x), **_row_feed(n, len(n)), "down": n.down, "ones": _ones(len(n), blocks),
        "down_scale": steps.scale.reshape(-1, blocks, BLOCK), "down_centre": steps.centre.reshape(-1, blocks, BLOCK),
        "down_step": steps.step,
    }  # fmt: skip


def _row_feed(
    parts: QuantRows | QuantGroups | QuantNeurons | PairedNeurons, rows: int
) -> dict[str, npt.NDArray[Any]]:
    """The quantised rows of `parts` as graphs name them: [rows, ...], all axes but the last joined."""
    arrays = {"q": parts.q, "scale": parts.scale, "centre": parts.centre, "step": parts.step}
    return {name: array.reshape(rows, -1) for name, array in arrays.items()} | {"index": _index(rows)}


def _index(n: int) -> npt.NDArray[np.int64]:
    """[n]: 0 to n - 1."""
    return _counting(_at_least(n))[:n]


def _ones(neurons: int, blocks: int) -> Floats:
    """[neurons, blocks] of 1."""
    return _many_ones(_at_least(neurons), blocks)[:neurons]


def _at_least(n: int) -> int:
    """The next power of two. If neurons are selected, nearly every part has another size: the caches stay small."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def _counting(n: int) -> npt.NDArray[np.int64]:
    return np.arange(n)


@cache
def _many_ones(neurons: int, blocks: int) -> Floats:
    return np.ones((neurons, blocks), np.float32)


def block_sums(x: Floats) -> Floats:
    """The sum of each block of 32 of x [T, K]: [T, K / 32]."""
    return np.asarray(x.reshape(len(x), -1, BLOCK).sum(2), np.float32)


def round_blocks(x: Floats) -> Floats:
    """x [T, K] with each block of 32 rounded to 8 bits, as MatMulNBits rounds its input at accuracy level 4."""
    blocks = x.reshape(len(x), -1, BLOCK)  # [T, K / 32, 32]
    scale = np.maximum(np.abs(blocks).max(2, keepdims=True), np.float32(1e-30)) / np.float32(127)  # [T, K / 32, 1]
    return np.asarray((np.rint(blocks / scale) * scale).reshape(x.shape), np.float32)
