"""Builds the onnxruntime graphs that a bundle carries, so that the board needs no `onnx` package.

Two lowerings of the same arithmetic, so that their logits agree:

- *in place*: the weights are inputs, in the bundle's own bytes (4.5 bits a weight in RAM). One small graph
  serves every layer. GatherBlockQuantized widens rows, Gemm multiplies them.
- *constant*: the weights are initialisers, for MatMulNBits to repack once (about 7 bits a weight in RAM,
  and many times faster). One graph for the whole model.

Between the products with large matrices stand *stages*, the same in both lowerings: norms, biases, sums and
attention itself. Whatever an architecture does there is in the stages' graphs, and the engine only runs them.

MatMulNBits knows no float centre, so y = (q - zero) * scale @ x is its share and the centres' share is a
thin product with the sum of each block of x.

Layers keep x in float32 (accuracy level 1). Level 4, which rounds x to 8 bits a block, is a fifth faster at
decoding and costs SmolLM2 a mean KL of 0.004; worse, a last-bit difference between two orders of summation
then flips roundings that grow to 5 % of the logits. The head of int4 bundles, which nothing follows, does run
at level 4; with int8 rows, for which closeness to the source is all, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from flashd.bundle.layout import PREDICTOR_ROWS, AttentionKind, Bias, Chooser, Experts, Formats, Model, Place
from flashd.bundle.rows import BITS, BLOCK, RowKind, unit_steps

OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
MICROSOFT = "com.microsoft"
CODES: dict[RowKind, tuple[int, int]] = {"int4": (T.UINT8, T.INT8), "int8": (T.UINT16, T.INT16)}
Dims = Sequence[int | str]
Vector = Callable[[str, int], str]
"""(name, length) -> the value that holds a small vector of the model."""


class _Graph:
    """Collects nodes; every method that adds one returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self._residual: onnx.NodeProto | None = None

    def input(self, name: str, kind: int, dims: Dims) -> str:
        """An input of the graph, which may be asked for again."""
        if not any(known.name == name for known in self.inputs):
            self.inputs.append(helper.make_tensor_value_info(name, kind, list(dims)))
        return name

    def output(self, name: str, kind: int, dims: Dims, value: str) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, list(dims)))

    def constant(self, value: npt.ArrayLike) -> str:
        name = f"c{len(self.initialisers)}"
        self.initialisers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def shape(self, *dims: int) -> str:
        """A constant shape, shared by all that have the same."""
        name = f"shape{dims}"
        if not any(i.name == name for i in self.initialisers):
            self.initialisers.append(numpy_helper.from_array(np.array(dims, np.int64), name))
        return name

    def external(self, name: str, kind: int, dims: Sequence[int]) -> str:
        """An initialiser that the engine supplies when it opens the graph."""
        tensor = T(name=name, data_type=kind, dims=dims, data_location=T.EXTERNAL)
        for key, value in (("location", "bundle"), ("offset", "0"), ("length", "0")):
            tensor.external_data.add(key=key, value=value)
        self.initialisers.append(tensor)
        return name

    def node(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        return self.nodes_out(op, *inputs, domain=domain, outputs=outputs, **attributes)[0]

    def nodes_out(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names

    def residual(self, x: str, branch: str) -> str:
        """x + branch, the stream that a layer adds to."""
        total = self.node("Add", x, branch)
        self._residual = self.nodes[-1]
        return total

    def rms_norm(self, x: str, weight: str, epsilon: float) -> str:
        """The norm of x's last axis; one node with the sum that x is, where nothing came in between."""
        if self._residual is None or self._residual is not self.nodes[-1] or self._residual.output[0] != x:
            return self.node("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)
        inputs, normed = self.nodes.pop().input, f"{x}_normed"
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization", [*inputs, weight], [normed, "", "", x],
                domain=MICROSOFT, epsilon=epsilon,
            )
        )  # fmt: skip
        return normed

    def serialise(self, name: str) -> bytes:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initialisers)
        return bytes(helper.make_model(graph, opset_imports=OPSETS, ir_version=10).SerializeToString())


