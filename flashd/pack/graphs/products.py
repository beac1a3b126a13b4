"""The graphs of products with weights in the bundle's own format, and what an FFN does between its products."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto as T

from flashd.bundle.architecture import Architecture
from flashd.bundle.row_kinds import BITS, BLOCK, RowKind, unit_steps
from flashd.pack.graphs.nodes import MICROSOFT, Graph

CODES: dict[RowKind, tuple[int, int]] = {"int4": (T.UINT8, T.INT8), "int8": (T.UINT16, T.INT16)}


def _scaled(g: Graph, codes: str, top: str) -> str:
    return g.node("Mul", g.node("Cast", codes, to=T.FLOAT), top)


def _widen(g: Graph, kind: RowKind, q: str, scale: str, index: str) -> str:
    """Rows [n, K] float32 = (q - zero) * scale, of packed rows q. index [n] picks them."""
    return g.node(
        "GatherBlockQuantized", q, index, scale, domain=MICROSOFT,
        bits=BITS[kind], block_size=BLOCK, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _rows_in(g: Graph, kind: RowKind, rows: str, width: int | str, blocks: int | str) -> tuple[str, str, str, str]:
    """The arrays of QuantRows as inputs: q [rows, width], scale and centre [rows, blocks], step [rows, 2]."""
    return (
        g.input("q", T.UINT8, [rows, width]),
        g.input("scale", CODES[kind][0], [rows, blocks]),
        g.input("centre", CODES[kind][1], [rows, blocks]),
        g.input("step", T.FLOAT16, [rows, 2]),
    )


def _rows_product(g: Graph, kind: RowKind, parts: tuple[str, str, str, str], index: str) -> str:
    """x [T, K] times rows [n, K] of codes -> [T, n]."""
    q, scale, centre, step = parts
    wide = g.node("Mul", g.node("Cast", step, to=T.FLOAT), g.constant(unit_steps(kind)))
    top_scale, top_centre = g.nodes_out("Split", wide, outputs=2, axis=1, num_outputs=2)
    weights = _widen(g, kind, q, _scaled(g, scale, top_scale), index)
    centres = g.node("Gemm", "sums", _scaled(g, centre, top_centre), transB=1)
    return g.node("Gemm", "x", weights, centres, transB=1)


def _ternary_product(g: Graph, index: str) -> str:
    """x [T, K] times ternary rows [n, K] -> [T, n]."""
    q, ones = g.input("q", T.UINT8, ["rows", "bytes"]), g.input("ones", T.FLOAT, ["rows", "B"])
    scale = g.node("Transpose", g.input("scale", T.FLOAT, ["rows", 1]), perm=[1, 0])
    return g.node("Mul", g.node("Gemm", "x", _widen(g, "ternary", q, ones, index), transB=1), scale)


def linear(kind: RowKind) -> bytes:
    """y [T, n] = x [T, K] times n rows in place.

    Inputs besides x are the arrays of PlainRows, QuantRows or TernaryRows. Quantised and ternary rows also take
    `index` [n], which counts from 0. Quantised rows take `sums` [T, K / 32], the sum of each block of x; ternary rows
    take `ones` [n, K / 32].
    """
    g = Graph()
    g.input("x", T.FLOAT, ["T", "K"])
    if kind == "f16":
        w = g.node("Cast", g.input("w", T.FLOAT16, ["n", "K"]), to=T.FLOAT)
        g.output("y", T.FLOAT, ["T", "n"], g.node("Gemm", "x", w, transB=1))
        return g.serialise("linear")
    if kind == "ternary":
        g.output("y", T.FLOAT, ["T", "n"], _ternary_product(g, g.input("index", T.INT64, ["n"])))
        return g.serialise("linear")
    g.input("sums", T.FLOAT, ["T", "B"])
    parts = _rows_in(g, kind, "rows", "bytes", "B")
    index = g.input("index", T.INT64, ["n"])
    g.output("y", T.FLOAT, ["T", "n"], _rows_product(g, kind, parts, index))
    return g.serialise("linear")


def ffn(model: Architecture, kind: RowKind) -> bytes:
    """y [T, Architecture.share_width] = the contribution of n groups, in place, to an FFN's output.

    Inputs besides x [T, H] are the arrays of QuantGroups, PlainGroups or TernaryGroups, with the axes of groups and
    neurons joined if they are contiguous. `index` [32 n M] counts from 0; `ones` [32 n, H / 32] are 1.
    """
    g, h = Graph(), model.hidden
    x = g.input("x", T.FLOAT, ["T", h])
    if kind == "f16":
        rows = g.node("Cast", g.input("w", T.FLOAT16, ["rows", h]), to=T.FLOAT)
        down = g.node("Cast", g.input("down", T.FLOAT16, ["neurons", h]), to=T.FLOAT)
        a = _activations(g, model, g.node("Gemm", x, rows, transB=1))
        g.output("y", T.FLOAT, ["T", model.share_width], share(g, model, a, g.node("Gemm", a, down)))
        return g.serialise("ffn")
    blocks, width = h // BLOCK, h * BITS[kind] // 8
    if kind == "ternary":
        a = _activations(g, model, _ternary_product(g, g.input("index", T.INT64, ["rows"])))
        ones, index = g.input("down_ones", T.FLOAT, ["neurons", blocks]), g.input("down_index", T.INT64, ["neurons"])
        down = _widen(g, kind, g.input("down", T.UINT8, ["neurons", width]), ones, index)
        scale = g.node("Transpose", g.input("down_scale", T.FLOAT, ["neurons", 1]), perm=[1, 0])
        y = g.node("Gemm", g.node("Mul", a, scale), down)
        g.output("y", T.FLOAT, ["T", model.share_width], share(g, model, a, y))
        return g.serialise("ffn")
    g.input("sums", T.FLOAT, ["T", blocks])
    parts = _rows_in(g, kind, "rows", width, blocks)
    index = g.input("index", T.INT64, ["rows"])
    a = _activations(g, model, _rows_product(g, kind, parts, index))
    sums = g.node("ReduceSum", g.node("Reshape", a, g.shape(0, -1, BLOCK)), g.shape(2), keepdims=0)  # [T, n]

    ones = g.input("ones", T.FLOAT, ["neurons", blocks])
    down_index = g.input("down_index", T.INT64, ["neurons"])
    levels = _widen(g, kind, g.input("down", T.UINT8, ["neurons", width]), ones, down_index)  # [32 n, H]
    scale, centre = _column_steps(g, kind, h)
    grouped = g.node("Reshape", levels, g.shape(-1, BLOCK, h))  # [n, 32, H]
    scales = g.node("Reshape", scale, g.shape(-1, 1, h))
    weights = g.node("Reshape", g.node("Mul", grouped, scales), g.shape(-1, h))
    centres = g.node("Reshape", centre, g.shape(-1, h))  # [n, H]
    y = g.node("Gemm", a, weights, g.node("Gemm", sums, centres))
    g.output("y", T.FLOAT, ["T", model.share_width], share(g, model, a, y))
    return g.serialise("ffn")


def _column_steps(g: Graph, kind: RowKind, h: int) -> tuple[str, str]:
    """(scales, centres) of columns of down_proj, [n, H / 32, 32] each, from the arrays of ColumnSteps."""
    blocks = h // BLOCK
    scale = g.input("down_scale", CODES[kind][0], ["n", blocks, BLOCK])
    centre = g.input("down_centre", CODES[kind][1], ["n", blocks, BLOCK])
    step = g.input("down_step", T.FLOAT16, ["n", 2, blocks])
    wide = g.node("Mul", g.node("Cast", step, to=T.FLOAT), g.constant(unit_steps(kind).reshape(1, 2, 1)))
    tops = [
        g.node("Reshape", part, g.shape(-1, blocks, 1))
        for part in g.nodes_out("Split", wide, outputs=2, axis=1, num_outputs=2)
    ]
    return _scaled(g, scale, tops[0]), _scaled(g, centre, tops[1])


def share(g: Graph, model: Architecture, a: str, y: str) -> str:
    """y [..., H], followed by the sum of the squares of activations a [..., F] if the model norms them."""
    if not model.normed_neurons:
        return y
    return g.node("Concat", y, g.node("ReduceSumSquare", a, g.constant(np.array([-1])), keepdims=1), axis=-1)


def neurons(model: Architecture, kind: RowKind) -> bytes:
    """y [T, H] = the contribution of n neurons to an FFN's output, each multiplied by its weight `chosen` [T, n].

    Inputs besides x [T, H] are the arrays of QuantNeurons or PlainNeurons, all axes but the last joined.
    """
    g, h, m = Graph(), model.hidden, model.inputs
    g.input("x", T.FLOAT, ["T", h])
    chosen = g.input("chosen", T.FLOAT, ["T", "n"])
    if kind == "f16":
        wide = g.node("Cast", g.input("w", T.FLOAT16, ["records", h]), to=T.FLOAT)
    else:
        wide = _widened_rows(g, kind, h)
    rows = g.node("Reshape", wide, g.shape(-1, m + 1, h))
    widths = g.constant(np.array([m, 1], np.int64))
    inputs, down = (
        g.node("Reshape", part, g.shape(-1, h)) for part in g.nodes_out("Split", rows, widths, outputs=2, axis=1)
    )
    a = _activations(g, model, g.node("Gemm", "x", inputs, transB=1))
    g.output("y", T.FLOAT, ["T", h], g.node("Gemm", g.node("Mul", a, chosen), down))
    return g.serialise("neurons")


def _widened_rows(g: Graph, kind: RowKind, h: int) -> str:
    """[records, H] float32, centres included."""
    blocks = h // BLOCK
    q, scale, centre, step = _rows_in(g, kind, "records", h * BITS[kind] // 8, blocks)
    index = g.input("index", T.INT64, ["records"])
    tops = g.node("Mul", g.node("Cast", step, to=T.FLOAT), g.constant(unit_steps(kind)))
    top_scale, top_centre = g.nodes_out("Split", tops, outputs=2, axis=1, num_outputs=2)
    levels = g.node("Reshape", _widen(g, kind, q, _scaled(g, scale, top_scale), index), g.shape(-1, blocks, BLOCK))
    centres = g.node("Reshape", _scaled(g, centre, top_centre), g.shape(-1, blocks, 1))
    return g.node("Reshape", g.node("Add", levels, centres), g.shape(-1, h))


def pairs(model: Architecture, kind: RowKind) -> bytes:
    """y [T, H] = the share that n neurons have in an FFN's output; `chosen` [T, n] are their gates' activations.

    Inputs are the arrays of PairedNeurons and, of the same neurons, of ColumnSteps as `down_scale`, `down_centre` and
    `down_step`; or of PlainNeurons, all axes but the last joined.
    """
    g, h, blocks = Graph(), model.hidden, model.hidden // BLOCK
    x, chosen = g.input("x", T.FLOAT, ["T", h]), g.input("chosen", T.FLOAT, ["T", "n"])
    if kind == "f16":
        rows = g.node("Cast", g.input("w", T.FLOAT16, ["records", h]), to=T.FLOAT)
        both = g.node("Reshape", rows, g.shape(-1, 2, h))
        row, down = (
            g.node("Reshape", part, g.shape(-1, h))
            for part in g.nodes_out("Split", both, outputs=2, axis=1, num_outputs=2)
        )
        up = g.node("Gemm", x, row, transB=1)
    else:
        g.input("sums", T.FLOAT, ["T", blocks])
        width = h * BITS[kind] // 8
        parts, index = _rows_in(g, kind, "n", width, blocks), g.input("index", T.INT64, ["n"])
        up = _rows_product(g, kind, parts, index)
        levels = _widen(
            g, kind, g.input("down", T.UINT8, ["n", width]), g.input("ones", T.FLOAT, ["n", blocks]), index
        )
        scales, centres = _column_steps(g, kind, h)
        down = g.node("Add", g.node("Mul", levels, g.node("Reshape", scales, g.shape(-1, h))),
                      g.node("Reshape", centres, g.shape(-1, h)))  # fmt: skip
    if model.activation == "drelu":
        up = g.node("Relu", up)
    g.output("y", T.FLOAT, ["T", h], g.node("Gemm", g.node("Mul", up, chosen), down))
    return g.serialise("pairs")


def gates(model: Architecture) -> bytes:
    """a [T, n], the activations of the products [T, n] of an FFN's input with n gate rows."""
    g = Graph()
    products = g.input("products", T.FLOAT, ["T", "n"])
    g.output("a", T.FLOAT, ["T", "n"], activated(g, model, products))
    return g.serialise("gates")


