"""Which arrays of constant rows onnxruntime does not read any more once a session is open.

It repacks the weights of MatMulNBits while it opens a session. Whether it still reads the arrays that it was given
depends on the processor and on the arithmetic. This is found out once, with a small product: an array is overwritten,
and if no result changes, it may be thrown away.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from flashd.bundle.rows.kinds import BLOCK
from flashd.graphs.constant import LEVELS, Arithmetic, nbits
from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import T
from flashd.system.onnx_session import open_session

ROWS, WIDTH = 128, 256
TOKENS = (1, 2, 17)
"""Of the passes that are compared: few and many tokens are multiplied in different ways."""


PARTS = ("q", "scale", "zero")
"""The arrays of a product: weights, scales and zero points."""


@cache
def unread(arithmetic: Arithmetic, eight: bool) -> frozenset[str]:
    """Those of PARTS that need not be kept, of rows of 4 bits and, with `eight`, of 8 bits too."""
    found = _unread(4, arithmetic, False)
    if eight:  # see graphs.constant.Products.of_wide
        found &= _unread(8, arithmetic, False) if arithmetic == "int8" else _unread(4, arithmetic, True)
    return found


def _unread(bits: int, arithmetic: Arithmetic, with_zero: bool) -> frozenset[str]:
    """Those that a small product of `bits` bits does not read. What it does not have it does not read either."""
    g = Graph()
    x = g.input("x", T.FLOAT, [1, "T", WIDTH])
    names = ("q", "scale", "zero" if with_zero else "")
    g.output("y", T.FLOAT, [1, "T", ROWS], nbits(g, x, names, (ROWS, WIDTH), bits, LEVELS[arithmetic]))
    random, blocks = np.random.default_rng(0), WIDTH // BLOCK
    arrays = {
        "q": random.integers(0, 256, (ROWS, blocks, BLOCK * bits // 8), np.uint8),
        "scale": random.random((ROWS, blocks), np.float32),
        "zero": random.integers(0, 256, (ROWS, blocks // 2), np.uint8),
    }
    had = [name for name in names if name]
    session = open_session(g.serialise("probe"), {name: arrays[name] for name in had}, in_place=had)
    inputs = [random.standard_normal((1, tokens, WIDTH), np.float32) for tokens in TOKENS]

    def outputs() -> list[npt.NDArray[np.float32]]:
        return [session.run(None, {"x": x})[0] for x in inputs]

    expected = outputs()

    def is_unread(name: str) -> bool:
        original = arrays[name].copy()
        arrays[name][...] = 0
        same = all(np.array_equal(y, z) for y, z in zip(expected, outputs(), strict=True))
        arrays[name][...] = original
        return same

    return frozenset(name for name in PARTS if name not in had or is_unread(name))
