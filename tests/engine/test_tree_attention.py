"""Attention of tokens in branches: right, and the same bits whatever stands between the keys that a token sees."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashd.bundle.rows.kinds import Floats
from flashd.graphs.layer_stages import NEVER
from flashd.graphs.nodes import Graph
from flashd.graphs.onnx_bytes import T
from flashd.graphs.tree_attention import Heads, attend
from flashd.system.onnx_session import open_session, start_pool

QUERIES, KEYS, WIDTH = 6, 2, 24
SEEN = 300
"""Keys of a text. Products of more than some hundred rows are made in several parts."""


def session(cap: float, sinks: bool) -> ort.InferenceSession:
    start_pool(2)
    g = Graph()
    query = g.input("query", T.FLOAT, [1, "T", QUERIES * WIDTH])
    keys, values = (g.input(name, T.FLOAT, [1, KEYS, "S", WIDTH]) for name in ("keys", "values"))
    bias = g.input("bias", T.FLOAT, [1, 1, "T", "S"])
    own = g.input("sinks", T.FLOAT, [QUERIES]) if sinks else ""
    heads = Heads(QUERIES, KEYS, WIDTH, WIDTH**-0.5, cap, own)
    g.output("y", T.FLOAT, [1, "T", QUERIES * WIDTH], attend(g, heads, query, keys, values, bias))
    return open_session(g.serialise("attention"), together=True)


def expected(
    query: Floats, keys: Floats, values: Floats, seen: npt.NDArray[np.bool_], cap: float, sinks: Floats | None
) -> Floats:
    """By the definition, in float64. query [T, heads, D], keys and values [kv heads, S, D], seen [T, S]."""
    wide = [np.repeat(x.astype(np.float64), QUERIES // KEYS, axis=0) for x in (keys, values)]  # [heads, S, D]
    scores = np.einsum("thd,hsd->hts", query.astype(np.float64), wide[0]) * WIDTH**-0.5
    scores = cap * np.tanh(scores / cap) if cap else scores
    odds = np.where(seen, np.exp(scores), 0)  # [heads, T, S]
    total = odds.sum(-1) + (0 if sinks is None else np.exp(sinks.astype(np.float64))[:, None])
    return np.asarray(np.einsum("hts,hsd->thd", odds / total[..., None], wide[1]), np.float32)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("cap", [0.0, 2.0])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 32), tokens=st.integers(1, 9), others=st.integers(1, 40))
def test_masked_keys_change_no_bit(cap: float, sinks: bool, seed: int, tokens: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    ran, more = session(cap, sinks), {"sinks": rng.normal(size=QUERIES).astype(np.float32)} if sinks else {}
    query = rng.normal(size=(1, tokens, QUERIES * WIDTH)).astype(np.float32)
    keys, values = rng.normal(size=(2, 1, KEYS, SEEN, WIDTH)).astype(np.float32)
    sees = np.tril(np.ones((tokens, SEEN), np.bool_), SEEN - tokens)
    bias = np.where(sees, np.float32(0), NEVER)

    (alone,) = ran.run(None, {"query": query, "keys": keys, "values": values, "bias": bias[None, None]} | more)
    right = expected(query.reshape(tokens, QUERIES, WIDTH), keys[0], values[0], sees, cap, more.get("sinks"))
    assert np.abs(alone.reshape(right.shape) - right).max() < 2e-6

    # the same keys, with those of others between them
    at = np.sort(rng.permutation(SEEN + others)[:SEEN])
    wide = rng.normal(size=(2, 1, KEYS, SEEN + others, WIDTH)).astype(np.float32) * 9
    wide[0][:, :, at], wide[1][:, :, at] = keys, values
    masked = np.full((tokens, SEEN + others), NEVER)
    masked[:, at] = bias
    (beside,) = ran.run(None, {"query": query, "keys": wide[0], "values": wide[1], "bias": masked[None, None]} | more)
    assert np.array_equal(alone, beside)

    # and each token in a pass of its own
    for t in range(tokens):
        given_ = {"query": query[:, [t, t]], "keys": wide[0], "values": wide[1], "bias": masked[None, None, [t, t]]}
        assert np.array_equal(ran.run(None, given_ | more)[0][0, 0], alone[0, t])
