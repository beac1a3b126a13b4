"""What layers do that keep a state in place of keys and values.

A state has the last rows that went into it, so that the last tokens can be forgotten again: a draft that was wrong.
A short convolution needs nothing else. A gated delta net and a Mamba-2 mixer also have a sum over all tokens. Of the
last rows the sum may lack some, which are *pending*: these are taken in anew in each pass, until they are *folded*
into the sum.

All of it is computed so that a token's values do not depend on how many share the pass: sums of products element by
element, norms row by row, and LinearAttention, which goes token by token. Only one node reads an old state before the
new one is written, so both may be the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.layer_kinds import GatedDeltaNet, Mamba2, Recurrent, ShortConvolution
from flashd.graphs.nodes import Graph, Vector
from flashd.graphs.onnx_bytes import MICROSOFT, T

REWIND = 16
"""Rows that a state has beside those that the next token needs. So many tokens can be forgotten."""

EPSILON = 1e-6
"""Added to the square of the length of queries and keys of a delta net (transformers, modeling_qwen3_next.l2norm)."""

Shape = tuple[int, ...]


def rows_shape(model: Architecture, kind: Recurrent) -> Shape:
    """[1, rows, W]: of the last rows that went into the state of a layer of that kind."""
    return 1, REWIND + kind.taps - 1, kind.row_width(model.hidden)


def sums_shape(kind: Recurrent) -> Shape | None:
    """[1, heads, key dim, value dim] of the sum; None if there is none."""
    return (1, *kind.sums) if kind.sums else None


def recur(g: Graph, model: Architecture, kind: Recurrent, inner: str, vector: Vector, suffix: str) -> str:
    """inner [1, R, ...], the layer's inner values -> [1, R, ...], what its last product takes.

    Only the first `tokens` of the R rows count. `past_rows`, `present_rows`: what a state has of the last rows. With
    a sum, `pending` of these rows are not in `past_sums` yet: the first `folded` of them are taken in for
    `folded_sums`, and all of them and the tokens for `present_sums`.
    """
    if isinstance(kind, ShortConvolution):
        return _convolved(g, model, kind, inner, vector, suffix)
    if isinstance(kind, GatedDeltaNet):
        z, y = _summed(g, model, kind, inner, lambda rows: _of_delta_net(g, kind, rows, vector), suffix)
        return _normed(g, model, kind, (y, z), vector)
    z, y = _summed(g, model, kind, inner, lambda rows: _of_mamba(g, kind, rows, vector), suffix)
    return _normed_groups(g, model, kind, (y, z), vector)


def _convolved(g: Graph, model: Architecture, kind: ShortConvolution, inner: str, vector: Vector, suffix: str) -> str:
    b, c, x = g.nodes_out("Split", inner, outputs=3, axis=2, num_outputs=3)
    every = _every_row(g, model, kind, g.node("Mul", b, x), suffix)
    seen = g.node("Slice", every, g.shape(REWIND), g.shape(_END), g.shape(1))
    return g.node("Mul", c, _convolution(g, kind, seen, vector, model.hidden))


_END = 1 << 30
"""As where a slice stops: it goes on to the end."""


def _every_row(g: Graph, model: Architecture, kind: Recurrent, rows: str, suffix: str) -> str:
    """[1, kept + R, W]: the state's rows and the new ones [1, R, W]. Gives out those that the next pass needs."""
    shape = rows_shape(model, kind)
    every = g.node("Concat", g.input(f"past_rows{suffix}", T.FLOAT, shape), rows, axis=1)
    tokens = g.input("tokens", T.INT64, [1])
    last = g.node("Slice", every, tokens, g.node("Add", tokens, g.shape(shape[1])), g.shape(1))
    g.named_output(f"present_rows{suffix}", T.FLOAT, shape, last)
    return every


def _convolution(g: Graph, kind: Recurrent, rows: str, vector: Vector, width: int) -> str:
    """rows [1, n + taps - 1, width] -> [1, n, width], channel by channel."""
    total = ""
    for tap in range(kind.taps):
        ahead = kind.taps - 1 - tap
        seen = g.node("Slice", rows, g.shape(tap), g.shape(-ahead if ahead else _END), g.shape(1))
        one = g.node("Mul", seen, vector(f"conv.{tap}", width))
        total = g.node("Add", total, one) if total else one
    return total


@dataclass(frozen=True)
class _Operands:
    """What LinearAttention takes of n tokens, [1, n, ...] each, and how."""

    parts: list[str]  # queries, keys, values, decays (their logarithms), and of delta nets rates
    rule: str
    key_heads: int
    scale: float = 1.0
    beside: str = ""  # [1, n, values width], what is added to its output


