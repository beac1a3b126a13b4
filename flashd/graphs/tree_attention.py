"""Attention of tokens that may stand in branches, of models that page.

What a token gets has to be the same bits wherever its keys are in the cache, and whichever keys of other branches are
between them. Else a product that rounds what goes into it could round it to another number, and then a draft could
change a word. GroupQueryAttention adds up in an order that depends on the keys that are masked. Here float32 does
what concerns a key alone: its score and its probability. The sums over keys are made in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import T


@dataclass(frozen=True)
class Heads:
    """The heads of a kind of attention.

    `scale`: what scores are multiplied by. `cap`: what they stay below; 0: no cap. `sinks`: the name of a vector
    [heads] of scores that take part in no output; empty: the model has none.
    """

    queries: int
    keys: int
    width: int  # D
    scale: float
    cap: float = 0.0
    sinks: str = ""


def by_head(g: Graph, rows: str, heads: Heads) -> str:
    """Keys or values [1, T, heads D] -> [1, heads, T, D]."""
    return g.node("Transpose", g.node("Reshape", rows, g.shape(0, 0, heads.keys, heads.width)), perm=[0, 2, 1, 3])


def attend(g: Graph, heads: Heads, query: str, keys: str, values: str, bias: str) -> str:
    """query [1, T, heads D], keys and values [1, kv heads, S, D] -> [1, T, heads D].

    `bias` [1, 1, T, S] is 0 for each key that a token sees, and NEVER for the others.
    """
    group = heads.queries // heads.keys
    scaled = g.node("Mul", query, g.constant(np.float32(heads.scale)))
    by_group = g.node("Reshape", scaled, g.shape(-1, heads.keys, group, heads.width))  # [T, kv heads, G, D]
    by_key = g.node("Transpose", by_group, perm=[1, 2, 0, 3])  # [kv heads, G, T, D]
    together = g.shape(1, heads.keys, -1, heads.width)
    across = g.node("Transpose", keys, perm=[0, 1, 3, 2])  # [1, kv heads, D, S]
    scores = g.node("MatMul", g.node("Reshape", by_key, together), across)  # [1, kv heads, G T, S]
    if heads.cap:
        cap = g.constant(np.float32(heads.cap))
        scores = g.node("Mul", g.node("Tanh", g.node("Div", scores, cap)), cap)
    scores = g.node("Reshape", scores, g.shape(heads.keys, group, -1, 0))
    scores = g.node("Add", scores, bias)  # [kv heads, G, T, S]
    largest = g.node("ReduceMax", scores, g.shape(-1), keepdims=1)  # [kv heads, G, T, 1]
    sinks = g.node("Reshape", heads.sinks, g.shape(heads.keys, group, 1, 1)) if heads.sinks else ""
    if sinks:
        largest = g.node("Max", largest, sinks)
    odds = _wide(g, g.node("Exp", g.node("Sub", scores, largest)))
    total = g.node("ReduceSum", odds, g.shape(-1), keepdims=1)
    if sinks:
        total = g.node("Add", total, _wide(g, g.node("Exp", g.node("Sub", sinks, largest))))
    odds = g.node("Reshape", odds, g.shape(1, heads.keys, -1, 0))
    seen = g.node("MatMul", odds, _wide(g, values))  # [1, kv heads, G T, D]
    seen = g.node("Div", g.node("Reshape", seen, g.shape(heads.keys, group, -1, heads.width)), total)
    out = g.node("Transpose", g.node("Cast", seen, to=T.FLOAT), perm=[2, 0, 1, 3])  # [T, kv heads, G, D]
    return g.node("Reshape", out, g.shape(1, -1, heads.queries * heads.width))


def _wide(g: Graph, x: str) -> str:
    return g.node("Cast", x, to=T.DOUBLE)
