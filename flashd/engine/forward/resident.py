"""The forward pass of a model that fits: constant graphs of whole layers. It reads nothing on the card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from flashd.bundle.arrays import Groups, Rows
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward import attention, products, stages
from flashd.engine.forward.constants import Constants
from flashd.engine.forward.head import Head
from flashd.engine.forward.head_rows import ConstantRows
from flashd.engine.model.branches import Branches
from flashd.engine.model.contract import CardStats, Finish, Guesses, Meanwhile, OnStep, Tokens, silent
from flashd.engine.model.kv_cache import SPARE, KvCache
from flashd.engine.model.sizes import NODES
from flashd.engine.planning.parts import WHOLE_TOKENS, layers_together
from flashd.engine.planning.plan import Plan
from flashd.graphs.in_place import graph
from flashd.system.freed_memory import give_back_freed_memory


@dataclass(frozen=True)
class _Bound:
    """A session of some layers with what goes in and out of it."""

    session: ort.InferenceSession
    binding: Any
    names: list[str]  # of its inputs
    layers: range
    with_states: list[int]  # those of its layers whose states are elsewhere in each pass


class ResidentModel:
    """A bundle held whole. Raises DamagedRun, CardError while loading."""

    def __init__(self, bundle: Bundle, plan: Plan, on_step: OnStep = silent) -> None:
        self._bundle, self._model = bundle, bundle.header.model
        products.use_threads(plan.threads)
        together = layers_together(bundle.header)
        self.cache = KvCache(self._model, plan.context, kv=plan.kv, together=together)
        self.card = CardStats()
        self.hit_rate = 1.0
        self.shares_reads = self.drafts = self.branches = False
        self.texts = 1
        self.nodes, self.pass_tokens = NODES, WHOLE_TOKENS
        fast, sparing = (Constants(bundle.header, kind, plan.kv) for kind in ("int8", "float32"))
        self._rotary = attention.Rotary(bundle, plan.context + SPARE)
        self._embed = stages.Embedder(bundle, fast if plan.int8_layers else sparing, self.card)
        self._logits = stages.Stage(graph(bundle.header, "logits")) if self._model.changes_logits else None
        self._vectors = stages.named(bundle.floats("vectors"), self._model.model_vectors())
        self._finish = stages.Finish(bundle, fast if plan.int8_layers else sparing, self._vectors)
        layers = self._model.layers
        self._bindings: list[_Bound] = []
        for some in _sessions(layers, plan.int8_layers, together):
            constants = fast if some.stop <= plan.int8_layers else sparing
            self._bindings.append(self._bound(constants.whole(some, [self._layer(i) for i in some]), some))
            on_step(some.stop, layers, 0)
        rows = ConstantRows(fast if plan.int8_head else sparing, self._model.hidden, doubled=not plan.int8_head)
        self._head = Head(bundle, rows, plan, None)
        give_back_freed_memory()

    def draft(self, tokens: Tokens, branches: Branches) -> Guesses:
        """Never asked for: nothing is cheaper than an exact pass here."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open but memory."""

    def use(self, cache: KvCache) -> None:
        """Goes on with another cache, which has another text. It is as long as the one before."""
        if cache is not self.cache:
            self.cache = cache
            for some in self._bindings:
                self._bind_keys(some.binding, some.layers)

    def likely(self, tokens: Tokens, on_step: OnStep = silent) -> Floats:
        """Logits [1, n] behind the last of `tokens` [T], of those n tokens whose rows of the head are in RAM.

        The KV cache keeps all T. Raises DamagedRun, CardError: the embedding's rows are read from the card.
        """
        parts = self._head.in_parts(self._passed(tokens, on_step)[-1:], silent, self._vectors.get("head.bias"))
        return np.concatenate([logits for _, _, logits in parts], axis=1)

    def forward(
        self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent, branches: Branches | None = None,
        meanwhile: Meanwhile = nullcontext, finish: Finish | None = None,  # noqa: ARG002
    ) -> Floats:  # fmt: skip
        """Logits [R, V] of the rows `wanted` [R] of a pass over `tokens` [T], which the KV cache keeps.

        Nothing is waited for, and so `meanwhile` is not called. Raises NotImplementedError for `branches`.
        """
        if branches:
            raise NotImplementedError
        logits = self._head(self._passed(tokens, on_step)[wanted], silent, finish=finish)
        return self._logits(self._vectors, x=logits)[0] if self._logits else logits

    def in_parts(self, tokens: Tokens, on_step: OnStep = silent) -> Iterator[tuple[slice, int, Floats]]:
        """As forward gives them behind each of `tokens` [T], those of some tokens of the vocabulary at a time."""
        yield from self._head.in_parts(self._passed(tokens, on_step), on_step, self._vectors.get("head.bias"))

    def _passed(self, tokens: Tokens, on_step: OnStep) -> Floats:
        """[T, H] behind the last norm. If `on_step` raises, the KV cache keeps none of the tokens."""
        past = self.cache.length
        try:
            x = self._through_layers(tokens, past, on_step)
        except BaseException:
            self.cache.truncate(past)
            raise
        self.cache.advance(len(tokens))
        return self._finish(x[0])

    def _through_layers(self, tokens: Tokens, past: int, on_step: OnStep) -> Floats:
        """[1, T, H] behind the last layer."""
        rows, said = self._embed(tokens, np.arange(past, past + len(tokens)))
        x = rows[None]  # [1, T, H]
        inputs = {f"token.{i}": each[None] for i, each in enumerate(said)}
        for some in self._bindings:
            some.binding.bind_cpu_input("x", x)
            for name in inputs.keys() & some.names:
                some.binding.bind_cpu_input(name, inputs[name])
            attention.bind_positions(some.binding, some.names, past, len(tokens), len(tokens))
            for i in some.with_states:
                attention.bind_kept(some.binding, self.cache.layer(i, len(tokens)), f".{i}")
            out = np.empty_like(x)
            some.binding.bind_ortvalue_output("x_out", ort.OrtValue.ortvalue_from_numpy(out))
            for i in some.layers:
                self.cache.widen(i, past)
            some.session.run_with_iobinding(some.binding)
            for i in some.layers:
                self.cache.take_in(i, past, len(tokens))
            x = out
            on_step(some.layers.stop, self._model.layers, 0)
        return x

    def _layer(self, i: int) -> tuple[list[Rows], dict[str, Floats], Groups | None]:
        at, bundle = f"layer.{i}.", self._bundle
        every = [*self._model.products(i), *self._model.products_behind()]
        products = [bundle.rows(f"{at}{product.name}") for product in every]
        return products, stages.vectors_of(bundle, i), bundle.all_groups(i) if self._model.layer_groups[i] else None

    def _bound(self, session: ort.InferenceSession, layers: range) -> _Bound:
        binding, names = session.io_binding(), stages.input_names(session)
        self._rotary.bind(names, binding)
        self._bind_keys(binding, layers)
        with_states = [i for i in layers if self._model.state_kind(i)]
        return _Bound(session, binding, names, layers, with_states)

    def _bind_keys(self, binding: Any, layers: range) -> None:
        """Gives a session the keys and values of its layers. What keeps a state finds all it keeps in each pass."""
        for i in layers:
            if self._model.state_kind(i) is None:
                attention.bind_kept(binding, self.cache.layer(i, 0), f".{i}")


def _sessions(layers: int, int8: int, together: int) -> list[range]:
    """The layers of each session, at most so many together; the first `int8` layers have sessions of their own."""
    parts = (range(0, int8), range(int8, layers))
    return [part[at : at + together] for part in parts for at in range(0, len(part), together)]
