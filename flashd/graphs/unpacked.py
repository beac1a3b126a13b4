"""The product of tokens with rows whose weights are bytes: for what is multiplied once or a few times.

MatMulNBits repacks constants when a session is opened, which takes longer than a few products do. Here weights come
as bytes [B, 32, n], a block of 32 at a time, the n rows side by side, and onnxruntime takes them as they are. See
engine.forward.unpacked, which makes them.

*int8* rounds what goes into a product to 8 bits in blocks of 32, as MatMulNBits does at accuracy level 4. Within a
block the sums are exact, and blocks are added in one order for each token, so that a token's outputs do not depend
on how many others share a product. *float32* rounds nothing. A single token is doubled there, see graphs.constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import LayerProduct
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.bundle.rows.kinds import BITS, BLOCK, CENTRE_BITS, CODE_TYPES, unit_steps
from flashd.graphs.constant import Arithmetic
from flashd.graphs.layers import Layers
from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import MICROSOFT, T
from flashd.graphs.products import above, activated, block_means, gated, share
from flashd.graphs.rounding import SMALLEST, KvFormat

ZEROS = {"int4": 8, "int8": 128, "mxfp4": 128, "ternary": 2, "int3": 4, "int2": 2}
"""What stands for zero in the bytes of each kind of rows."""

ROWS_TOGETHER = 256
"""Rows that many tokens are multiplied with at once. Sums of their blocks then stay in the processor's cache."""

MIDDLE = np.uint8(128)
"""What stands for zero in rounded inputs."""


def planes(form: RowFormat) -> int:
    """Weights that a byte of a row holds. Unpacked, all first ones of a block come before all second ones.

    Of weights of 3 bits, three bytes hold eight.
    """
    return 8 if form.kind == "int3" else 8 // BITS[form.kind]


def rounds(form: RowFormat, arithmetic: Arithmetic) -> bool:
    """Whether what goes into a product with such rows is rounded."""
    return arithmetic == "int8" and form.kind != "f16"


def signed(form: RowFormat, arithmetic: Arithmetic) -> bool:
    """Whether weights are signed bytes as a product takes them.

    Signed ones are multiplied sooner. But AVX2 adds two products in 16 bits, where those of 8-bit weights overflow.
    """
    return not rounds(form, arithmetic) or form.kind in ("int4", "int3", "int2", "ternary")


def entering(form: RowFormat, arithmetic: Arithmetic) -> bytes:
    """h [T, K] as products with rows take it.

    Rounded it is codes [T, B, 32], of means too, and step [T, B], what one code of each block is worth. Else it is x
    [T, 32 B], or of f16 rows x [T, K].
    """
    g = Graph()
    h = g.input("h", T.FLOAT, ["T", form.width])
    for name, (kind, value) in _entering(g, h, form, arithmetic).items():
        g.output(name, kind, ["T", *_shape(name, form)], value)
    return g.serialise("entering")


def group(model: Architecture, form: GroupFormat, arithmetic: Arithmetic, many: bool = False) -> bytes:
    """y [T, W]: the share that a group has in an FFN, whose input is what `entering` gives.

    `inputs.w` [B, 32, M N] and `down.w` [B, 32, H] are the weights and the digits behind them. Their scales are codes
    and steps, see `_scales`, or `inputs.scale` and `down.scale` [B, 1, n], or [1, 1, n] if a row has one. Of f16 rows
    `w` is [K, n]. If gates have a bound, it and the least that is left of them are `bounds` [T, 2].

    `many`: the graph is the faster one for more than a few tokens. Both give the same.
    """
    g, rows = Graph(), form.inputs * form.neurons
    a = _product(g, _given(g, form.row, arithmetic), "inputs", form.row, rows, many)
    if form.biases:
        a = g.node("Add", a, g.input("bias", T.FLOAT, [rows]))
    if model.gated:
        gate, up = g.nodes_out("Split", a, outputs=2, axis=1, num_outputs=2)
        bounds = g.input("bounds", T.FLOAT, ["T", 2]) if model.bounds else ""
        over = g.nodes_out("Split", bounds, outputs=2, axis=1, num_outputs=2) if bounds else []
        a = gated(g, model, above(g, gate, *over), up)
    else:
        a = activated(g, model, a)
    weighed = g.node("Mul", a, g.input("norm", T.FLOAT, [form.neurons])) if form.normed else a
    inner = {name: value for name, (_, value) in _entering(g, weighed, form.column, arithmetic).items()}
    y = _product(g, inner, "down", form.column, form.hidden, many)
    g.output("y", T.FLOAT, ["T", model.share_width], share(g, model, a, y))
    return g.serialise("group")