def activations(model: Architecture) -> bytes:
    """a [T, 32 n] of `products` [T, 32 n M] of an FFN's input with n groups, a neuron's M side by side."""
    g = Graph()
    products = g.input("products", T.FLOAT, ["T", "rows"])
    g.output("a", T.FLOAT, ["T", "neurons"], _activations(g, model, products))
    return g.serialise("activations")


def _activations(g: Graph, model: Architecture, products: str) -> str:
    """Activations [T, 32 n] of the input rows' products [T, 32 n M], a neuron's M side by side."""
    if "inputs" in model.biases:
        products = g.node("Add", products, g.input("bias", T.FLOAT, ["rows"]))
    if not model.gated:
        return activated(g, model, products)
    pairs = g.node("Reshape", products, g.shape(0, -1, 2))  # [T, 32 n, 2]
    gate, up = g.nodes_out("Split", pairs, outputs=2, axis=2, num_outputs=2)
    return g.node("Squeeze", gated(g, model, gate, up), g.shape(2))


def gated(g: Graph, model: Architecture, gate: str, up: str) -> str:
    if model.activation == "drelu":
        up = g.node("Relu", up)
    return g.node("Mul", activated(g, model, gate), up)


def activated(g: Graph, model: Architecture, x: str) -> str:
    match model.activation:
        case "silu":
            return g.node("QuickGelu", x, domain=MICROSOFT, alpha=1.0)
        case "gelu":
            return g.node("Gelu", x)
        case "gelu_tanh":
            return g.node("Gelu", x, approximate="tanh")
        case "relu" | "drelu":
            return g.node("Relu", x)
        case "relu2":
            positive = g.node("Relu", x)
            return g.node("Mul", positive, positive)
        case "fatrelu":
            return g.node("ThresholdedRelu", x, alpha=model.threshold)
