"""Builds the onnxruntime graphs that a bundle carries, so that the board needs no `onnx` package.

Two lowerings of the same arithmetic, so that their logits agree:

- *in place*: the weights are inputs, in the bundle's own bytes (4.5 bits a weight in RAM). One small graph
  serves every layer. GatherBlockQuantized widens rows, Gemm multiplies them.
- *constant*: the weights are initialisers, for MatMulNBits to repack once (about 7 bits a weight in RAM,
  and many times faster). One graph for the whole model.

MatMulNBits knows no float centre, so y = (q - zero) * scale @ x is its share and the centres' share is a
thin product with the sum of each block of x.

Layers keep x in float32 (accuracy level 1). Level 4, which rounds x to 8 bits a block, is a fifth faster at
decoding and costs SmolLM2 a mean KL of 0.004; worse, a last-bit difference between two orders of summation
then flips roundings that grow to 5 % of the logits. The head of int4 bundles, which nothing follows, does run
at level 4; with int8 rows, for which closeness to the source is all, it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from flashd.bundle.layout import Formats, Model
from flashd.bundle.rows import BLOCK, RowKind, unit_steps

OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
MICROSOFT = "com.microsoft"
ACTIVATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {"silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0})}
BITS: dict[RowKind, int] = {"int4": 4, "int8": 8, "f16": 16}
CODES: dict[RowKind, tuple[int, int]] = {"int4": (T.UINT8, T.INT8), "int8": (T.UINT16, T.INT16)}
Dims = Sequence[int | str]


class _Graph:
    """Collects nodes; every method that adds one returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initialisers: list[onnx.TensorProto] = []

    def input(self, name: str, kind: int, dims: Dims) -> str:
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

    def serialise(self, name: str) -> bytes:
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.initialisers)
        return bytes(helper.make_model(graph, opset_imports=OPSETS, ir_version=10).SerializeToString())


def build(model: Model, formats: Formats) -> dict[str, bytes]:
    """Every graph of a bundle, by the name of its section."""
    graphs = {f"graph.linear.{kind}": linear(kind) for kind in {formats.attention, formats.head}}
    graphs["graph.ffn"] = ffn(model, formats.ffn)
    graphs["graph.attention"] = attention(model)
    if "f16" not in (formats.ffn, formats.attention, formats.head):
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


def _rows_product(g: _Graph, kind: RowKind, parts: tuple[str, str, str, str], index: str) -> str:
    """x [T, K] times rows [n, K] of codes -> [T, n]."""
    q, scale, centre, step = parts
    wide = g.node("Mul", g.node("Cast", step, to=T.FLOAT), g.constant(unit_steps(kind)))
    top_scale, top_centre = g.nodes_out("Split", wide, outputs=2, axis=1, num_outputs=2)
    weights = _widen(g, kind, q, _scaled(g, scale, top_scale), index)
    centres = g.node("Gemm", "sums", _scaled(g, centre, top_centre), transB=1)
    return g.node("Gemm", "x", weights, centres, transB=1)


def linear(kind: RowKind) -> bytes:
    """y [T, n] = x [T, K] times n rows in place.

    Quantised rows also take `sums` [T, K / 32], the sum of each block of x, and `index`, which counts 0 .. n.
    """
    g = _Graph()
    g.input("x", T.FLOAT, ["T", "K"])
    if kind == "f16":
        w = g.node("Cast", g.input("w", T.FLOAT16, ["n", "K"]), to=T.FLOAT)
        g.output("y", T.FLOAT, ["T", "n"], g.node("Gemm", "x", w, transB=1))
        return g.serialise("linear")
    g.input("sums", T.FLOAT, ["T", "B"])
    parts = (
        g.input("q", T.UINT8, ["rows", "bytes"]),
        g.input("scale", CODES[kind][0], ["rows", "B"]),
        g.input("centre", CODES[kind][1], ["rows", "B"]),
        g.input("step", T.FLOAT16, ["rows", 2]),
    )
    index = g.input("index", T.INT64, ["n"])
    g.output("y", T.FLOAT, ["T", "n"], _rows_product(g, kind, parts, index))
    return g.serialise("linear")