def rows(form: RowFormat, n: int, arithmetic: Arithmetic, many: bool = False) -> bytes:
    """y [T, n], the product of what `entering` gives with n rows, `rows.w` and their scales, see `group`."""
    g = Graph()
    y = _product(g, _given(g, form, arithmetic), "rows", form, n, many)
    g.named_output("y", T.FLOAT, ["T", n], y)
    return g.serialise("rows")


def attention(
    model: Architecture, arithmetic: Arithmetic, i: int, forms: Mapping[str, RowFormat], many: bool, kv: KvFormat
) -> bytes:
    """The attention of a layer, see Layers.attention_graph, whose rows and small vectors are inputs.

    Layers that are alike have the same graph. `forms`: of the rows of each product, which are `NAME.w` and their
    scales, see `group`.
    """
    g = Graph()

    def vector(name: str, length: int) -> str:
        return g.input(name, T.FLOAT, [length])

    return Layers(g, model, _Products(g, arithmetic, forms, many), lambda _: vector, kv).attention_graph(i)


class _Products:
    """Adds products with rows that are inputs of a graph."""

    def __init__(self, g: Graph, arithmetic: Arithmetic, forms: Mapping[str, RowFormat], many: bool) -> None:
        self._g, self._arithmetic, self._forms, self._many = g, arithmetic, forms, many
        self._entering: dict[tuple[str, RowFormat], dict[str, str]] = {}

    def __call__(self, x: str, name: str, n: int, k: int) -> str:  # noqa: ARG002
        """x [1, T, K] times rows [n, K] -> [1, T, n]"""
        g, of_layer = self._g, name.split(".", 2)[2]
        form = self._forms[of_layer]
        y = _product(g, self._given(x, form), of_layer, form, n, self._many)
        return g.node("Unsqueeze", y, g.shape(0))

    def by_head(self, x: str, name: str, product: LayerProduct) -> str:
        """x [1, T, heads K], of which each head's part is multiplied by rows of its own -> [1, T, rows]"""
        g, heads, of_layer = self._g, product.heads, name.split(".", 2)[2]
        form, n = self._forms[of_layer], product.rows // heads
        parts = g.nodes_out("Split", x, outputs=heads, axis=2, num_outputs=heads)
        weights = [
            g.nodes_out("Split", each, outputs=heads, axis=-1, num_outputs=heads)
            for each in _weights(g, of_layer, form, product.rows, self._arithmetic)
        ]
        made = [
            _multiplied(g, self._given(part, form), some, form, n, self._many)
            for part, *some in zip(parts, *weights, strict=True)
        ]
        return g.node("Unsqueeze", g.node("Concat", *made, axis=1), g.shape(0))

    def _given(self, x: str, form: RowFormat) -> dict[str, str]:
        """What products with rows of a form take of x [1, T, K]. Those that take the same x share it."""
        if (x, form) not in self._entering:
            flat = self._g.node("Reshape", x, self._g.shape(-1, form.width))
            made = _entering(self._g, flat, form, self._arithmetic)
            self._entering[x, form] = {name: value for name, (_, value) in made.items()}
        return self._entering[x, form]


def _given(g: Graph, form: RowFormat, arithmetic: Arithmetic) -> dict[str, str]:
    """The inputs that `entering` gives, by name."""
    names = ("codes", "step") if rounds(form, arithmetic) else ("x",)
    return {name: g.input(name, _kind(name), ["T", *_shape(name, form)]) for name in names}


