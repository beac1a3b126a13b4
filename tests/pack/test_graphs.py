"""The activations that a bundle's graphs know, each against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from flashd.bundle.architecture import Activation
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.graphs.products import activations
from flashd.system.onnx_session import open_session, start_pool

FORMULAS: dict[Activation, Callable[[Floats], Floats]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "drelu": lambda x: np.maximum(x, 0),
    "fatrelu": lambda x: np.where(x > 0.3, x, 0),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_activations(tiny_bundle: Path, name: Activation, gated: bool, biased: bool) -> None:
    with Bundle(tiny_bundle) as bundle:
        model = msgspec.structs.replace(
            bundle.header.model, activation=name, threshold=0.3, gated=gated, biases=["inputs"] if biased else []
        )
    random = np.random.default_rng(0)
    products = random.standard_normal((3, 64 * model.inputs)).astype(np.float32)
    bias = random.standard_normal(64 * model.inputs).astype(np.float32) if biased else np.zeros(1, np.float32)
    start_pool(2)
    feed = {"products": products, "bias": bias} if biased else {"products": products}
    (a,) = open_session(activations(model)).run(None, feed)
    pairs = (products + bias).reshape(3, 64, -1)
    up = pairs[..., -1]
    expected = FORMULAS[name](pairs[..., 0])
    if gated:
        expected = expected * (np.maximum(up, 0) if name == "drelu" else up)
    assert np.abs(a - expected).max() < 1e-5
