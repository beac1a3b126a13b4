"""Opens the bundle's onnxruntime graphs and gives each the shape of a function on arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.layout import Model
from flashd.bundle.reader import Bundle
from flashd.bundle.rows import (
    BLOCK,
    ColumnSteps,
    Floats,
    Groups,
    NeuronSlots,
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
from flashd.engine.branches import Branches
from flashd.engine.kv import KvCache
from flashd.engine.pages import use_small_pages
from flashd.session import open_session, start_pool

Tokens = npt.NDArray[np.int64]
Vectors = dict[str, Floats]
"""The small vectors of a layer, or of the whole model, by the names of bundle.layout.Model."""

TEMPORARY_BYTES = 3 << 20
"""Rows are widened to float32 a part at a time; a part this large stays in a processor's cache."""

TOKENS_AT_ONCE = 128
"""Tokens that go through a product together. A pass may have more, for which its temporaries need not be larger."""


@cache
def use_threads(threads: int) -> None:
    """Makes the process ready to compute with so many threads."""
    start_pool(threads)
    use_small_pages()


class Linear:
    """y = x W^T on rows in place."""

    def __init__(self, graph: bytes, rounded: bool = False) -> None:
        """`rounded`: round x as the constant head does, so that both give the same logits."""
        self._session = open_session(graph)
        self._rounded = rounded

    def __call__(self, x: Floats, rows: Rows) -> Floats:
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
        elif isinstance(rows, TernaryRows):
            n, ones = len(rows), _ones(len(rows), rows.q.shape[1] * 4 // BLOCK)
            (y,) = self._session.run(
                None, {**feed, "q": rows.q, "scale": rows.scale, "ones": ones, "index": _index(n)}
            )
        else:
            (y,) = self._session.run(None, {**feed, **_row_feed(rows, len(rows))})
        return np.asarray(y, np.float32)


class Ffn:
    """The share of some groups of bundles in an FFN's output."""

    def __init__(self, graph: bytes, model: Model) -> None:
        self._session = open_session(graph)
        self._inputs, self._width = model.inputs, model.share_width

    def __call__(self, x: Floats, groups: Groups) -> Floats:
        """x [T, H] float32, n groups in place -> [T, H] float32; what shares in a norm comes behind the H."""
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
    """The share of some neurons in an FFN's output, each counting for something in some of the tokens.

    `inputs`: rows of a neuron beside its column.
    """

    def __init__(self, graph: bytes, inputs: int) -> None:
        self._session = open_session(graph)
        self._rows = inputs + 1

    def __call__(
        self, x: Floats, neurons: NeuronSlots, counts: npt.NDArray[Any], steps: ColumnSteps | None = None
    ) -> Floats:
        """x [T, H] float32, n neurons, what each counts for in each token [T, n] -> [T, H] float32.

        `steps`: of the columns of n PairedNeurons.
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
    """Neurons, and the steps of their columns, as the graph names them."""
    blocks = x.shape[1] // BLOCK
    return {
        "sums": block_sums(x), **_row_feed(n, len(n)), "down": n.down, "ones": _ones(len(n), blocks),
        "down_scale": steps.scale.reshape(-1, blocks, BLOCK), "down_centre": steps.centre.reshape(-1, blocks, BLOCK),
        "down_step": steps.step,
    }  # fmt: skip


def _row_feed(
    parts: QuantRows | QuantGroups | QuantNeurons | PairedNeurons, rows: int
) -> dict[str, npt.NDArray[Any]]:
    """The quantised rows of `parts`, all axes but the last joined, as graphs name them."""
    arrays = {"q": parts.q, "scale": parts.scale, "centre": parts.centre, "step": parts.step}
    return {name: array.reshape(rows, -1) for name, array in arrays.items()} | {"index": _index(rows)}


def _index(n: int) -> npt.NDArray[np.int64]:
    return _counting(_at_least(n))[:n]


def _ones(neurons: int, blocks: int) -> Floats:
    return _many_ones(_at_least(neurons), blocks)[:neurons]


def _at_least(n: int) -> int:
    """A power of two: where neurons are selected there are as many different n as parts may have rows."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def _counting(n: int) -> npt.NDArray[np.int64]:
    return np.arange(n)


@cache
def _many_ones(neurons: int, blocks: int) -> Floats:
    return np.ones((neurons, blocks), np.float32)


def block_sums(x: Floats) -> Floats:
    """The sum [T, K / 32] of each block of x [T, K]."""
    return np.asarray(x.reshape(len(x), -1, BLOCK).sum(2), np.float32)


def round_blocks(x: Floats) -> Floats:
    """x [T, K] rounded to 8 bits a block of 32, as MatMulNBits rounds its input at accuracy level 4."""
    blocks = x.reshape(len(x), -1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(2, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return np.asarray((np.rint(blocks / scale) * scale).reshape(x.shape), np.float32)


def input_names(session: ort.InferenceSession) -> list[str]:
    return [i.name for i in session.get_inputs()]


class Stage:
    """A small graph between the large products. It takes what it needs by name."""

    def __init__(self, graph: bytes) -> None:
        self._session = open_session(graph)
        self._names = input_names(self._session)

    def __call__(self, vectors: Vectors, **values: Floats) -> list[Floats]:
        """What comes of `values` and those of `vectors` that it names."""
        feed = {name: values[name] if name in values else vectors[name] for name in self._names}
        return list(self._session.run(None, feed))


def named(values: Floats, lengths: dict[str, int]) -> Vectors:
    """The parts of `values`, one behind the other, by name."""
    ends = np.cumsum(list(lengths.values()), dtype=np.int64)
    return dict(zip(lengths, np.split(values, ends[:-1]), strict=True)) if lengths else {}


KEPT_ROWS = 256
"""Embeddings kept of tokens that came one at a time: a text says most of its tokens again."""


class Embedder:
    """Token ids -> what goes into the first layer."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._model = bundle, bundle.header.model
        self._table = bundle.header.embedding_table
        self._kept = lru_cache(KEPT_ROWS)(lambda token: bundle.table_rows(self._table, np.array([token])))

    def __call__(self, tokens: Tokens, positions: Tokens) -> Floats:
        """[T, H] of `tokens` [T] at `positions` [T] of a text. Raises DamagedRun, CardError."""
        x = self._kept(int(tokens[0])) if len(tokens) == 1 else self._bundle.table_rows(self._table, tokens)
        if self._model.embedding_scale != 1:
            x = x * np.float32(self._model.embedding_scale)
        if self._model.positions:
            x = x + self._bundle.table_rows("positions", positions)
        return x


class Rotary:
    """cos and sin of rotary embedding (arXiv 2104.09864), halves rotated, for each of a model's tables.

    A table gives each pair of a head's dimensions the angle that a position turns it by, 0 for what is not turned,
    and the length that it is stretched to.
    """

    def __init__(self, bundle: Bundle, positions: int) -> None:
        model = bundle.header.model
        tables = bundle.floats("rope").astype(np.float64).reshape(model.ropes, 2, model.head_dim // 2)
        self._arrays: dict[str, Floats] = {}
        for i, (angle, length) in enumerate(tables):
            turned = np.arange(positions)[:, None] * angle  # [positions, D / 2]
            self._arrays[f"cos.{i}"] = (length * np.cos(turned)).astype(np.float32)
            self._arrays[f"sin.{i}"] = (length * np.sin(turned)).astype(np.float32)
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in self._arrays.items()}

    def bind(self, names: Iterable[str], binding: Any) -> None:
        """Gives a graph those tables that are among the `names` of its inputs."""
        for name in names:
            if name in self._values:
                binding.bind_ortvalue_input(name, self._values[name])


NEVER = np.float32(-1e30)
"""Added to a score, what takes a key out of attention."""


@dataclass(frozen=True)
class Places:
    """Where the T tokens of a pass stand, and which of them each may look at."""

    past: int
    positions: npt.NDArray[np.int64]  # [1, T]
    bias: Floats  # [1, 1, T, past + T], added to attention's scores

    def parts(self, most: int) -> list[tuple[slice, Places]]:
        """Up to `most` of the tokens at a time: which, and where they stand behind those before them."""
        tokens = self.positions.shape[1]
        parts = [slice(at, min(at + most, tokens)) for at in range(0, tokens, most)]
        return [(part, self._part(part)) for part in parts]

    def _part(self, part: slice) -> Places:
        bias = np.ascontiguousarray(self.bias[:, :, part, : self.past + part.stop])
        return Places(self.past + part.start, self.positions[:, part], bias)

    @classmethod
    def in_line(cls, past: int, tokens: int) -> Places:
        """One token behind the other."""
        return cls(past, np.arange(past, past + tokens)[None], np.zeros((1, 1, tokens, past + tokens), np.float32))

    @classmethod
    def in_branches(cls, past: int, branches: Branches, known: int = 0) -> Places:
        """They begin behind `past` slots of the cache, which has the first `known` of them already."""
        sees = branches.sees(past)[known:]
        bias = np.where(sees, np.float32(0), NEVER)
        return cls(past + known, sees.sum(1)[None] - 1, bias[None, None])


class Attention:
    """Attention over a layer's KV cache, with what stands around it: biases, norms, rotary embedding."""

    def __init__(self, bundle: Bundle, cache: KvCache) -> None:
        model = bundle.header.model
        sessions = [open_session(bundle.read(f"graph.attention.{i}")) for i in range(len(model.attention))]
        self._sessions = [(sessions[kind], input_names(sessions[kind])) for kind in model.layer_kinds]
        self._cache = cache
        self._rotary = Rotary(bundle, cache.context)

    def __call__(self, layer: int, qkv: Floats, vectors: Vectors, places: Places) -> Floats:
        """qkv [T, q + k + v widths] of T new tokens -> [T, query width]; their keys and values are kept."""
        session, names = self._sessions[layer]
        binding = session.io_binding()
        binding.bind_cpu_input("qkv", qkv[None])
        self._rotary.bind(names, binding)
        for name in names:
            if name in vectors:
                binding.bind_cpu_input(name, vectors[name])
        bind_positions(binding, places.past, len(qkv))
        binding.bind_cpu_input("positions", places.positions)
        binding.bind_cpu_input("bias", places.bias)
        for part, value in zip(("key", "value"), self._cache.layer(layer), strict=True):
            binding.bind_ortvalue_input(f"past_{part}", value)
            binding.bind_ortvalue_output(f"present_{part}", value)
        binding.bind_output("y", "cpu")
        session.run_with_iobinding(binding)
        (y,) = [v.numpy() for v in binding.get_outputs() if len(v.shape()) == 3]
        return np.asarray(y[0], np.float32)


def bind_positions(binding: Any, past: int, new: int) -> None:
    """Tells GroupQueryAttention where `new` tokens stand behind `past` ones."""
    binding.bind_cpu_input("last", np.array([past + new - 1], np.int32))
    binding.bind_cpu_input("total", np.array(past + new, np.int32))
