"""Graphs whose weights are constants, which onnxruntime repacks once when it opens them.

The kinds: the attention of a layer or what is in its place, some units of a layer's FFN, what is behind it, whole
layers one behind the other, the head, and what tokens say to each layer. A constant takes 5 to 6 bits a weight in RAM
and is multiplied 20 to 50 times as fast as rows that are widened first.

There are two arithmetics. *int8* rounds what goes into a product to 8 bits in blocks of 32, as llama.cpp does:
MatMulNBits at accuracy level 4, for models that stay whole and for mixtures. *float32* rounds nothing: level 1, for
the attention of models that select neurons, and where RAM is scarce. A paged model's logits are the same to the bit
whatever is in RAM and however many tokens share a pass:

- a group's share in an FFN is a product of its own, and shares are added in the groups' order;
- a single row is doubled, because products of one row add up in another order than those of several;
- attention over branches adds up in float64, see graphs.tree_attention.

The centres of a row's blocks are digits behind its weights. So what goes into a product is followed by the means of
its blocks, twice, if any centre is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import LayerProduct
from flashd.bundle.rows.kinds import BLOCK, RowKind
from flashd.graphs.layer_stages import LayerStages
from flashd.graphs.layers import Layers
from flashd.graphs.nodes import Graph, Vector
from flashd.graphs.onnx_bytes import MICROSOFT, T
from flashd.graphs.products import above, activated, block_means, gated, share
from flashd.graphs.rounding import KvFormat

Arithmetic = Literal["int8", "float32"]
LEVELS: dict[Arithmetic, int] = {"int8": 4, "float32": 1}


class StoredRows(NamedTuple):
    """The rows of a product."""

    kind: RowKind
    centred: bool  # whether their centres are not all zero


Stored = Mapping[str, StoredRows]
"""Those of products by their names."""


class Products:
    """Adds products with constant rows to a graph.

    Args:
        stored: the rows of each product, by its name.
    """

    def __init__(self, g: Graph, arithmetic: Arithmetic, stored: Stored) -> None:
        self._g, self._arithmetic, self.stored = g, arithmetic, stored
        self._with_sums: dict[str, str] = {}

    def __call__(self, x: str, name: str, n: int, k: int) -> str:
        """x [1, T, K] times rows [n, K] -> [1, T, n]. engine.forward.constants has the arrays that it names."""
        width, rows = k, self.stored[name]
        if rows.centred:
            x, width = self.with_sums(x, k), k + digits(k)
        return self.of_wide(x, rows.kind, name, n, width)

    def by_head(self, x: str, name: str, product: LayerProduct) -> str:
        """x [1, T, heads K], of which each head's part is multiplied by rows of its own -> [1, T, rows]."""
        g, heads, k = self._g, product.heads, product.width
        width, rows = k, self.stored[f"{name}.0"]
        if rows.centred:
            x, width = self.with_sums(g.node("Reshape", x, g.shape(1, -1, k)), k), k + digits(k)
            x = g.node("Reshape", x, g.shape(1, -1, heads * width))
        parts = g.nodes_out("Split", x, outputs=heads, axis=2, num_outputs=heads)
        n = product.rows // heads
        made = [self.of_wide(part, rows.kind, f"{name}.{i}", n, width) for i, part in enumerate(parts)]
        return g.node("Concat", *made, axis=2)

    def of_wide(self, x: str, kind: RowKind, name: str, n: int, width: int) -> str:
        """x [1, T, width], which has its sums behind it if the rows have centres, times rows -> [1, T, n]."""
        if kind == "f16":
            return self._g.node("MatMul", x, self._g.external(f"{name}.w", T.FLOAT, [width, n]))
        if kind not in ("int8", "mxfp4"):
            return self._nbits(x, f"{name}.q", f"{name}.scale", n, width, 4)
        if self._arithmetic == "int8":
            return self._nbits(x, f"{name}.q", f"{name}.scale", n, width, 8)
        # at level 1 only 4-bit weights are multiplied without being widened whole: q - 128 is 16 (high - 8) + low
        high = self._nbits(x, f"{name}.q.high", f"{name}.scale.high", n, width, 4)
        low = self._nbits(x, f"{name}.q.low", f"{name}.scale", n, width, 4, f"{name}.zero")
        return self._g.node("Add", high, low)

    def with_sums(self, x: str, k: int, filled: bool = False) -> str:
        """x [1, T, K] and behind it, twice, the means of its blocks, the first time filled up to whole blocks.

        With `filled` the second time too.
        """
        if x not in self._with_sums:
            g, blocks = self._g, k // BLOCK
            means = block_means(g, x, blocks, 1)  # [1, T, K / 32]
            whole = means
            if blocks % BLOCK:
                whole = g.node("Pad", means, g.shape(0, 0, 0, 0, 0, -blocks % BLOCK))
            # [1, T, K + digits(K)]
            self._with_sums[x] = g.node("Concat", x, whole, whole if filled else means, axis=2)
        return self._with_sums[x]

    def _nbits(self, x: str, q: str, scale: str, n: int, k: int, bits: int, zero: str = "") -> str:
        return nbits(self._g, x, (q, scale, zero), (n, k), bits, LEVELS[self._arithmetic])


