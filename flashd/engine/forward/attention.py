"""Attention over the KV cache: rotary tables, the positions of a pass's tokens, and the call of the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.reader import Bundle
from flashd.bundle.row_kinds import Floats
from flashd.engine.forward.products import Vectors
from flashd.engine.forward.stages import input_names
from flashd.engine.model.branches import Branches
from flashd.engine.model.kv_cache import KvCache
from flashd.system.onnx_session import open_session


class Rotary:
    """cos and sin of rotary embedding (arXiv 2104.09864), halves rotated, for each of a model's tables.

    A table has two numbers for each pair of a head's dimensions: the angle that one position turns it by (0 if it is
    not turned), and the length that it is stretched to.
    """

    def __init__(self, bundle: Bundle, positions: int) -> None:
        model = bundle.header.model
        tables = (
            bundle.floats("rope").astype(np.float64).reshape(model.ropes, 2, model.head_dim // 2)
        )  # [n, 2, D / 2]
        self._arrays: dict[str, Floats] = {}
        for i, (angle, length) in enumerate(tables):
            turned = np.arange(positions)[:, None] * angle  # [positions, D / 2]
            self._arrays[f"cos.{i}"] = (length * np.cos(turned)).astype(np.float32)
            self._arrays[f"sin.{i}"] = (length * np.sin(turned)).astype(np.float32)
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in self._arrays.items()}

    def bind(self, names: Iterable[str], binding: Any) -> None:
        """Binds those tables that are among the `names` of a graph's inputs."""
        for name in names:
            if name in self._values:
                binding.bind_ortvalue_input(name, self._values[name])


NEVER = np.float32(-1e30)
"""A score with this added to it gets no attention."""


@dataclass(frozen=True)
class Places:
    """The positions of the T tokens of a pass in their texts, and what each attends to."""

    past: int  # tokens in the cache before them
    positions: npt.NDArray[np.int64]  # [1, T]
    bias: Floats  # [1, 1, T, past + T], added to attention's scores: 0 or NEVER

    def parts(self, most: int) -> list[tuple[slice, Places]]:
        """The tokens in parts of up to `most`: the slice of each part, and its places behind the parts before it."""
        tokens = self.positions.shape[1]
        parts = [slice(at, min(at + most, tokens)) for at in range(0, tokens, most)]
        return [(part, self._part(part)) for part in parts]

    def _part(self, part: slice) -> Places:
        bias = np.ascontiguousarray(self.bias[:, :, part, : self.past + part.stop])  # [1, 1, part, past + stop]
        return Places(self.past + part.start, self.positions[:, part], bias)

    @classmethod
    def in_line(cls, past: int, tokens: int) -> Places:
        """`tokens` tokens in one line behind `past` tokens."""
        return cls(past, np.arange(past, past + tokens)[None], np.zeros((1, 1, tokens, past + tokens), np.float32))

    @classmethod
    def in_branches(cls, past: int, branches: Branches, known: int = 0) -> Places:
        """The tokens of `branches` behind `past` slots of the cache, without the first `known`.

        The cache has the `known` tokens already, in the slots that follow the first `past`.
        """
        sees = branches.sees(past)[known:]  # [T, past + known + T]
        bias = np.where(sees, np.float32(0), NEVER)
        return cls(past + known, sees.sum(1)[None] - 1, bias[None, None])


class Attention:
    """Attention over a layer's KV cache, with the biases, norms and rotary embedding that belong to it."""

    def __init__(self, bundle: Bundle, cache: KvCache) -> None:
        model = bundle.header.model
        sessions = [open_session(bundle.read(f"graph.attention.{i}")) for i in range(len(model.attention))]
        self._sessions = [(sessions[kind], input_names(sessions[kind])) for kind in model.layer_kinds]
        self._cache = cache
        self._rotary = Rotary(bundle, cache.context)

    def __call__(self, layer: int, qkv: Floats, vectors: Vectors, places: Places) -> Floats:
        """qkv [T, q + k + v widths] of T new tokens -> [T, query width] float32.

        The layer's cache keeps their keys and values. `cache.advance` is left to the caller.
        """
        session, names = self._sessions[layer]
        binding = session.io_binding()
        binding.bind_cpu_input("qkv", qkv[None])
        self._rotary.bind(names, binding)
        for name in names:
            if name in vectors:
                binding.bind_cpu_input(name, vectors[name])
        bind_positions(binding, places.past, len(qkv))
        binding.bind_cpu_input("positions", places.positions)
        binding.bind_cpu_input("bias", places.bias)
        for part, value in zip(("key", "value"), self._cache.layer(layer), strict=True):
            binding.bind_ortvalue_input(f"past_{part}", value)
            binding.bind_ortvalue_output(f"present_{part}", value)
        binding.bind_output("y", "cpu")
        session.run_with_iobinding(binding)
        (y,) = [v.numpy() for v in binding.get_outputs() if len(v.shape()) == 3]  # [1, T, query width]
        return np.asarray(y[0], np.float32)


def bind_positions(binding: Any, past: int, new: int) -> None:
    """Tells GroupQueryAttention that `new` tokens follow `past` tokens."""
    binding.bind_cpu_input("last", np.array([past + new - 1], np.int32))
    binding.bind_cpu_input("total", np.array(past + new, np.int32))
