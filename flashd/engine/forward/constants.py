"""Sessions of constant weights: the bundle's rows as onnxruntime wants them, and the graphs that multiply them.

A session is opened from arrays of the bundle's own bytes and a graph that is made here from the header. onnxruntime
repacks the weights while it opens it; the arrays may be thrown away then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.arrays import Groups, Mxfp4Rows, PlainRows, QuantRows, Rows, TernaryRows
from flashd.bundle.header import Header
from flashd.bundle.layer_kinds import LayerProduct
from flashd.bundle.rows import mxfp4
from flashd.bundle.rows.bits import pack_bits, unpack
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import BLOCK, CENTRE_BITS, Bytes, Floats, RowKind
from flashd.engine.forward.products import scales
from flashd.graphs import constant
from flashd.graphs.constant import Arithmetic
from flashd.graphs.layer_stages import vectors_before_ffn, vectors_behind_ffn
from flashd.graphs.rounding import KvFormat
from flashd.graphs.unread import PARTS, unread
from flashd.system.onnx_session import open_session

Initialisers = dict[str, npt.NDArray[Any]]


def at_least_two(x: Floats) -> Floats:
    """x [T, K], a single row twice: float32 products of one row add up in another order than those of several."""
    return np.repeat(x, 2, axis=0) if len(x) == 1 else x


def multiplied(session: Any, doubled: bool = True, **inputs: Floats) -> Floats:
    """The output [T, n] of a session for its inputs [T, ...], by name.

    `doubled`: a single row is computed twice, see at_least_two. int8 products of one row need not be.
    """
    (y,) = session.run(None, {name: (at_least_two(x) if doubled else x)[None] for name, x in inputs.items()})
    return np.asarray(y[0, : len(next(iter(inputs.values())))], np.float32)


@dataclass(frozen=True)
class _Product:
    """The arrays of a product with constant rows, by the ends of their names."""

    arrays: Initialisers
    centred: bool

    def named(self, name: str) -> Initialisers:
        return {f"{name}.{end}": array for end, array in self.arrays.items()}


class Constants:
    """Opens sessions for one bundle. It may be called from several threads.

    Args:
        arithmetic: see graphs.constant. Models of which a part stays whole in each arithmetic have two of these.
        kv: how keys and values are kept.
    """

    def __init__(self, header: Header, arithmetic: Arithmetic = "float32", kv: KvFormat = "float32") -> None:
        self._header, self._model, self._formats = header, header.model, header.formats
        self.arithmetic, self._kv = arithmetic, kv
        self._graphs: dict[tuple[Any, ...], bytes] = {}
        kinds = {header.formats.ffn, header.formats.attention, header.formats.head}
        self._unread = unread(arithmetic, not kinds.isdisjoint({"int8", "mxfp4"}))

    def rows(self, rows: Rows, kind: RowKind, k: int, once: bool = False) -> ort.InferenceSession:
        """x [1, R, K] -> y [1, R, n], the product with rows [n, K]. `once`: it streams past."""
        product = self._product(rows, kind, k)
        centred = frozenset({"rows"} if product.centred else ())
        graph = self._graph(constant.rows, kind, self.arithmetic, len(rows), k, centred)
        return self._opened(graph, product.named("rows"), once)

    def groups(self, groups: Groups, once: bool = False) -> ort.InferenceSession:
        """h, before [1, T, ...] -> y [1, T, W]: what is before, and the share of some groups of any layer.

        `once`: they stream past, or others are computed beside them; one thread is enough.
        """
        arrays, centred = self._of_groups(groups)
        kind = self._formats.ffn
        graph = self._graph(constant.ffn, self._model, kind, self.arithmetic, len(groups), centred)
        return self._opened(graph, arrays, once)

    def attention(self, i: int, products: Sequence[Rows], vectors: dict[str, Floats]) -> ort.InferenceSession:
        """The attention of layer i, see graphs.constant.attention. `products`: the rows of Architecture.products."""
        behind = vectors_behind_ffn(self._model) - vectors_before_ffn(self._model)
        own = {name: vector for name, vector in vectors.items() if name not in behind}
        arrays, centred = self._of_attention(i, products, own)
        graph = constant.attention(self._model, self._formats.attention, self.arithmetic, i, centred, self._kv)
        return self._opened(graph, arrays)

    def leave(self, i: int, products: Sequence[Rows], vectors: dict[str, Floats]) -> ort.InferenceSession:
        """What is behind the FFN of layer i, see graphs.constant.leave. `products`: those of products_behind."""
        behind = vectors_behind_ffn(self._model)
        own = {name: vector for name, vector in vectors.items() if name in behind}
        arrays, centred = self._of_products(f"layer.{i}.", self._model.products_behind(), products)
        arrays |= {f"layer.{i}.{name}": vector for name, vector in own.items()}
        return self._opened(constant.leave(self._model, self._formats.attention, self.arithmetic, i, centred), arrays)

    def token_inputs(self, projection: Rows, norm: Floats) -> ort.InferenceSession:
        """What tokens say to each layer, see graphs.constant.token_inputs."""
        product = self._product(projection, self._formats.attention, self._model.hidden)
        centred = frozenset({"token_projection"} if product.centred else ())
        graph = constant.token_inputs(self._model, self._formats.attention, self.arithmetic, centred)
        return self._opened(graph, product.named("token_projection") | {"token_norm.weight": norm})

    def spread(self, rows: Rows) -> ort.InferenceSession:
        """What makes several states of an embedding, see graphs.constant.spread. `rows`: of stream_projection."""
        arrays, centred = self._of_states("stream_projection", rows)
        return self._opened(constant.spread(self._model, self._formats.attention, self.arithmetic, centred), arrays)

    def finish(self, rows: Rows, vectors: dict[str, Floats]) -> ort.InferenceSession:
        """What makes one of several states, see graphs.constant.finish. `rows`: of stream_out."""
        arrays: Initialisers = {name: vectors[name] for name in self._model.norm_vectors("final")}
        centred: frozenset[str] = frozenset()
        for i, at in enumerate(range(0, len(rows), self._model.hidden)):
            more, names = self._of_states(f"stream_out.{i}", rows[at : at + self._model.hidden])
            arrays |= more
            centred |= names
        return self._opened(constant.finish(self._model, self._formats.attention, self.arithmetic, centred), arrays)

    def _of_states(self, name: str, rows: Rows) -> tuple[Initialisers, frozenset[str]]:
        product = self._product(rows, self._formats.attention, self._model.hidden)
        return product.named(name), frozenset({name} if product.centred else ())

    def whole(
        self, layers: range, parts: Sequence[tuple[Sequence[Rows], dict[str, Floats], Groups | None]]
    ) -> ort.InferenceSession:
        """Whole layers: of each the rows of products and products_behind, the small vectors, and groups, if any."""
        arrays: Initialisers = {}
        centred: frozenset[str] = frozenset()
        for i, (products, vectors, groups) in zip(layers, parts, strict=True):
            for more, names in (
                self._of_attention(i, products, vectors),
                self._of_ffn(f"layer.{i}.", groups) if groups is not None else ({}, frozenset()),
            ):
                arrays |= more
                centred |= names
        kinds = self._formats.attention, self._formats.ffn
        return self._opened(constant.whole(self._model, kinds, self.arithmetic, layers, centred, self._kv), arrays)

    def _opened(self, graph: bytes, arrays: Initialisers, once: bool = False) -> ort.InferenceSession:
        """A session that reads weights, scales and zero points in place, and holds what it reads while it runs."""
        in_place = [name for name in arrays if _part(name)]
        spare = [name for name in in_place if _part(name) in self._unread]
        return open_session(graph, arrays, alone=once, in_place=in_place, unread=spare)

    def _graph(self, make: Any, *asked: Any) -> bytes:
        """A graph that is made once: what streams past asks for few different ones, over and over."""
        key = (make, *(part for part in asked if part is not self._model))
        if key not in self._graphs:
            self._graphs[key] = make(*asked)
        return self._graphs[key]

    def _of_attention(
        self, i: int, products: Sequence[Rows], vectors: dict[str, Floats]
    ) -> tuple[Initialisers, frozenset[str]]:
        at, known = f"layer.{i}.", [*self._model.products(i), *self._model.products_behind()]
        arrays, centred = self._of_products(at, known[: len(products)], products)
        return arrays | {f"{at}{name}": vector for name, vector in vectors.items()}, centred

    def _of_products(
        self, at: str, products: Sequence[LayerProduct], rows: Sequence[Rows]
    ) -> tuple[Initialisers, frozenset[str]]:
        arrays: Initialisers = {}
        centred = set()
        for made, part in zip(products, rows, strict=True):
            product = self._product(part, self._header.product_format(made).kind, made.width)
            arrays |= product.named(f"{at}{made.name}")
            centred |= {f"{at}{made.name}"} if product.centred else set()
        return arrays, frozenset(centred)

    def _of_ffn(self, at: str, groups: Groups) -> tuple[Initialisers, frozenset[str]]:
        """A whole layer's: see graphs.constant.Layers.whole_ffn."""
        m, kind = self._model, self._formats.ffn
        inputs = self._product(
            type(groups.inputs)(*(by_matrix(a, m.inputs) for a in groups.inputs.arrays())), kind, m.hidden
        )
        arrays = inputs.named(f"{at}inputs")
        if groups.bias.size:
            arrays[f"{at}inputs.bias"] = by_matrix(groups.bias[..., None], m.inputs)[:, 0]
        if groups.norm.size:
            arrays[f"{at}neurons_norm"] = groups.norm.reshape(-1)
        with_centres = _centred(groups.down, kind, m.group_neurons)
        downs = [
            self._product(groups.down[g : g + 1].joined(), kind, m.group_neurons, with_centres).arrays
            for g in range(len(groups))
        ]
        joined = {end: np.concatenate([d[end] for d in downs], axis=1 - (end == "w")) for end in downs[0]}
        if "zero" in joined:  # a byte holds those of two blocks, and a group may end with half a byte
            joined["zero"] = _zeros(joined["scale"])
        arrays |= _Product(joined, with_centres).named(f"{at}down")
        names = [f"{at}inputs"] * inputs.centred + [f"{at}down"] * with_centres
        return arrays, frozenset(names)

    def _of_groups(self, groups: Groups) -> tuple[Initialisers, frozenset[str]]:
        m, kind = self._model, self._formats.ffn
        inputs = self._product(groups.inputs.joined(), kind, m.hidden)
        arrays = inputs.named("inputs")
        if groups.bias.size:
            arrays["inputs.bias"] = groups.bias.reshape(-1)
        if groups.norm.size:
            arrays["neurons_norm"] = groups.norm.reshape(-1)
        with_centres = _centred(groups.down, kind, m.group_neurons)
        for number in range(len(groups)):
            down = groups.down[number : number + 1].joined()
            arrays |= self._product(down, kind, m.group_neurons, with_centres).named(f"down.{number}")
        names = ["inputs"] * inputs.centred + ["down"] * with_centres
        return arrays, frozenset(names)

    def _product(self, rows: Rows, kind: RowKind, k: int, centred: bool | None = None) -> _Product:
        """The arrays of a product with rows [n, K]; their centres are left out if all of them are zero."""
        if isinstance(rows, PlainRows):
            return _Product({"w": np.ascontiguousarray(rows.w.T, np.float32)}, False)
        if isinstance(rows, TernaryRows):
            nibbles = pack_bits(unpack(rows.q, 2) + np.uint8(6), 4)  # their zero is 8, not 2
            blocks = nibbles.reshape(len(rows), -1, BLOCK // 2)
            return _Product({"q": blocks, "scale": rows.scale.repeat(blocks.shape[1], axis=1)}, False)
        if isinstance(rows, Mxfp4Rows):
            scale = mxfp4.scales(rows.exponent)
            return _Product(self._of_bytes(mxfp4.as_bytes(rows.q).reshape(*scale.shape, -1), scale), False)
        form = RowFormat(kind, k).widened
        if centred is None:
            centred = _centred(rows, kind, k)
        q = rows.q if centred else rows.q[:, : form.weight_bytes]
        scale = scales(rows.scale, rows.step, form, centred)
        blocks = q.reshape(*scale.shape, -1)
        if kind != "int8":
            return _Product({"q": blocks, "scale": scale}, centred)
        return _Product(self._of_bytes(blocks, scale), centred)

    def _of_bytes(self, blocks: Bytes, scale: Floats) -> Initialisers:
        """The arrays of a product with rows of 8 bits, their blocks [n, B, 32] and scales [n, B]."""
        if self.arithmetic == "int8":
            return {"q": blocks, "scale": scale}
        high, low = (pack_bits(np.asarray(nibble, np.uint8), 4) for nibble in (blocks >> 4, blocks & 15))
        return {
            "q.high": high,
            "scale.high": 16 * scale,
            "q.low": low,
            "scale": scale,
            "zero": _zeros(scale),
        }


def _part(name: str) -> str:
    """Which of PARTS an array of a product is, by the end of its name. Empty: another array, such as a vector.

    `layer.0.scale.weight`, which multiplies what leaves a layer, is a vector. It is read in every pass.
    """
    *_, end = name.removesuffix(".high").removesuffix(".low").split(".")
    return end if end in PARTS else ""


def _zeros(scale: Floats) -> npt.NDArray[np.uint8]:
    """The zero points [n, blocks / 2] of nibbles that count from zero, for scales [n, blocks]."""
    return np.zeros((len(scale), -(-scale.shape[1] // 2)), np.uint8)


def by_matrix(array: npt.NDArray[Any], inputs: int) -> npt.NDArray[Any]:
    """[g, M N, ...] -> [M g N, ...]: all rows of gate, then all of up."""
    groups, rows = array.shape[:2]
    parts = array.reshape(groups, inputs, rows // inputs, *array.shape[2:])
    return np.moveaxis(parts, 1, 0).reshape(groups * rows, *array.shape[2:])


def _centred(rows: Rows, kind: RowKind, k: int) -> bool:
    """Whether any of the rows [..., n, bytes] has a centre that is not zero."""
    if not isinstance(rows, QuantRows):
        return False
    zero = 0x88 if CENTRE_BITS[kind] == 4 else 0x80
    weights = RowFormat(kind, k).widened.weight_bytes
    return bool((rows.q[..., weights:] != zero).any())
