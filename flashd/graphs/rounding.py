"""Keys and values rounded to what a row of the KV cache holds in 8 bits, see engine.model.kv_rows."""

from __future__ import annotations

from typing import Literal

import numpy as np

from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import T

KvFormat = Literal["float32", "int8"]
"""How keys and values are kept."""

SMALLEST = np.float32(2.0**-100)
"""A scale that is not zero, for rows of zeros. Rows of numbers below 1e-28 are rounded to zero, or nearly so."""


NUMBERS = 16
"""Numbers of a key or a value that share a scale.

A few channels of keys are often far larger than the rest. KL to float32 on 256 tokens with 128, 32, 16 and 8 of them:
Qwen2.5-Coder-1.5B 0.0095, 0.0017, 0.0011, 0.0004; SmolLM2-135M 0.0007 (64), 0.0003, 0.0002, 0.0001.
"""


def block(head_dim: int) -> int:
    """Numbers of a block of a head; heads that do not divide have one block."""
    return NUMBERS if head_dim % NUMBERS == 0 else head_dim


def rounded(g: Graph, x: str, head_dim: int) -> str:
    """[1, T, heads D] -> the same, each block of numbers rounded to multiples of a 127th of its largest.

    That 127th has 8 significant bits, so that the largest number is 127 times it, exactly.
    """
    rows = g.node("Reshape", x, g.shape(0, 0, -1, block(head_dim)))  # [1, T, blocks, numbers]
    largest = g.node("ReduceMax", g.node("Abs", rows), g.shape(-1), keepdims=1)  # [1, T, blocks, 1]
    exact = g.node("Mul", largest, g.constant(np.float32(1 / 127)))
    short = g.node("Cast", g.node("Cast", exact, to=T.BFLOAT16), to=T.FLOAT)
    scale = g.node("Max", short, g.constant(SMALLEST))
    codes = g.node("Round", g.node("Div", rows, scale))
    return g.node("Reshape", g.node("Mul", codes, scale), g.shape(0, 0, -1))
