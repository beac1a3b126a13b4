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
from flashd.bundle.rows.kinds import BLOCK, CENTRE_BITS, Bytes, Floats
from flashd.engine.forward.products import scales
from flashd.graphs import constant
from flashd.graphs.constant import Arithmetic, Stored, StoredRows
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
    rows: StoredRows

    def named(self, name: str) -> Initialisers:
        return {f"{name}.{end}": array for end, array in self.arrays.items()}


class Constants:
    """Opens sessions for one bundle.

    Args:
        arithmetic: see graphs.constant. Models of which a part stays whole in each arithmetic have two of these.
        kv: how keys and values are kept.
    """

    def __init__(self, header: Header, arithmetic: Arithmetic = "float32", kv: KvFormat = "float32") -> None:
        self._model = header.model
        self.arithmetic, self._kv = arithmetic, kv
        self._graphs: dict[tuple[Any, ...], bytes] = {}
        self._unread = unread(arithmetic, not header.formats.constant.isdisjoint({"int8", "mxfp4"}))

    def rows(self, rows: Rows, k: int) -> ort.InferenceSession:
        """x [1, R, K] -> y [1, R, n], the product with rows [n, K]."""
        product = self._product(rows, k)
        graph = self._graph(constant.rows, self.arithmetic, len(rows), k, {"rows": product.rows})
        return self._opened(graph, product.named("rows"))

    def groups(self, groups: Groups) -> ort.InferenceSession:
        """h, before [1, T, ...] -> y [1, T, W]: what is before, and the share of some groups of any layer."""
        arrays, stored = self._of_groups(groups)
        graph = self._graph(constant.ffn, self._model, self.arithmetic, len(groups), stored)
        return self._opened(graph, arrays)

    def attention(self, i: int, products: Sequence[Rows], vectors: dict[str, Floats]) -> ort.InferenceSession:
        """The attention of layer i, see graphs.constant.attention. `products`: the rows of Architecture.products."""
        behind = vectors_behind_ffn(self._model) - vectors_before_ffn(self._model)
        own = {name: vector for name, vector in vectors.items() if name not in behind}
        arrays, stored = self._of_attention(i, products, own)
        return self._opened(constant.attention(self._model, self.arithmetic, i, stored, self._kv), arrays)

    def leave(self, i: int, products: Sequence[Rows], vectors: dict[str, Floats]) -> ort.InferenceSession:
        """What is behind the FFN of layer i, see graphs.constant.leave. `products`: those of products_behind."""
        behind = vectors_behind_ffn(self._model)
        own = {name: vector for name, vector in vectors.items() if name in behind}
        arrays, stored = self._of_products(f"layer.{i}.", self._model.products_behind(), products)
        arrays |= {f"layer.{i}.{name}": vector for name, vector in own.items()}
        return self._opened(constant.leave(self._model, self.arithmetic, i, stored), arrays)

    def token_inputs(self, projection: Rows, norm: Floats) -> ort.InferenceSession:
        """What tokens say to each layer, see graphs.constant.token_inputs."""
        product = self._product(projection, self._model.hidden)
        graph = constant.token_inputs(self._model, self.arithmetic, {"token_projection": product.rows})
        return self._opened(graph, product.named("token_projection") | {"token_norm.weight": norm})

    def spread(self, rows: Rows) -> ort.InferenceSession:
        """What makes several states of an embedding, see graphs.constant.spread. `rows`: of stream_projection."""
        product = self._product(rows, self._model.hidden)
        graph = constant.spread(self._model, self.arithmetic, {"stream_projection": product.rows})
        return self._opened(graph, product.named("stream_projection"))

    def finish(self, rows: Rows, vectors: dict[str, Floats]) -> ort.InferenceSession:
        """What makes one of several states, see graphs.constant.finish. `rows`: of stream_out."""
        arrays: Initialisers = {name: vectors[name] for name in self._model.norm_vectors("final")}
        stored: dict[str, StoredRows] = {}
        for i, at in enumerate(range(0, len(rows), self._model.hidden)):
            product = self._product(rows[at : at + self._model.hidden], self._model.hidden)
            arrays |= product.named(f"stream_out.{i}")
            stored[f"stream_out.{i}"] = product.rows
        return self._opened(constant.finish(self._model, self.arithmetic, stored), arrays)

    def whole(
        self, layers: range, parts: Sequence[tuple[Sequence[Rows], dict[str, Floats], Groups | None]]
    ) -> ort.InferenceSession:
        """Whole layers: of each the rows of products and products_behind, the small vectors, and groups, if any."""
        arrays: Initialisers = {}
        stored: dict[str, StoredRows] = {}
        for i, (products, vectors, groups) in zip(layers, parts, strict=True):
            for more, rows in (
                self._of_attention(i, products, vectors),
                self._of_ffn(f"layer.{i}.", groups) if groups is not None else ({}, {}),
            ):
                arrays |= more
                stored |= rows
        return self._opened(constant.whole(self._model, self.arithmetic, layers, stored, self._kv), arrays)

    def _opened(self, graph: bytes, arrays: Initialisers) -> ort.InferenceSession:
        """A session that reads weights, scales and zero points in place, and holds what it reads while it runs."""
        in_place = [name for name in arrays if _part(name)]
        spare = [name for name in in_place if _part(name) in self._unread]
        return open_session(graph, arrays, in_place=in_place, unread=spare)

    def _graph(self, make: Any, *asked: Any) -> bytes:
        """A graph that is made once: experts ask for few different ones, over and over."""
        parts = (tuple(part.items()) if isinstance(part, dict) else part for part in asked)
        key = (make, *(part for part in parts if part is not self._model))
        if key not in self._graphs:
            self._graphs[key] = make(*asked)
        return self._graphs[key]

    def _of_attention(
        self, i: int, products: Sequence[Rows], vectors: dict[str, Floats]
    ) -> tuple[Initialisers, Stored]:
        at, known = f"layer.{i}.", [*self._model.products(i), *self._model.products_behind()]
        arrays, stored = self._of_products(at, known[: len(products)], products)
        return arrays | {f"{at}{name}": vector for name, vector in vectors.items()}, stored

    def _of_products(
        self, at: str, products: Sequence[LayerProduct], rows: Sequence[Rows]
    ) -> tuple[Initialisers, Stored]:
        arrays: Initialisers = {}
        stored: dict[str, StoredRows] = {}
        for made, part in zip(products, rows, strict=True):
            n, with_centres = made.rows // made.heads, _centred(part, made.width)
            for head in range(made.heads):
                name = f"{at}{made.name}" + (f".{head}" if made.heads > 1 else "")
                product = self._product(part[head * n : (head + 1) * n], made.width, with_centres)
                arrays |= product.named(name)
                stored[name] = product.rows
        return arrays, stored

    def _of_ffn(self, at: str, groups: Groups) -> tuple[Initialisers, Stored]:
        """A whole layer's: see graphs.constant.Ffns.whole_ffn."""
        m = self._model
        inputs = self._product(
            type(groups.inputs)(*(by_matrix(a, m.inputs) for a in groups.inputs.arrays())), m.hidden
        )
        arrays = inputs.named(f"{at}inputs")
        if groups.bias.size:
            arrays[f"{at}inputs.bias"] = by_matrix(groups.bias[..., None], m.inputs)[:, 0]
        if groups.norm.size:
            arrays[f"{at}neurons_norm"] = groups.norm.reshape(-1)
        with_centres = _centred(groups.down, m.group_neurons)
        downs = [
            self._product(groups.down[g : g + 1].joined(), m.group_neurons, with_centres).arrays
            for g in range(len(groups))
        ]
        joined = {end: np.concatenate([d[end] for d in downs], axis=1 - (end == "w")) for end in downs[0]}
        if "zero" in joined:  # a byte holds those of two blocks, and a group may end with half a byte
            joined["zero"] = _zeros(joined["scale"])
        down = _Product(joined, StoredRows(groups.down.kind, with_centres))
        return arrays | down.named(f"{at}down"), {f"{at}inputs": inputs.rows, f"{at}down": down.rows}

    def _of_groups(self, groups: Groups) -> tuple[Initialisers, Stored]:
        m = self._model
        inputs = self._product(groups.inputs.joined(), m.hidden)
        arrays = inputs.named("inputs")
        if groups.bias.size:
            arrays["inputs.bias"] = groups.bias.reshape(-1)
        if groups.norm.size:
            arrays["neurons_norm"] = groups.norm.reshape(-1)
        with_centres = _centred(groups.down, m.group_neurons)
        for number in range(len(groups)):
            down = groups.down[number : number + 1].joined()
            arrays |= self._product(down, m.group_neurons, with_centres).named(f"down.{number}")
        return arrays, {"inputs": inputs.rows, "down": StoredRows(groups.down.kind, with_centres)}

    def _product(self, rows: Rows, k: int, centred: bool | None = None) -> _Product:
        """The arrays of a product with rows [n, K]; their centres are left out if all of them are zero."""
        if centred is None:
            centred = _centred(rows, k)
        return _Product(self._arrays(rows, k, centred), StoredRows(rows.kind, centred))

    def _arrays(self, rows: Rows, k: int, centred: bool) -> Initialisers:
        if isinstance(rows, PlainRows):
            return {"w": np.ascontiguousarray(rows.w.T, np.float32)}
        if isinstance(rows, TernaryRows):
            nibbles = pack_bits(unpack(rows.q, 2) + np.uint8(6), 4)  # their zero is 8, not 2
            blocks = nibbles.reshape(len(rows), -1, BLOCK // 2)
            return {"q": blocks, "scale": rows.scale.repeat(blocks.shape[1], axis=1)}
        if isinstance(rows, Mxfp4Rows):
            scale = mxfp4.scales(rows.exponent)
            return self._of_bytes(mxfp4.as_bytes(rows.q).reshape(*scale.shape, -1), scale)
        form = RowFormat(rows.kind, k)
        q = rows.q if centred else rows.q[:, : form.weight_bytes]
        scale = scales(rows.scale, rows.step, form, centred)
        blocks = q.reshape(*scale.shape, -1)
        return self._of_bytes(blocks, scale) if rows.kind == "int8" else {"q": blocks, "scale": scale}

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


def _centred(rows: Rows, k: int) -> bool:
    """Whether any of the rows [..., n, bytes] has a centre that is not zero."""
    if not isinstance(rows, QuantRows):
        return False
    zero = 0x88 if CENTRE_BITS[rows.kind] == 4 else 0x80
    weights = RowFormat(rows.kind, k).weight_bytes
    return bool((rows.q[..., weights:] != zero).any())
