"""The forward pass of a model that fits in RAM: one graph with constant weights. The card gives embeddings alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from flashd.bundle.architecture import Architecture
from flashd.bundle.arrays import QuantGroups, QuantRows, Rows, TernaryGroups, TernaryRows
from flashd.bundle.bits import pack_bits, unpack
from flashd.bundle.reader import Bundle, steps
from flashd.bundle.row_kinds import BLOCK, Bytes, Floats, RowKind, unit_steps
from flashd.engine.forward import attention, products, stages
from flashd.engine.model import sizes
from flashd.engine.model.branches import Branches
from flashd.engine.model.contract import CardStats, Guesses, Meanwhile, OnStep, Tokens, silent
from flashd.engine.model.kv_cache import KvCache
from flashd.engine.planning.plan import Plan
from flashd.system.freed_memory import give_back_freed_memory
from flashd.system.onnx_session import open_session

Initialisers = dict[str, npt.NDArray[Any]]


class ResidentModel:
    """The Model of a bundle that is held whole in RAM, in the order of MatMulNBits.

    Raises DamagedRun, CardError while it loads and, for embeddings, while it runs.
    """

    def __init__(self, bundle: Bundle, plan: Plan, on_step: OnStep = silent) -> None:
        self._bundle = bundle
        self._model: Architecture = bundle.header.model
        products.use_threads(plan.threads)
        self.cache = KvCache(self._model, plan.context)
        self.card = CardStats()
        self.hit_rate = 1.0
        self.shares_reads = self.drafts = self.branches = False
        self.pass_tokens = sizes.TOKENS_AT_ONCE
        self._session = open_session(bundle.read("graph.resident"), self._initialisers(on_step))
        give_back_freed_memory()
        self._embed = stages.Embedder(bundle)
        self._rotary = attention.Rotary(bundle, plan.context)
        self._binding = self._bound()

    def draft(self, tokens: Tokens, branches: Branches) -> Guesses:
        """Not supported: nothing is cheaper than an exact pass here."""
        raise NotImplementedError

    def close(self) -> None:
        """Does nothing: only memory is held."""

    def forward(
        self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent, branches: Branches | None = None,
        meanwhile: Meanwhile = nullcontext,  # noqa: ARG002
    ) -> Floats:  # fmt: skip
        """Logits [R, V] behind the tokens numbered `wanted` [R] of a pass over `tokens` [T]; the cache keeps all T.

        `meanwhile` is not called, since nothing streams. Raises NotImplementedError if `branches` are given.
        """
        if branches:
            raise NotImplementedError
        b = self._binding
        b.bind_cpu_input("x", self._embed(tokens, np.arange(self.cache.length, self.cache.length + len(tokens))))
        b.bind_cpu_input("wanted", wanted)
        attention.bind_positions(b, self.cache.length, len(tokens))
        logits = np.empty((len(wanted), self._model.vocabulary), np.float32)
        b.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(b)
        self.cache.advance(len(tokens))
        on_step(self._model.layers, self._model.layers, 0)
        return logits

    def in_parts(self, tokens: Tokens, on_step: OnStep = silent) -> Iterator[tuple[int, Floats]]:
        """One part: (0, logits [T, V] behind each of `tokens` [T]). Loading took more memory than that."""
        yield 0, self.forward(tokens, np.arange(len(tokens)), on_step)

    def _bound(self) -> Any:
        binding = self._session.io_binding()
        self._rotary.bind(stages.input_names(self._session), binding)
        for i in range(self._model.layers):
            for part, value in zip(("key", "value"), self.cache.layer(i), strict=True):
                binding.bind_ortvalue_input(f"past_{part}.{i}", value)
                binding.bind_ortvalue_output(f"present_{part}.{i}", value)
        return binding

    def _initialisers(self, on_step: OnStep) -> Initialisers:
        m, formats = self._model, self._bundle.header.formats
        head = self._bundle.rows("head")
        assert isinstance(head, QuantRows)
        scale, centre = steps(head, formats.head)
        out: Initialisers = {**stages.named(self._bundle.floats("vectors"), m.model_vectors())}
        if formats.rounded_head:
            out |= {"head.q": head.q.reshape(*scale.shape, -1), "head.scale": scale}
            if formats.centred_head:
                out["head.centre"] = BLOCK * centre.T
        else:
            out |= _planes("head", head.q, scale, centre, formats.head)
        for i in range(m.layers):
            at = f"layer.{i}."
            vectors = stages.named(self._bundle.floats(f"{at}vectors"), m.layer_vectors())
            out |= {f"{at}{name}": vector for name, vector in vectors.items()}
            for part in ("qkv", "output"):
                out |= _product_planes(f"{at}{part}", self._bundle.rows(f"{at}{part}"), formats.attention)
            out |= self._ffn(i, formats.ffn)
            on_step(i + 1, m.layers, 0)
        return out

    def _ffn(self, i: int, kind: RowKind) -> Initialisers:
        """The constants of a layer's FFN: input rows [M F, H], matrix by matrix, and down_proj [H, F].

        The blocks of down_proj run along the neurons.
        """
        m, form = self._model, self._bundle.header.group
        groups = form.empty(m.groups)
        for first, some in self._bundle.groups(i, m.groups):
            groups[first : first + len(some)].take(some)
        if isinstance(groups, TernaryGroups):
            return _ternary_ffn(f"layer.{i}.", groups)
        assert isinstance(groups, QuantGroups)
        inputs = QuantRows(*(_matrix_major(part) for part in (groups.q, groups.scale, groups.centre, groups.step)))
        levels: Bytes = unpack(groups.down, form.row.bits).transpose(2, 0, 1).reshape(m.hidden, m.neurons)  # [H, F]
        top = groups.down_step.astype(np.float32) * unit_steps(kind)[:, None]  # [g, 2, H / 32]
        top = top.repeat(BLOCK, axis=2)  # [g, 2, H]
        down_scale, down_centre = groups.down_scale * top[:, 0], groups.down_centre * top[:, 1]  # [g, H] each
        at = f"layer.{i}."
        down = _planes(f"{at}down", pack_bits(levels, form.row.bits), down_scale.T, down_centre.T, kind)
        return _planes(f"{at}inputs", inputs.q, *steps(inputs, kind), kind) | down | _input_biases(at, groups.bias)


def _input_biases(at: str, bias: Floats) -> Initialisers:
    return {f"{at}inputs.bias": _matrix_major(bias[..., None])[:, 0]} if bias.size else {}


def _ternary_ffn(at: str, groups: TernaryGroups) -> Initialisers:
    """As ResidentModel._ffn. The scales of down_proj's columns come apart: the activations are multiplied by them."""
    down = unpack(groups.down, 2).reshape(-1, groups.down.shape[-1] * 4).T  # [H, F]
    ones = np.ones((len(down), 1), np.float32)  # [H, 1]
    return {
        **_ternary_planes(f"{at}inputs", _matrix_major(groups.q), _matrix_major(groups.scale)),
        **_ternary_planes(f"{at}down", pack_bits(down, 2), ones),
        f"{at}down.columns": groups.down_scale.reshape(-1),
        **_input_biases(at, groups.bias),
    }


