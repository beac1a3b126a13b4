"""The graph of a whole model with constant weights, for boards on which the model fits."""

from __future__ import annotations

from onnx import TensorProto as T

from flashd.bundle.architecture import Architecture
from flashd.bundle.header import Formats
from flashd.bundle.row_kinds import BITS, BLOCK, RowKind
from flashd.pack.graphs.nodes import MICROSOFT, Graph
from flashd.pack.graphs.products import activated, gated, share
from flashd.pack.graphs.stages import LayerStages, Vector, present


def resident(model: Architecture, formats: Formats) -> bytes:
    """The whole model: embeddings x [T, H] -> logits [R, V] behind the tokens numbered `wanted` [R]."""
    g, h = Graph(), model.hidden
    # three axes throughout, as GroupQueryAttention needs them: a Reshape costs as much as a small product
    x = g.node("Unsqueeze", g.input("x", T.FLOAT, ["T", h]), g.shape(0))  # [1, T, H]
    wanted = g.input("wanted", T.INT64, ["R"])
    for i in range(model.layers):
        at = f"layer.{i}."
        block = LayerStages(g, model, _external_vectors(g, at))
        normed = block.enter(x)
        qkv = _layer_product(g, normed, formats.attention, f"{at}qkv", model.qkv_width, h)
        kind = model.attention[model.layer_kinds[i]]
        heads, key, value = block.attend(qkv, kind, f".{i}")
        present(g, model, f"present_key.{i}", key)
        present(g, model, f"present_value.{i}", value)
        branch = _layer_product(g, heads, formats.attention, f"{at}output", h, model.query_width)
        x, normed = block.middle(x, normed, branch)
        x = block.leave(x, _feed_forward(g, model, formats.ffn, normed, at))
    last = LayerStages(g, model, _external_vectors(g, ""))
    logits = last.logits(_head(g, last.finish(g.node("Gather", x, wanted, axis=1)), formats, model.vocabulary, h))
    g.output("logits", T.FLOAT, ["R", model.vocabulary], g.node("Squeeze", logits, g.shape(0)))
    return g.serialise("resident")


def _external_vectors(g: Graph, at: str) -> Vector:
    return lambda name, length: g.external(f"{at}{name}", T.FLOAT, [length])


def _feed_forward(g: Graph, model: Architecture, kind: RowKind, x: str, at: str) -> str:
    """A layer's FFN, [1, T, H] -> [1, T, Architecture.share_width], without the bias of its output."""
    both = _layer_product(g, x, kind, f"{at}inputs", model.inputs * model.neurons, model.hidden)
    if "inputs" in model.biases:
        both = g.node("Add", both, g.external(f"{at}inputs.bias", T.FLOAT, [model.inputs * model.neurons]))
    if model.gated:
        a = gated(g, model, *g.nodes_out("Split", both, outputs=2, axis=2, num_outputs=2))
    else:
        a = activated(g, model, both)
    if kind == "ternary":
        scaled = g.node("Mul", a, g.external(f"{at}down.columns", T.FLOAT, [model.neurons]))
        return share(g, model, a, _layer_product(g, scaled, kind, f"{at}down", model.hidden, model.neurons))
    return share(g, model, a, _layer_product(g, a, kind, f"{at}down", model.hidden, model.neurons))


def _layer_product(g: Graph, x: str, kind: RowKind, name: str, n: int, k: int) -> str:
    """x [1, T, K] times constant rows [n, K] of a layer -> [1, T, n].

    MatMulNBits multiplies only 4-bit weights in float32 without widening the whole matrix. So 8-bit weights are two
    planes of nibbles, 16 * high + low, and ternary weights are nibbles.
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


def _head(g: Graph, x: str, formats: Formats, n: int, k: int) -> str:
    """Logits [1, R, V] of x [1, R, H]."""
    kind = formats.head
    if not formats.rounded_head:
        return _layer_product(g, x, kind, "head", n, k)
    q = g.external("head.q", T.UINT8, [n, k // BLOCK, BLOCK * BITS[kind] // 8])
    scale = g.external("head.scale", T.FLOAT, [n, k // BLOCK])
    y = g.node("MatMulNBits", x, q, scale, domain=MICROSOFT,
               K=k, N=n, bits=BITS[kind], block_size=BLOCK, accuracy_level=4)  # fmt: skip
    return _with_centres(g, x, y, "head", n, k) if formats.centred_head else y


def _with_centres(g: Graph, x: str, y: str, name: str, n: int, k: int) -> str:
    # one node in place of Reshape and ReduceSum: in a small model a node costs as much as what it computes
    means = g.node("AveragePool", x, kernel_shape=[BLOCK], strides=[BLOCK])  # [1, T, K / 32]
    centre = g.external(f"{name}.centre", T.FLOAT, [k // BLOCK, n])  # times 32
    return g.node("Add", y, g.node("MatMul", means, centre))
