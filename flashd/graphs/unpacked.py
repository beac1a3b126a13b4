"""The product of tokens with a group whose weights are bytes: for groups that are multiplied once or a few times.

MatMulNBits repacks constants when a session is opened, which takes longer than a few products do. Here weights come
as bytes [B, 32, n], a block of 32 at a time, the n rows side by side, and MatMulInteger takes them as they are. See
engine.forward.unpacked, which makes them.

*int8* rounds what goes into a product to 8 bits in blocks of 32, as MatMulNBits does at accuracy level 4. Within a
block the sums are exact, and blocks are added in one order for each token, so that a token's outputs do not depend
on how many others share a product. *float32* rounds nothing. A single token is doubled there, see graphs.constant.
"""

from __future__ import annotations

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.rows.formats import GroupFormat, RowFormat
from flashd.bundle.rows.kinds import BITS, BLOCK
from flashd.graphs.constant import Arithmetic
from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import T
from flashd.graphs.products import activated, gated
from flashd.graphs.rounding import SMALLEST

ZEROS = {"int4": 8, "int8": 128, "mxfp4": 128, "ternary": 2}
"""What stands for zero in the bytes of each kind of rows."""

MIDDLE = np.uint8(128)
"""What stands for zero in rounded inputs."""


def planes(form: RowFormat) -> int:
    """Weights that a byte of a row holds. Unpacked, all first ones of a block come before all second ones."""
    return 8 // BITS[form.kind]


def entering(form: GroupFormat, arithmetic: Arithmetic) -> bytes:
    """h [T, H], the input of a layer's groups, as each of them takes it.

    Rounded it is codes [T, B, 32], of means too, and step [T, B], what one code of each block is worth. Else it is x
    [T, B, 32], or of f16 rows x [T, H].
    """
    g = Graph()
    h = g.input("h", T.FLOAT, ["T", form.hidden])
    for name, (kind, value) in _entering(g, h, form.row, arithmetic).items():
        g.output(name, kind, ["T", *_shape(name, form.row)], value)
    return g.serialise("entering")


def group(model: Architecture, form: GroupFormat, arithmetic: Arithmetic) -> bytes:
    """y [T, H] = before [T, H] and the share that a group has in an FFN, whose input is what `entering` gives.

    `inputs.w` [B, 32, M N] and `down.w` [B, 32, H] are the weights and the digits behind them, `inputs.scale` and
    `down.scale` [B, 1, n] their scales, or [1, 1, n] if a row has one. Of f16 rows `w` is [K, n].
    """
    g, rows = Graph(), form.inputs * form.neurons
    names = ("codes", "step") if _rounds(form.row, arithmetic) else ("x",)
    given = {name: g.input(name, _kind(name), ["T", *_shape(name, form.row)]) for name in names}
    a = _product(g, given, "inputs", form.row, rows)
    if form.biases:
        a = g.node("Add", a, g.input("bias", T.FLOAT, [rows]))
    if model.gated:
        gate, up = g.nodes_out("Split", a, outputs=2, axis=1, num_outputs=2)
        a = gated(g, model, gate, up)
    else:
        a = activated(g, model, a)
    inner = {name: value for name, (_, value) in _entering(g, a, form.column, arithmetic).items()}
    share = _product(g, inner, "down", form.column, form.hidden)
    g.output("y", T.FLOAT, ["T", form.hidden], g.node("Add", g.input("before", T.FLOAT, ["T", form.hidden]), share))
    return g.serialise("group")


def _rounds(form: RowFormat, arithmetic: Arithmetic) -> bool:
    return arithmetic == "int8" and form.kind != "f16"


def _blocks(form: RowFormat) -> int:
    return (form.width + form.digits) // BLOCK


def _kind(name: str) -> T:
    return T.UINT8 if name == "codes" else T.FLOAT


def _shape(name: str, form: RowFormat) -> list[int]:
    if form.kind == "f16":
        return [form.width]
    return [_blocks(form)] if name == "step" else [_blocks(form), BLOCK]


def _entering(g: Graph, x: str, form: RowFormat, arithmetic: Arithmetic) -> dict[str, tuple[T, str]]:
    """What a product with rows takes of x [T, K], by name, see `entering`."""
    if form.kind == "f16":
        return {"x": (T.FLOAT, x)}
    x = g.node("Reshape", _with_means(g, x, form), g.shape(-1, _blocks(form), BLOCK))  # [T, B, 32]
    if arithmetic == "float32":
        return {"x": (T.FLOAT, _as_unpacked(g, x, form))}
    largest = g.node("ReduceMax", g.node("Abs", x), g.shape(-1), keepdims=1)
    step = g.node("Max", g.node("Mul", largest, g.constant(np.float32(1 / 127))), g.constant(SMALLEST))  # [T, B, 1]
    codes = g.node("Add", g.node("Round", g.node("Div", x, step)), g.constant(np.float32(MIDDLE)))
    codes = _as_unpacked(g, g.node("Cast", codes, to=T.UINT8), form)
    return {"codes": (T.UINT8, codes), "step": (T.FLOAT, g.node("Squeeze", step, g.shape(2)))}


def _product(g: Graph, given: dict[str, str], name: str, form: RowFormat, n: int) -> str:
    """[T, n], n rows times what `_entering` made."""
    if form.kind == "f16":
        w = g.node("Cast", g.input(f"{name}.w", T.FLOAT16, [form.width, n]), to=T.FLOAT)
        return g.node("MatMul", given["x"], w)
    w = g.input(f"{name}.w", T.UINT8, [_blocks(form), BLOCK, n])
    scale = g.input(f"{name}.scale", T.FLOAT, ["scales", 1, n])
    zero = g.constant(np.uint8(ZEROS[form.kind]))
    if "x" in given:
        centred = g.node("Sub", g.node("Cast", w, to=T.FLOAT), g.node("Cast", zero, to=T.FLOAT))
        sums = g.node("MatMul", g.node("Transpose", given["x"], perm=[1, 0, 2]), centred)  # [B, T, n]
        return g.node("ReduceSum", g.node("Mul", sums, scale), g.shape(0), keepdims=0)
    codes = g.node("Transpose", given["codes"], perm=[1, 0, 2])  # [B, T, 32]
    sums = g.node("Cast", g.node("MatMulInteger", codes, w, g.constant(MIDDLE), zero), to=T.FLOAT)  # [B, T, n]
    sums = g.node("Transpose", g.node("Mul", sums, scale), perm=[1, 0, 2])  # [T, B, n]
    y = g.node("MatMul", g.node("Unsqueeze", given["step"], g.shape(1)), sums)  # [T, 1, n]
    return g.node("Squeeze", y, g.shape(1))


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
    rows = g.node("Unsqueeze", x, g.shape(0))  # [1, T, K]
    means = g.node("AveragePool", rows, kernel_shape=[BLOCK], strides=[BLOCK])  # [1, T, K / 32]
    if missing := form.digits // 2 - form.blocks:
        means = g.node("Pad", means, g.shape(0, 0, 0, 0, 0, missing))
    return g.node("Squeeze", g.node("Concat", rows, means, means, axis=2), g.shape(0))
