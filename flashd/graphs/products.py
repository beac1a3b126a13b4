"""Products with rows that are not constant, and what an FFN does between its products.

Rows are inputs, in the bundle's own bytes. What goes into a product with quantised rows has the means of its blocks
behind it, twice, as the rows have the digits of their centres.
"""

from __future__ import annotations

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.rows.formats import RowFormat
from flashd.bundle.rows.kinds import BITS, BLOCK, RowKind
from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import MICROSOFT, T

CLAMPED_AT, CLAMPED_SLOPE = 7.0, 1.702
"""Of gpt-oss's activation: min(gate, 7) sigmoid(1.702 min(gate, 7)), times 1 more than up within -7 .. 7."""


def linear(kind: RowKind) -> bytes:
    """y [T, n] = x [T, K] times n rows in place; of quantised rows K counts the digits of centres too.

    Quantised rows are `q` [n, bytes] and `scale` [n, K / 32] float32; `index` counts 0 .. n. f16 rows are `w` [n, K].
    """
    g = Graph()
    g.input("x", T.FLOAT, ["T", "K"])
    if kind == "f16":
        w = g.node("Cast", g.input("w", T.FLOAT16, ["n", "K"]), to=T.FLOAT)
    else:
        w = _widened(g, kind, "n", "bytes", "B")
    g.output("y", T.FLOAT, ["T", "n"], g.node("Gemm", "x", w, transB=1))
    return g.serialise("linear")


def _widened(g: Graph, kind: RowKind, rows: str, width: int | str, blocks: int | str) -> str:
    """Rows [n, K] float32 of packed rows, the digits of their centres included."""
    q, scale = g.input("q", T.UINT8, [rows, width]), g.input("scale", T.FLOAT, [rows, blocks])
    return g.node(
        "GatherBlockQuantized", q, g.input("index", T.INT64, [rows]), scale, domain=MICROSOFT,
        bits=BITS[kind], block_size=BLOCK, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def neurons(model: Architecture, kind: RowKind, gate_decides: bool) -> bytes:
    """y [T, H] = the share that n neurons have in an FFN's output, each as much as `chosen` [T, n] says.

    Inputs are the arrays of QuantNeurons, their scales float32, or of PlainNeurons, all axes but the last joined, and
    x [T, H], of quantised neurons with the means of its blocks. If gates decide, `chosen` are their activations, and
    a neuron has an up row alone.
    """
    g, h, m = Graph(), model.hidden, 1 if gate_decides else model.inputs
    form = RowFormat(kind, h)
    width = h + form.digits
    x, chosen = g.input("x", T.FLOAT, ["T", width]), g.input("chosen", T.FLOAT, ["T", "n"])
    if kind == "f16":
        wide = g.node("Cast", g.input("w", T.FLOAT16, ["records", h]), to=T.FLOAT)
    else:
        wide = _widened(g, kind, "records", form.q_bytes, width // BLOCK)
    rows = g.node("Reshape", wide, g.shape(-1, m + 1, width))
    inputs, down = g.nodes_out("Split", rows, g.shape(m, 1), outputs=2, axis=1)
    down = g.node("Reshape", down, g.shape(-1, width))
    if form.digits:
        down = _with_centres(g, down, form)
    a = g.node("Gemm", x, g.node("Reshape", inputs, g.shape(-1, width)), transB=1)
    if not gate_decides:
        a = _activations(g, model, a)
    elif model.activation == "drelu":
        a = g.node("Relu", a)
    g.output("y", T.FLOAT, ["T", h], g.node("Gemm", g.node("Mul", a, chosen), down))
    return g.serialise("neurons")


def _with_centres(g: Graph, wide: str, form: RowFormat) -> str:
    """Rows [n, H] of rows [n, H + digits]: each weight and the centre of its block, whose digits count for 32."""
    half = form.digits // 2
    weights, high, low = g.nodes_out("Split", wide, g.shape(form.width, half, half), outputs=3, axis=1)
    centres = g.node("Mul", g.node("Add", high, low), g.constant(np.float32(1 / BLOCK)))  # [n, half]
    centres = g.node("Slice", centres, g.shape(0), g.shape(form.blocks), g.shape(1))
    blocks = g.node("Reshape", weights, g.shape(-1, form.blocks, BLOCK))
    return g.node("Reshape", g.node("Add", blocks, g.node("Unsqueeze", centres, g.shape(2))), g.shape(-1, form.width))


def block_means(g: Graph, x: str, blocks: int, *before: int) -> str:
    """The means of the blocks of x [..., K] -> [..., K / 32]. `before`: the axes before the tokens' own.

    AveragePool takes two to three times as long.
    """
    return g.node("ReduceMean", g.node("Reshape", x, g.shape(*before, -1, blocks, BLOCK)), g.shape(-1), keepdims=0)


def share(g: Graph, model: Architecture, a: str, y: str) -> str:
    """y [..., H] with the sum of the squares of activations a [..., F] behind it, in models that norm them."""
    if not model.normed_neurons:
        return y
    return g.node("Concat", y, g.node("ReduceSumSquare", a, g.constant(np.array([-1])), keepdims=1), axis=-1)


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
    """Activations [T, 32 n] of the input rows' products [T, 32 n M], a neuron's M side by side.

    If gates have a bound, it and the least that is left of them are `bounds` [T, 2].
    """
    if "inputs" in model.biases:
        products = g.node("Add", products, g.input("bias", T.FLOAT, ["rows"]))
    if not model.gated:
        return activated(g, model, products)
    pairs = g.node("Reshape", products, g.shape(0, -1, 2))  # [T, 32 n, 2]
    gate, up = g.nodes_out("Split", pairs, outputs=2, axis=2, num_outputs=2)
    if model.bounds:
        both = g.node("Unsqueeze", g.input("bounds", T.FLOAT, ["T", 2]), g.shape(1))  # [T, 1, 2]
        gate = above(g, gate, *g.nodes_out("Split", both, outputs=2, axis=2, num_outputs=2))
    return g.node("Squeeze", gated(g, model, gate, up), g.shape(2))


def above(g: Graph, gate: str, bound: str = "", least: str = "") -> str:
    """What of a gate's product goes into the activation: by how much it exceeds a bound, and `least` at the least."""
    return g.node("Max", g.node("Sub", gate, bound), least) if bound else gate


def gated(g: Graph, model: Architecture, gate: str, up: str) -> str:
    if model.activation == "drelu":
        up = g.node("Relu", up)
    elif model.activation == "clamped_silu":
        limits = g.constant(np.float32(-CLAMPED_AT)), g.constant(np.float32(CLAMPED_AT))
        up = g.node("Add", g.node("Clip", up, *limits), g.constant(np.float32(1)))
    return g.node("Mul", activated(g, model, gate), up)


def activated(g: Graph, model: Architecture, x: str) -> str:
    match model.activation:
        case "silu":
            return g.node("QuickGelu", x, domain=MICROSOFT, alpha=1.0)
        case "clamped_silu":
            clamped = g.node("Min", x, g.constant(np.float32(CLAMPED_AT)))
            return g.node("QuickGelu", clamped, domain=MICROSOFT, alpha=CLAMPED_SLOPE)
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
