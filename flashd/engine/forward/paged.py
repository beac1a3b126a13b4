"""The forward pass of a model that does not fit: some of it stays in RAM, and the rest comes from the card.

What every token needs (attention, the head's likely rows) stays. It is constant in mixtures and in models that
select neurons. In others it is as the card has it, like their FFNs. The FFNs, which page, see a whole chunk of tokens
at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np

from flashd.bundle.architecture import Architecture
from flashd.bundle.reader import Bundle
from flashd.bundle.rows.kinds import Floats
from flashd.engine.forward import attention, products, stages
from flashd.engine.forward.attention import Places
from flashd.engine.forward.attention_weights import AttentionWeights, ConstantAttention, UnpackedAttention
from flashd.engine.forward.constants import Constants
from flashd.engine.forward.ffn.experts import ExpertFfn, LeadingFfns, MixedFfn
from flashd.engine.forward.ffn.feed_forward import FeedForward
from flashd.engine.forward.ffn.selected import SelectedFfn
from flashd.engine.forward.ffn.streamed import StreamedFfn
from flashd.engine.forward.head import Head
from flashd.engine.forward.head_rows import ConstantRows
from flashd.engine.model import sizes
from flashd.engine.model.branches import Branches
from flashd.engine.model.contract import CardStats, Finish, Guesses, Meanwhile, OnStep, Tokens, silent
from flashd.engine.model.kv_cache import KvCache
from flashd.engine.model.sizes import NODES
from flashd.engine.planning.held import of_sessions
from flashd.engine.planning.parts import most_nodes, pass_tokens
from flashd.engine.planning.plan import Plan
from flashd.engine.planning.unpacked import streams
from flashd.graphs.in_place import graph
from flashd.system.freed_memory import give_back_freed_memory


def _feed_forward(bundle: Bundle, constants: Constants, plan: Plan) -> FeedForward:
    header = bundle.header
    if header.selection:
        return SelectedFfn(bundle, plan)
    if not header.model.experts:
        return StreamedFfn(bundle, plan)
    experts = ExpertFfn(bundle, constants, plan)
    leading = header.model.experts.leading
    if leading is None:
        return experts
    return MixedFfn(bundle, LeadingFfns(bundle, leading, plan.arithmetic), experts)


def _joined(parts: list[Floats]) -> Floats:
    """[T, ...] from the parts [n, ...] of its tokens."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class PagedModel:
    """The Model of a bundle that is larger than its memory budget. Close it when done.

    Args:
        bundle: an open bundle. The caller closes it.
        plan: what stays in RAM.
        on_step: is told how far loading has come.
        feed_forward: the FFNs to use in place of the bundle's own kind.

    Raises DamagedRun, CardError while it loads and while it runs.
    """

    def __init__(
        self, bundle: Bundle, plan: Plan, on_step: OnStep = silent, feed_forward: FeedForward | None = None
    ) -> None:
        self._bundle = bundle
        self._model: Architecture = bundle.header.model
        products.use_threads(plan.threads, shared=plan.all_constant)
        constants = Constants(bundle.header, of_sessions(bundle.header, plan.arithmetic), plan.kv)
        self._leave = stages.Leave(bundle, constants)
        self._logits = stages.Stage(graph(bundle.header, "logits")) if self._model.changes_logits else None
        self._vectors = stages.named(bundle.floats("vectors"), self._model.model_vectors())
        self._finish = stages.Finish(bundle, constants, self._vectors)
        self._ffn = feed_forward or _feed_forward(bundle, constants, plan)
        try:
            lend = self._ffn.lend
            self.cache = KvCache(self._model, plan.context, lend, plan.kv, texts=plan.texts, beside=plan.of_unused)
            self._attend = attention.Attention(bundle, self._attention_weights(constants, plan), plan.context)
            for i in range(self._model.layers):
                self._load_layer(i, on_step)
            self._head = self._opened_head(constants, plan)
            self._embed = stages.Embedder(bundle, constants, self._ffn.card, self._head.row)
        except BaseException:
            self.close()
            raise
        give_back_freed_memory()
        self.pass_tokens = pass_tokens(bundle.header)
        self.branches = not self._model.recurrent  # a state follows one line of tokens
        self.nodes = NODES
        if self.branches and self._head.streams:
            self.nodes = most_nodes(self._model, plan.head_rows)
        self.texts = plan.texts

    def close(self) -> None:
        self._ffn.close()

    @property
    def card(self) -> CardStats:
        return self._ffn.card

    @property
    def hit_rate(self) -> float:
        return self._ffn.hit_rate

    @property
    def shares_reads(self) -> bool:
        return self._ffn.shares_reads

    @property
    def drafts(self) -> bool:
        return self._ffn.drafts

    def forward(
        self, tokens: Tokens, wanted: Tokens, on_step: OnStep = silent, branches: Branches | None = None,
        meanwhile: Meanwhile = nullcontext, finish: Finish | None = None,
    ) -> Floats:  # fmt: skip
        """Logits [R, V] behind the tokens numbered `wanted` [R] of a pass over `tokens` [T]; the cache keeps all T.

        Without `branches` the tokens follow all that is in the cache. `meanwhile` may draft: when it is called all
        layers are done and the cache has the tokens. With `finish` only those rows of the R that it names come back.

        Raises CardError, DamagedRun. The cache is then as it was before.
        """
        with self._passed(tokens, branches, on_step) as x:
            return self._said(x[wanted], on_step, meanwhile, finish)

    def in_parts(self, tokens: Tokens, on_step: OnStep = silent) -> Iterator[tuple[slice, int, Floats]]:
        """Logits behind `tokens` [T], part by part: (which of them, first token of the vocabulary, logits [R, n]).

        A part takes no more memory than the logits of a pass that checks drafts. Raises CardError, DamagedRun.
        """
        with self._passed(tokens, None, on_step) as x:
            h = self._finish(x)
            yield from self._head.in_parts(h, on_step, self._vectors.get("head.bias"))

    def draft(self, tokens: Tokens, branches: Branches) -> Guesses:
        """Guesses at what follows each of `tokens` [T], made with the weights in RAM alone.

        `tokens` are the last of the tokens of `branches`. Those before them were drafted before and are in the KV
        cache. The cache counts drafted tokens as valid: have it go back before the next exact pass.
        """
        known = len(branches.parents) - len(tokens)
        places = Places.in_branches(self.cache.length - known, branches, known)
        self.cache.reserve(self.cache.length + len(tokens) + 1)
        x = self._pass(tokens, places, silent, exact=False)
        self.cache.advance(len(tokens), places.of_texts)
        # guesses do without a cap, which keeps the order of logits, and without a bias, which is as long as the head
        h = self._finish(x)
        return Guesses.of(self._head.of_likely(h, drafting=True), NODES if self.branches else 1)

    @contextmanager
    def _passed(self, tokens: Tokens, branches: Branches | None, on_step: OnStep) -> Iterator[Floats]:
        """Runs a pass and yields [T, H] behind the last layer.

        If the pass or the block breaks off, cache and FFNs are as they were before.
        """
        before = self.cache.place
        past = before.length
        self.cache.reserve(past + len(tokens) + 1)
        places = Places.in_branches(past, branches) if branches else Places.in_line(past, len(tokens))
        try:
            x = self._pass(tokens, places, on_step)
            self.cache.advance(len(tokens), places.of_texts)
            yield x
        except BaseException:
            # the next pass starts at the first layer, at whichever layer this one broke off
            self._ffn.restart()
            self.cache.go_back(before)
            raise

    def _pass(self, tokens: Tokens, places: Places, on_step: OnStep, exact: bool = True) -> Floats:
        """[T, H] behind the last layer."""
        x, said = self._embed(tokens, places.positions[0, : len(tokens)])
        parts = places.parts(sizes.TOKENS_ATTENDING)
        of_texts = places.by_text(sizes.TOKENS_ATTENDING) if self._model.recurrent else parts
        for i in range(self._model.layers):
            if exact:
                self._ffn.enter(i, x)
            attending = of_texts if self._model.state_kind(i) else parts
            done = [self._attend(i, x[part], some, self.cache, drafting=not exact) for part, some in attending]
            x, h = _joined([x for x, _ in done]), _joined([h for _, h in done])
            y = self._ffn(i, h, on_step) if exact else self._ffn.from_ram(i, h)
            x = _joined([self._leave(i, x[part], y[part], said[i, part]) for part, _ in parts])
            on_step(i + 1, self._model.layers, self.card.bytes_read)
        return x

    def _said(self, x: Floats, on_step: OnStep, meanwhile: Meanwhile, finish: Finish | None) -> Floats:
        """Logits [R, V] of x [R, H] behind the last layer, or of those rows that `finish` names."""
        h = self._finish(x)
        logits = self._head(h, on_step, meanwhile, finish)
        return self._logits(self._vectors, x=logits)[0] if self._logits else logits

    def _attention_weights(self, constants: Constants, plan: Plan) -> AttentionWeights:
        if streams(self._bundle.header):
            return UnpackedAttention(self._bundle, plan.arithmetic, plan.kv)
        return ConstantAttention(self._bundle, constants)

    def _opened_head(self, constants: Constants, plan: Plan) -> Head:
        if isinstance(self._ffn, StreamedFfn):
            return Head(self._bundle, self._ffn.head_rows, plan, self._ffn.stream)
        return Head(self._bundle, ConstantRows(constants, self._model.hidden, doubled=True), plan, None)

    def _load_layer(self, i: int, on_step: OnStep) -> None:
        self._attend.load(i)
        self._leave.load(i)
        self._ffn.load(i)
        on_step(i + 1, self._model.layers, 0)