def nbits(g: Graph, x: str, names: tuple[str, str, str], shape: tuple[int, int], bits: int, level: int) -> str:
    """x [1, T, K] times rows of `shape` (n, K) of some bits -> [1, T, n].

    Args:
        names: of the weights, their scales and their zero points; the last is empty if all are in the middle.
        level: the accuracy_level of MatMulNBits.
    """
    (n, k), blocks = shape, -(-shape[1] // BLOCK)
    q = g.external(names[0], T.UINT8, [n, blocks, BLOCK * bits // 8])
    scale = g.external(names[1], T.FLOAT, [n, blocks])
    zeros = [g.external(names[2], T.UINT8, [n, -(-blocks // 2)])] if names[2] else []
    return g.node(
        "MatMulNBits", x, q, scale, *zeros, domain=MICROSOFT,
        K=k, N=n, bits=bits, block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip


def digits(k: int) -> int:
    """Values that follow K inputs for the digits of centres; the last block need not be filled."""
    blocks = k // BLOCK
    return -(-blocks // BLOCK) * BLOCK + blocks


class Ffns:
    """Puts FFNs with constant weights into a graph."""

    def __init__(self, g: Graph, model: Architecture, products: Products) -> None:
        self._g, self._model, self._products = g, model, products
        self._group = model.group_neurons

    def ffn(self, h: str, groups: int, before: str) -> str:
        """[1, T, Model.share_width]: what is before, and some groups' shares in an FFN of h [1, T, H], in order.

        Rows of gate and up are by group, [groups, M, N]; each group has its own rows of down.
        """
        g, m, n = self._g, self._model, self._group
        h, *bound = self._apart(h)
        a = self._inputs("", h, groups)  # [1, T, groups M N]
        if m.gated:
            pairs = g.node("Reshape", a, g.shape(1, -1, groups, m.inputs, n))  # [1, T, groups, M, N]
            gate, up = g.nodes_out("Split", pairs, outputs=2, axis=3, num_outputs=2)
            over = [g.node("Reshape", each, g.shape(1, -1, 1, 1, 1)) for each in bound]
            a = gated(g, m, above(g, gate, *over), up)
        else:
            a = activated(g, m, a)
        squared = a = g.node("Reshape", a, g.shape(1, -1, groups * n))  # [1, T, groups N]
        a = self._weighed("", a, groups)
        a, width = g.node("Reshape", a, g.shape(1, -1, n)), n  # [1, T groups, N]
        down = self._products.stored["down"]
        if down.centred:
            a, width = self._products.with_sums(a, n), n + digits(n)
        a = g.node("Reshape", a, g.shape(1, -1, groups * width))  # [1, T, groups width]
        parts = g.nodes_out("Split", a, outputs=groups, axis=2, num_outputs=groups) if groups > 1 else [a]
        shares = [
            self._products.of_wide(part, down.kind, f"down.{number}", m.hidden, width)
            for number, part in enumerate(parts)
        ]
        if m.normed_neurons:  # the sum of each group's squares goes with its share
            squares = g.nodes_out("Split", squared, outputs=groups, axis=2, num_outputs=groups)
            shares = [share(g, m, part, one) for part, one in zip(squares, shares, strict=True)]
        y = before
        for one in shares:
            y = g.node("Add", y, one)
        return y

    def whole_ffn(self, i: int, h: str) -> str:
        """[1, T, Model.share_width]: a layer's whole FFN of h [1, T, H].

        Rows of gate and up are by matrix, [M, F], and all groups' rows of down lie one behind the other, their digits
        with them: one product of all of them costs half of what a product a group costs.
        """
        g, m, n, at = self._g, self._model, self._group, f"layer.{i}."
        groups = m.layer_groups[i]
        h, *bound = self._apart(h)
        a = self._inputs(at, h, groups)  # [1, T, M F]
        if m.gated:
            gate, up = g.nodes_out("Split", a, outputs=2, axis=2, num_outputs=2)
            a = gated(g, m, above(g, gate, *bound), up)
        else:
            a = activated(g, m, a)
        activations, a, width = a, self._weighed(at, a, groups), m.neurons_of(i)
        down = self._products.stored[f"{at}down"]
        if down.centred:
            by_group = self._products.with_sums(g.node("Reshape", a, g.shape(1, -1, n)), n, filled=True)
            width = groups * (n + 2 * (digits(n) - n // BLOCK))
            a = g.node("Reshape", by_group, g.shape(1, -1, width))
        return share(g, m, activations, self._products.of_wide(a, down.kind, f"{at}down", m.hidden, width))

    def _apart(self, h: str) -> list[str]:
        """[1, T, H] of what an FFN is given, and each number that stands behind it, [1, T, 1]."""
        g, m = self._g, self._model
        return g.nodes_out("Split", h, g.shape(m.hidden, 1, 1), outputs=3, axis=2) if m.bounds else [h]

    def _weighed(self, at: str, a: str, groups: int) -> str:
        """Activations [1, T, groups N], times their norm's weights in models that norm them."""
        if not self._model.normed_neurons:
            return a
        norm = self._g.external(f"{at}neurons_norm", T.FLOAT, [groups * self._group])
        return self._g.node("Mul", a, norm)

    def _inputs(self, at: str, h: str, groups: int) -> str:
        """The products of h with rows of gate and up, and their biases."""
        g, m = self._g, self._model
        rows = groups * m.inputs * self._group
        a = self._products(h, f"{at}inputs", rows, m.hidden)
        if "inputs" not in m.biases:
            return a
        return g.node("Add", a, g.external(f"{at}inputs.bias", T.FLOAT, [rows]))


def attention(model: Architecture, arithmetic: Arithmetic, i: int, stored: Stored, kv: KvFormat = "float32") -> bytes:
    """The attention of a layer, or what is in its place, see Layers.attention_graph."""
    g = Graph()
    return Layers(g, model, Products(g, arithmetic, stored), partial(_external_vectors, g), kv).attention_graph(i)


def leave(model: Architecture, arithmetic: Arithmetic, i: int, stored: Stored) -> bytes:
    """x, branch [1, T, ...] (the FFN's output), token [1, T, P] -> x_out [1, T, H] of a layer with token inputs."""
    g = Graph()
    x = g.input("x", T.FLOAT, [1, "T", model.carried_width])
    branch, token = g.input("branch", T.FLOAT, [1, "T", model.share_width]), _token_input(g, model)
    layers = Layers(g, model, Products(g, arithmetic, stored), partial(_external_vectors, g))
    block = LayerStages(g, model, _external_vectors(g, f"layer.{i}."))
    g.output("x_out", T.FLOAT, [1, "T", model.stream_width], layers.leave(i, x, branch, block, token))
    return g.serialise("leave")


def token_inputs(model: Architecture, arithmetic: Arithmetic, stored: Stored) -> bytes:
    """x [1, T, H], the embeddings, and rows [1, T, L P] of the table -> y [L, T, P], all layers' token inputs."""
    g = Graph()
    x, rows = g.input("x", T.FLOAT, [1, "T", model.hidden]), g.input("rows", T.FLOAT, [1, "T", model.token_width])
    products = Products(g, arithmetic, stored)(x, "token_projection", model.token_width, model.hidden)
    y = LayerStages(g, model, _external_vectors(g, "")).token_inputs(products, rows)
    width = model.token_inputs.width if model.token_inputs else 0
    g.output("y", T.FLOAT, [model.layers, "T", width], y)
    return g.serialise("token_inputs")


def _token_input(g: Graph, model: Architecture, suffix: str = "") -> str:
    """The input [1, T, P] for a layer's token inputs; empty if the model has none."""
    if model.token_inputs is None:
        return ""
    return g.input(f"token{suffix}", T.FLOAT, [1, "T", model.token_inputs.width])


def ffn(model: Architecture, arithmetic: Arithmetic, groups: int, stored: Stored) -> bytes:
    """h [1, T, H], before [1, T, Model.share_width] -> y, what is before and the share of some groups of a layer."""
    g = Graph()
    h, width = g.input("h", T.FLOAT, [1, "T", model.group_input_width]), model.share_width
    before = g.input("before", T.FLOAT, [1, "T", width])
    ffns = Ffns(g, model, Products(g, arithmetic, stored))
    g.output("y", T.FLOAT, [1, "T", width], ffns.ffn(h, groups, before))
    return g.serialise("ffn")


def whole(
    model: Architecture, arithmetic: Arithmetic, layers: range, stored: Stored, kv: KvFormat = "float32"
) -> bytes:
    """x [1, T, H] that goes into the first of some layers -> `x_out` [1, T, H] behind the last."""
    g = Graph()
    x = g.input("x", T.FLOAT, [1, "T", model.stream_width])
    products = Products(g, arithmetic, stored)
    made, ffns = Layers(g, model, products, partial(_external_vectors, g), kv), Ffns(g, model, products)
    for i in layers:
        token = _token_input(g, model, f".{i}")
        x, h, block = made.attention(i, x, f".{i}")
        if not model.layer_groups[i]:
            continue
        x = made.leave(i, x, ffns.whole_ffn(i, h), block, token)
    g.output("x_out", T.FLOAT, [1, "T", model.stream_width], x)
    return g.serialise("layers")


def spread(model: Architecture, arithmetic: Arithmetic, stored: Stored) -> bytes:
    """x [1, T, H], the embeddings -> y [1, T, S H], the states in front of the layers."""
    g = Graph()
    x, width = g.input("x", T.FLOAT, [1, "T", model.hidden]), model.stream_width
    products = Products(g, arithmetic, stored)(x, "stream_projection", width - model.hidden, model.hidden)
    y = LayerStages(g, model, _external_vectors(g, "")).spread(x, products)
    g.output("y", T.FLOAT, [1, "T", width], y)
    return g.serialise("spread")


def finish(model: Architecture, arithmetic: Arithmetic, stored: Stored) -> bytes:
    """x [1, T, S H] behind the last layer -> y [1, T, H], the input of the head."""
    g = Graph()
    x, count = g.input("x", T.FLOAT, [1, "T", model.stream_width]), model.stream_width // model.hidden
    states = g.nodes_out("Split", x, outputs=count, axis=2, num_outputs=count)[1:]
    made = Products(g, arithmetic, stored)
    parts = [made(state, f"stream_out.{i}", model.hidden, model.hidden) for i, state in enumerate(states)]
    products = g.node("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]
    g.output(
        "y", T.FLOAT, [1, "T", model.hidden], LayerStages(g, model, _external_vectors(g, "")).finish(x, products)
    )
    return g.serialise("finish")


def rows(arithmetic: Arithmetic, n: int, k: int, stored: Stored) -> bytes:
    """x [1, R, K] -> y [1, R, n], the product with n rows of the head."""
    g = Graph()
    x = g.input("x", T.FLOAT, [1, "R", k])
    g.output("y", T.FLOAT, [1, "R", n], Products(g, arithmetic, stored)(x, "rows", n, k))
    return g.serialise("rows")


def _external_vectors(g: Graph, at: str) -> Vector:
    return lambda name, length: g.external(f"{at}{name}", T.FLOAT, [length])
