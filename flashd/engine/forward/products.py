"""Products with rows in place, for rows that are chosen anew each time: graphs called on the card's own bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flashd.bundle.arrays import Mxfp4Rows, NeuronArrays, PlainNeurons, PlainRows, Rows, TernaryRows
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import BLOCK, CENTRE_BITS, Codes, Floats, RowKind, unit_steps
from flashd.engine.model.sizes import TEMPORARY_BYTES
from flashd.system.freed_memory import use_small_pages
from flashd.system.onnx_session import open_session, start_pool

Vectors = dict[str, Floats]
"""The small vectors of a layer, or of the whole model, by the names of Architecture."""


def use_threads(threads: int, shared: bool = True) -> None:
    """Makes the process ready to compute with so many threads, see start_pool."""
    start_pool(threads, shared)
    use_small_pages()


class Linear:
    """y = x W^T on rows in place."""

    def __init__(self, graph: bytes, kind: RowKind) -> None:
        self._session, self._kind = open_session(graph), kind

    def __call__(self, x: Floats, rows: Rows) -> Floats:
        """x [T, K] float32, n rows of K -> [T, n] float32, widening a part of the rows at a time."""
        part = max(1, TEMPORARY_BYTES // (4 * x.shape[1]))
        wide = x if isinstance(rows, PlainRows) else with_means(x, RowFormat(self._kind, x.shape[1]))
        out = np.empty((len(x), len(rows)), np.float32)
        for start in range(0, len(rows), part):
            out[:, start : start + part] = self._part(wide, rows[start : start + part])
        return out

    def _part(self, x: Floats, rows: Rows) -> Floats:
        assert not isinstance(rows, TernaryRows | Mxfp4Rows)
        if isinstance(rows, PlainRows):
            (y,) = self._session.run(None, {"x": x, "w": rows.w})
        else:
            scale = scales(rows.scale, rows.step, RowFormat(self._kind, rows.scale.shape[1] * BLOCK))
            (y,) = self._session.run(None, {"x": x, "q": rows.q, "scale": scale, "index": _index(len(rows))})
        return np.asarray(y, np.float32)


class Neurons:
    """The share of some neurons in an FFN's output, each counting for something in some of the tokens.

    `inputs`: rows of a neuron beside its column.
    """

    def __init__(self, graph: bytes, inputs: int, kind: RowKind) -> None:
        self._session = open_session(graph)
        self._rows, self._kind = inputs + 1, kind

    def __call__(self, x: Floats, neurons: NeuronArrays, counts: npt.NDArray[Any]) -> Floats:
        """x [T, H] float32, n neurons, what each counts for in each token [T, n] -> [T, H] float32."""
        part = max(1, TEMPORARY_BYTES // (4 * x.shape[1] * self._rows))
        wide = x if isinstance(neurons, PlainNeurons) else with_means(x, RowFormat(self._kind, x.shape[1]))
        out = np.zeros(x.shape, np.float32)
        for start in range(0, len(neurons), part):
            some = slice(start, start + part)
            out += self._part(wide, neurons[some], counts[:, some])
        return out

    def _part(self, x: Floats, n: NeuronArrays, counts: npt.NDArray[Any]) -> Floats:
        rows = len(n) * self._rows
        feed: dict[str, Any] = {"x": x, "chosen": counts.astype(np.float32)}
        if n.bias.size:
            feed["bias"] = n.bias.reshape(-1)
        if isinstance(n, PlainNeurons):
            feed["w"] = n.w.reshape(rows, -1)
        else:
            form = RowFormat(self._kind, n.scale.shape[-1] * BLOCK)
            feed["q"], feed["index"] = n.q.reshape(rows, -1), _index(rows)
            feed["scale"] = scales(n.scale.reshape(rows, -1), n.step.reshape(rows, 2), form)
        (y,) = self._session.run(None, feed)
        return np.asarray(y, np.float32)


def scales(codes: Codes, step: npt.NDArray[np.float16], form: RowFormat, centred: bool = True) -> Floats:
    """The scales [n, B + 2 P] float32 of rows, and behind them those of the digits, which meet the means of blocks.

    codes [n, B], step [n, 2]; if not `centred`, [n, B] without the digits.
    """
    blocks, half = form.blocks, form.digits // BLOCK // 2 if centred else 0
    worth = step.astype(np.float32) * unit_steps(form.kind)  # [n, 2]
    scale = np.empty((len(codes), blocks + 2 * half), np.float32)
    np.multiply(codes, worth[:, :1], out=scale[:, :blocks])
    low = BLOCK * worth[:, 1:]  # [n, 1]
    scale[:, blocks : blocks + half] = low * (1 << CENTRE_BITS[form.kind])
    scale[:, blocks + half :] = low
    return scale


def with_means(x: Floats, form: RowFormat) -> Floats:
    """x [T, K] and behind it, twice, the means of its blocks, filled up to whole blocks: [T, K + digits]."""
    means = x.reshape(len(x), -1, BLOCK).mean(2)  # [T, B]
    filled = np.pad(means, ((0, 0), (0, form.digits // 2 - form.blocks)))
    return np.asarray(np.concatenate([x, filled, filled], axis=1), np.float32)


def _index(n: int) -> npt.NDArray[np.int64]:
    """0 .. n, of an array that is kept: a token may choose any number of neurons."""
    return _counting(1 << max(n - 1, 0).bit_length())[:n]


@cache
def _counting(n: int) -> npt.NDArray[np.int64]:
    return np.arange(n)