def _product_planes(name: str, rows: Rows, kind: RowKind) -> Initialisers:
    if isinstance(rows, TernaryRows):
        return _ternary_planes(name, rows.q, rows.scale)
    assert isinstance(rows, QuantRows)
    return _planes(name, rows.q, *steps(rows, kind), kind)


def _ternary_planes(name: str, q: Bytes, scale: Floats) -> Initialisers:
    """The initialisers of a product with ternary rows, written as nibbles. q [n, K / 4], scale [n, 1]."""
    nibbles = pack_bits(unpack(q, 2) + np.uint8(6), 4)  # [n, K / 2]; their zero is 8, not 2
    nibbles = nibbles.reshape(len(q), -1, BLOCK // 2)  # [n, K / 32, 16]
    return {f"{name}.q": nibbles, f"{name}.scale": scale.repeat(nibbles.shape[1], axis=1)}


def _matrix_major(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[g, 32, M, ...] -> [M * 32 g, ...]: all rows of one input matrix, then of the next."""
    return np.ascontiguousarray(np.moveaxis(part, 2, 0)).reshape(-1, part.shape[-1])


def _planes(name: str, q: Bytes, scale: Floats, centre: Floats, kind: RowKind) -> Initialisers:
    """The initialisers of a layer's product.

    Args:
        q: packed integers, [n, K * bits / 8].
        scale, centre: [n, K / 32].
        kind: int4 gives one plane of nibbles; int8 gives two, of the high and the low nibbles.
    """
    scale = np.ascontiguousarray(scale)
    planes: Initialisers
    if kind == "int4":
        planes = {f"{name}.q": q.reshape(*scale.shape, -1), f"{name}.scale": scale}
    else:
        high, low = (pack_bits(np.asarray(nibble, np.uint8), 4) for nibble in (q >> 4, q & 15))
        planes = {
            f"{name}.q.high": high.reshape(*scale.shape, -1), f"{name}.scale.high": 16 * scale,
            f"{name}.q.low": low.reshape(*scale.shape, -1), f"{name}.scale.low": scale,
        }  # fmt: skip
        # q - 128 = 16 (high - 8) + (low - 8) + 8
        centre = centre + 8 * scale
    return {**planes, f"{name}.centre": BLOCK * centre.T}