def ffn(model: Model, kind: RowKind) -> bytes:
    """y [T, H] = the share that n groups of bundles, in place, have in a gated FFN's output.

    Inputs are the arrays of QuantGroups or PlainGroups with the group and neuron axes joined where that
    leaves them contiguous; `index` counts 0 .. 64 n, `ones` [32 n, H / 32] are unit scales.
    """
    g, h = _Graph(), model.hidden
    x = g.input("x", T.FLOAT, ["T", h])
    if kind == "f16":
        rows = g.node("Cast", g.input("w", T.FLOAT16, ["rows", h]), to=T.FLOAT)
        down = g.node("Cast", g.input("down", T.FLOAT16, ["neurons", h]), to=T.FLOAT)
        a = _gated(g, model, g.node("Gemm", x, rows, transB=1))
        g.output("y", T.FLOAT, ["T", h], g.node("Gemm", a, down))
        return g.serialise("ffn")
    blocks, width = h // BLOCK, h * BITS[kind] // 8
    g.input("sums", T.FLOAT, ["T", blocks])
    parts = (
        g.input("q", T.UINT8, ["rows", width]),
        g.input("scale", CODES[kind][0], ["rows", blocks]),
        g.input("centre", CODES[kind][1], ["rows", blocks]),
        g.input("step", T.FLOAT16, ["rows", 2]),
    )
    index = g.input("index", T.INT64, ["rows"])
    a = _gated(g, model, _rows_product(g, kind, parts, index))
    sums = g.node("ReduceSum", g.node("Reshape", a, g.shape(0, -1, BLOCK)), g.shape(2), keepdims=0)  # [T, n]

    ones = g.input("ones", T.FLOAT, ["neurons", blocks])
    down_index = g.input("down_index", T.INT64, ["neurons"])
    levels = _widen(g, kind, g.input("down", T.UINT8, ["neurons", width]), ones, down_index)  # [32 n, H]
    scale = g.input("down_scale", CODES[kind][0], ["n", blocks, BLOCK])
    centre = g.input("down_centre", CODES[kind][1], ["n", blocks, BLOCK])
    step = g.input("down_step", T.FLOAT16, ["n", 2, blocks])
    wide = g.node("Mul", g.node("Cast", step, to=T.FLOAT), g.constant(unit_steps(kind).reshape(1, 2, 1)))
    tops = [
        g.node("Reshape", part, g.shape(-1, blocks, 1))
        for part in g.nodes_out("Split", wide, outputs=2, axis=1, num_outputs=2)
    ]
    grouped = g.node("Reshape", levels, g.shape(-1, BLOCK, h))  # [n, 32, H]
    scales = g.node("Reshape", _scaled(g, scale, tops[0]), g.shape(-1, 1, h))
    weights = g.node("Reshape", g.node("Mul", grouped, scales), g.shape(-1, h))
    centres = g.node("Reshape", _scaled(g, centre, tops[1]), g.shape(-1, h))  # [n, H]
    y = g.node("Gemm", a, weights, g.node("Gemm", sums, centres))
    g.output("y", T.FLOAT, ["T", h], y)
    return g.serialise("ffn")


def _gated(g: _Graph, model: Model, products: str) -> str:
    """Activations [T, 32 n] of gate and up products that alternate, [T, 64 n]."""
    pairs = g.node("Reshape", products, g.constant(np.array([0, -1, 2], np.int64)))  # [T, 32 n, 2]
    gate, up = g.nodes_out("Split", pairs, outputs=2, axis=2, num_outputs=2)
    op, domain, attributes = ACTIVATIONS[model.activation]
    a = g.node("Mul", g.node(op, gate, domain=domain, **attributes), up)
    return g.node("Squeeze", a, g.shape(2))


def attention(model: Model) -> bytes:
    """Rotary embedding, KV cache and grouped-query attention of T new tokens, [1, T, ...] throughout.

    `positions` [1, T] and `bias` [1, 1, T, past + T], which is added to the scores, make a tree of the new tokens.
    """
    g = _Graph()
    qkv = g.input("qkv", T.FLOAT, [1, "T", model.qkv_width])
    positions = g.input("positions", T.INT64, [1, "T"])
    bias = g.input("bias", T.FLOAT, [1, 1, "T", "all"])
    out, key, value = _attend(g, model, qkv, "", positions, bias)
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