def _summed(
    g: Graph,
    model: Architecture,
    kind: GatedDeltaNet | Mamba2,
    inner: str,
    made: Callable[[str], _Operands],
    suffix: str,
) -> tuple[str, str]:
    """(z, output of LinearAttention) [1, R, values width] of a layer whose state has a sum.

    Its inner values are z and behind it a row of the state. `made` makes the operands of rows of the state.
    """
    shape = sums_shape(kind)
    assert shape is not None
    width = shape[1] * shape[3]
    z, rows = g.nodes_out("Split", inner, g.shape(width, kind.row_width(model.hidden)), outputs=2, axis=2)
    every = _every_row(g, model, kind, rows, suffix)
    tokens, pending = g.input("tokens", T.INT64, [1]), g.input(f"pending{suffix}", T.INT64, [1])
    # the pending rows, the tokens, and in front of them what their convolution takes in
    stop = g.node("Add", tokens, g.shape(REWIND + kind.taps - 1))
    taken = g.node("Slice", every, g.node("Sub", g.shape(REWIND), pending), stop, g.shape(1))
    operands = made(taken)
    folded = g.input(f"folded{suffix}", T.INT64, [1])
    first = [g.node("Slice", part, g.shape(0), folded, g.shape(1)) for part in operands.parts]
    _, sums = _attended(g, kind, operands, first, g.input(f"past_sums{suffix}", T.FLOAT, shape))
    g.named_output(f"folded_sums{suffix}", T.FLOAT, shape, sums)
    rest = [g.node("Slice", part, folded, g.shape(_END), g.shape(1)) for part in operands.parts]
    y, sums = _attended(g, kind, operands, rest, f"folded_sums{suffix}")
    g.named_output(f"present_sums{suffix}", T.FLOAT, shape, sums)
    y = _last(g, y, tokens)
    if operands.beside:
        y = g.node("Add", y, _last(g, operands.beside, tokens))
    return z, _filled(g, y, inner)


def _last(g: Graph, x: str, tokens: str) -> str:
    """The last rows of x [1, n, ...], as many as there are tokens."""
    return g.node("Slice", x, g.node("Neg", tokens), g.shape(_END), g.shape(1))


def _mixed(g: Graph, kind: GatedDeltaNet | Mamba2, rows: str, rates: int, vector: Vector) -> tuple[str, str]:
    """(what is convolved [1, n, ...], rates [1, n, ...]) of rows [1, n + taps - 1, W]."""
    mixed, own = g.nodes_out("Split", rows, g.shape(kind.mixed_width, rates), outputs=2, axis=2)
    convolved = _convolution(g, kind, mixed, vector, kind.mixed_width)
    return convolved, g.node("Slice", own, g.shape(kind.taps - 1), g.shape(_END), g.shape(1))


def _silu(g: Graph, x: str) -> str:
    return g.node("QuickGelu", x, domain=MICROSOFT, alpha=1.0)


def _of_delta_net(g: Graph, kind: GatedDeltaNet, rows: str, vector: Vector) -> _Operands:
    heads = kind.value_heads
    mixed, rates = _mixed(g, kind, rows, 2 * heads, vector)
    widths = g.shape(kind.keys_width, kind.keys_width, kind.values_width)
    queries, keys, values = g.nodes_out("Split", _silu(g, mixed), widths, outputs=3, axis=2)
    queries, keys = (_repeated(g, kind, _one_long(g, kind, part)) for part in (queries, keys))
    beta, alpha = g.nodes_out("Split", rates, outputs=2, axis=2, num_outputs=2)
    slow = _softplus(g, g.node("Add", alpha, vector("dt.bias", heads)))
    decays = g.node("Mul", slow, vector("decay", heads))
    return _Operands(
        [queries, keys, values, decays, g.node("Sigmoid", beta)], "gated_delta",
        heads if kind.tiled else kind.key_heads, 1 / math.sqrt(kind.key_dim),
    )  # fmt: skip


def _of_mamba(g: Graph, kind: Mamba2, rows: str, vector: Vector) -> _Operands:
    heads = kind.heads
    mixed, rates = _mixed(g, kind, rows, heads, vector)
    mixed = _silu(g, g.node("Add", mixed, vector("mamba_conv.bias", kind.mixed_width)))
    widths = g.shape(kind.width, kind.shared_width, kind.shared_width)
    x, b, c = g.nodes_out("Split", mixed, widths, outputs=3, axis=2)
    dt = _softplus(g, g.node("Add", rates, vector("dt.bias", heads)))
    by_head = g.node("Reshape", x, g.shape(1, -1, heads, kind.head_dim))

    def times(of_heads: str) -> str:
        """x [1, n, width], each head multiplied by its number [1, n or 1, heads]."""
        product = g.node("Mul", by_head, g.node("Unsqueeze", of_heads, g.shape(-1)))
        return g.node("Reshape", product, g.shape(1, -1, kind.width))

    skip = g.node("Reshape", vector("skip", heads), g.shape(1, 1, heads))
    decays = g.node("Mul", dt, vector("decay", heads))
    return _Operands([c, b, times(dt), decays], "gated", kind.groups, beside=times(skip))