def _blocks(form: RowFormat) -> int:
    return (form.width + form.digits) // BLOCK


def _kind(name: str) -> T:
    return T.UINT8 if name == "codes" else T.FLOAT


def _shape(name: str, form: RowFormat) -> list[int]:
    if name == "x":
        return [form.width + form.digits]
    return [_blocks(form)] if name == "step" else [_blocks(form), BLOCK]


def _entering(g: Graph, x: str, form: RowFormat, arithmetic: Arithmetic) -> dict[str, tuple[T, str]]:
    """What a product with rows takes of x [T, K], by name, see `entering`."""
    if form.kind == "f16":
        return {"x": (T.FLOAT, x)}
    x = g.node("Reshape", _with_means(g, x, form), g.shape(-1, _blocks(form), BLOCK))  # [T, B, 32]
    if not rounds(form, arithmetic):
        x = g.node("Reshape", _as_unpacked(g, x, form), g.shape(-1, form.width + form.digits))
        return {"x": (T.FLOAT, x)}
    largest = g.node("ReduceMax", g.node("Abs", x), g.shape(-1), keepdims=1)
    step = g.node("Max", g.node("Mul", largest, g.constant(np.float32(1 / 127))), g.constant(SMALLEST))  # [T, B, 1]
    codes = g.node("Add", g.node("Round", g.node("Div", x, step)), g.constant(np.float32(MIDDLE)))
    codes = _as_unpacked(g, g.node("Cast", codes, to=T.UINT8), form)
    return {"codes": (T.UINT8, codes), "step": (T.FLOAT, g.node("Squeeze", step, g.shape(2)))}


def _product(g: Graph, given: dict[str, str], name: str, form: RowFormat, n: int, many: bool) -> str:
    """[T, n], n rows times what `_entering` made."""
    arithmetic: Arithmetic = "int8" if "codes" in given else "float32"
    return _multiplied(g, given, _weights(g, name, form, n, arithmetic), form, n, many)


def _weights(g: Graph, name: str, form: RowFormat, n: int, arithmetic: Arithmetic) -> list[str]:
    """The inputs that are n rows: weights, and their scales if they have some."""
    if form.kind == "f16":
        return [g.input(f"{name}.w", T.FLOAT16, [form.width, n])]
    kind = T.INT8 if signed(form, arithmetic) else T.UINT8
    w = g.input(f"{name}.w", kind, [_blocks(form), BLOCK, n])
    if form.kind in CODE_TYPES:
        return [w, _scales(g, name, form, n)]
    return [w, g.input(f"{name}.scale", T.FLOAT, [1 if form.kind == "ternary" else _blocks(form), 1, n])]


def _scales(g: Graph, name: str, form: RowFormat, n: int) -> str:
    """[B, 1, n]: the scales of n rows, and behind them those of the digits, which meet the means of blocks.

    `NAME.codes` [B, 1, n] and `NAME.step` [2, 1, n] are the rows' own. numpy would hold the interpreter's lock.
    """
    of_codes = T.UINT16 if CODE_TYPES[form.kind] is np.uint16 else T.UINT8
    codes = g.input(f"{name}.codes", of_codes, [form.blocks, 1, n])
    step = g.node("Cast", g.input(f"{name}.step", T.FLOAT16, [2, 1, n]), to=T.FLOAT)
    worth = g.node("Mul", step, g.constant(unit_steps(form.kind).reshape(2, 1, 1)))
    top, centre = g.nodes_out("Split", worth, outputs=2, axis=0, num_outputs=2)
    low = g.node("Mul", centre, g.constant(np.float32(BLOCK)))
    high = g.node("Mul", low, g.constant(np.float32(1 << CENTRE_BITS[form.kind])))
    half = form.digits // BLOCK // 2
    weights = g.node("Mul", g.node("Cast", codes, to=T.FLOAT), top)
    return g.node("Concat", weights, *[high] * half, *[low] * half, axis=0)