def _attend(g: _Graph, model: Model, qkv: str, suffix: str, *tree: str) -> tuple[str, str, str]:
    cache: Dims = [1, model.kv_heads, "C", model.head_dim]
    past = [g.input(f"past_{part}{suffix}", T.FLOAT, cache) for part in ("key", "value")]
    if not any(i.name == "last" for i in g.inputs):
        g.input("last", T.INT32, [1])
        g.input("total", T.INT32, [])
        g.input("cos", T.FLOAT, ["positions", model.head_dim // 2])
        g.input("sin", T.FLOAT, ["positions", model.head_dim // 2])
    out, key, value = g.nodes_out(
        "GroupQueryAttention", qkv, "", "", *past, "last", "total", "cos", "sin", *tree,
        domain=MICROSOFT, outputs=3, num_heads=model.heads, kv_num_heads=model.kv_heads, do_rotary=1,
    )  # fmt: skip
    return out, key, value


# --- constant ---------------------------------------------------------------------------------------------


def resident(model: Model, formats: Formats) -> bytes:
    """The whole model: x [T, H] embeddings -> logits [R, V] of the rows named by `wanted` [R]."""
    g, h = _Graph(), model.hidden
    # three axes throughout, as GroupQueryAttention wants them: a change of shape costs as much as a small product
    residual = g.node("Unsqueeze", g.input("x", T.FLOAT, ["T", h]), g.shape(0))  # [1, T, H]
    wanted = g.input("wanted", T.INT64, ["R"])
    branch = None
    for i in range(model.layers):
        at = f"layer.{i}."
        normed, residual = _normed(g, model, residual, branch, f"{at}attention_norm")
        bias = g.external(f"{at}bias", T.FLOAT, [model.qkv_width]) if model.qkv_bias else ""
        qkv = _layer_product(g, normed, formats.attention, f"{at}qkv", model.qkv_width, h, bias)
        heads, key, value = _attend(g, model, qkv, f".{i}")
        _present(g, model, f"present_key.{i}", key)
        _present(g, model, f"present_value.{i}", value)
        branch = _layer_product(g, heads, formats.attention, f"{at}output", h, model.query_width)
        normed, residual = _normed(g, model, residual, branch, f"{at}ffn_norm")
        both = _layer_product(g, normed, formats.ffn, f"{at}inputs", 2 * model.neurons, h)
        gate, up = g.nodes_out("Split", both, outputs=2, axis=2, num_outputs=2)
        op, domain, attributes = ACTIVATIONS[model.activation]
        a = g.node("Mul", g.node(op, gate, domain=domain, **attributes), up)
        branch = _layer_product(g, a, formats.ffn, f"{at}down", h, model.neurons)
    residual = g.node("Gather", residual, wanted, axis=1)
    branch = g.node("Gather", str(branch), wanted, axis=1)
    normed, _ = _normed(g, model, residual, branch, "norm")
    logits = g.node("Squeeze", _head(g, normed, formats, model.vocabulary, h), g.shape(0))
    g.output("logits", T.FLOAT, ["R", model.vocabulary], logits)
    return g.serialise("resident")


def _normed(g: _Graph, model: Model, residual: str, branch: str | None, weight: str) -> tuple[str, str]:
    """(RMS norm of residual + branch, residual + branch), [1, T, H] both."""
    gamma = g.external(weight, T.FLOAT, [model.hidden])
    epsilon = model.norm_epsilon
    if branch is None:
        return g.node("SimplifiedLayerNormalization", residual, gamma, axis=-1, epsilon=epsilon), residual
    normed, _, _, total = g.nodes_out(
        "SkipSimplifiedLayerNormalization", residual, branch, gamma,
        domain=MICROSOFT, outputs=4, epsilon=epsilon,
    )  # fmt: skip
    return normed, total


def _layer_product(g: _Graph, x: str, kind: RowKind, name: str, n: int, k: int, bias: str = "") -> str:
    """x [1, T, K] times constant rows [n, K] of a layer.

    float32 products exist for 4-bit weights only, so 8-bit ones are two planes of nibbles, 16 high + low.
    """
    planes = [""] if kind == "int4" else [".high", ".low"]
    y = ""
    for plane in planes:
        q = g.external(f"{name}.q{plane}", T.UINT8, [n, k // BLOCK, BLOCK // 2])
        scale = g.external(f"{name}.scale{plane}", T.FLOAT, [n, k // BLOCK])
        inputs = [x, q, scale] + (["", "", bias] if bias and not y else [])
        part = g.node("MatMulNBits", *inputs, domain=MICROSOFT,
                      K=k, N=n, bits=4, block_size=BLOCK, accuracy_level=1)  # fmt: skip
        y = g.node("Add", y, part) if y else part
    return _with_centres(g, x, y, name, n, k)


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
    centre = g.external(f"{name}.centre", T.FLOAT, [k // BLOCK, n])
    blocks = g.node("Reshape", x, g.shape(0, 0, -1, BLOCK))
    sums = g.node("ReduceSum", blocks, g.shape(3), keepdims=0)  # [1, T, K / 32]
    return g.node("Add", y, g.node("MatMul", sums, centre))