def _softplus(g: Graph, x: str) -> str:
    """log(1 + exp(x)), element by element.

    onnxruntime's Softplus and Log round the last elements of an array otherwise than those before them, so that a
    token's value would depend on how many share the pass. This is x if it is above 0, and log(1 + z) with
    z = exp(-|x|), as 2 artanh(s) = 2 (s + s^3 / 3 + s^5 / 5 ...) with s = z / (2 + z), which is a third at the most:
    eight terms are exact to 1e-9.
    """
    z = g.node("Exp", g.node("Neg", g.node("Abs", x)))
    s = g.node("Div", z, g.node("Add", z, g.constant(np.float32(2))))
    squared, total = g.node("Mul", s, s), ""
    for power in range(15, 0, -2):
        term = g.constant(np.float32(2 / power))
        total = g.node("Add", g.node("Mul", total, squared), term) if total else term
    return g.node("Add", g.node("Relu", x), g.node("Mul", total, s))


def _one_long(g: Graph, kind: GatedDeltaNet, x: str) -> str:
    """Queries or keys [1, n, key heads D], each head divided by its length."""
    heads = g.node("Reshape", x, g.shape(1, -1, kind.key_heads, kind.key_dim))
    # the root mean square is the length divided by the root of D
    scale = g.constant(np.full(kind.key_dim, 1 / math.sqrt(kind.key_dim), np.float32))
    normed = g.node("SimplifiedLayerNormalization", heads, scale, axis=-1, epsilon=EPSILON / kind.key_dim)
    return g.node("Reshape", normed, g.shape(1, -1, kind.keys_width))


def _repeated(g: Graph, kind: GatedDeltaNet, x: str) -> str:
    """[1, n, keys width], or [1, n, value heads D] if the heads of keys stand one behind the other, over and over."""
    times = kind.value_heads // kind.key_heads
    return g.node("Concat", *[x] * times, axis=2) if kind.tiled and times > 1 else x


def _attended(
    g: Graph, kind: GatedDeltaNet | Mamba2, operands: _Operands, parts: list[str], sums: str
) -> tuple[str, str]:
    """(output [1, n, values width], the sum behind it) of n rows of the operands' parts behind a sum."""
    queries, keys, values, *rates = parts
    y, sums = g.nodes_out(
        "LinearAttention", queries, keys, values, sums, *rates, domain=MICROSOFT, outputs=2,
        q_num_heads=operands.key_heads, kv_num_heads=kind.sums[0], update_rule=operands.rule, scale=operands.scale,
    )  # fmt: skip
    return y, sums


def _filled(g: Graph, y: str, like: str) -> str:
    """y [1, tokens, ...] with its last row once more, if `like` [1, R, ...] has one row more."""
    last = g.node("Slice", y, g.shape(-1), g.shape(_END), g.shape(1))
    rows = g.node("Slice", g.node("Shape", like), g.shape(1), g.shape(2))
    return g.node("Slice", g.node("Concat", y, last, axis=1), g.shape(0), rows, g.shape(1))


def _normed(g: Graph, model: Architecture, kind: GatedDeltaNet, parts: tuple[str, str], vector: Vector) -> str:
    """y and z [1, R, values width] -> the norm of y, head by head, times SiLU of z."""
    y, z = parts
    heads = g.node("Reshape", y, g.shape(1, -1, kind.value_heads, kind.value_dim))
    weight = vector("delta_norm.weight", kind.value_dim)
    normed = g.node("SimplifiedLayerNormalization", heads, weight, axis=-1, epsilon=model.norm_epsilon)
    normed = g.node("Reshape", normed, g.shape(1, -1, kind.values_width))
    return g.node("Mul", normed, _silu(g, z))


def _normed_groups(g: Graph, model: Architecture, kind: Mamba2, parts: tuple[str, str], vector: Vector) -> str:
    """y and z [1, R, width] -> the norm of y SiLU(z), group by group, or y SiLU(z) if the kind norms nothing."""
    y, z = parts
    gated, each = g.node("Mul", y, _silu(g, z)), kind.width // kind.groups
    if not kind.normed:
        return gated
    groups = g.node("Reshape", gated, g.shape(1, -1, kind.groups, each))
    ones = g.constant(np.ones(each, np.float32))  # the weights of groups differ
    normed = g.node("SimplifiedLayerNormalization", groups, ones, axis=-1, epsilon=model.norm_epsilon)
    return g.node(
        "Mul", g.node("Reshape", normed, g.shape(1, -1, kind.width)), vector("mamba_norm.weight", kind.width)
    )