def _multiplied(g: Graph, given: dict[str, str], weights: Sequence[str], form: RowFormat, n: int, many: bool) -> str:
    """[T, n], n rows times what `_entering` made."""
    if form.kind == "f16":
        return g.node("MatMul", given["x"], g.node("Cast", weights[0], to=T.FLOAT))
    w, scale = weights
    count = -(-n // ROWS_TOGETHER)
    if "x" in given:
        parts = [g.node("MatMul", given["x"], wide) for wide in _widened(g, w, scale, form, count)]
        return g.node("Concat", *parts, axis=1) if count > 1 else parts[0]
    kind: type[np.uint8 | np.int8] = np.int8 if signed(form, "int8") else np.uint8
    codes = g.node("Transpose", given["codes"], perm=[1, 0, 2])  # [B, T, 32]
    zeros = g.constant(MIDDLE), g.constant(kind(ZEROS[form.kind]))
    step = g.node("Unsqueeze", given["step"], g.shape(1))  # [T, 1, B]

    def summed(sums: str) -> str:
        """[T, 1, n], the sum of [B, T, n] over blocks, of each token by itself."""
        return g.node("FusedMatMul", step, sums, domain=MICROSOFT, transBatchB=1)

    if not many or form.kind == "ternary":  # which has one scale for all blocks
        sums = g.node("Cast", g.node("MatMulInteger", codes, w, *zeros), to=T.FLOAT)
        return g.node("Squeeze", summed(g.node("Mul", sums, scale)), g.shape(1))
    one = g.constant(np.float32(1))
    split = [g.nodes_out("Split", x, outputs=count, axis=2, num_outputs=count) for x in (w, scale)]
    made = [
        summed(g.node("MatMulIntegerToFloat", codes, *part, *zeros, domain=MICROSOFT))
        for part in ((w, one, scale) for w, scale in zip(*split, strict=True))
    ]
    return g.node("Squeeze", g.node("Concat", *made, axis=2), g.shape(1))


def _widened(g: Graph, w: str, scale: str, form: RowFormat, count: int) -> Iterator[str]:
    """[32 B, n] float32 of signed weights [B, 32, n] around 0, in `count` parts of the rows, one after the other."""
    flat = g.node("Reshape", w, g.shape(form.width + form.digits, -1))  # [32 B, n]
    scale = g.node("Squeeze", scale, g.shape(1))  # [B, n] or [1, n]
    parts = [g.nodes_out("Split", x, outputs=count, axis=1, num_outputs=count) for x in (flat, scale)]
    for some, each in zip(*parts, strict=True):
        if form.kind == "ternary":
            yield g.node("DequantizeLinear", some, g.node("Squeeze", each, g.shape(0)), axis=1)
        else:
            yield g.node("DequantizeLinear", some, each, axis=0, block_size=BLOCK)


def _as_unpacked(g: Graph, x: str, form: RowFormat) -> str:
    """[T, B, 32], a block's values in the order in which its weights are unpacked."""
    of_byte = planes(form)
    if of_byte == 1:
        return x
    x = g.node("Reshape", x, g.shape(-1, _blocks(form), BLOCK // of_byte, of_byte))
    return g.node("Reshape", g.node("Transpose", x, perm=[0, 1, 3, 2]), g.shape(-1, _blocks(form), BLOCK))


def transpose() -> bytes:
    """x [n, m] uint8 -> y [m, n]. It moves 16 bytes at a time, which numpy does not."""
    g = Graph()
    g.named_output("y", T.UINT8, ["m", "n"], g.node("Transpose", g.input("x", T.UINT8, ["n", "m"]), perm=[1, 0]))
    return g.serialise("transpose")


def _with_means(g: Graph, x: str, form: RowFormat) -> str:
    """x [T, K] and behind it, twice, the means of its blocks, filled up to whole blocks: [T, K + digits]."""
    if not form.digits:
        return x
    means = block_means(g, x, form.blocks)  # [T, K / 32]
    if missing := form.digits // 2 - form.blocks:
        means = g.node("Pad", means, g.shape(0, 0, 0, missing))
    return g.node("Concat", x, means, means, axis=1)