def build(model: Model, formats: Formats, chooser: Chooser | None = None) -> dict[str, bytes]:
    """Every graph of a bundle, by the name of its section; of one whose neurons are selected, those that it needs."""
    rows: set[RowKind] = {formats.attention, formats.head}
    if model.experts:
        rows.add("f16")
    if chooser:
        rows.add(formats.ffn if chooser == "gate" else PREDICTOR_ROWS)
    # sorted: a set's order changes from run to run, and the same model makes the same bundle
    graphs = {f"graph.linear.{kind}": linear(kind) for kind in sorted(rows)}
    shares = {None: ffn, "predictor": neurons, "gate": pairs}
    graphs["graph.ffn"] = shares[chooser](model, formats.ffn)
    if chooser == "gate":
        graphs["graph.gate"] = gates(model)
    graphs |= stages(model)
    if not chooser and not model.experts and "f16" not in (formats.ffn, formats.attention, formats.head):
        graphs["graph.resident"] = resident(model, formats)
    return graphs


# --- in place ---------------------------------------------------------------------------------------------


def _scaled(g: _Graph, codes: str, top: str) -> str:
    return g.node("Mul", g.node("Cast", codes, to=T.FLOAT), top)


def _widen(g: _Graph, kind: RowKind, q: str, scale: str, index: str) -> str:
    """Rows [n, K] float32 = (q - zero) * scale of packed rows; index [n] picks them."""
    return g.node(
        "GatherBlockQuantized", q, index, scale, domain=MICROSOFT,
        bits=BITS[kind], block_size=BLOCK, gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def _rows_in(g: _Graph, kind: RowKind, rows: str, width: int | str, blocks: int | str) -> tuple[str, str, str, str]:
    """The arrays of QuantRows as inputs: q [rows, width], scale and centre [rows, blocks], step [rows, 2]."""
    return (
        g.input("q", T.UINT8, [rows, width]),
        g.input("scale", CODES[kind][0], [rows, blocks]),
        g.input("centre", CODES[kind][1], [rows, blocks]),
        g.input("step", T.FLOAT16, [rows, 2]),
    )


def _rows_product(g: _Graph, kind: RowKind, parts: tuple[str, str, str, str], index: str) -> str:
    """x [T, K] times rows [n, K] of codes -> [T, n]."""
    q, scale, centre, step = parts
    wide = g.node("Mul", g.node("Cast", step, to=T.FLOAT), g.constant(unit_steps(kind)))
    top_scale, top_centre = g.nodes_out("Split", wide, outputs=2, axis=1, num_outputs=2)
    weights = _widen(g, kind, q, _scaled(g, scale, top_scale), index)
    centres = g.node("Gemm", "sums", _scaled(g, centre, top_centre), transB=1)
    return g.node("Gemm", "x", weights, centres, transB=1)


def _ternary_product(g: _Graph, index: str) -> str:
    """x [T, K] times ternary rows [n, K] -> [T, n]."""
    q, ones = g.input("q", T.UINT8, ["rows", "bytes"]), g.input("ones", T.FLOAT, ["rows", "B"])
    scale = g.node("Transpose", g.input("scale", T.FLOAT, ["rows", 1]), perm=[1, 0])
    return g.node("Mul", g.node("Gemm", "x", _widen(g, "ternary", q, ones, index), transB=1), scale)


def linear(kind: RowKind) -> bytes:
    """y [T, n] = x [T, K] times n rows in place.

    Quantised rows also take `index`, which counts 0 .. n, and `sums` [T, K / 32], the sum of each block of x, or in
    their place ternary rows unit scales, `ones` [n, K / 32].
    """
    g = _Graph()
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


def ffn(model: Model, kind: RowKind) -> bytes:
    """y [T, Model.share_width] = the share that n groups of bundles, in place, have in an FFN's output.

    Inputs are the arrays of QuantGroups or PlainGroups with the group and neuron axes joined where that
    leaves them contiguous; `index` counts 0 .. 32 n M, `ones` [32 n, H / 32] are unit scales.
    """
    g, h = _Graph(), model.hidden
    x = g.input("x", T.FLOAT, ["T", h])
    if kind == "f16":
        rows = g.node("Cast", g.input("w", T.FLOAT16, ["rows", h]), to=T.FLOAT)
        down = g.node("Cast", g.input("down", T.FLOAT16, ["neurons", h]), to=T.FLOAT)
        a = _activations(g, model, g.node("Gemm", x, rows, transB=1))
        g.output("y", T.FLOAT, ["T", model.share_width], _share(g, model, a, g.node("Gemm", a, down)))
        return g.serialise("ffn")
    blocks, width = h // BLOCK, h * BITS[kind] // 8
    if kind == "ternary":
        a = _activations(g, model, _ternary_product(g, g.input("index", T.INT64, ["rows"])))
        ones, index = g.input("down_ones", T.FLOAT, ["neurons", blocks]), g.input("down_index", T.INT64, ["neurons"])
        down = _widen(g, kind, g.input("down", T.UINT8, ["neurons", width]), ones, index)
        scale = g.node("Transpose", g.input("down_scale", T.FLOAT, ["neurons", 1]), perm=[1, 0])
        y = g.node("Gemm", g.node("Mul", a, scale), down)
        g.output("y", T.FLOAT, ["T", model.share_width], _share(g, model, a, y))
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
    g.output("y", T.FLOAT, ["T", model.share_width], _share(g, model, a, y))
    return g.serialise("ffn")


def _column_steps(g: _Graph, kind: RowKind, h: int) -> tuple[str, str]:
    """Scales and centres [n, H / 32, 32] of columns of down_proj, from the arrays of ColumnSteps."""
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


def _share(g: _Graph, model: Model, a: str, y: str) -> str:
    """y [..., H] with the sum of the squares of activations a [..., F] behind it, in models that norm them."""
    if not model.normed_neurons:
        return y
    return g.node("Concat", y, g.node("ReduceSumSquare", a, g.constant(np.array([-1])), keepdims=1), axis=-1)


def neurons(model: Model, kind: RowKind) -> bytes:
    """y [T, H] = the share that n neurons have in an FFN's output, each as much as `chosen` [T, n] says.

    Inputs are the arrays of QuantNeurons or PlainNeurons, all axes but the last joined.
    """
    g, h, m = _Graph(), model.hidden, model.inputs
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


def _widened_rows(g: _Graph, kind: RowKind, h: int) -> str:
    """[records, H] float32, centres included."""
    blocks = h // BLOCK
    q, scale, centre, step = _rows_in(g, kind, "records", h * BITS[kind] // 8, blocks)
    index = g.input("index", T.INT64, ["records"])
    tops = g.node("Mul", g.node("Cast", step, to=T.FLOAT), g.constant(unit_steps(kind)))
    top_scale, top_centre = g.nodes_out("Split", tops, outputs=2, axis=1, num_outputs=2)
    levels = g.node("Reshape", _widen(g, kind, q, _scaled(g, scale, top_scale), index), g.shape(-1, blocks, BLOCK))
    centres = g.node("Reshape", _scaled(g, centre, top_centre), g.shape(-1, blocks, 1))
    return g.node("Reshape", g.node("Add", levels, centres), g.shape(-1, h))


def pairs(model: Model, kind: RowKind) -> bytes:
    """y [T, H] = the share that n neurons have in an FFN's output; `chosen` [T, n] are their gates' activations.

    Inputs are the arrays of PairedNeurons and, of the same neurons, of ColumnSteps as `down_scale`, `down_centre` and
    `down_step`; or of PlainNeurons, all axes but the last joined.
    """
    g, h, blocks = _Graph(), model.hidden, model.hidden // BLOCK
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


def gates(model: Model) -> bytes:
    """a [T, n], the activations of the products [T, n] of an FFN's input with n gate rows."""
    g = _Graph()
    products = g.input("products", T.FLOAT, ["T", "n"])
    g.output("a", T.FLOAT, ["T", "n"], _activated(g, model, products))
    return g.serialise("gates")


def activations(model: Model) -> bytes:
    """a [T, 32 n] of `products` [T, 32 n M] of an FFN's input with n groups, a neuron's M side by side."""
    g = _Graph()
    products = g.input("products", T.FLOAT, ["T", "rows"])
    g.output("a", T.FLOAT, ["T", "neurons"], _activations(g, model, products))
    return g.serialise("activations")


def _activations(g: _Graph, model: Model, products: str) -> str:
    """Activations [T, 32 n] of the input rows' products [T, 32 n M], a neuron's M side by side."""
    if "inputs" in model.biases:
        products = g.node("Add", products, g.input("bias", T.FLOAT, ["rows"]))
    if not model.gated:
        return _activated(g, model, products)
    pairs = g.node("Reshape", products, g.shape(0, -1, 2))  # [T, 32 n, 2]
    gate, up = g.nodes_out("Split", pairs, outputs=2, axis=2, num_outputs=2)
    return g.node("Squeeze", _gated(g, model, gate, up), g.shape(2))


def _gated(g: _Graph, model: Model, gate: str, up: str) -> str:
    if model.activation == "drelu":
        up = g.node("Relu", up)
    return g.node("Mul", _activated(g, model, gate), up)


def _activated(g: _Graph, model: Model, x: str) -> str:
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


# --- stages -----------------------------------------------------------------------------------------------


def stages(model: Model) -> dict[str, bytes]:
    """The graphs between the products of the in-place lowering. x and h are [T, H] throughout.

        enter      x -> h, what the attention's product takes
        attention  qkv [1, T, ...] -> y [1, T, query width]; keys and values are kept; one graph a kind of attention
        middle     x, h, branch (the attention's output product) -> x, h, what the FFN takes
        leave      x, branch (the FFN's output, Model.share_width wide) -> x of the next layer
        finish     x -> h, what the head takes
        logits     x (logits [R, V]) -> x, in models that do something to them
        route      scores [T, E] (the router's product) -> used [T, K] int64, the experts that a token uses, the one
                   of the highest score first, and weights [T, K], their shares; in mixtures

    Each also takes the vectors that it needs, by their names in Model.layer_vectors and model_vectors.
    """
    out = {f"graph.attention.{i}": _attention_stage(model, kind) for i, kind in enumerate(model.attention)}
    plan: list[tuple[str, Callable[..., str | tuple[str, str]], list[str], list[str]]] = [
        ("enter", _Block.enter, ["x"], ["h"]),
        ("middle", _Block.middle, ["x", "h", "branch"], ["x", "h"]),
        ("leave", _Block.leave, ["x", "branch"], ["x"]),
        ("finish", _Block.finish, ["x"], ["h"]),
    ]
    for name, stage, inputs, outputs in plan:
        g = _Graph()
        wide = model.share_width if name == "leave" else model.hidden
        values = [g.input(part, T.FLOAT, ["T", wide if part == "branch" else model.hidden]) for part in inputs]
        made = stage(_Block(g, model, _vector_inputs(g)), *values)
        for part, value in zip(outputs, made if isinstance(made, tuple) else (made,), strict=True):
            g.output(f"{part}_out", T.FLOAT, ["T", model.hidden], value)
        out[f"graph.{name}"] = g.serialise(name)
    if model.logit_cap or "head" in model.biases:
        g = _Graph()
        logits = g.input("x", T.FLOAT, ["R", model.vocabulary])
        g.output("x_out", T.FLOAT, ["R", model.vocabulary], _Block(g, model, _vector_inputs(g)).logits(logits))
        out["graph.logits"] = g.serialise("logits")
    if model.experts:
        out["graph.route"] = _route(model.experts)
    return out


def _route(experts: Experts) -> bytes:
    g = _Graph()
    scores = g.input("scores", T.FLOAT, ["T", experts.count])
    scores = g.node("Sigmoid", scores) if experts.scores == "sigmoid" else g.node("Softmax", scores, axis=1)
    weights, used = g.nodes_out("TopK", scores, g.constant(np.array([experts.used])), outputs=2, axis=1)
    if experts.normalised:
        weights = g.node("Div", weights, g.node("ReduceSum", weights, g.shape(1)))
    if experts.scale != 1:
        weights = g.node("Mul", weights, g.constant(np.float32(experts.scale)))
    g.output("used", T.INT64, ["T", experts.used], used)
    g.output("weights", T.FLOAT, ["T", experts.used], weights)
    return g.serialise("route")


def _vector_inputs(g: _Graph) -> Vector:
    return lambda name, length: g.input(name, T.FLOAT, [length])


def _attention_stage(model: Model, kind: AttentionKind) -> bytes:
    g = _Graph()
    qkv = g.input("qkv", T.FLOAT, [1, "T", model.qkv_width])
    tree = [g.input("positions", T.INT64, [1, "T"]), g.input("bias", T.FLOAT, [1, 1, "T", "all"])]
    out, key, value = _Block(g, model, _vector_inputs(g)).attend(qkv, kind, "", tree)
    g.output("y", T.FLOAT, [1, "T", model.query_width], out)
    for name, kept in (("present_key", key), ("present_value", value)):
        _present(g, model, name, kept)
    return g.serialise("attention")


def _present(g: _Graph, model: Model, name: str, value: str) -> None:
    # No Identity behind these: it would copy the cache. The node's own output takes the name.
    for node in g.nodes:
        for i, out in enumerate(node.output):
            if out == value:
                node.output[i] = name
    dims: list[Any] = [1, model.kv_heads, "C", model.head_dim]
    g.outputs.append(helper.make_tensor_value_info(name, T.FLOAT, dims))


class _Block:
    """The stages of one layer, put into a graph."""

    def __init__(self, g: _Graph, model: Model, vector: Vector) -> None:
        self._g, self._model, self._vector = g, model, vector

    def enter(self, x: str) -> str:
        return x if self._model.block == "post" else self._normed(x, "attention")

    def middle(self, x: str, h: str, branch: str) -> tuple[str, str]:
        branch = self._normed(self._biased(branch, "output"), "attention_branch")
        after = self._g.residual(x, branch)
        if self._model.block == "post":
            after = self._normed(after, "attention")
            return after, after
        if self._model.block == "sequential":
            return after, self._normed(after, "ffn")
        return after, self._normed(x, "ffn") if "ffn" in self._model.norms else h

    def leave(self, x: str, branch: str) -> str:
        branch = self._normed(self._biased(self._divided(branch), "down"), "ffn_branch")
        after = self._g.residual(x, branch)
        return self._normed(after, "ffn") if self._model.block == "post" else after

    def _divided(self, branch: str) -> str:
        """An FFN's output [..., H] by the root mean square of its activations, whose squares' sum is behind it."""
        g, m = self._g, self._model
        if not m.normed_neurons:
            return branch
        y, squares = g.nodes_out("Split", branch, g.shape(m.hidden, 1), outputs=2, axis=-1)
        mean = g.node("Div", squares, g.constant(np.float32(m.normed_neurons)))
        return g.node("Div", y, g.node("Sqrt", g.node("Add", mean, g.constant(np.float32(m.norm_epsilon)))))

    def finish(self, x: str) -> str:
        return self._normed(x, "final")

    def logits(self, logits: str) -> str:
        g, m = self._g, self._model
        logits = self._biased(logits, "head")
        if m.logit_cap:
            cap = g.constant(np.float32(m.logit_cap))
            logits = g.node("Mul", g.node("Tanh", g.node("Div", logits, cap)), cap)
        return logits

    def attend(self, qkv: str, kind: AttentionKind, suffix: str, tree: Sequence[str] = ()) -> tuple[str, str, str]:
        """qkv [1, T, ...] -> (output [1, T, query width], keys, values).

        With `tree`, of positions [1, T] and what is added to the scores [1, 1, T, past + T], the new tokens are one.
        """
        g, m = self._g, self._model
        parts = [self._biased(qkv, "qkv"), "", ""]
        if "query" in m.norms:
            widths = g.shape(m.query_width, m.kv_width, m.kv_width)
            query, key, value = g.nodes_out("Split", parts[0], widths, outputs=3, axis=2)
            parts = [self._normed_heads(query, "query"), self._normed_heads(key, "key"), value]
        cache: Dims = [1, m.kv_heads, "C", m.head_dim]
        past = [g.input(f"past_{part}{suffix}", T.FLOAT, cache) for part in ("key", "value")]
        positions = [g.input("last", T.INT32, [1]), g.input("total", T.INT32, [])]
        attributes: dict[str, Any] = {}
        if kind.rope is not None:
            table: Dims = ["positions", m.head_dim // 2]
            positions += [g.input(f"{part}.{kind.rope}", T.FLOAT, table) for part in ("cos", "sin")]
            attributes["do_rotary"] = 1
        elif tree:
            positions += ["", ""]
        if kind.window:
            attributes["local_window_size"] = kind.window
        if m.attention_cap:
            attributes["softcap"] = m.attention_cap
        out, keys, values = g.nodes_out(
            "GroupQueryAttention", *parts, *past, *positions, *tree, domain=MICROSOFT, outputs=3,
            num_heads=m.heads, kv_num_heads=m.kv_heads, scale=m.attention_scale, **attributes,
        )  # fmt: skip
        return self._normed(out, "heads"), keys, values

    def _biased(self, x: str, part: Bias) -> str:
        if part not in self._model.biases:
            return x
        m = self._model
        width = {"qkv": m.qkv_width, "head": m.vocabulary}.get(part, m.hidden)
        return self._g.node("Add", x, self._vector(f"{part}.bias", width))

    def _normed_heads(self, x: str, place: Place) -> str:
        """The norm of queries or keys [1, T, width], a head at a time where the model has it so."""
        g, m = self._g, self._model
        if not m.norm_heads:
            return self._normed(x, place)
        normed = self._normed(g.node("Reshape", x, g.shape(0, 0, -1, m.head_dim)), place)
        return g.node("Reshape", normed, g.shape(0, 0, -1))

    def _normed(self, x: str, place: Place) -> str:
        """The norm of x's last axis, or x where there is none."""
        g, m = self._g, self._model
        vectors = [self._vector(name, length) for name, length in m.norm_vectors(place).items()]
        if not vectors:
            return x
        if m.norm == "layer":
            return g.node("LayerNormalization", x, *vectors, axis=-1, epsilon=m.norm_epsilon)
        return g.rms_norm(x, vectors[0], m.norm_epsilon)


# --- constant ---------------------------------------------------------------------------------------------


def resident(model: Model, formats: Formats) -> bytes:
    """The whole model: x [T, H] embeddings -> logits [R, V] of the rows named by `wanted` [R]."""
    g, h = _Graph(), model.hidden
    # three axes throughout, as GroupQueryAttention wants them: a change of shape costs as much as a small product
    x = g.node("Unsqueeze", g.input("x", T.FLOAT, ["T", h]), g.shape(0))  # [1, T, H]
    wanted = g.input("wanted", T.INT64, ["R"])
    for i in range(model.layers):
        at = f"layer.{i}."
        block = _Block(g, model, _external_vectors(g, at))
        normed = block.enter(x)
        qkv = _layer_product(g, normed, formats.attention, f"{at}qkv", model.qkv_width, h)
        kind = model.attention[model.layer_kinds[i]]
        heads, key, value = block.attend(qkv, kind, f".{i}")
        _present(g, model, f"present_key.{i}", key)
        _present(g, model, f"present_value.{i}", value)
        branch = _layer_product(g, heads, formats.attention, f"{at}output", h, model.query_width)
        x, normed = block.middle(x, normed, branch)
        x = block.leave(x, _feed_forward(g, model, formats.ffn, normed, at))
    last = _Block(g, model, _external_vectors(g, ""))
    logits = last.logits(_head(g, last.finish(g.node("Gather", x, wanted, axis=1)), formats, model.vocabulary, h))
    g.output("logits", T.FLOAT, ["R", model.vocabulary], g.node("Squeeze", logits, g.shape(0)))
    return g.serialise("resident")


def _external_vectors(g: _Graph, at: str) -> Vector:
    return lambda name, length: g.external(f"{at}{name}", T.FLOAT, [length])


def _feed_forward(g: _Graph, model: Model, kind: RowKind, x: str, at: str) -> str:
    """A layer's FFN, [1, T, H] -> [1, T, Model.share_width], without the bias of its output."""
    both = _layer_product(g, x, kind, f"{at}inputs", model.inputs * model.neurons, model.hidden)
    if "inputs" in model.biases:
        both = g.node("Add", both, g.external(f"{at}inputs.bias", T.FLOAT, [model.inputs * model.neurons]))
    if model.gated:
        a = _gated(g, model, *g.nodes_out("Split", both, outputs=2, axis=2, num_outputs=2))
    else:
        a = _activated(g, model, both)
    if kind == "ternary":
        scaled = g.node("Mul", a, g.external(f"{at}down.columns", T.FLOAT, [model.neurons]))
        return _share(g, model, a, _layer_product(g, scaled, kind, f"{at}down", model.hidden, model.neurons))
    return _share(g, model, a, _layer_product(g, a, kind, f"{at}down", model.hidden, model.neurons))


def _layer_product(g: _Graph, x: str, kind: RowKind, name: str, n: int, k: int) -> str:
    """x [1, T, K] times constant rows [n, K] of a layer.

    float32 products that do not widen a whole matrix exist for 4-bit weights only, so 8-bit ones are two planes of
    nibbles, 16 high + low, and ternary ones are nibbles.
    """
    planes = [".high", ".low"] if kind == "int8" else [""]
    y = ""
    for plane in planes:
        q = g.external(f"{name}.q{plane}", T.UINT8, [n, k // BLOCK, BLOCK // 2])
        scale = g.external(f"{name}.scale{plane}", T.FLOAT, [n, k // BLOCK])
        part = g.node("MatMulNBits", x, q, scale, domain=MICROSOFT,
                      K=k, N=n, bits=4, block_size=BLOCK, accuracy_level=1)  # fmt: skip
        y = g.node("Add", y, part) if y else part
    return y if kind == "ternary" else _with_centres(g, x, y, name, n, k)


def _head(g: _Graph, x: str, formats: Formats, n: int, k: int) -> str:
    """Logits [1, R, V] of x [1, R, H]."""
    kind = formats.head
    if not formats.rounded_head:
        return _layer_product(g, x, kind, "head", n, k)
    q = g.external("head.q", T.UINT8, [n, k // BLOCK, BLOCK * BITS[kind] // 8])
    scale = g.external("head.scale", T.FLOAT, [n, k // BLOCK])
    y = g.node("MatMulNBits", x, q, scale, domain=MICROSOFT,
               K=k, N=n, bits=BITS[kind], block_size=BLOCK, accuracy_level=4)  # fmt: skip
    return _with_centres(g, x, y, "head", n, k) if formats.centred_head else y


def _with_centres(g: _Graph, x: str, y: str, name: str, n: int, k: int) -> str:
    # one node where Reshape and ReduceSum are two: a node costs a small model as much as what it computes
    means = g.node("AveragePool", x, kernel_shape=[BLOCK], strides=[BLOCK])  # [1, T, K / 32]
    centre = g.external(f"{name}.centre", T.FLOAT, [k // BLOCK, n])  # times 32
    return g.node("Add", y, g.node("MatMul", means, centre))
